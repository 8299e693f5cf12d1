"""Two real data-parallel processes (gloo) under `accelerate launch`: watched, they train as they do alone."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llm_dynamics.callbacks import ProbeCallback
from llm_dynamics.runlog import load_run
from tests.training import build_trainer, make_probes, save_tiny_model

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
# `accelerate launch --cpu --num_processes 2` and `distributed_type: MULTI_CPU` start one process, silently
LAUNCH = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: "no"
main_process_ip: 127.0.0.1
main_process_port: {port}
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), dropout=0.2)


@pytest.fixture(scope="module")
def workspace(model_folder, tmp_path_factory):
    """What the two processes of `worker.py` left behind."""
    workspace = tmp_path_factory.mktemp("two_processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config = LAUNCH.format(port=free.getsockname()[1])
    (workspace / "two.yaml").write_text(config)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(workspace / "two.yaml")]
    command += ["--module", "tests.distributed.worker", str(model_folder), str(workspace)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and its workers
        pytest.fail(f"the two processes hang; they said:\n{process.communicate()[0]}")
    if process.returncode != 0:
        pytest.fail(f"the two processes failed; they said:\n{output}")
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
    alone, watched = ends_with(workspace, f"{kind}_alone"), ends_with(workspace, f"{kind}_watched")
    for rank in range(2):
        assert watched[rank]["rows"] == alone[rank]["rows"]
        assert watched[rank]["weights"] == alone[rank]["weights"]
        assert (watched[rank]["observed"], alone[rank]["observed"]) == ([0, 1, 2, 3], [])
    assert alone[0]["weights"] == alone[1]["weights"]  # the two did train one model


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
