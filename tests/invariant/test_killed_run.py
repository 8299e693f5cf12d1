"""A run killed in the middle of an observation: its log reads to the last completed one, and can be continued."""

import multiprocessing

import pandas as pd
import pytest
import torch

from llm_dynamics.runlog import load_run
from tests.invariant.interrupted import start_run, train_until
from tests.training import TIMED_COLUMNS, save_tiny_model

PATIENCE = 120
"""Seconds after which a child that says nothing is taken for dead."""
CASES = {
    # where the run is killed, what can be read then
    "before sequences/step_000000004.parquet": [0, 2],
    "half sequences/step_000000004.parquet": [0, 2],
    "half tokens/step_000000004.parquet": [0, 2],
    "before steps/step_000000004.parquet": [0, 2],
    "half steps/step_000000004.parquet": [0, 2],
    "half meta.json": [0, 2, 4, 5],
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), dropout=0.2)


@pytest.fixture(scope="module")
def uninterrupted(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    start_run(model_folder, folder).train()
    return load_run(folder)


@pytest.fixture(scope="module")
def processes():
    """Children are forked from a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.invariant.interrupted"])
    return context


def kill_run_at(where, model_folder, output_dir, processes):
    ours, theirs = processes.Pipe()
    arguments = (where, torch.get_num_threads(), model_folder, output_dir, theirs)
    child = processes.Process(target=train_until, args=arguments, daemon=True)
    child.start()
    theirs.close()
    try:
        assert ours.poll(PATIENCE), "the child neither trained nor ended"
        assert ours.recv() == "blocked"
    finally:
        child.kill()  # SIGKILL
        child.join()
        ours.close()
    assert child.exitcode == -9


def log_files(output_dir):
    folder = output_dir / "dynamics"
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def assert_same_log(run, expected):
    assert run.observed_steps == expected.observed_steps
    for table in ("probes", "sequences", "tokens", "steps"):
        ours, theirs = (getattr(log, table).drop(columns=TIMED_COLUMNS, errors="ignore") for log in (run, expected))
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


@pytest.mark.parametrize("where", CASES, ids=[where.replace(" ", "-").replace("/", "-") for where in CASES])
def test_a_killed_run_reads_to_its_last_observation_and_is_continued_without_a_trace(
    where, model_folder, tmp_path, uninterrupted, processes
):
    kill_run_at(where, model_folder, tmp_path, processes)
    killed = load_run(tmp_path)
    assert killed.observed_steps == CASES[where]
    for table in ("sequences", "tokens", "steps"):
        frame = getattr(uninterrupted, table)
        expected = frame[frame["step"].isin(CASES[where])].reset_index(drop=True)
        ours = getattr(killed, table)
        assert set(ours.columns) <= set(expected.columns)
        untimed = [column for column in ours.columns if column not in TIMED_COLUMNS]
        pd.testing.assert_frame_equal(ours[untimed], expected[untimed], check_exact=True)
    left = [file for file in log_files(tmp_path) if file.endswith(".tmp")]
    assert len(left) == (1 if where.startswith("half") else 0)  # the run was indeed killed while it wrote

    start_run(model_folder, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_log(load_run(tmp_path), uninterrupted)
    assert log_files(tmp_path) == log_files(uninterrupted.path.parent)
    assert load_run(tmp_path).meta["resumed_at"] == [2]
