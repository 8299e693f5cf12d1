"""What each method makes of advantages, against loops over responses and tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.trainers.nthr import advantages as shape

NUMBERS = st.floats(-4, 4, width=32)


@st.composite
def batches(draw):
    """B responses of T tokens: advantages, scores with NaN, thresholds with NaN and infinities, masks."""
    b, t = draw(st.integers(1, 5)), draw(st.integers(0, 6))

    def rows(values, *sizes):
        if not sizes:
            return draw(values)
        return [rows(values, *sizes[1:]) for _ in range(sizes[0])]

    edges = st.sampled_from([math.inf, -math.inf, math.nan, 0.0])
    return {
        "advantages": torch.tensor(rows(NUMBERS, b)),
        "scores": torch.tensor(rows(NUMBERS | st.just(math.nan), b, t)).view(b, t),
        "thresholds": torch.tensor(rows(NUMBERS | edges, b)),
        "etas": torch.tensor(rows(NUMBERS | st.just(math.nan), b)),
        "tokens": torch.tensor(rows(st.booleans(), b, t), dtype=torch.bool).view(b, t),
        "correct": torch.tensor(rows(st.booleans(), b), dtype=torch.bool),
        "known": torch.tensor(rows(st.booleans(), b), dtype=torch.bool),
    }


def loop(batch, rule):
    """(B, T) of rule(i, k), in Python numbers."""
    b, t = batch["scores"].shape
    values = [[rule(i, k) for k in range(t)] for i in range(b)]
    return torch.tensor(values, dtype=torch.float32).view(b, t)


def numbers(batch, *names):
    return [batch[name].tolist() for name in names]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)


@given(batches())
@settings(max_examples=50, deadline=None)
def test_every_token_gets_its_responses_advantage(batch):
    (a,) = numbers(batch, "advantages")
    before = batch["advantages"].clone()
    found = shape.by_token(batch["advantages"], batch["scores"].shape[1])
    assert_same(found, loop(batch, lambda i, k: a[i]))
    found += 1  # it is no view
    assert torch.equal(batch["advantages"], before)


@given(batches())
@settings(max_examples=100, deadline=None)
def test_selected_are_penalised_candidates_above_their_threshold(batch):
    a, s, tau, candidate = numbers(batch, "advantages", "scores", "thresholds", "tokens")
    found = shape.selected_tokens(batch["advantages"], batch["scores"], batch["thresholds"], batch["tokens"])
    assert found.dtype == torch.bool
    expected = loop(batch, lambda i, k: candidate[i][k] and a[i] < 0 and s[i][k] > tau[i])
    assert torch.equal(found, expected.bool())


def test_a_score_at_the_threshold_is_not_above_it():
    found = shape.selected_tokens(
        torch.tensor([-1.0]), torch.tensor([[0.5, 0.50001]]), torch.tensor([0.5]), torch.ones(1, 2, dtype=torch.bool)
    )
    assert found.tolist() == [[False, True]]


@pytest.mark.parametrize(("threshold", "selected"), [(-math.inf, True), (math.inf, False), (math.nan, False)])
def test_infinite_thresholds_select_all_or_none(threshold, selected):
    scores = torch.tensor([[-1e30, 0.0, 1e30]])
    candidates = torch.tensor([[True, True, True]])
    found = shape.selected_tokens(torch.tensor([-1.0]), scores, torch.tensor([threshold]), candidates)
    assert found.tolist() == [[selected] * 3]


@pytest.mark.parametrize("advantage", [0.0, -0.0, 0.3])
def test_a_wrong_response_without_a_penalty_is_not_selected(advantage):
    found = shape.selected_tokens(
        torch.tensor([advantage]), torch.ones(1, 2), torch.tensor([-math.inf]), torch.ones(1, 2, dtype=torch.bool)
    )
    assert not found.any()


@given(batches())
@settings(max_examples=50, deadline=None)
def test_selected_tokens_advantage_is_multiplied_with_eta(batch):
    a, eta, selected = numbers(batch, "advantages", "etas", "tokens")
    found = shape.downweighted(batch["advantages"], batch["tokens"], batch["etas"])
    assert_same(found, loop(batch, lambda i, k: eta[i] * a[i] if selected[i][k] else a[i]))


@given(batches(), st.sampled_from([-1.5, -0.1, 0.0, 0.1, 1.0]))
@settings(max_examples=100, deadline=None)
def test_thr_keeps_and_reweights_tokens_by_their_hidden_reward(batch, q):
    a, s, tau, correct, mixed = numbers(batch, "advantages", "scores", "thresholds", "correct", "tokens")

    def reward(i, k):
        return (2 * correct[i] - 1) * s[i][k]

    def rule(i, k):
        if not mixed[i][k]:
            return a[i]
        r = reward(i, k)
        if math.isnan(r):
            return math.nan
        return (abs(r) > tau[i]) * (1 + ((r > 0) - (r < 0)) * q) * a[i]

    batch["scores"] = torch.where(batch["tokens"], batch["scores"].nan_to_num(), batch["scores"])  # mixed are scored
    s = batch["scores"].tolist()
    shaped, rewards = shape.thr(
        *(batch[name] for name in ("advantages", "scores", "thresholds", "correct", "tokens")), q
    )
    assert_same(shaped, loop(batch, rule))
    assert_same(rewards, loop(batch, reward))


def test_thr_of_either_sign_of_q():
    advantages, correct = torch.tensor([1.0, -1.0]), torch.tensor([True, False])
    scores, mixed = torch.tensor([[3.0, -3.0, 1.0]] * 2), torch.ones(2, 3, dtype=torch.bool)
    exploit, _ = shape.thr(advantages, scores, torch.tensor([2.0, 2.0]), correct, mixed, 0.5)
    assert exploit.tolist() == [[1.5, 0.5, 0.0], [-0.5, -1.5, 0.0]]
    explore, _ = shape.thr(advantages, scores, torch.tensor([2.0, 2.0]), correct, mixed, -0.5)
    assert explore.tolist() == [[0.5, 1.5, 0.0], [-1.5, -0.5, 0.0]]


@given(batches())
@settings(max_examples=50, deadline=None)
def test_pos_only_drops_penalties(batch):
    (a,) = numbers(batch, "advantages")
    found = shape.pos_only(batch["advantages"], batch["scores"].shape[1])
    assert_same(found, loop(batch, lambda i, k: max(a[i], 0.0)))


@given(batches(), st.floats(-2, 2, width=32))
@settings(max_examples=50, deadline=None)
def test_w_reinforce_replaces_advantages_by_signs(batch, weight):
    batch["correct"] &= batch["known"]
    correct, known = numbers(batch, "correct", "known")
    found = shape.w_reinforce(batch["correct"], batch["known"], weight, batch["scores"].shape[1])
    assert found.dtype == torch.float32
    assert_same(found, loop(batch, lambda i, k: (weight if correct[i] else -1.0) if known[i] else 0.0))


# ---- draws ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), max_size=5), st.data(), st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_as_many_tokens_are_drawn_as_asked_each_once(lengths, data, seed):
    count = data.draw(st.integers(0, sum(lengths)))
    drawn = shape.random_tokens(count, lengths, seed)
    assert [len(part) for part in drawn] == lengths
    assert all(part.dtype == torch.bool for part in drawn)
    assert sum(int(part.sum()) for part in drawn) == count  # a token drawn twice would be missing here


def test_the_draw_depends_on_the_seed_alone():
    lengths = [5, 0, 11, 3]
    torch.manual_seed(1)
    first = shape.random_tokens(7, lengths, seed=4)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = shape.random_tokens(7, lengths, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat(first), torch.cat(second))
    assert any(not torch.equal(torch.cat(shape.random_tokens(7, lengths, seed)), torch.cat(first)) for seed in range(4))


def test_every_token_is_as_likely_as_any_other():
    draws = torch.stack([torch.cat(shape.random_tokens(3, [4, 0, 6], seed)) for seed in range(3000)]).double()
    assert (draws.mean(dim=0) - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 3000)
