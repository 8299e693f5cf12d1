import math

import numpy as np
import pandas as pd
import pytest

from llm_dynamics.frames import align, delta, family_curves
from llm_dynamics.runlog import RunLogs

from .logs import assert_rows, random_log, value_log

COLUMNS = ["step", "probe_id", "prompt_id", "family", "n_tokens", "value", "baseline", "delta", "delta_per_token"]


def by_hand(run, base_of, column="logp_sum"):
    """`delta` with plain loops; `base_of(row)` is the baseline of a row."""
    rows = []
    for row in run.sequences.to_dict("records"):
        base = base_of(row)
        change = row[column] - base
        about = [row[key] for key in ("step", "probe_id", "prompt_id", "family", "n_tokens")]
        rows.append((*about, row[column], base, change, change / row["n_tokens"]))
    return rows


def at(run, step, probe_id, column="logp_sum"):
    found = run.sequences.query("step == @step and probe_id == @probe_id")[column]
    return float(found.iloc[0]) if len(found) else math.nan


@pytest.mark.parametrize("baseline", ["first", 5])
def test_changes_equal_plain_loops_with_bad_and_missing_numbers(tmp_path, baseline):
    run = random_log(tmp_path, n_prompts=5, spoilt=0.2, missing=0.2)
    step = 0 if baseline == "first" else baseline
    frame = delta(run, baseline)
    assert list(frame) == COLUMNS
    with np.errstate(invalid="ignore"):
        assert_rows(frame, by_hand(run, lambda row: at(run, step, row["probe_id"])))


def test_the_baseline_may_be_another_run_at_the_same_step(tmp_path):
    run, other = (random_log(tmp_path / name, seed=seed) for seed, name in enumerate(("dpo", "sft")))
    frame = delta(run, other)
    assert list(frame) == COLUMNS
    assert_rows(frame, by_hand(run, lambda row: at(other, row["step"], row["probe_id"])))


def test_among_several_runs_the_baseline_is_named_and_its_rows_are_left_out(tmp_path):
    runs = RunLogs({name: random_log(tmp_path / name, seed=seed) for seed, name in enumerate("abc")})
    frame = delta(runs, "b")
    assert frame["run"].unique().tolist() == ["a", "c"]
    for name in ("a", "c"):
        own = frame[frame["run"] == name].drop(columns="run").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, delta(runs[name], runs["b"]))


def test_a_run_against_itself_does_not_change(tmp_path):
    run = random_log(tmp_path)
    assert (delta(run, run)["delta"] == 0).all()


def test_each_of_several_runs_counts_from_its_own_start(tmp_path):
    runs = RunLogs({name: random_log(tmp_path / name, seed=seed) for seed, name in enumerate("ab")})
    frame = delta(runs)
    for name in "ab":
        own = frame[frame["run"] == name].drop(columns="run").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, delta(runs[name]))


def test_a_chain_counts_from_the_start_of_its_first_stage(tmp_path):
    sft = value_log(tmp_path / "sft", {"p/chosen": {0: -9, 10: -5}})
    dpo = value_log(tmp_path / "dpo", {"p/chosen": {0: -5, 10: -6}})
    frame = delta({"all": [sft, dpo]})
    assert frame[["step", "delta"]].to_numpy().tolist() == [[0, 0], [10, 4], [20, 3]]
    assert delta({"all": [sft, dpo]}, 10)["delta"].tolist() == [-4, 0, -1]


def test_aligned_frames_can_be_given_with_any_baseline(tmp_path):
    a = value_log(tmp_path / "a", {"p/chosen": {0: -1, 5: -2, 10: -4}})
    b = value_log(tmp_path / "b", {"p/chosen": {0: -2, 50: -5, 100: -9}})
    frame = align({"a": a, "b": b}, on="progress")
    assert delta(frame)["delta"].tolist() == [0, -1, -3, 0, -3, -7]
    assert delta(frame, 0.5)["delta"].tolist() == [1, 0, -2, 3, 0, -4]
    against = delta(frame, "a")
    assert against["at"].tolist() == [0, 0.5, 1]
    assert against["delta"].tolist() == [-1, -3, -5]
    assert against["delta_per_token"].tolist() == [-0.5, -1.5, -2.5]


def test_means_of_changes_are_the_curves_of_change(tmp_path):
    run = random_log(tmp_path, n_prompts=5, missing=0.2)
    means = delta(run).groupby(["family", "step"])["delta"].mean()
    curves = family_curves(run, delta=True).query("~family.str.startswith('argmax')")
    assert means.to_numpy() == pytest.approx(curves.set_index(["family", "step"])["mean"].sort_index().to_numpy())


def test_it_agrees_with_delta_from_start_where_every_probe_was_there_at_the_start(tmp_path):
    run = random_log(tmp_path)
    older = run.delta_from_start()
    newer = delta(run)
    assert newer["delta"].tolist() == older["delta_logp_sum"].tolist()
    assert newer["delta_per_token"].tolist() == older["delta_logp_mean"].tolist()


def test_any_statistic_can_be_subtracted(tmp_path):
    run = random_log(tmp_path)
    frame = delta(run, statistic="entropy")
    assert_rows(frame, by_hand(run, lambda row: at(run, 0, row["probe_id"], "entropy_sum"), "entropy_sum"))


def test_a_log_without_observations_has_no_changes(tmp_path):
    frame = delta(random_log(tmp_path, steps=()))
    assert frame.empty
    assert list(frame) == COLUMNS


@pytest.mark.parametrize(
    ("baseline", "said"),
    [
        ("sft", r"baseline is 'sft'; allowed: 'first', a step, or a run: a, b"),
        (7, r"run 'a' was not observed at step 7; observed: 0, 5, 10"),
    ],
)
def test_a_baseline_that_is_none_is_refused_with_those_that_there_are(tmp_path, baseline, said):
    runs = RunLogs({name: random_log(tmp_path / name) for name in "ab"})
    with pytest.raises(ValueError, match=said):
        delta(runs, baseline)


def test_a_run_called_first_is_no_baseline(tmp_path):
    runs = RunLogs({name: random_log(tmp_path / name) for name in ("first", "second")})
    with pytest.raises(ValueError, match="rename it"):
        delta(runs)
    assert delta(runs, "second")["run"].unique().tolist() == ["first"]


def test_a_log_as_baseline_of_several_runs_is_refused_and_so_is_any_frame(tmp_path):
    run = random_log(tmp_path)
    with pytest.raises(ValueError, match="give the name of one: a"):
        delta({"a": run}, run)
    with pytest.raises(ValueError, match=r"the frame lacks run, at: `align` did not return it"):
        delta(run.sequences)
    with pytest.raises(ValueError, match="lacks entropy_sum"):
        delta(align({"a": run}), statistic="entropy")
