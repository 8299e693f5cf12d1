"""Two processes under DeepSpeed ZeRO-2 and ZeRO-3 (on CPUs, gloo): run logs and NTHR's scores are those of one process.

They run where DeepSpeed is installed: `DS_BUILD_OPS=0 pip install deepspeed`.
"""

import importlib.util
import json

import numpy as np
import pandas as pd
import pytest

from llm_dynamics.runlog import load_run
from tests.distributed.deepspeed_worker import KINDS, NTHR, short_run
from tests.distributed.launch import run_two_processes
from tests.distributed.nthr_runs import TENSORS, nthr_run
from tests.training import save_tiny_model

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
COUNTS = ("rank", "riser_count")
"""Columns, by how they begin, that count tokens above a bound: one that stands at it is counted or not."""
LAUNCH = """\
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  deepspeed_multinode_launcher: standard
  offload_optimizer_device: none
  offload_param_device: none
  zero3_init_flag: {init}
  zero_stage: {stage}
use_cpu: true
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: "no"
main_process_ip: 127.0.0.1
main_process_port: {{port}}
"""


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def workspace(request, tmp_path_factory):
    """What the two processes of `deepspeed_worker.py` left behind."""
    workspace = tmp_path_factory.mktemp("deepspeed")
    save_tiny_model(workspace / "model")
    launch = LAUNCH.format(stage=request.param, init=str(request.param == 3).lower())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        run_two_processes("tests.distributed.deepspeed_worker", workspace, workspace, launch=launch)
    assert end(workspace, "sft")["stage"] == request.param
    return workspace


def end(workspace, name):
    """What a run ended with."""
    return json.loads((workspace / name / "end.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_watched_processes_have_the_loss_rows_of_processes_alone(kind, workspace):
    watched, alone = end(workspace, kind)["rows"], end(workspace, f"{kind}_alone")["rows"]
    assert watched == alone
    assert sum("loss" in row for row in watched) == 2


@pytest.mark.parametrize(
    ("name", "kind", "lora"), [("sft", "sft", False), ("dpo", "dpo", False), ("lora", "dpo", True)]
)
def test_the_tables_are_those_of_one_process(name, kind, lora, workspace, tmp_path):
    short_run(kind, workspace / "model", tmp_path, world_size=1, lora=lora)
    two, one = load_run(workspace / name), load_run(tmp_path)
    assert two.meta["world_size"] == 2
    assert two.observed_steps == one.observed_steps == [0, 1, 2]
    for table in ("sequences", "tokens"):
        ours, theirs = getattr(two, table), getattr(one, table)
        counted = [column for column in theirs if column.startswith(COUNTS)]
        values = [column for column in theirs if column in counted or pd.api.types.is_float_dtype(theirs[column])]
        keys = [column for column in theirs if column not in values]
        pd.testing.assert_frame_equal(ours[keys], theirs[keys])
        for column in values:
            near = {"rtol": 1e-5, "atol": 2e-5}
            if column in counted:
                near = {"atol": 2.0}
            elif column.startswith("riser_mass"):
                near = {"atol": 0.02}
            np.testing.assert_allclose(ours[column], theirs[column], err_msg=f"{table}.{column}", **near)
    if kind == "dpo":
        assert two.sequences["ref_logp_sum"].notna().all()
    moved = two.delta_from_start().query("step == 2")["delta_logp_sum"].abs()
    assert moved.min() > 1e-3


def test_nthr_and_displacement_are_those_of_one_process(workspace, tmp_path):
    _, expected, _ = nthr_run(NTHR, workspace / "model", tmp_path, world_size=1)
    steps = end(workspace, NTHR)["steps"]
    scored = 0
    assert len(steps) == len(expected)
    for ours, theirs in zip(steps, expected, strict=True):
        assert len(ours) == len(theirs)
        for mine, his in zip(ours, theirs, strict=True):
            for name in TENSORS:
                np.testing.assert_allclose(mine[name], his[name], rtol=1e-4, atol=1e-4, err_msg=name)
            scored += int(np.isfinite(his["scores"]).sum())
    assert scored > 10
    two, one = load_run(workspace / NTHR).displacements, load_run(tmp_path).displacements
    assert two[["step", "example"]].equals(one[["step", "example"]])
    assert len(one) > 2
    for column in ("logp_before", "logp_after"):
        np.testing.assert_allclose(two[column], one[column], rtol=1e-4, atol=1e-4)
