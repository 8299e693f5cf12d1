"""Two real data-parallel processes (gloo) under `accelerate launch`: watched, they train as they do alone."""

import json

import numpy as np
import pandas as pd
import pytest

from llm_dynamics.callbacks import ProbeCallback
from llm_dynamics.runlog import load_run
from tests.distributed.explained_runs import RUNS, explained_trainer
from tests.distributed.launch import run_two_processes
from tests.training import build_trainer, make_probes, save_tiny_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), dropout=0.2)


@pytest.fixture(scope="module")
def workspace(model_folder, tmp_path_factory):
    """What the two processes of `worker.py` left behind."""
    workspace = tmp_path_factory.mktemp("two_processes")
    save_tiny_model(workspace / "model")  # without dropout, of which each process draws its own
    run_two_processes("tests.distributed.worker", workspace, model_folder, workspace)
    return workspace


def ends_with(workspace, name):
    """What each process ended a run with."""
    return [json.loads((workspace / name / f"process_{rank}.json").read_text()) for rank in range(2)]


def one_process_log(kind, model_folder, output_dir, probes, **arguments):
    """The run log of a run in this process, up to its observation before the first step."""
    trainer = build_trainer(kind, model_folder, output_dir, **arguments)
    callback = ProbeCallback(trainer, probes, every=1)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    return load_run(output_dir)


