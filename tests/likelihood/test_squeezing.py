"""The squeezing statistics against the literal softmax step, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.likelihood import squeezing_stats

contexts = st.tuples(
    st.integers(2, 12), st.integers(0, 2**31), st.floats(0.1, 6.0), st.floats(1e-3, 8.0), st.integers(0, 11)
)


def make_context(size, seed, spread, label):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(1, size, generator=generator, dtype=torch.float64)
    return logits, torch.tensor([label % size])


def step(logits, label, strength):
    """The negative step itself: z' = z + e (p - 1_y), by definition."""
    p = logits.softmax(-1)
    direction = p.clone()
    direction[0, label] -= 1
    return p[0], (logits + strength * direction).softmax(-1)[0]


@given(contexts)
@settings(max_examples=200, deadline=None)
def test_statistics_equal_the_literal_step(context):
    size, seed, spread, strength, label = context
    logits, labels = make_context(size, seed, spread, label)
    y = labels.item()
    stats = squeezing_stats(logits.log_softmax(-1), labels, strength=strength)
    before, after = step(logits, y, strength)
    others = [i for i in range(size) if i != y]
    star = max(others, key=lambda i: before[i].item())

    tau = torch.log(sum(before[j] * torch.exp(strength * (before[j] - float(j == y))) for j in range(size))) / strength
    assert stats.tau.item() == pytest.approx(tau.item(), abs=1e-9, rel=1e-9)
    assert stats.tau0.item() == pytest.approx((before.square().sum() - before[y]).item(), abs=1e-12)
    assert stats.collision.item() == pytest.approx(before.square().sum().item(), rel=1e-12)
    assert stats.p_label.item() == pytest.approx(before[y].item(), rel=1e-12)
    assert stats.other_id.item() == star
    assert stats.p_other.item() == pytest.approx(before[star].item(), rel=1e-12)
    assert stats.moved_to_other.item() == pytest.approx((after[star] - before[star]).item(), abs=1e-12, rel=1e-9)
    rest = torch.log(sum(before[i] for i in range(size) if i != star))
    assert stats.log1m_p_other.item() == pytest.approx(rest.item(), abs=1e-12, rel=1e-9)

    margin = (before - tau).abs().min().item()
    if margin > 1e-12:  # a token exactly at the threshold neither rises nor falls
        risers = [i for i in others if after[i] > before[i]]
        assert stats.riser_count.item() == len(risers)
        assert stats.riser_mass.item() == pytest.approx(sum(before[i].item() for i in risers), abs=1e-12)


@given(contexts)
@settings(max_examples=100, deadline=None)
def test_the_label_falls_and_the_best_other_token_rises(context):
    size, seed, spread, strength, label = context
    logits, labels = make_context(size, seed, spread, label)
    stats = squeezing_stats(logits.log_softmax(-1), labels, strength=strength)
    before, after = step(logits, labels.item(), strength)
    assert after[labels.item()] < before[labels.item()]
    assert stats.moved_to_other.item() > 0


@given(contexts)
@settings(max_examples=100, deadline=None)
def test_tau0_is_the_limit_and_gives_the_derivative(context):
    size, seed, spread, _, label = context
    logits, labels = make_context(size, seed, spread, label)
    y = labels.item()
    small = 1e-5
    stats = squeezing_stats(logits.log_softmax(-1), labels, strength=small)
    assert stats.tau.item() == pytest.approx(stats.tau0.item(), abs=2e-5)
    before, after = step(logits, y, small)
    slope = (after.log() - before.log()) / small
    expected = before - stats.tau0
    expected[y] -= 1
    assert torch.allclose(slope, expected, atol=1e-4)


def test_log_of_the_remaining_mass_stays_finite_where_one_token_takes_all():
    logp = torch.tensor([[0.0, -60.0, -70.0]]).log_softmax(-1)  # p(y*) is 1 in float32, and log1p(-p) would be -inf
    stats = squeezing_stats(logp, torch.tensor([1]))
    assert stats.p_other.item() == 1.0
    assert stats.log1m_p_other.item() == pytest.approx(-60.0, abs=1e-3)


