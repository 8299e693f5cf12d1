"""A fault on one of two real processes (gloo): both end that part of the watching, and neither waits for the other."""

import json

import pytest

from llm_dynamics.runlog import load_run
from tests.distributed.fault_worker import FAULTS, ONLY_MAIN
from tests.distributed.launch import run_two_processes
from tests.training import save_tiny_model

pytestmark = pytest.mark.distributed


def test_a_fault_on_one_process_switches_the_part_off_on_both_and_training_is_as_alone(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    run_two_processes("tests.distributed.fault_worker", tmp_path, model, tmp_path)
    ends = [json.loads((tmp_path / f"faults_{rank}.json").read_text()) for rank in range(2)]
    assert len(ends[0]) == 2 * len(FAULTS) - len(ONLY_MAIN)
    for name, end in ends[0].items():
        part = FAULTS[name.split("_")[0]][2]
        assert end["steps"] == 3, name
        assert end["same"], name
        assert part in end["off"], name
        assert end == ends[1][name], name
        if name != "opening_0":
            failures = load_run(tmp_path / name).meta["failures"]
            assert [failure["part"] for failure in failures] == [part], name
            assert "thrown into one process" in failures[0]["error"]
