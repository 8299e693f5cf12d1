"""Two processes with sharded parameters (FSDP2's `fully_shard`, gloo): the run log is that of one process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_dynamics.callbacks import ProbeCallback
from llm_dynamics.likelihood import is_sharded, score_logps
from llm_dynamics.runlog import load_run
from tests.distributed.sharded_worker import NTHR_CASES, first_generation, train_step
from tests.training import TIMED_COLUMNS, build_trainer, make_probes, save_tiny_model

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def workspace(model_folder, tmp_path_factory):
    """What the two processes of `sharded_worker.py` left behind."""
    workspace = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--standalone", "-m", "tests.distributed.sharded_worker", str(model_folder), str(workspace)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the two processes hang; they said:\n{process.communicate()[0]}")
    if process.returncode != 0:
        pytest.fail(f"the two processes failed; they said:\n{output}")
    return workspace


@pytest.fixture(scope="module")
def alone(model_folder, tmp_path_factory):
    """The same in this process."""
    folder = tmp_path_factory.mktemp("alone")
    trainer = build_trainer("sft", model_folder, folder)
    assert not is_sharded(trainer.model)
    callback = ProbeCallback(trainer, make_probes(3), every=1)
    trainer.state.max_steps = 2
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    ids = torch.tensor([list(callback.encoded[0].input_ids)])
    losses = []
    for step in (1, 2):
        losses.append(train_step(trainer.model, ids, 0.1))
        trainer.state.global_step = step
        callback.on_step_end(trainer.args, trainer.state, trainer.control)
    return callback, losses, load_run(folder)


def test_the_tables_are_those_of_one_process(workspace, alone):
    sharded, whole = load_run(workspace / "sharded"), alone[2]
    assert sharded.observed_steps == whole.observed_steps == [0, 1, 2]
    for table in ("sequences", "tokens"):
        pd.testing.assert_frame_equal(getattr(sharded, table), getattr(whole, table), rtol=1e-5, atol=1e-5)
    metrics = [c for c in whole.steps if c not in TIMED_COLUMNS and c != "dynamics/overhead"]
    pd.testing.assert_frame_equal(sharded.steps[metrics], whole.steps[metrics], rtol=1e-4, atol=1e-5)
    assert (whole.delta_from_start()["delta_logp_sum"].abs() > 1e-3).any()  # the steps did something


def test_training_goes_on_as_without_observing_and_parameters_stay_in_pieces(workspace, alone):
    seen = json.loads((workspace / "sharded.json").read_text())
    assert seen["losses"] == pytest.approx(alone[1], abs=1e-5)
    assert seen["sharded_again"]
    assert seen["backbone"]
    assert seen["shares_prompts"]


def test_a_process_with_nothing_to_score_runs_along(workspace, alone, model_folder):
    seen = json.loads((workspace / "sharded.json").read_text())
    callback = alone[0]
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.tensor([list(callback.encoded[0].input_ids)])
    for _ in range(2):
        train_step(model, ids, 0.1)
    expected = score_logps(model, callback.encoded[:2])
    torch.testing.assert_close(torch.tensor(seen["alone"]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NTHR_CASES)
def test_nthr_scores_with_sharded_parameters_are_those_of_one_process(name, workspace, model_folder, tmp_path):
    seen = json.loads((workspace / "sharded.json").read_text())["nthr"][name]
    expected = first_generation(name, model_folder, tmp_path, world_size=1, sharded=False)
    assert len(seen) == len(expected)
    scored = 0
    for mine, theirs in zip(seen, expected, strict=True):
        for key, value in theirs.items():
            torch.testing.assert_close(
                torch.tensor(mine[key], dtype=torch.float64),
                torch.tensor(value, dtype=torch.float64),
                rtol=1e-6,
                atol=1e-6,
                equal_nan=True,
            )
        scored += sum(score == score for score in theirs["scores"])
    assert scored
