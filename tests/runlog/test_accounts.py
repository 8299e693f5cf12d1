"""The tables of the step account, on disk and back."""

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_dynamics.runlog import RunLogError, RunLogWriter, load_run, load_runs, schema

from .logs import META, as_before_stamps, explain, files_of, influence_frame, new_log, observe, training_tokens_frame
from .test_writer import crash_at_rename

TOKENS = pd.DataFrame({"probe_id": "p0/chosen", "position": [0, 1], "cause": "up", "share": 0.5, "measured": -1.0})
MAPS = pd.DataFrame({"probe_id": "p0/chosen", "example": 1, "m": [0, 1], "l": 0, "share": [0.25, math.nan]})
ALL = {"influence_tokens": TOKENS, "influence_maps": MAPS}
RUNLOG = (Path(__file__).parents[2] / "docs" / "runlog.md").read_text(encoding="utf-8")


@pytest.fixture
def log(tmp_path):
    """A run log with observations at steps 0 and 10 and the accounts of steps 1, 6 and 11."""
    writer = new_log(tmp_path / "out" / "dynamics")
    for step in (0, 10):
        observe(writer, step)
    for step in (1, 6, 11):
        explain(writer, step, -float(step), tables=ALL)
    return writer.folder


# ---- schema ----------------------------------------------------------------------------------------------------------


def test_accounts_are_written_last_since_they_mark_completeness():
    assert list(schema.ACCOUNT_TABLES)[-1] == "accounts"
    assert not schema.ACCOUNT_TABLES.keys() & schema.OBSERVED_TABLES.keys()


@pytest.mark.parametrize("table", schema.ACCOUNT_TABLES)
def test_every_column_says_what_it_holds_and_begins_with_the_step(table):
    columns = schema.ACCOUNT_TABLES[table]
    assert all(field.metadata[b"doc"] for field in columns)
    assert len(set(columns.names)) == len(columns)
    assert columns.names[0] == "step"


def test_shares_are_double_precision():
    shares = [columns.field("share") for columns in schema.ACCOUNT_TABLES.values() if "share" in columns.names]
    assert [str(field.type) for field in shares] == ["double"] * 4


@pytest.mark.parametrize("table", schema.ACCOUNT_TABLES)
def test_the_page_on_the_run_log_has_every_column_as_the_schema_describes_it(table):
    _, _, section = RUNLOG.partition(f"\n### {table}\n")
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", section.split("\n### ")[0], flags=re.M)
    assert rows == [
        (field.name, str(field.type), field.metadata[b"doc"].decode().replace("|", r"\|"))
        for field in schema.ACCOUNT_TABLES[table]
    ]


# ---- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", schema.ACCOUNT_TABLES)
def test_a_part_has_the_columns_and_types_of_its_schema(log, table):
    written = pq.read_schema(log / table / schema.part_name(6))
    assert written.equals(schema.ACCOUNT_TABLES[table])
    assert list(getattr(load_run(log), table)) == schema.ACCOUNT_TABLES[table].names


def test_accounts_come_back_as_written(log):
    run = load_run(log)
    assert run.explained_steps == [1, 6, 11]
    assert run.observed_steps == [0, 10]
    for step in run.explained_steps:
        own = run.influence.query("step == @step").drop(columns="step").reset_index(drop=True)
        expected = influence_frame(-float(step)).astype({"own_share": float})
        pd.testing.assert_frame_equal(own, expected, check_dtype=False)
    assert run.training_tokens["token"].tolist() == ["Ten", " minutes", "A", " week"] * 3
    assert run.training_examples["prompt_id"].isna().tolist() == [False, True] * 3
    assert run.influence_tokens["share"].tolist() == [0.5] * 6
    np.testing.assert_array_equal(run.influence_maps["share"], [0.25, math.nan] * 3)
    assert run.accounts["step"].tolist() == [1, 6, 11]
    assert run.accounts["note"].isna().all()


