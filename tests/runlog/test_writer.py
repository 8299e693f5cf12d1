import json
import math
import re
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from llm_dynamics.runlog import RunLogError, RunLogWriter, load_run, schema

from .logs import META, files_of, new_log, observe, probes_frame, sequences_frame, tokens_frame

INF = math.inf


def column(folder, table, step, name):
    return pq.ParquetFile(folder / table / schema.part_name(step)).read()[name].to_pylist()


def crash_at_rename(monkeypatch, number):
    """Let the `number`-th rename from now on fail, as if the process had died there, and all later ones."""
    renames = []
    original = Path.replace

    def replace(self, target):
        renames.append(target)
        if len(renames) >= number:
            raise OSError("killed here")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)


# ---- what lies on disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["sequences", "tokens", "steps"])
def test_a_part_has_the_columns_and_types_of_its_schema(tmp_path, table):
    observe(new_log(tmp_path / "dynamics"), 5, loss=0.5)
    written = pq.read_schema(tmp_path / "dynamics" / table / schema.part_name(5))
    assert written.equals(schema.OBSERVED_TABLES[table])


def test_the_probes_table_has_the_columns_and_types_of_its_schema(tmp_path):
    new_log(tmp_path)
    table = pq.ParquetFile(tmp_path / "probes.parquet").read()
    assert table.schema.equals(schema.PROBES)
    assert table["source_row"].to_pylist() == [0, None]
    assert table["response_ids"].to_pylist() == [[4, 5], [4, 5]]


def test_metrics_of_the_run_follow_the_fixed_columns_as_doubles(tmp_path):
    observe(new_log(tmp_path), 0, **{"probe/chosen_logp": -3, "loss": 1})
    written = pq.read_schema(tmp_path / "steps" / schema.part_name(0))
    assert written.names == [*schema.STEPS.names, "probe/chosen_logp"]
    assert str(written.field("probe/chosen_logp").type) == "double"


def test_a_column_that_was_not_measured_is_null(tmp_path):
    observe(new_log(tmp_path), 0)
    assert column(tmp_path, "sequences", 0, "ref_logp_sum") == [None, None]
    assert column(tmp_path, "tokens", 0, "rank") == [None] * 4
    assert column(tmp_path, "steps", 0, "overhead") == [None]


def test_a_nan_that_was_measured_stays_a_nan_and_a_null_a_null(tmp_path):
    writer = new_log(tmp_path)
    frame = sequences_frame([math.nan, -INF], entropy_sum=pd.Series([None, INF], dtype=object))
    writer.write(0, sequences=frame, tokens=tokens_frame([math.nan, -2.0]), scalars=lambda: {"loss": math.nan})
    first, second = column(tmp_path, "sequences", 0, "logp_sum")
    assert math.isnan(first)
    assert second == -INF
    assert column(tmp_path, "sequences", 0, "entropy_sum") == [None, INF]
    logps = column(tmp_path, "tokens", 0, "logp")
    assert [value is not None and math.isnan(value) for value in logps] == [True, True, False, False]
    assert math.isnan(column(tmp_path, "steps", 0, "loss")[0])


def test_pandas_reads_a_folder_of_parts_without_this_package(tmp_path):
    writer = new_log(tmp_path / "lr=1e-4" / "dynamics")
    observe(writer, 0)
    observe(writer, 10, (-3.0, -4.0))
    (writer.folder / "tokens" / ".step_000000020.parquet.1.tmp").write_bytes(b"left by a killed writer")
    tokens = pd.read_parquet(writer.folder / "tokens")
    assert list(tokens.columns) == schema.TOKENS.names
    assert tokens.groupby("step")["logp"].sum().to_dict() == {0: -3.0, 10: -7.0}
    sequences = pd.read_parquet(writer.folder / "sequences")
    assert sequences["logp_sum"].tolist() == [-1.0, -2.0, -3.0, -4.0]
    assert pd.read_parquet(writer.folder / "probes.parquet")["probe_id"].tolist() == ["p0/chosen", "p0/rejected"]


