"""The pseudo-NTK against whole Jacobians, and what it can and cannot see."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llm_dynamics.kernel.pseudo import centred_direction, pseudo_kernel, pseudo_token_kernel
from tests.kernel.whole_jacobians import (
    SMALL_VOCAB,
    blocks,
    build_small,
    draw_responses,
    flat_gradient,
    labels_of,
    logits_at_responses,
)
from tests.likelihood.models import build, without_float32_casts

EXACT = {"atol": 1e-11, "rtol": 1e-10}
PROBES = draw_responses([2, 3], seed=1)
TRAINS = draw_responses([4], seed=2)


@pytest.fixture(autouse=True)
def all_in_float64():
    with without_float32_casts():
        yield


@pytest.fixture(scope="module")
def kernel_blocks():
    with without_float32_casts():
        return {tied: blocks(build_small(tied=tied), PROBES, TRAINS) for tied in (False, True)}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def shift_head(model, seed=5):
    """Add one vector to all rows of the head: every logit moves by the same amount, no log-prob moves."""
    with torch.no_grad():
        model.lm_head.weight += 3 * torch.randn(8, generator=seeded(seed), dtype=torch.float64)


@pytest.mark.parametrize("vocab_size", [2, 13, 400])
def test_the_direction_is_a_unit_vector_that_ones_cannot_see(vocab_size):
    v = centred_direction(vocab_size, seeded(0))
    assert v.sum().item() == pytest.approx(0, abs=1e-12)
    assert v.norm().item() == pytest.approx(1, rel=1e-12)
    assert not torch.equal(v, centred_direction(vocab_size, seeded(1))) or vocab_size == 2


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_the_quadratic_form_of_the_block_in_the_direction(kernel_blocks, tied):
    kappa = pseudo_kernel(build_small(tied=tied), PROBES, TRAINS, generator=seeded(3))
    v = centred_direction(SMALL_VOCAB, seeded(3))
    torch.testing.assert_close(kappa, torch.einsum("v,mlvw,w->ml", v, kernel_blocks[tied], v), **EXACT)


def test_the_sides_can_be_exchanged(kernel_blocks):
    there = pseudo_kernel(build_small(), PROBES, TRAINS, generator=seeded(3))
    back = pseudo_kernel(build_small(), TRAINS, PROBES, generator=seeded(3))
    torch.testing.assert_close(back, there.T, **EXACT)


def test_draws_average_to_the_nearest_multiple_of_the_centring_matrix(kernel_blocks):
    c = torch.eye(SMALL_VOCAB, dtype=torch.float64) - 1 / SMALL_VOCAB
    visible = c @ kernel_blocks[False] @ c
    expected = visible.diagonal(dim1=2, dim2=3).sum(-1) / (SMALL_VOCAB - 1)
    nearest = torch.linalg.lstsq(c.flatten()[:, None], visible.reshape(-1, SMALL_VOCAB**2).T)
    torch.testing.assert_close(nearest.solution[0].reshape(expected.shape), expected, **EXACT)

    generator = seeded(0)
    directions = torch.stack([centred_direction(SMALL_VOCAB, generator) for _ in range(4000)])
    samples = torch.einsum("rv,mlvw,rw->rml", directions, kernel_blocks[False], directions)
    error = samples.std(0) / 4000**0.5
    assert ((samples.mean(0) - expected).abs() < 4.5 * error).all()
    kappa = pseudo_kernel(build_small(), PROBES, TRAINS, draws=6, generator=seeded(0))
    torch.testing.assert_close(kappa, samples[:6].mean(0), **EXACT)


def test_shifting_all_rows_of_the_head_moves_the_sum_of_logits_and_not_the_centred_kernel():
    plain, shifted = build_small(), build_small()
    shift_head(shifted)
    with torch.no_grad():
        before, after = (logits_at_responses(m, PROBES) for m in (plain, shifted))
    torch.testing.assert_close(after.log_softmax(-1), before.log_softmax(-1), **EXACT)
    assert not torch.allclose(after, before)

    gradients = []  # log-probs move under training as before
    for model in (plain, shifted):
        logp = logits_at_responses(model, PROBES).log_softmax(-1).gather(1, labels_of(PROBES)[:, None])[:, 0]
        gradients.append(torch.stack([flat_gradient(entry, list(model.parameters())) for entry in logp]))
    torch.testing.assert_close(gradients[1], gradients[0], **EXACT)

    centred = [pseudo_kernel(m, PROBES, TRAINS, draws=2) for m in (plain, shifted)]
    torch.testing.assert_close(centred[1], centred[0], **EXACT)
    tokens = [pseudo_token_kernel(m, PROBES, TRAINS) for m in (plain, shifted)]
    torch.testing.assert_close(tokens[1], tokens[0], **EXACT)
    for output in ("sum", "first"):
        with pytest.warns(UserWarning, match=r'changes.*output="centred"'):
            moved = [pseudo_kernel(m, PROBES, TRAINS, output=output) for m in (plain, shifted)]
        assert (moved[1] - moved[0]).norm() > moved[0].norm(), output


def test_the_warned_outputs_are_what_they_say(kernel_blocks):
    with pytest.warns(UserWarning, match="sum of logits is the direction that log-probs cannot see"):
        total = pseudo_kernel(build_small(), PROBES, TRAINS, output="sum")
    torch.testing.assert_close(total, kernel_blocks[False].sum((2, 3)) / SMALL_VOCAB, **EXACT)
    with pytest.warns(UserWarning, match="first logit"):
        first = pseudo_kernel(build_small(), PROBES, TRAINS, output="first")
    torch.testing.assert_close(first, kernel_blocks[False][:, :, 0, 0], **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pseudo_kernel(build_small(), PROBES[:1], TRAINS)


def test_the_token_kernel_is_exact_where_the_block_is_a_multiple_of_the_identity():
    """With the head alone trained, K = (h . h') I, and the pseudo token kernel is the token kernel."""
    model = build_small()
    weights = {"lm_head.weight": model.lm_head.weight}
    pseudo = pseudo_token_kernel(model, PROBES, TRAINS, weights=weights)
    gradients = []
    for responses in (PROBES, TRAINS):
        logp = logits_at_responses(model, responses).log_softmax(-1).gather(1, labels_of(responses)[:, None])[:, 0]
        gradients.append(torch.stack([flat_gradient(entry, [model.lm_head.weight]) for entry in logp]))
    torch.testing.assert_close(pseudo, gradients[0] @ gradients[1].T, **EXACT)


def test_adapters_alone_are_differentiated_and_the_model_is_left_as_it_was():
    model = build_small()
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.3)
    adapted = get_peft_model(model, config).double().train()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    random_state = torch.get_rng_state()
    kappa = pseudo_kernel(adapted, PROBES, TRAINS, generator=seeded(3))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    assert all(parameter.grad is None for parameter in adapted.parameters())
    assert adapted.training

    adapters = [p for p in adapted.parameters() if p.requires_grad]
    v = centred_direction(SMALL_VOCAB, seeded(3))
    expected = torch.einsum("v,mlvw,w->ml", v, blocks(adapted.eval(), PROBES, TRAINS, adapters), v)
    torch.testing.assert_close(kappa, expected, **EXACT)


