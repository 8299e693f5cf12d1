"""The LLDS penalty against a loop over responses and tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.trainers.nthr.llds import llds_penalty


def by_definition(logps, old_logps, advantages, mask):
    total = 0.0
    for now, before, advantage, counted in zip(logps, old_logps, advantages, mask, strict=True):
        falls = [b - n for n, b, c in zip(now.tolist(), before.tolist(), counted.tolist(), strict=True) if c]
        if advantage >= 0 and sum(falls) > 0:
            total += sum(max(0.0, fall) for fall in falls) / len(falls)
    return total / len(logps)


def draw(b, t, seed):
    generator = torch.Generator().manual_seed(seed)
    logps, old = (-torch.rand(b, t, generator=generator, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(b, generator=generator, dtype=torch.float64)
    advantages[::3] = 0.0
    mask = torch.rand(b, t, generator=generator) < 0.7
    return logps, old, advantages, mask


@given(st.integers(1, 6), st.integers(0, 6), st.integers(0, 1000), st.sampled_from([torch.bool, torch.int64]))
@settings(max_examples=60, deadline=None)
def test_the_penalty_is_the_papers_sum(b, t, seed, dtype):
    logps, old, advantages, mask = draw(b, t, seed)
    found = llds_penalty(logps, old, advantages, mask.to(dtype))
    assert found.shape == ()
    assert found.item() == pytest.approx(by_definition(logps, old, advantages, mask), rel=1e-10, abs=1e-15)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_its_gradient_lifts_the_fallen_tokens_of_fallen_responses(b, t, seed):
    logps, old, advantages, mask = draw(b, t, seed)
    logps.requires_grad_()
    llds_penalty(logps, old, advantages, mask).backward()
    expected = torch.zeros(b, t, dtype=torch.float64)
    for i in range(b):
        fall = (old[i] - logps[i].detach()) * mask[i]
        if advantages[i] >= 0 and fall.sum() > 0:
            expected[i] = -((fall > 0) & mask[i]).double() / int(mask[i].sum()) / b
    torch.testing.assert_close(logps.grad, expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("shift", [0.0, 0.25], ids=["equal", "risen"])
def test_nothing_is_asked_of_weights_at_which_nothing_fell(shift):
    _, old, advantages, mask = draw(5, 4, 0)
    logps = (old + shift).requires_grad_()
    penalty = llds_penalty(logps, old, advantages, mask)
    penalty.backward()
    assert penalty.item() == 0.0
    assert not logps.grad.any()


def test_a_response_whose_total_rose_contributes_nothing_though_one_token_fell():
    old = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])
    logps = torch.tensor([[-1.5, -0.25], [-1.5, -0.75]], requires_grad=True)
    penalty = llds_penalty(logps, old, torch.ones(2), torch.ones(2, 2))
    penalty.backward()
    assert penalty.item() == pytest.approx(0.5 / 2 / 2)
    assert logps.grad.tolist() == [[0.0, 0.0], [-0.25, 0.0]]


def test_a_response_whose_total_stayed_contributes_nothing():
    old, logps = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -0.5]], requires_grad=True)
    penalty = llds_penalty(logps, old, torch.ones(1), torch.ones(1, 2))
    penalty.backward()
    assert penalty.item() == 0.0
    assert not logps.grad.any()


@pytest.mark.parametrize(("advantage", "counts"), [(1.0, True), (0.0, True), (-0.0, True), (-1e-6, False)])
def test_only_responses_without_a_penalty_are_kept(advantage, counts):
    old, logps = torch.zeros(1, 2), torch.full((1, 2), -1.0)
    found = llds_penalty(logps, old, torch.tensor([advantage]), torch.ones(1, 2))
    assert found.item() == float(counts)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_advantages_of_tokens_count_as_those_of_their_response(b, t, seed):
    logps, old, advantages, mask = draw(b, t, seed)
    by_token = advantages[:, None].expand(b, t).clone()
    by_token[~mask] = -7.0  # padding has no say
    kept = advantages.masked_fill(~mask.any(dim=1), 1.0)
    expected = llds_penalty(logps, old, kept, mask)
    assert llds_penalty(logps, old, by_token, mask).item() == expected.item()


def test_one_negative_token_takes_its_response_out():
    old, logps, mask = torch.zeros(2, 3), torch.full((2, 3), -1.0), torch.ones(2, 3)
    advantages = torch.tensor([[1.0, -0.1, 1.0], [1.0, 0.0, 1.0]])
    assert llds_penalty(logps, old, advantages, mask).item() == 0.5


def test_empty_masks_count_as_responses_but_not_as_falls():
    old, logps = torch.zeros(2, 3), torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.tensor([[0, 0, 0], [1, 1, 0]])
    assert llds_penalty(logps, old, torch.ones(2), mask).item() == 0.5
    penalty = llds_penalty(logps, old, torch.ones(2), torch.zeros(2, 3))
    penalty.backward()
    assert penalty.item() == 0.0
    assert not logps.grad.any()


@pytest.mark.parametrize("garbage", [5.0, -math.inf, math.nan])
def test_what_lies_outside_the_mask_is_never_seen(garbage):
    old, mask = torch.zeros(2, 3), torch.tensor([[True, False, True], [False, True, True]])
    logps, advantages = torch.full((2, 3), -1.0), torch.ones(2)
    expected = llds_penalty(logps, old, advantages, mask)
    assert expected == 1
    for both in (True, False):
        spoilt = torch.where(mask, logps, garbage).requires_grad_()
        found = llds_penalty(spoilt, torch.where(mask, old, garbage) if both else old, advantages, mask)
        found.backward()
        assert found.item() == expected.item()
        assert not spoilt.grad[~mask].any()


def test_the_old_log_probs_get_no_gradient():
    logps, old, advantages, mask = draw(4, 5, 3)
    old.requires_grad_()
    llds_penalty(logps.requires_grad_(), old, advantages, mask).backward()
    assert old.grad is None
    assert logps.grad.any()
