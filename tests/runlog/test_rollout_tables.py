"""The tables of reinforcement, on disk and back."""

import importlib.util
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_dynamics.runlog import RunLogError, RunLogWriter, load_run, load_runs, schema

from .logs import META, explain, files_of, new_log, observe
from .test_writer import crash_at_rename

TABLES = list(schema.ROLLOUT_TABLES)
ROLLOUTS = pd.DataFrame(
    {
        "example": [0, 1, 2],
        "question": [0, 0, 1],
        "prompt": "Boil an egg?",
        "completion": ["Ten minutes.<|im_end|>", "", "Größe\n  \t'\""],
        "n_tokens": [3, 0, 4],
        "reward": [1.0, 0.25, None],
        "correct": pd.Series([True, False, None], dtype=object),
        "advantage": [0.7, -0.7, 0.0],
        "success_rate": [0.5, 0.5, None],
        "eta": [0.0, 0.0, None],
        "threshold": [-math.inf, -math.inf, None],
        "anchor": [2.5, None, None],
        "n_selected": [0, 0, 0],
    }
)
TOKENS = pd.DataFrame(
    {
        "example": [0, 0, 1],
        "question": 0,
        "position": [0, 1, 0],
        "token_id": [4, 5, 6],
        "token": ["Ten", " minutes", "A"],
        "score": pd.Series([None, None, 3.25], dtype=object),
        "threshold": 2.5,
        "selected": [False, False, True],
        "advantage_before": [0.7, 0.7, -0.7],
        "advantage": [0.7, 0.7, -0.0],
    }
)
DISPLACEMENTS = pd.DataFrame(
    {
        "example": [0],
        "question": [0],
        "prompt": "Boil an egg?",
        "completion": "Ten minutes.",
        "n_tokens": 3,
        "success_rate": 0.5,
        "logp_before": -4.0,
        "logp_after": -3.5,
    }
)
ALL = {"rollouts": ROLLOUTS, "nthr_tokens": TOKENS, "displacements": DISPLACEMENTS}


@pytest.fixture
def log(tmp_path):
    """A run log observed at steps 0 and 10, with rollouts of the steps 1, 6 and 11."""
    writer = new_log(tmp_path / "out" / "dynamics")
    for step in (0, 10):
        observe(writer, step)
    for step in (1, 6, 11):
        writer.write_rollouts(step, ALL)
    return writer.folder


# ---- schema ----------------------------------------------------------------------------------------------------------


def test_the_tables_have_names_of_their_own():
    assert not schema.ROLLOUT_TABLES.keys() & (schema.OBSERVED_TABLES.keys() | schema.ACCOUNT_TABLES.keys())
    assert set(schema.ROLLOUT_TABLES) < set(schema.TABLES)


@pytest.mark.parametrize("table", TABLES)
def test_every_column_says_what_it_holds_and_begins_with_the_step(table):
    columns = schema.ROLLOUT_TABLES[table]
    assert all(field.metadata[b"doc"] for field in columns)
    assert len(set(columns.names)) == len(columns)
    assert columns.names[:3] == ["step", "example", "question"]


# ---- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_a_part_has_the_columns_and_types_of_its_schema(log, table):
    assert pq.read_schema(log / table / schema.part_name(6)).equals(schema.ROLLOUT_TABLES[table])


@pytest.mark.parametrize("table", TABLES)
def test_rollouts_come_back_as_written(log, table):
    frame = getattr(load_run(log), table)
    assert list(frame) == schema.ROLLOUT_TABLES[table].names
    assert frame["step"].unique().tolist() == [1, 6, 11]
    for step in (1, 6, 11):
        own = frame[frame["step"] == step].drop(columns="step").reset_index(drop=True)
        for column, written in ALL[table].items():
            for ours, theirs in zip(own[column], written, strict=True):
                missing = theirs is None or (isinstance(theirs, float) and math.isnan(theirs))
                assert pd.isna(ours) if missing else ours == theirs, column


def test_an_infinite_threshold_and_a_null_are_told_apart(log):
    column = pq.ParquetFile(log / "rollouts" / schema.part_name(1)).read()["threshold"].to_pylist()
    assert column[:2] == [-math.inf, -math.inf]
    assert pq.ParquetFile(log / "nthr_tokens" / schema.part_name(1)).read()["score"].to_pylist() == [None, None, 3.25]
    assert pq.ParquetFile(log / "rollouts" / schema.part_name(1)).read()["correct"].to_pylist() == [True, False, None]