def test_a_soft_capped_model_is_differentiated_through_its_cap():
    model = build("gemma2_soft_capped")
    probes, trains = draw_responses([2], seed=1), draw_responses([2], seed=2)
    kappa = pseudo_kernel(model, probes, trains, generator=seeded(3))
    v = centred_direction(model.config.vocab_size, seeded(3)).float()
    sides = []
    for responses in (probes, trains):
        outputs = logits_at_responses(model, responses) @ v
        sides.append(torch.stack([flat_gradient(entry, list(model.parameters())) for entry in outputs]))
    torch.testing.assert_close(kappa, sides[0] @ sides[1].T, atol=1e-5, rtol=1e-3)


def test_bad_input_is_refused_by_name():
    model = build_small()
    with pytest.raises(ValueError, match="output is 'mean'"):
        pseudo_kernel(model, PROBES, TRAINS, output="mean")
    with pytest.raises(ValueError, match="draws must be at least 1"):
        pseudo_kernel(model, PROBES, TRAINS, draws=0)
    with pytest.raises(ValueError, match="seen 2 for 'sum'"):
        pseudo_kernel(model, PROBES, TRAINS, output="sum", draws=2)
    with pytest.raises(ValueError, match="at least 2 logits; seen 1"):
        centred_direction(1, seeded(0))
    with pytest.raises(ValueError, match="no parameter of LlamaForCausalLM requires a gradient"):
        pseudo_kernel(model.requires_grad_(False), PROBES, TRAINS)
