"""A run killed in the middle of writing its log: it reads to the last completed part, and is continued exactly."""

import contextlib
import io
import multiprocessing

import pandas as pd
import pytest
import torch

from llm_dynamics.runlog import load_run, schema
from tests.invariant.interrupted import STARTS, train_until
from tests.training import TIMED, TIMED_COLUMNS, save_tiny_model, weights_of

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
def finished(model_folder, tmp_path_factory):
    """Uninterrupted runs by kind; each is made once."""
    trainers = {}

    def finish(kind):
        if kind not in trainers:
            trainers[kind] = STARTS[kind](model_folder, tmp_path_factory.mktemp("uninterrupted"))
            quietly(trainers[kind].train)
        return trainers[kind]

    return finish


@pytest.fixture(scope="module")
def processes():
    """Children are forked from a server that has imported everything once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.invariant.interrupted"])
    return context


def quietly(train, **options):
    """Train without the tables of completions that GRPO prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return train(**options)


def kill_run_at(kind, where, model_folder, output_dir, processes):
    ours, theirs = processes.Pipe()
    arguments = (kind, where, torch.get_num_threads(), model_folder, output_dir, theirs)
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
    for table in ("probes", *schema.TABLES):
        timed = [*TIMED_COLUMNS, "seconds"]
        ours, theirs = (getattr(log, table).drop(columns=timed, errors="ignore") for log in (run, expected))
        pd.testing.assert_frame_equal(ours, theirs, check_exact=True)


def rows_of(trainer):
    """The trainer's log rows, the last summary apart: all but wall time and TRL's count of tokens, which restarts."""
    rows = [row for row in trainer.state.log_history if "train_runtime" not in row]
    timed = (*TIMED, "dynamics/overhead", "num_tokens")
    return [{key: repr(value) for key, value in row.items() if not key.endswith(timed)} for row in rows]


@pytest.mark.parametrize("where", CASES, ids=[where.replace(" ", "-").replace("/", "-") for where in CASES])
def test_a_killed_run_reads_to_its_last_observation_and_is_continued_without_a_trace(
    where, model_folder, tmp_path, finished, processes
):
    uninterrupted = load_run(finished("sft").args.output_dir)
    kill_run_at("sft", where, model_folder, tmp_path, processes)
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
    continue_and_compare("sft", model_folder, tmp_path, finished("sft"))


def continue_and_compare(kind, model_folder, output_dir, finished):
    """Resume from the checkpoint at 2: logs, rows and weights are those of the run that nobody killed."""
    trainer = STARTS[kind](model_folder, output_dir)
    quietly(trainer.train, resume_from_checkpoint=str(output_dir / "checkpoint-2"))
    run, uninterrupted = load_run(output_dir), load_run(finished.args.output_dir)
    assert_same_log(run, uninterrupted)
    assert log_files(output_dir) == log_files(uninterrupted.path.parent)
    assert run.meta["resumed_at"] == [2]
    assert rows_of(trainer) == rows_of(finished)
    assert weights_of(trainer) == weights_of(finished)


EXPLAINED = {
    # kind, where it is killed, and the tables that an uninterrupted run fills at which steps
    "dpo": ("before accounts/step_000000004.parquet", {"steps": [0, 3, 5], "accounts": [1, 2, 4, 5]}),
    "nthr": (
        "half nthr_tokens/step_000000004.parquet",
        {"steps": [0, 3, 5], "rollouts": [1, 4], "nthr_tokens": [1, 4], "displacements": [1, 5], "accounts": [1, 4, 5]},
    ),
}


@pytest.mark.parametrize("kind", EXPLAINED)
def test_a_killed_run_is_continued_with_all_its_tables_rows_and_weights(
    kind, model_folder, tmp_path, finished, processes
):
    where, filled = EXPLAINED[kind]
    run = load_run(finished(kind).args.output_dir)
    assert {table: sorted(set(getattr(run, table)["step"])) for table in filled} == filled
    assert not run.training_tokens.empty
    kill_run_at(kind, where, model_folder, tmp_path, processes)
    assert (tmp_path / "dynamics" / "sequences" / "step_000000003.parquet").exists()  # beyond the checkpoint
    continue_and_compare(kind, model_folder, tmp_path, finished(kind))
