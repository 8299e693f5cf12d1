"""The LLDS penalty against a loop over responses and tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.trainers.nthr.llds import llds_penalty


def penalty_of(logps, old_logps, advantages, mask):
    """The penalty of a batch that is a whole generation."""
    return llds_penalty(logps, old_logps, advantages, mask, (advantages >= 0).to(logps.dtype).mean())


def actions(falls, counted):
    """What each run of counted tokens fell."""
    runs = [[]]
    for fall, counts in zip(falls, counted, strict=True):
        if counts:
            runs[-1].append(fall)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def by_definition(logps, old_logps, advantages, mask):
    """The paper's formula: a mean over the responses worth keeping, gated action by action."""
    preserved = [i for i, advantage in enumerate(advantages.tolist()) if advantage >= 0]
    total = 0.0
    for i in preserved:
        length = int(mask[i].sum())
        for action in actions((old_logps[i] - logps[i]).tolist(), mask[i].tolist()):
            if sum(action) > 0:
                total += sum(max(0.0, fall) for fall in action) / length
    return total / max(1, len(preserved))


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
    found = penalty_of(logps, old, advantages, mask.to(dtype))
    assert found.shape == ()
    assert found.item() == pytest.approx(by_definition(logps, old, advantages, mask), rel=1e-10, abs=1e-15)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_its_gradient_lifts_the_fallen_tokens_of_fallen_actions(b, t, seed):
    logps, old, advantages, mask = draw(b, t, seed)
    logps.requires_grad_()
    penalty_of(logps, old, advantages, mask).backward()
    expected = torch.zeros(b, t, dtype=torch.float64)
    n_kept = int((advantages >= 0).sum())
    for i in range(b):
        fall = (old[i] - logps[i].detach()) * mask[i]
        for first in range(t):
            if not mask[i, first] or (first > 0 and mask[i, first - 1]):
                continue
            stop = next((k for k in range(first, t) if not mask[i, k]), t)
            if advantages[i] >= 0 and fall[first:stop].sum() > 0:
                expected[i, first:stop] = -(fall[first:stop] > 0).double() / int(mask[i].sum()) / n_kept
    torch.testing.assert_close(logps.grad, expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_micro_batches_of_a_generation_add_up_to_its_penalty(parts):
    logps, old, advantages, mask = draw(6, 5, 1)
    share = (advantages >= 0).double().mean()
    assert 0 < share < 1
    chunks = zip(*(whole.chunk(parts) for whole in (logps, old, advantages, mask)), strict=True)
    found = sum(llds_penalty(*chunk, share) for chunk in chunks) / parts
    assert found.item() == pytest.approx(by_definition(logps, old, advantages, mask), rel=1e-10)


@pytest.mark.parametrize("wrong", [0, 1, 7])
def test_responses_that_are_not_kept_do_not_dilute_it(wrong):
    old, logps = torch.zeros(2 + wrong, 2), torch.full((2 + wrong, 2), -0.25)
    advantages = torch.tensor([1.0, 0.0] + [-1.0] * wrong)
    assert penalty_of(logps, old, advantages, torch.ones(2 + wrong, 2)).item() == 0.25


def test_a_turn_that_rose_does_not_hide_one_that_fell():
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    old, logps = torch.zeros(1, 5), torch.tensor([[-0.5, -0.25, -9.0, 2.0, -1.0]], requires_grad=True)
    penalty = penalty_of(logps, old, torch.ones(1), mask)
    penalty.backward()
    assert penalty.item() == pytest.approx(0.75 / 4)
    assert logps.grad.tolist() == [[-0.25, -0.25, 0.0, 0.0, 0.0]]


def test_where_nothing_is_kept_there_is_nothing_to_pay():
    logps = torch.full((2, 2), -1.0, requires_grad=True)
    penalty = penalty_of(logps, torch.zeros(2, 2), torch.tensor([-1.0, -1.0]), torch.ones(2, 2))
    penalty.backward()
    assert penalty.item() == 0.0
    assert not logps.grad.any()


@pytest.mark.parametrize("shift", [0.0, 0.25], ids=["equal", "risen"])
def test_nothing_is_asked_of_weights_at_which_nothing_fell(shift):
    _, old, advantages, mask = draw(5, 4, 0)
    logps = (old + shift).requires_grad_()
    penalty = penalty_of(logps, old, advantages, mask)
    penalty.backward()
    assert penalty.item() == 0.0
    assert not logps.grad.any()


def test_a_response_whose_total_rose_contributes_nothing_though_one_token_fell():
    old = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])
    logps = torch.tensor([[-1.5, -0.25], [-1.5, -0.75]], requires_grad=True)
    penalty = penalty_of(logps, old, torch.ones(2), torch.ones(2, 2))
    penalty.backward()
    assert penalty.item() == pytest.approx(0.5 / 2 / 2)
    assert logps.grad.tolist() == [[0.0, 0.0], [-0.25, 0.0]]


def test_a_response_whose_total_stayed_contributes_nothing():
    old, logps = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -0.5]], requires_grad=True)
    penalty = penalty_of(logps, old, torch.ones(1), torch.ones(1, 2))
    penalty.backward()
    assert penalty.item() == 0.0
    assert not logps.grad.any()


@pytest.mark.parametrize(("advantage", "counts"), [(1.0, True), (0.0, True), (-0.0, True), (-1e-6, False)])
def test_only_responses_without_a_penalty_are_kept(advantage, counts):
    old, logps = torch.zeros(1, 2), torch.full((1, 2), -1.0)
    found = penalty_of(logps, old, torch.tensor([advantage]), torch.ones(1, 2))
    assert found.item() == float(counts)


def test_empty_masks_count_as_responses_but_not_as_falls():
    old, logps = torch.zeros(2, 3), torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.tensor([[0, 0, 0], [1, 1, 0]])
    assert penalty_of(logps, old, torch.ones(2), mask).item() == 0.5
    penalty = penalty_of(logps, old, torch.ones(2), torch.zeros(2, 3))
    penalty.backward()
    assert penalty.item() == 0.0
    assert not logps.grad.any()


@pytest.mark.parametrize("garbage", [5.0, -math.inf, math.nan])
def test_what_lies_outside_the_mask_is_never_seen(garbage):
    old, mask = torch.zeros(2, 3), torch.tensor([[True, False, True], [False, True, True]])
    logps, advantages = torch.full((2, 3), -1.0), torch.ones(2)
    expected = penalty_of(logps, old, advantages, mask)
    assert expected == 1
    for both in (True, False):
        spoilt = torch.where(mask, logps, garbage).requires_grad_()
        found = penalty_of(spoilt, torch.where(mask, old, garbage) if both else old, advantages, mask)
        found.backward()
        assert found.item() == expected.item()
        assert not spoilt.grad[~mask].any()


def test_the_old_log_probs_get_no_gradient():
    logps, old, advantages, mask = draw(4, 5, 3)
    old.requires_grad_()
    penalty_of(logps.requires_grad_(), old, advantages, mask).backward()
    assert old.grad is None
    assert logps.grad.any()