def test_a_nan_that_was_measured_stays_a_nan_and_a_null_a_null(tmp_path):
    writer = new_log(tmp_path)
    frame = influence_frame(math.nan)
    frame["own_share"] = pd.Series([None, math.nan] * 4, dtype=object)
    explain(writer, 1, tables={"influence": frame}, explained=math.nan, explained_by_gradient=None)
    part = pq.ParquetFile(tmp_path / "influence" / schema.part_name(1)).read()
    assert all(math.isnan(value) for value in part["measured"].to_pylist())
    assert part["own_share"].to_pylist()[0] is None
    assert math.isnan(part["own_share"].to_pylist()[1])
    account = pq.ParquetFile(tmp_path / "accounts" / schema.part_name(1)).read()
    assert math.isnan(account["explained"].to_pylist()[0])
    assert account["explained_by_gradient"].to_pylist() == [None]


def test_tables_that_were_not_measured_have_no_part_and_no_rows(tmp_path):
    explain(new_log(tmp_path), 1)
    assert not list((tmp_path / "influence_maps").iterdir())
    run = load_run(tmp_path)
    for name in ("influence_tokens", "influence_maps"):
        assert getattr(run, name).empty
        assert list(getattr(run, name)) == schema.ACCOUNT_TABLES[name].names


def test_writing_a_step_again_replaces_all_of_it(log):
    explain(RunLogWriter(log), 6, -99.0)
    run = load_run(log)
    assert run.influence.query("step == 6")["measured"].unique().tolist() == [-99.0]
    assert run.influence_maps["step"].unique().tolist() == [1, 11]
    assert len(run.accounts) == 3


def test_an_account_needs_influence_and_takes_known_tables_and_columns_only(tmp_path):
    writer = new_log(tmp_path)
    before = files_of(tmp_path)
    influence = influence_frame()
    with pytest.raises(ValueError, match=r"`influence` is needed; seen: training_tokens"):
        writer.write_account(1, {"training_tokens": training_tokens_frame()}, {})
    for name in ("accounts", "tokens"):
        with pytest.raises(ValueError, match=f"seen: influence, {name}"):
            writer.write_account(1, {"influence": influence, name: influence}, {})
    with pytest.raises(ValueError, match=r"influence has no column shares; allowed: step, family"):
        writer.write_account(1, {"influence": influence.rename(columns={"share": "shares"})}, {})
    with pytest.raises(ValueError, match=r"accounts has no column lr"):
        writer.write_account(1, {"influence": influence}, {"lr": 1.0})
    assert files_of(tmp_path) == before


# ---- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(1, 7))
def test_an_account_appears_whole_or_not_at_all(tmp_path, monkeypatch, number):
    writer = new_log(tmp_path)
    observe(writer, 0)
    explain(writer, 1, tables=ALL)
    whole = files_of(tmp_path)
    with monkeypatch.context() as patch:
        crash_at_rename(patch, number)
        with pytest.raises(OSError, match="killed here"):
            explain(writer, 6, tables=ALL)
    run = load_run(tmp_path)
    assert run.explained_steps == [1]
    assert all(getattr(run, name)["step"].unique().tolist() == [1] for name in schema.ACCOUNT_TABLES)
    # it lies before the checkpoint, but was never complete
    assert RunLogWriter(tmp_path).resume(20, META) == []
    assert files_of(tmp_path).keys() == whole.keys()


@pytest.mark.parametrize("number", range(1, 7))
def test_an_account_is_never_half_old_and_half_new(log, monkeypatch, number):
    crash_at_rename(monkeypatch, number)
    with pytest.raises(OSError, match="killed here"):
        explain(RunLogWriter(log), 6, -99.0, tables=ALL)
    run = load_run(log)
    assert run.explained_steps == [1, 11]
    assert run.influence["step"].unique().tolist() == [1, 11]


# ---- resuming --------------------------------------------------------------------------------------------------------


def test_resuming_drops_the_accounts_after_the_checkpoint_and_keeps_the_rest(log):
    before = files_of(log)
    assert RunLogWriter(log).resume(6, META) == [10]
    after = files_of(log)
    kept = {name for name in before if not name.endswith(("000000010.parquet", "000000011.parquet"))}
    assert after.keys() == kept
    assert all(after[name] == before[name] for name in kept - {"meta.json"})
    assert load_run(log).explained_steps == [1, 6]