@pytest.mark.parametrize("table", TABLES)
def test_an_empty_table_has_a_part_with_its_columns(tmp_path, table):
    writer = new_log(tmp_path)
    writer.write_rollouts(3, {table: ALL[table].iloc[:0]})
    assert pq.read_schema(tmp_path / table / schema.part_name(3)).equals(schema.ROLLOUT_TABLES[table])
    frame = getattr(load_run(tmp_path), table)
    assert frame.empty
    assert list(frame) == schema.ROLLOUT_TABLES[table].names


def test_tables_of_a_run_are_read_one_by_one_and_need_no_observation(tmp_path):
    writer = new_log(tmp_path)
    writer.write_rollouts(2, {"displacements": DISPLACEMENTS})
    run = load_run(tmp_path)
    assert run.observed_steps == run.explained_steps == []
    assert run.displacements["step"].tolist() == [2]
    for table in ("rollouts", "nthr_tokens"):
        assert getattr(run, table).empty
        assert not list((tmp_path / table).iterdir())
    assert [part.num_rows for part in run.parts("displacements", steps=[1, 2])] == [1]  # step 1 was not looked at


def test_a_missing_column_becomes_null_and_the_step_is_filled_in(tmp_path):
    writer = new_log(tmp_path)
    writer.write_rollouts(2, {"rollouts": ROLLOUTS.drop(columns="anchor").assign(step=77)})
    part = pq.ParquetFile(tmp_path / "rollouts" / schema.part_name(2)).read()
    assert part["anchor"].to_pylist() == [None] * 3
    assert part["step"].to_pylist() == [2] * 3


def test_writing_a_step_again_replaces_it_and_no_other_table(log):
    before = files_of(log)
    RunLogWriter(log).write_rollouts(6, {"displacements": DISPLACEMENTS.assign(logp_after=-9.0)})
    after = files_of(log)
    assert [name for name in before if before[name] != after[name]] == ["displacements/step_000000006.parquet"]
    assert before.keys() == after.keys()
    assert load_run(log).displacements["logp_after"].tolist() == [-3.5, -9.0, -3.5]


@pytest.mark.parametrize("unknown", ["rollout", "influence", "tokens"])
@pytest.mark.parametrize("first", [False, True])
def test_a_table_that_is_none_of_these_is_refused_and_nothing_is_written(tmp_path, unknown, first):
    writer = new_log(tmp_path)
    before = files_of(tmp_path)
    tables = {unknown: ROLLOUTS, **ALL} if first else {**ALL, unknown: ROLLOUTS}
    with pytest.raises(KeyError, match=unknown):
        writer.write_rollouts(1, tables)
    assert files_of(tmp_path).keys() == before.keys()


def test_pandas_reads_a_folder_of_parts_without_this_package(log):
    for table in TABLES:
        frame = pd.read_parquet(log / table)
        pd.testing.assert_frame_equal(frame, getattr(load_run(log), table), check_dtype=False)
    fell = pd.read_parquet(log / "displacements").query("logp_after < logp_before")
    assert fell.empty


def test_duckdb_reads_a_folder_of_parts_without_this_package(log):
    if importlib.util.find_spec("duckdb") is None:
        pytest.skip("duckdb is not installed")
    import duckdb

    for table in TABLES:
        rows = duckdb.sql(f"select count(*), max(step) from '{log}/{table}/*.parquet'").fetchall()
        assert rows == [(3 * len(ALL[table]), 11)]


# ---- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_killed_writer_leaves_whole_parts_only_and_resuming_sweeps_up(log, monkeypatch, number):
    before = files_of(log)
    with monkeypatch.context() as patch:
        crash_at_rename(patch, number)
        with pytest.raises(OSError, match="killed here"):
            RunLogWriter(log).write_rollouts(16, ALL)
    left = files_of(log).keys() - before.keys()
    assert len(left) == number - 1  # an error while writing leaves nothing
    (log / "rollouts" / ".step_000000016.parquet.77.tmp").write_bytes(b"PAR1")  # a kill may
    run = load_run(log)
    for place, table in enumerate(TABLES, start=1):
        steps = [1, 6, 11] + ([16] if place < number else [])
        assert getattr(run, table)["step"].unique().tolist() == steps
        assert len(getattr(run, table)) == len(steps) * len(ALL[table])
    assert RunLogWriter(log).resume(12, META) == []
    assert files_of(log).keys() == before.keys()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_part_that_is_being_replaced_is_the_old_or_the_new(log, monkeypatch, number):
    crash_at_rename(monkeypatch, number)
    with pytest.raises(OSError, match="killed here"):
        RunLogWriter(log).write_rollouts(6, {name: frame.iloc[:1].assign(example=9) for name, frame in ALL.items()})
    run = load_run(log)
    for place, table in enumerate(TABLES, start=1):
        own = getattr(run, table).query("step == 6")["example"].tolist()
        assert own == ([9] if place < number else ALL[table]["example"].tolist())


