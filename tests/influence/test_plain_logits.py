"""Coefficients out of the gradient of logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from llm_dynamics.influence.plain_logits import coefficients_from_logits, gradient_of_logits, residual_of

SIZES = {"B": st.integers(1, 3), "T": st.integers(1, 5), "V": st.integers(2, 9)}


def draw(B, T, V, seed, scale, shifted=True):
    """Logits (B, T, V), coefficients and labels (B, S), some of which are none."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    S = T if shifted else T - 1
    labels = torch.randint(0, V, (B, S), generator=generator)
    labels[torch.rand(B, S, generator=generator) < 0.3] = -100
    c = torch.randn(B, S, generator=generator, dtype=torch.float64).masked_fill(labels == -100, 0)
    return logits, c, labels


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([0.0, 1.0, 10.0]), shifted=st.booleans(), **SIZES)
def test_a_loss_of_the_label_log_probs_gives_its_coefficients_back(B, T, V, seed, scale, shifted):
    logits, c, labels = draw(B, T, V, seed, scale, shifted)
    gradient = gradient_of_logits(logits, c, labels)
    assert gradient.shape == logits.shape
    logps, recovered = coefficients_from_logits(logits, gradient, labels)
    torch.testing.assert_close(recovered, c, rtol=1e-9, atol=0)
    picked = logits[:, : labels.shape[1]].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(logps, picked.masked_fill(labels == -100, 0), rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), **SIZES)
def test_the_gradient_of_logits_is_autograds(B, T, V, seed):
    logits, c, labels = draw(B, T, V, seed, 2.0)
    free = logits.clone().requires_grad_()
    logp = free.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    (expected,) = torch.autograd.grad((c * logp).sum(), free)
    torch.testing.assert_close(gradient_of_logits(logits, c, labels), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gap", [1e-3, 1e-12, 1e-100])
def test_a_label_that_is_all_but_certain_gives_its_coefficient_back(gap):
    """1 - pi(y) is summed from the other tokens, so nothing cancels, and the residual's own gradient has it all."""
    logits = torch.tensor([[[0.0, 1.0, 0.5]]], dtype=torch.float64)
    logits[..., 0] = -torch.tensor(gap, dtype=torch.float64).log() + logits[..., 1:].logsumexp(-1)
    labels, c = torch.tensor([[0]]), torch.tensor([[-0.7]], dtype=torch.float64)
    assert 1 - logits.softmax(-1)[0, 0, 0] == pytest.approx(gap, rel=1e-2, abs=1e-15)
    _, recovered = coefficients_from_logits(logits, gradient_of_logits(logits, c, labels), labels)
    torch.testing.assert_close(recovered, c, rtol=1e-9, atol=0)


def test_a_certain_label_has_no_coefficient():
    """Where pi(y) is one to the last bit, and all others zero, the loss asks for nothing that the logits could give."""
    logits = torch.tensor([[[2000.0, 0.0, 1.0]]], dtype=torch.float64)
    labels, c = torch.tensor([[0]]), torch.tensor([[-0.7]], dtype=torch.float64)
    gradient = gradient_of_logits(logits, c, labels)
    assert not gradient.any()
    logps, recovered = coefficients_from_logits(logits, gradient, labels)
    assert not recovered.any()
    assert not logps.any()


def test_the_part_of_a_token_whose_coefficient_is_lost_to_rounding_is_its_gradient_still():
    """With 1 - pi(y) below float32's eps autograd's softmax gradient has lost the label's own entry.

    c then comes out too small (here: by one half), but what is attributed to the token, c (e_y - pi), is the nearest
    there is to the gradient that the loss really sent, which is that small itself.
    """
    logits = torch.tensor([[[20.0, 0.0]]], requires_grad=True)
    labels = torch.tensor([[0]])
    (gradient,) = torch.autograd.grad(cross_entropy(logits[0], labels[0]), logits)
    assert gradient[0, 0, 0] == 0
    assert gradient[0, 0, 1] > 0
    _, c = coefficients_from_logits(logits.detach(), gradient, labels)
    assert c.item() == pytest.approx(-0.5, rel=1e-3)
    missed = gradient - gradient_of_logits(logits.detach(), c, labels)
    assert missed.norm() < gradient.norm() < 1e-8


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), **SIZES)
def test_what_is_no_label_log_prob_is_no_part_of_the_coefficient(B, T, V, seed):
    """The remaining residual is orthogonal to the label's: c is its least-squares coefficient."""
    logits, _, labels = draw(B, T, V, seed, 1.0)
    gradient = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, c = coefficients_from_logits(logits, gradient, labels)
    rest = gradient - gradient_of_logits(logits, c, labels)
    for b, s in (labels != -100).nonzero().tolist():
        residual = residual_of(logits[b, s][None], labels[b, s][None])[0]
        assert abs(float(rest[b, s] @ residual)) <= 1e-9
    assert not c[labels == -100].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_worked_on_in_float32(dtype):
    logits, c, labels = draw(2, 4, 7, 0, 2.0)
    gradient = gradient_of_logits(logits, c, labels)
    logps, recovered = coefficients_from_logits(logits.to(dtype), gradient.to(dtype), labels)
    assert logps.dtype == recovered.dtype == torch.float32
    assert gradient_of_logits(logits.to(dtype), c, labels).dtype == dtype
    torch.testing.assert_close(recovered.double(), c, rtol=20 * torch.finfo(dtype).eps, atol=0)


def test_more_rows_than_one_block_of_work():
    logits, c, labels = draw(3, 400, 5, 1, 1.0)
    _, recovered = coefficients_from_logits(logits, gradient_of_logits(logits, c, labels), labels)
    torch.testing.assert_close(recovered, c, rtol=1e-9, atol=0)