def test_a_log_from_before_there_were_accounts_reads_and_resumes(log):
    for name in schema.ACCOUNT_TABLES:
        for part in (log / name).iterdir():
            part.unlink()
        (log / name).rmdir()
    run = load_run(log)
    assert run.explained_steps == []
    for name, columns in schema.ACCOUNT_TABLES.items():
        assert getattr(run, name).empty
        assert list(getattr(run, name)) == columns.names
    assert run.family_influence().empty
    writer = RunLogWriter(log)
    writer.resume(10, META)
    explain(writer, 11)
    assert load_run(log).explained_steps == [11]


# ---- bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", schema.ACCOUNT_TABLES)
@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing"], ids=["empty", "garbage"])
def test_a_bad_part_is_named_and_the_rest_can_be_read(log, table, content):
    (log / table / schema.part_name(6)).write_bytes(content)
    with pytest.raises(RunLogError, match=rf"{table}/step_000000006\.parquet.*errors=\"warn\""):
        getattr(load_run(log), table)
    run = load_run(log, errors="warn")
    with pytest.warns(UserWarning, match=rf"left out of {table}.*step_000000006\.parquet"):
        frame = getattr(run, table)
    assert frame["step"].unique().tolist() == [1, 11]


def test_influence_that_is_gone_is_named(log):
    (log / "influence" / schema.part_name(6)).unlink()
    with pytest.raises(RunLogError, match=r"influence/step_000000006\.parquet"):
        _ = load_run(log).influence


def test_a_foreign_part_is_shown_with_what_is_missing(log):
    pq.write_table(pa.table({"price": [1.0]}), log / "training_tokens" / schema.part_name(6))
    with pytest.raises(RunLogError, match=r"share \(double\).*seen: price"):
        _ = load_run(log).training_tokens


# ---- means over families ---------------------------------------------------------------------------------------------


def family_row(family="chosen", cause="up", share=7.0, measured=7.0):
    return pd.DataFrame(
        {"family": [family], "probe_id": None, "n_probes": 12, "cause": cause, "share": share, "measured": measured}
    )


def test_the_influence_on_a_family_is_the_mean_over_its_probes(tmp_path):
    ids = ("p0/chosen", "p1/chosen", "p0/rejected")
    frame = influence_frame(ids=ids)
    frame.loc[frame["probe_id"] == "p1/chosen", ["share", "own_share"]] *= 3
    writer = new_log(tmp_path)
    writer.write_account(4, {"influence": frame}, {})
    means = load_run(tmp_path).family_influence()
    assert list(means) == ["step", "family", "cause", "share", "own_share", "measured", "n_probes", "n_nonfinite"]
    assert means["cause"].tolist() == ["momentum", "up", "down", "remainder"] * 2
    chosen = means[means["family"] == "chosen"].set_index("cause")
    assert chosen["share"].tolist() == [-2.0, 4.0, -10.0, 0.0]
    assert chosen["own_share"].tolist()[1:3] == [2.0, -5.0]
    assert math.isnan(chosen.loc["momentum", "own_share"])
    assert chosen["n_probes"].unique().tolist() == [2]
    rejected = means[means["family"] == "rejected"]
    assert rejected["share"].sum() == rejected["measured"].iloc[0] == -4.0
    assert means.dtypes["n_probes"] == "int64"


def test_a_row_of_the_familys_own_goes_before_the_mean_over_the_probes_that_were_logged(tmp_path):
    writer = new_log(tmp_path)
    writer.write_account(1, {"influence": pd.concat([family_row(), influence_frame()])}, {})
    writer.write_account(2, {"influence": influence_frame()}, {})
    means = load_run(tmp_path).family_influence().set_index(["step", "family", "cause"])
    assert means.loc[(1, "chosen"), "share"].to_dict() == {"up": 7.0}
    assert means.loc[(1, "chosen", "up"), "n_probes"] == 12
    assert means.loc[(1, "rejected"), "share"].sum() == -4.0
    assert means.loc[(2, "chosen"), "share"].sum() == -4.0