# ---- resuming --------------------------------------------------------------------------------------------------------


def test_resuming_drops_what_came_after_the_checkpoint_and_keeps_the_rest(log):
    explain(RunLogWriter(log), 6)
    before = files_of(log)
    assert RunLogWriter(log).resume(6, META) == [10]  # observations, as ever
    after = files_of(log)
    kept = {name for name in before if not name.endswith(("000000010.parquet", "000000011.parquet"))}
    assert after.keys() == kept
    assert all(after[name] == before[name] for name in kept - {"meta.json"})
    for table in TABLES:
        assert getattr(load_run(log), table)["step"].unique().tolist() == [1, 6]


def test_each_table_is_resumed_by_its_own_steps(tmp_path):
    writer = new_log(tmp_path)
    for step, table in ((1, "rollouts"), (2, "displacements"), (5, "rollouts"), (5, "displacements")):
        writer.write_rollouts(step, {table: ALL[table]})
    RunLogWriter(tmp_path).resume(4, META)
    run = load_run(tmp_path)
    assert run.rollouts["step"].unique().tolist() == [1]
    assert run.displacements["step"].unique().tolist() == [2]
    assert run.nthr_tokens.empty


def test_a_new_run_moves_the_old_tables_aside(log):
    moved = RunLogWriter(log).start(load_run(log).probes, META)
    assert load_run(moved).rollouts["step"].unique().tolist() == [1, 6, 11]
    assert load_run(log).rollouts.empty


def test_a_log_from_before_there_were_these_tables_reads_and_resumes(log):
    for table in TABLES:
        for part in (log / table).iterdir():
            part.unlink()
        (log / table).rmdir()
    run = load_run(log)
    for table, columns in schema.ROLLOUT_TABLES.items():
        assert getattr(run, table).empty
        assert list(getattr(run, table)) == columns.names
    writer = RunLogWriter(log)
    writer.resume(10, META)
    writer.write_rollouts(11, ALL)
    assert load_run(log).nthr_tokens["step"].unique().tolist() == [11]


# ---- bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing"], ids=["empty", "garbage"])
def test_a_bad_part_is_named_and_the_rest_can_be_read(log, table, content):
    (log / table / schema.part_name(6)).write_bytes(content)
    with pytest.raises(RunLogError, match=rf"{table}/step_000000006\.parquet.*errors=\"warn\""):
        getattr(load_run(log), table)
    run = load_run(log, errors="warn")
    with pytest.warns(UserWarning, match=rf"left out of {table}.*step_000000006\.parquet"):
        frame = getattr(run, table)
    assert frame["step"].unique().tolist() == [1, 11]


def test_a_foreign_part_is_shown_with_what_is_missing(log):
    pq.write_table(pa.table({"price": [1.0]}), log / "displacements" / schema.part_name(6))
    with pytest.raises(RunLogError, match=r"logp_after \(double\).*seen: price"):
        _ = load_run(log).displacements


# ---- several runs ----------------------------------------------------------------------------------------------------


def test_rollouts_of_several_runs_are_stacked(log, tmp_path):
    other = new_log(tmp_path / "other")
    other.write_rollouts(3, {"displacements": DISPLACEMENTS})
    plain = new_log(tmp_path / "plain")
    runs = load_runs({"nthr": log, "grpo": other.folder, "none": plain.folder})
    for table in TABLES:
        frame = getattr(runs, table)
        assert list(frame) == ["run", *schema.ROLLOUT_TABLES[table].names]
    assert runs.displacements.groupby("run")["step"].apply(list).to_dict() == {"nthr": [1, 6, 11], "grpo": [3]}
    assert runs.rollouts["run"].unique().tolist() == ["nthr"]
    change = runs.displacements["logp_after"] - runs.displacements["logp_before"]
    np.testing.assert_array_equal(change, 0.5)


# ---- documentation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_the_page_on_the_run_log_has_every_column_as_the_schema_describes_it(table):
    page = (Path(__file__).parents[2] / "docs" / "runlog.md").read_text(encoding="utf-8")
    _, _, section = page.partition(f"\n### {table}\n")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", section.split("\n### ")[0], flags=re.M)
    assert rows == [
        (field.name, str(field.type), field.metadata[b"doc"].decode().replace("|", r"\|"))
        for field in schema.ROLLOUT_TABLES[table]
    ]
