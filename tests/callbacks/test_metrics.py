"""The scalars of an observation, against sums done by hand."""

import math

import pandas as pd
import pytest

from llm_dynamics.callbacks.metrics import finite_only, observation_metrics
from llm_dynamics.likelihood.tables import SQUEEZE_COLUMNS

STATISTICS = (*SQUEEZE_COLUMNS, "riser_count", "entropy")


def sequences(*rows, **changes):
    """A sequences table of (probe_id, n_tokens, logp_sum, argmax_logp_sum).

    Statistic k of the i-th probe sums to k * n_tokens + i.
    """
    frame = pd.DataFrame(rows, columns=["probe_id", "n_tokens", "logp_sum", "argmax_logp_sum"])
    frame[["prompt_id", "family"]] = frame["probe_id"].str.split("/", expand=True)
    frame["n_nonfinite"] = 0
    for k, name in enumerate(STATISTICS):
        frame[f"{name}_sum"] = [k * n + i for i, n in enumerate(frame["n_tokens"])]
    return frame.assign(**changes)


TABLE = (
    ("a/chosen", 2, -3.0, -1.0),
    ("a/rejected", 4, -8.0, -5.0),
    ("a/random", 3, -20.0, -6.0),
    ("b/chosen", 6, -5.0, -2.0),
    ("b/rejected", 1, -2.0, -1.5),
)
START = {"a/chosen": -4.0, "a/rejected": -7.0, "a/random": -10.0, "b/chosen": -5.5, "b/rejected": -1.0}


def test_families_are_averaged_over_their_probes_in_nats_per_response():
    metrics = observation_metrics(sequences(*TABLE), START)
    assert metrics["probe/chosen_logp"] == -4.0
    assert metrics["probe/rejected_logp"] == -5.0
    assert metrics["probe/random_logp"] == -20.0
    assert metrics["probe/chosen_delta"] == pytest.approx((1.0 + 0.5) / 2)
    assert metrics["probe/rejected_delta"] == pytest.approx((-1.0 - 1.0) / 2)
    assert metrics["probe/random_delta"] == -10.0
    assert metrics["probe/n_nonfinite"] == 0.0


def test_argmax_is_that_of_the_chosen_probes_and_margin_is_chosen_minus_rejected():
    metrics = observation_metrics(sequences(*TABLE), START)
    assert metrics["probe/argmax_logp"] == -1.5
    assert metrics["probe/margin"] == pytest.approx(((-3.0 + 8.0) + (-5.0 + 2.0)) / 2)


def test_a_prompt_without_one_of_the_two_responses_has_no_margin():
    metrics = observation_metrics(sequences(*TABLE[:4]), START)
    assert metrics["probe/margin"] == 5.0


def test_without_chosen_probes_argmax_is_that_of_all_and_there_is_no_margin():
    metrics = observation_metrics(sequences(TABLE[1], TABLE[2]), START)
    assert metrics["probe/argmax_logp"] == -5.5
    assert "probe/margin" not in metrics


def test_squeezing_statistics_are_means_over_the_tokens_of_the_rejected_probes():
    frame = sequences(*TABLE)
    metrics = observation_metrics(frame, START)
    # rejected probes are rows 1 and 4, with 4 and 1 tokens
    for k, name in enumerate(STATISTICS):
        assert metrics[f"squeeze/rejected_{name}"] == pytest.approx((k * 4 + 1 + k * 1 + 4) / 5)
    assert {name for name in metrics if name.startswith("squeeze/")} == {f"squeeze/rejected_{s}" for s in STATISTICS}


@pytest.mark.parametrize(("families", "squeezed"), [(("chosen", "random"), "chosen"), (("random",), "random")])
def test_without_rejected_probes_the_squeezed_family_is_chosen_or_else_the_first(families, squeezed):
    rows = [row for row in TABLE if row[0].split("/")[1] in families]
    metrics = observation_metrics(sequences(*rows), START)
    assert {name for name in metrics if name.startswith("squeeze/")} == {f"squeeze/{squeezed}_{s}" for s in STATISTICS}


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_broken_probe_is_seen_in_every_mean_that_it_enters(bad):
    frame = sequences(*TABLE, n_nonfinite=[0, 0, 0, 2, 0])
    frame.loc[3, ["logp_sum", "argmax_logp_sum"]] = bad  # b/chosen
    metrics = observation_metrics(frame, START)
    assert metrics["probe/n_nonfinite"] == 2.0
    for name in ("probe/chosen_logp", "probe/chosen_delta", "probe/argmax_logp", "probe/margin"):
        assert not math.isfinite(metrics[name]), name
    for name in ("probe/rejected_logp", "probe/random_delta"):
        assert math.isfinite(metrics[name]), name


def test_a_broken_probe_is_not_averaged_away_by_another_of_its_prompt_and_family():
    frame = sequences(*TABLE, ("b/chosen", 3, math.nan, math.nan))
    frame.loc[5, "probe_id"] = "b/chosen-2"
    assert math.isnan(observation_metrics(frame, START)["probe/margin"])


def test_a_broken_statistic_is_seen_in_its_mean():
    frame = sequences(*TABLE)
    frame.loc[1, "tau_sum"] = math.nan
    metrics = observation_metrics(frame, START)
    assert math.isnan(metrics["squeeze/rejected_tau"])
    assert math.isfinite(metrics["squeeze/rejected_tau0"])


def test_trackers_get_finite_floats_under_two_level_ascii_names():
    metrics = observation_metrics(sequences(*TABLE), START)
    assert all(type(value) is float and name.isascii() and name.count("/") == 1 for name, value in metrics.items())
    assert finite_only({"a": 1.0, "b": math.nan, "c": math.inf, "d": -math.inf}) == {"a": 1.0}
