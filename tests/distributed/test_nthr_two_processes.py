"""NTHR and displacement over two real processes (gloo): all numbers are those of one process on the same batches."""

import json

import numpy as np
import pandas as pd
import pytest

from llm_dynamics.runlog import load_run
from tests.distributed.launch import run_two_processes
from tests.distributed.nthr_runs import RUNS, TENSORS, metrics_of, nthr_run, weights_digest
from tests.training import save_tiny_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """What the two processes of `nthr_worker.py` left behind."""
    workspace = tmp_path_factory.mktemp("two_processes")
    save_tiny_model(workspace / "model")
    run_two_processes("tests.distributed.nthr_worker", workspace, workspace)
    return workspace


@pytest.fixture(scope="module", params=RUNS)
def both(request, workspace, tmp_path_factory):
    """A run of two processes (what each ended with, and the log), and of one."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer, steps, exchanged = nthr_run(request.param, workspace / "model", folder, world_size=1)
    assert not any(exchanged)
    ends = [json.loads((workspace / request.param / f"process_{rank}.json").read_text()) for rank in range(2)]
    one = {"steps": steps, "metrics": metrics_of(trainer), "weights": weights_digest(trainer), "log": load_run(folder)}
    return request.param, ends, load_run(workspace / request.param), one


def test_scores_thresholds_and_advantages_are_those_of_one_process(both):
    _, ends, _, one = both
    for step, expected in enumerate(one["steps"]):
        rows = [row for end in ends for row in end["steps"][step]]
        assert len(rows) == len(expected)
        for ours, theirs in zip(rows, expected, strict=True):
            for name in TENSORS:
                if name == "selected":
                    assert ours[name] == theirs[name]
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_the_comparison_means_something(both):
    name, ends, _, one = both
    rows = [row for step in one["steps"] for row in step]
    scores = np.concatenate([row["scores"] for row in rows])
    assert np.isfinite(scores).sum() > 10
    if not name.startswith("thr"):
        selected = np.concatenate([row["selected"] for row in rows])[np.isfinite(scores)]
        assert name == "nthr_2" or 0 < selected.mean() < 1
    longest = [max(len(row["scores"]) for row in end["steps"][0]) for end in ends]
    assert longest[0] > longest[1] + 2  # they pad to different lengths
    assert ends[0]["weights"] == ends[1]["weights"]
    for weight, value in one["weights"].items():
        assert ends[0]["weights"][weight] == pytest.approx(value, rel=1e-7)


def test_metrics_are_those_of_one_process_on_both(both):
    _, ends, _, one = both
    for end in ends:
        assert [int(step) for step in end["metrics"]] == list(one["metrics"])
        for step, expected in one["metrics"].items():
            ours = end["metrics"][str(step)]
            assert ours.keys() == expected.keys()
            for key, value in expected.items():
                if value is None:  # as TRL logs a mean of nothing
                    assert ours[key] is None
                    continue
                assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-5, nan_ok=True), key
    logged = {key for row in one["metrics"].values() for key in row}
    assert {"nthr/threshold", "nthr/eta", "nthr/p", "nthr/frac_downweighted", "nthr/score_mean"} <= logged
    assert {"lld/questions", "lld/delta", "lld/fell_share"} <= logged


@pytest.mark.parametrize(("table", "tolerance"), [("rollouts", 1e-6), ("nthr_tokens", 1e-6), ("displacements", 1e-5)])
def test_the_tables_of_the_run_log_are_those_of_one_process(table, tolerance, both):
    _, _, two, one = both
    ours, theirs = getattr(two, table), getattr(one["log"], table)
    assert two.meta["world_size"] == 2
    assert len(theirs) > 5 or table == "displacements"
    assert len(theirs) > 2
    values = [column for column in theirs if pd.api.types.is_float_dtype(theirs[column])]
    keys = [column for column in theirs if column not in values]
    pd.testing.assert_frame_equal(ours[keys], theirs[keys])
    np.testing.assert_allclose(ours[values], theirs[values], rtol=tolerance, atol=tolerance)
    for step, rows in theirs.groupby("step"):
        order = rows[["example", "position"]] if table == "nthr_tokens" else rows[["example"]]
        assert order.equals(order.sort_values(list(order))), step


def test_tokens_are_exchanged_only_where_groups_straddle(both):
    name, ends, _, _ = both
    for end in ends:
        assert end["exchanged"]
        assert all(calls == 0 for calls in end["exchanged"]) is (name == "whole_2")
        assert len(set(end["exchanged"])) == 1
    assert ends[0]["exchanged"] == ends[1]["exchanged"]
