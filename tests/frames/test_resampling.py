"""The bootstrap behind "unsure": weighted means are those of a sample with its prompts written out."""

import numpy as np
import pandas as pd
import pytest

from llm_dynamics.frames.resampling import N_RESAMPLES, Resamples, agreement

GROUPS = pd.Series(["a", "a", "b", "c", "c", "c"])
VALUES = pd.Series([1.0, 2.0, -3.0, 4.0, np.nan, 6.0])


def test_a_resample_is_the_sample_with_its_groups_drawn_again():
    resamples = Resamples(GROUPS)
    means = resamples.mean(VALUES, GROUPS)
    assert means.shape == (1 + N_RESAMPLES,)
    assert means[0] == pytest.approx(VALUES.mean())
    by_group = {name: VALUES[GROUPS.eq(name)] for name in "abc"}
    # every composition of three draws from three groups, by writing the rows out
    possible = {
        round(float(pd.concat([by_group[name] for name in (i, j, k)]).mean()), 12)
        for i in "abc" for j in "abc" for k in "abc"
    }  # fmt: skip
    assert {round(float(mean), 12) for mean in means[1:]} == possible


def test_values_of_one_group_are_drawn_together_in_all_means():
    resamples = Resamples(GROUPS)
    one, two = resamples.mean(VALUES, GROUPS), resamples.mean(2 * VALUES + 1, GROUPS)
    np.testing.assert_allclose(two, 2 * one + 1)


def test_the_spread_is_that_of_a_mean_over_independent_groups():
    values = pd.Series(np.random.default_rng(1).normal(size=400))
    means = Resamples(values.index.to_series()).mean(values, values.index.to_series())[1:]
    assert means.std() == pytest.approx(values.std() / 20, rel=0.15)


def test_the_same_groups_give_the_same_resamples():
    means = Resamples(GROUPS).mean(VALUES, GROUPS)
    np.testing.assert_array_equal(Resamples(GROUPS).mean(VALUES, GROUPS), means)
    np.testing.assert_array_equal(Resamples(GROUPS[::-1]).mean(VALUES[::-1], GROUPS[::-1]), means)
    assert not np.array_equal(Resamples(GROUPS, seed=1).mean(VALUES, GROUPS), means)


@pytest.mark.parametrize(("groups", "mean"), [(pd.Series(["a", "a"]), 2.0), (pd.Series([], dtype=str), np.nan)])
def test_fewer_than_two_groups_are_not_resampled(groups, mean):
    values = pd.Series([1.0, 3.0][: len(groups)], dtype=float)
    means = Resamples(groups).mean(values, groups)
    np.testing.assert_array_equal(means, [mean])
    assert agreement(means > 0) is None


def test_a_resample_without_a_value_is_nan():
    means = Resamples(GROUPS).mean(VALUES.where(GROUPS == "b"), GROUPS)
    assert means[0] == -3.0
    assert set(means[~np.isnan(means)]) == {-3.0}
    assert np.isnan(means).any()


@pytest.mark.parametrize(
    ("decisions", "share"), [([True, True, False, True, True], 0.75), ([False, True, True], 0.0), ([True], None)]
)
def test_agreement_is_the_share_of_resamples_that_decide_as_the_sample(decisions, share):
    assert agreement(np.array(decisions)) == share