def test_impossible_tokens_neither_rise_nor_spoil_the_rest():
    logits = torch.tensor([[1.0, 0.5, -torch.inf, 0.0]], dtype=torch.float64)
    stats = squeezing_stats(logits.log_softmax(-1), torch.tensor([0]))
    same = squeezing_stats(logits[:, [0, 1, 3]].log_softmax(-1), torch.tensor([0]))
    assert stats.tau.item() == pytest.approx(same.tau.item(), rel=1e-12)
    assert stats.riser_count.item() == same.riser_count.item()
    assert torch.isfinite(stats.log1m_p_other).all()


def test_a_nan_context_has_nan_statistics_and_leaves_the_others_alone():
    logp = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1)
    clean = squeezing_stats(logp[[0, 2]], torch.tensor([1, 3]))
    logp[1] = torch.nan
    stats = squeezing_stats(logp, torch.tensor([1, 2, 3]))
    assert stats.tau[1].isnan()
    assert stats.p_other[1].isnan()
    assert stats.riser_mass[1].isnan()
    assert stats.other_id[1] == -1
    assert stats.riser_count[1] == -1
    assert torch.equal(stats.tau[[0, 2]], clean.tau)


@pytest.mark.parametrize(
    ("logp", "labels", "strength", "message"),
    [
        (torch.zeros(5), torch.zeros(5, dtype=torch.long), 1.0, r"logp must be \(N, V\)"),
        (torch.zeros(2, 5), torch.zeros(3, dtype=torch.long), 1.0, r"labels \(N,\)"),
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), 0.0, "strength > 0"),
        (torch.zeros(2, 5), torch.zeros(2, dtype=torch.long), float("nan"), "strength > 0"),
    ],
)
def test_bad_input_is_named(logp, labels, strength, message):
    with pytest.raises(ValueError, match=message):
        squeezing_stats(logp, labels, strength=strength)


@pytest.mark.parametrize("gap", [12.0, 20.0, 26.0, 30.0, 60.0, 110.0])
def test_a_peaked_context_keeps_its_riser_in_float32(gap):
    logits = torch.tensor([[0.0, gap, 1.0, -1.0]], dtype=torch.float64)
    exact = squeezing_stats(logits.log_softmax(-1), torch.tensor([0]))
    stats = squeezing_stats(logits.float().log_softmax(-1), torch.tensor([0]))
    assert stats.riser_count.item() == 1
    assert stats.riser_mass.item() == pytest.approx(stats.p_other.item())
    assert stats.other_id.item() == 1
    assert stats.log1m_p_other.item() == pytest.approx(exact.log1m_p_other.item(), rel=1e-4)
    if gap < 100:  # beyond, the step moves less than float32 can hold
        assert stats.moved_to_other.item() == pytest.approx(exact.moved_to_other.item(), rel=1e-3)
        assert stats.moved_to_other.item() > 0


def test_y_star_is_told_apart_where_probabilities_underflow():
    logp = torch.tensor([[120.0, 0.0, 15.0]]).log_softmax(-1)
    stats = squeezing_stats(logp, torch.tensor([0]))
    assert stats.other_id.item() == 2
    assert squeezing_stats(logp, torch.tensor([1])).log1m_p_other.item() == pytest.approx(-105.0, abs=1e-3)


def test_a_huge_step_overflows_nothing():
    logp = torch.tensor([[3.0, 1.0, 0.0, -1.0]]).log_softmax(-1)
    stats = squeezing_stats(logp, torch.tensor([1]), strength=1000.0)
    assert stats.tau.isfinite()
    assert stats.moved_to_other.item() == pytest.approx(1 - stats.p_other.item(), rel=1e-5)