def assert_same_start(run, expected):
    pd.testing.assert_frame_equal(run.probes, expected.probes)
    for table in ("sequences", "tokens"):
        ours = getattr(run, table).query("step == 0").reset_index(drop=True)
        theirs = getattr(expected, table)
        exact = [column for column in theirs if not pd.api.types.is_float_dtype(theirs[column])]
        measured = [column for column in theirs if pd.api.types.is_float_dtype(theirs[column])]
        pd.testing.assert_frame_equal(ours[exact], theirs[exact])
        np.testing.assert_allclose(ours[measured], theirs[measured], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_watched_processes_end_with_the_bytes_and_loss_rows_of_processes_alone(kind, workspace):
    alone, watched, explained = (ends_with(workspace, f"{kind}_{how}") for how in ("alone", "watched", "explained"))
    for rank in range(2):
        assert watched[rank]["rows"] == alone[rank]["rows"]
        assert watched[rank]["weights"] == alone[rank]["weights"]
        assert explained[rank]["rows"] == alone[rank]["rows"]
        assert explained[rank]["weights"] == alone[rank]["weights"]
        assert (watched[rank]["observed"], alone[rank]["observed"]) == ([0, 1, 2, 3], [])
    assert alone[0]["weights"] == alone[1]["weights"]  # the two did train one model
    assert load_run(workspace / f"{kind}_explained").explained_steps == {"sft": [1, 2, 3], "dpo": [1, 3]}[kind]


@pytest.mark.parametrize(("kind", "lora"), [("sft", True), ("dpo", False)])
def test_the_log_is_written_once_and_starts_as_that_of_one_process(kind, lora, workspace, model_folder, tmp_path):
    run = load_run(workspace / f"{kind}_watched")
    assert run.meta["world_size"] == 2
    assert run.observed_steps == [0, 1, 2, 3]
    assert not list((workspace / f"{kind}_watched").glob("dynamics_before_*"))
    probes = make_probes()
    for table in (run.sequences, run.tokens):
        once = table.drop_duplicates(["step", "probe_id", *(["position"] if "position" in table else [])])
        assert len(once) == len(table)
        for _, rows in table.groupby("step"):
            assert list(rows["probe_id"].unique()) == [probe.probe_id for probe in probes]
    assert_same_start(run, one_process_log(kind, model_folder, tmp_path, probes, lora=lora, dropout=0.2))


def test_a_process_without_a_probe_to_score_takes_part(workspace, model_folder, tmp_path):
    run = load_run(workspace / "one_prompt")
    assert run.observed_steps == [0, 1]
    assert_same_start(run, one_process_log("sft", model_folder, tmp_path, make_probes(1)))
    assert [process["observed"] for process in ends_with(workspace, "one_prompt")] == [[0, 1], [0, 1]]


def test_observations_that_do_not_fit_the_budget_are_skipped_by_both_processes(workspace):
    run = load_run(workspace / "tight")
    assert run.observed_steps == [0, 4]
    assert run.meta["skipped_steps"] == [1, 2, 3]
    assert [process["observed"] for process in ends_with(workspace, "tight")] == [[0, 4], [0, 4]]


def test_the_main_process_decides_where_clocks_disagree(workspace):
    assert load_run(workspace / "clocks_disagree").meta["skipped_steps"] == [1, 2]
    assert [process["observed"] for process in ends_with(workspace, "clocks_disagree")] == [[0, 3], [0, 3]]


# ---- the account of the global step -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=RUNS)
def accounts(request, workspace, tmp_path_factory):
    """The logs of a run of two processes and of one on the same global batches."""
    folder = tmp_path_factory.mktemp(request.param)
    explained_trainer(request.param, workspace / "model", folder, world_size=1).train()
    return load_run(workspace / f"account_{request.param}"), load_run(folder)


def named(run, table):
    """A table with its training examples named by their text: their numbers depend on the processes."""
    examples = run.training_examples.assign(copy=lambda rows: rows.groupby(["step", "prompt", "response"]).cumcount())
    frame = getattr(run, table)
    if "example" not in frame:
        return frame
    names = examples[["step", "example", "prompt", "response", "copy"]]
    frame = examples if table == "training_examples" else frame.merge(names, on=["step", "example"], validate="m:1")
    return frame.drop(columns="example")


def test_two_processes_observe_at_every_step_what_one_does(accounts):
    two, one = accounts
    assert two.observed_steps == one.observed_steps
    assert len(one.observed_steps) >= 2
    for table in ("sequences", "tokens"):
        ours, theirs = getattr(two, table), getattr(one, table)
        values = [column for column in theirs if pd.api.types.is_float_dtype(theirs[column])]
        keys = [column for column in theirs if column not in values]
        pd.testing.assert_frame_equal(ours[keys], theirs[keys])
        np.testing.assert_allclose(ours[values], theirs[values], rtol=1e-6, atol=1e-5, err_msg=table)


def test_two_processes_account_for_the_global_step_as_one(accounts):
    two, one = accounts
    assert two.explained_steps == one.explained_steps == [1, 2]
    for table in ("influence", "influence_tokens", "training_examples", "training_tokens", "influence_maps"):
        ours, theirs = named(two, table), named(one, table)
        assert len(ours) == len(theirs)
        values = [column for column in theirs if pd.api.types.is_float_dtype(theirs[column])]
        keys = [column for column in theirs if column not in values]
        ours, theirs = (frame.sort_values(keys, ignore_index=True) for frame in (ours, theirs))
        pd.testing.assert_frame_equal(ours[keys], theirs[keys])
        np.testing.assert_allclose(ours[values], theirs[values], rtol=1e-6, atol=1e-6, err_msg=table)
    values = ["explained", "measured_norm", "remainder_norm", "clip_factor", "grad_norm", "learning_rate"]
    np.testing.assert_allclose(two.accounts[values], one.accounts[values], rtol=1e-6, atol=1e-6)


def test_the_global_step_is_accounted_for(accounts):
    two, _ = accounts
    assert (two.accounts["explained"] > 0.999).all()
    table = two.family_influence().groupby(["step", "family"]).agg({"share": "sum", "measured": "first"})
    np.testing.assert_allclose(table["share"], table["measured"], atol=1e-9)
    assert table["measured"].abs().max() > 0.02


def test_examples_are_numbered_over_processes_also_where_each_has_one_sign(workspace):
    run = load_run(workspace / "account_kto")
    for _, rows in run.training_examples.groupby("step"):
        assert rows["example"].tolist() == [0, 1, 2, 3]
        assert rows["role"].tolist() == ["desirable", "desirable", "undesirable", "undesirable"]
    assert {"up", "down"} <= set(run.influence["cause"])