def test_a_probe_that_is_not_finite_is_left_out_with_all_its_causes_and_counted(tmp_path):
    frame = influence_frame(ids=("p0/chosen", "p1/chosen"))
    frame.loc[(frame["probe_id"] == "p1/chosen") & (frame["cause"] == "up"), "share"] = math.inf
    writer = new_log(tmp_path)
    writer.write_account(1, {"influence": frame}, {})
    means = load_run(tmp_path).family_influence()
    assert means["share"].sum() == means["measured"].iloc[0] == -4.0
    assert means["n_probes"].unique().tolist() == means["n_nonfinite"].unique().tolist() == [1]
    assert means.set_index("cause").loc["up", "own_share"] == 1.0


def test_a_probe_that_is_not_finite_once_is_left_out_of_every_step_so_that_steps_add_up(tmp_path):
    frame = influence_frame(ids=("p0/chosen", "p1/chosen"))
    bad = frame.assign(share=frame["share"].mask((frame["probe_id"] == "p1/chosen") & (frame["cause"] == "up")))
    writer = new_log(tmp_path)
    writer.write_account(1, {"influence": frame.assign(measured=frame["measured"], share=frame["share"])}, {})
    writer.write_account(2, {"influence": bad}, {})
    means = load_run(tmp_path).family_influence()
    assert means.groupby("step")["n_probes"].unique().map(list).to_dict() == {1: [1], 2: [1]}
    assert means["n_nonfinite"].unique().tolist() == [1]


def test_a_step_of_which_nothing_is_known_leaves_no_probe_out_of_other_steps(tmp_path):
    frame = influence_frame(ids=("p0/chosen", "p1/chosen"))
    writer = new_log(tmp_path)
    writer.write_account(1, {"influence": frame}, {})
    writer.write_account(2, {"influence": frame.assign(share=math.nan)}, {})
    means = load_run(tmp_path).family_influence()
    assert means.groupby("step")["n_probes"].unique().map(list).to_dict() == {1: [2], 2: [0]}
    assert means[means["step"] == 1]["share"].sum() == -4.0
    assert means[means["step"] == 2]["share"].isna().all()


def test_accounts_of_several_runs_are_stacked(log, tmp_path):
    other = new_log(tmp_path / "other")
    explain(other, 3)
    plain = new_log(tmp_path / "plain")
    runs = load_runs({"dpo": log, "sft": other.folder, "none": plain.folder})
    for name in schema.ACCOUNT_TABLES:
        assert getattr(runs, name).columns[0] == "run"
    assert runs.accounts.groupby("run")["step"].apply(list).to_dict() == {"dpo": [1, 6, 11], "sft": [3]}
    means = runs.family_influence()
    assert means.columns[0] == "run"
    assert means["run"].unique().tolist() == ["dpo", "sft"]


@pytest.mark.parametrize("columns", [None, ["step", "row"], ["row"], ["example", "role"]])
def test_a_log_written_before_rows_were_kept_is_read_with_nulls_in_their_place(columns, tmp_path):
    writer = new_log(tmp_path)
    observe(writer, 1)
    explain(writer, 1)
    as_before_stamps(tmp_path)
    part = tmp_path / "training_examples" / schema.part_name(1)
    old = pq.read_table(part)
    pq.write_table(old.drop_columns(["row"]), part)
    run = load_run(tmp_path)
    frame = run.training_examples if columns is None else run.columns("training_examples", columns)
    assert len(frame) == 2
    if "row" in frame:
        assert frame["row"].isna().all()
    assert run.blame("chosen")["share"].tolist() == [-1.0, -1.0]
    pq.write_table(old.drop_columns(["role"]), part)  # a column that has always been there
    with pytest.raises(RunLogError, match="missing or of another type: role"):
        _ = load_run(tmp_path).training_examples