def test_meta_is_readable_json_with_the_schema_version(tmp_path):
    new_log(tmp_path, note="naïve ✓", output_dir=Path("a"))
    meta = json.loads((tmp_path / "meta.json").read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{32}", meta.pop("run_id"))
    assert meta == {"schema_version": schema.SCHEMA_VERSION, **META, "note": "naïve ✓", "output_dir": "a"}


def test_the_size_of_a_table_is_that_of_its_parts(tmp_path):
    writer = new_log(tmp_path)
    assert writer.table_bytes("tokens") == 0
    observe(writer, 0)
    observe(writer, 1)
    (tmp_path / "tokens" / ".step_000000002.parquet.1.tmp").write_bytes(bytes(1000))
    parts = [tmp_path / "tokens" / schema.part_name(step) for step in (0, 1)]
    assert writer.table_bytes("tokens") == sum(part.stat().st_size for part in parts)


# ---- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "table"), [(1, "sequences"), (2, "tokens"), (3, "steps")])
def test_a_part_appears_whole_or_not_at_all(tmp_path, monkeypatch, number, table):
    writer = new_log(tmp_path)
    observe(writer, 0)
    crash_at_rename(monkeypatch, number)
    with pytest.raises(OSError, match="killed here"):
        observe(writer, 10)
    assert not (tmp_path / table / schema.part_name(10)).exists()
    run = load_run(tmp_path)
    assert run.observed_steps == [0]
    assert run.sequences["step"].unique().tolist() == [0]
    assert run.tokens["step"].unique().tolist() == [0]
    assert run.steps["step"].tolist() == [0]


def test_a_part_cut_short_while_it_is_written_has_no_visible_name(tmp_path, monkeypatch):
    writer = new_log(tmp_path)
    observe(writer, 0)

    def no_space(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        observe(writer, 10)
    assert [file.name for file in (tmp_path / "sequences").iterdir() if not file.name.startswith(".")] == [
        schema.part_name(0)
    ]
    assert load_run(tmp_path).sequences["step"].unique().tolist() == [0]


def test_meta_stays_whole_when_writing_it_fails(tmp_path, monkeypatch):
    writer = new_log(tmp_path)
    before = load_run(tmp_path).meta
    crash_at_rename(monkeypatch, 1)
    with pytest.raises(OSError, match="killed here"):
        writer.update_meta(finished_at_step=10)
    assert load_run(tmp_path).meta == before


def test_the_scalars_are_asked_for_when_the_other_tables_are_on_disk(tmp_path):
    writer = new_log(tmp_path)
    seen = []

    def scalars():
        seen.extend(table for table in schema.OBSERVED_TABLES if (tmp_path / table / schema.part_name(0)).exists())
        return {}

    writer.write(0, sequences=sequences_frame([-1.0, -2.0]), tokens=tokens_frame([-1.0, -2.0]), scalars=scalars)
    assert seen == ["sequences", "tokens"]


def test_writing_a_step_again_replaces_it(tmp_path):
    writer = new_log(tmp_path)
    observe(writer, 0, (-1.0, -2.0), loss=1.0)
    observe(writer, 0, (-5.0, -6.0), loss=3.0)
    run = load_run(tmp_path)
    assert run.observed_steps == [0]
    assert run.sequences["logp_sum"].tolist() == [-5.0, -6.0]
    assert run.tokens["logp"].sum() == -11.0
    assert run.steps["loss"].tolist() == [3.0]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_observation_is_never_half_old_and_half_new(tmp_path, monkeypatch, number):
    writer = new_log(tmp_path)
    observe(writer, 0)
    observe(writer, 10, (-1.0, -2.0))
    crash_at_rename(monkeypatch, number)
    with pytest.raises(OSError, match="killed here"):
        observe(writer, 10, (-5.0, -6.0))
    assert load_run(tmp_path).observed_steps == [0]


def test_writing_a_step_again_without_tokens_leaves_no_tokens_of_the_first_time(tmp_path):
    writer = new_log(tmp_path)
    observe(writer, 0, (-1.0, -2.0))
    observe(writer, 0, (-5.0, -6.0), tokens=False)
    assert load_run(tmp_path).tokens.empty


def test_steps_and_has_tell_of_complete_observations_only(tmp_path):
    writer = new_log(tmp_path)
    for step in (20, 0, 10):
        observe(writer, step)
    (tmp_path / "steps" / schema.part_name(10)).unlink()
    assert writer.steps() == [0, 20]
    assert [writer.has(step) for step in (0, 10, 20, 30)] == [True, False, True, False]


# ---- a fresh start ---------------------------------------------------------------------------------------------------


def test_a_fresh_start_moves_an_earlier_log_aside_and_loses_nothing(tmp_path):
    writer = RunLogWriter(tmp_path / "dynamics")
    assert not writer.exists()
    assert writer.start(probes_frame(), META) is None
    assert writer.exists()
    observe(writer, 0)
    before = files_of(writer.folder)
    (writer.folder / "notes.txt").write_text("somebody's own file")

    second = RunLogWriter(tmp_path / "dynamics")
    moved = second.start(probes_frame(), META)
    assert files_of(moved) == before
    assert load_run(moved).observed_steps == [0]
    assert load_run(tmp_path).observed_steps == []
    assert (writer.folder / "notes.txt").read_text() == "somebody's own file"

    third = RunLogWriter(tmp_path / "dynamics").start(probes_frame(), META)
    assert third != moved
    assert files_of(moved) == before


# ---- resuming --------------------------------------------------------------------------------------------------------


def test_resuming_drops_what_was_observed_after_the_checkpoint_and_keeps_the_rest(tmp_path):
    first = new_log(tmp_path)
    for step in (0, 10, 20, 30):
        observe(first, step, (-float(step), -1.0))
    kept = {name: content for name, content in files_of(tmp_path).items() if "step_000000000" in name or "10." in name}

    second = RunLogWriter(tmp_path)
    assert second.resume(15, META) == [20, 30]
    assert second.steps() == [0, 10]
    after = files_of(tmp_path)
    assert {name: after[name] for name in kept} == kept
    assert not [name for name in after if "20." in name or "30." in name]

    observe(second, 20, (-99.0, -1.0))
    run = load_run(tmp_path)
    assert run.observed_steps == [0, 10, 20]
    assert run.sequences["logp_sum"].tolist()[::2] == [0.0, -10.0, -99.0]
    assert not run.sequences.duplicated(["step", "probe_id"]).any()


def test_the_observation_at_the_checkpoint_itself_is_kept(tmp_path):
    observe(new_log(tmp_path), 10)
    assert RunLogWriter(tmp_path).resume(10, META) == []
    assert load_run(tmp_path).observed_steps == [10]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_resuming_clears_what_a_killed_writer_left(tmp_path, monkeypatch, number):
    writer = new_log(tmp_path)
    observe(writer, 0)
    whole = files_of(tmp_path)
    with monkeypatch.context() as patch:
        crash_at_rename(patch, number)
        with pytest.raises(OSError, match="killed here"):
            observe(writer, 10)
    # the interrupted observation lies before the checkpoint: it was never complete, so it goes all the same
    RunLogWriter(tmp_path).resume(20, META)
    assert files_of(tmp_path).keys() == whole.keys()


def test_keys_of_meta_that_only_the_first_run_set_stay(tmp_path):
    first = new_log(tmp_path, created="monday", learning_rate=1.0)
    first.update_meta(token_probes=["p0/chosen"])
    second = RunLogWriter(tmp_path)
    second.resume(0, META | {"created": "tuesday", "learning_rate": 2.0})
    meta = load_run(tmp_path).meta
    assert meta["token_probes"] == second.meta["token_probes"] == ["p0/chosen"]
    assert meta["created"] == "monday"
    assert meta["learning_rate"] == 2.0


def test_every_resume_is_on_record(tmp_path):
    observe(new_log(tmp_path), 0)
    RunLogWriter(tmp_path).resume(5, META)
    RunLogWriter(tmp_path).resume(7, META)
    assert load_run(tmp_path).meta["resumed_at"] == [5, 7]


def test_other_probes_are_refused_and_both_shown(tmp_path):
    observe(new_log(tmp_path), 10)
    before = files_of(tmp_path)
    with pytest.raises(RunLogError, match=r"'abc'.*'xyz'"):
        RunLogWriter(tmp_path).resume(0, {"probes_fingerprint": "xyz"})
    assert files_of(tmp_path) == before


def test_another_schema_version_is_refused_and_both_shown(tmp_path):
    observe(new_log(tmp_path), 10)
    (tmp_path / "meta.json").write_text(json.dumps(META | {"schema_version": 99}))
    before = files_of(tmp_path)
    with pytest.raises(RunLogError, match=f"99.*{schema.SCHEMA_VERSION}"):
        RunLogWriter(tmp_path).resume(0, META)
    assert files_of(tmp_path) == before


def test_a_log_that_was_copied_without_its_empty_folders_can_be_resumed(tmp_path):
    # as `git`, zip files and object stores do: a run that keeps no tokens has an empty `tokens` folder
    observe(new_log(tmp_path), 0, tokens=False)
    (tmp_path / "tokens").rmdir()
    writer = RunLogWriter(tmp_path)
    writer.resume(0, META)
    observe(writer, 10)
    assert load_run(tmp_path).observed_steps == [0, 10]


def test_resuming_leaves_what_others_put_into_the_folders(tmp_path):
    observe(new_log(tmp_path), 0)
    (tmp_path / "sequences" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "sequences" / ".gitkeep").touch()
    RunLogWriter(tmp_path).resume(0, META)
    assert (tmp_path / "sequences" / ".gitkeep").exists()
    assert (tmp_path / "sequences" / ".ipynb_checkpoints").exists()
