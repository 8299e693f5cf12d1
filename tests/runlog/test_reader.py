import json
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.files import write_parquet
from llm_dynamics.runlog import RunLog, RunLogError, RunLogWriter, load_run, load_runs, schema

from .logs import IDS, META, new_log, observe


@pytest.fixture
def log(tmp_path):
    """A run log with observations at steps 0, 10 and 20; the tokens of step 20 are not kept."""
    writer = new_log(tmp_path / "out" / "dynamics")
    observe(writer, 0, (-1.0, -2.0))
    observe(writer, 10, (-1.5, -4.0), **{"probe/chosen_logp": -1.5})
    observe(writer, 20, (-1.25, -8.0), tokens=False, **{"probe/chosen_logp": -1.25, "probe/n_nonfinite": 0.0})
    return writer.folder


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_its_output_dir_and_by_its_own_folder(log):
    for path in (log, log.parent, str(log.parent)):
        run = load_run(path)
        assert run.path == log
        assert run.name == "out"
        assert run.observed_steps == [0, 10, 20]


def test_a_run_log_in_a_folder_of_another_name_is_called_by_that(tmp_path):
    new_log(tmp_path / "first-try")
    assert load_run(tmp_path / "first-try").name == "first-try"


@pytest.mark.parametrize("make", ["nothing", "empty", "file"])
def test_where_there_is_no_run_log_the_error_says_what_was_looked_for(tmp_path, make):
    path = tmp_path / "runs"
    if make == "empty":
        path.mkdir()
    if make == "file":
        path.write_text("x")
    with pytest.raises(RunLogError, match=r"runs/meta\.json.*runs/dynamics/meta\.json.*output_dir"):
        load_run(path)


@pytest.mark.parametrize(
    "content", [b"{", b"[1, 2]", b"\xff\xfe", b"", b'{"name": "somebody else\'s"}', b'{"schema_version": "1"}', b"null"]
)
def test_a_foreign_or_broken_meta_json_is_refused_by_name(log, content):
    (log / "meta.json").write_bytes(content)
    with pytest.raises(RunLogError, match=r"dynamics/meta\.json"):
        load_run(log)


def test_another_schema_version_is_refused_with_both_versions(log):
    (log / "meta.json").write_text(json.dumps({"schema_version": 7}))
    with pytest.raises(RunLogError, match=rf"version 7; .* reads {schema.SCHEMA_VERSION}.*pandas"):
        load_run(log)


def test_errors_is_raise_or_warn(log):
    with pytest.raises(ValueError, match=r"'ignore'.*\"raise\", \"warn\""):
        load_run(log, errors="ignore")


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_tables_have_the_columns_of_the_schema(log):
    run = load_run(log)
    assert list(run.probes) == schema.PROBES.names
    assert list(run.sequences) == schema.SEQUENCES.names
    assert list(run.tokens) == schema.TOKENS.names
    assert list(run.steps)[: len(schema.STEPS)] == schema.STEPS.names


def test_rows_come_by_step_and_then_as_written(log):
    run = load_run(log)
    assert run.sequences["step"].tolist() == [0, 0, 10, 10, 20, 20]
    assert run.sequences["probe_id"].tolist() == [*IDS] * 3
    assert run.sequences["logp_sum"].tolist() == [-1.0, -2.0, -1.5, -4.0, -1.25, -8.0]


def test_an_observation_may_have_no_tokens(log):
    assert load_run(log).tokens["step"].unique().tolist() == [0, 10]


def test_metrics_may_differ_between_observations(log):
    steps = load_run(log).steps.set_index("step")
    assert list(steps.columns[-2:]) == ["probe/chosen_logp", "probe/n_nonfinite"]
    assert steps["probe/chosen_logp"].isna().tolist() == [True, False, False]
    assert steps.loc[20, "probe/n_nonfinite"] == 0.0


def test_a_run_without_observations_has_empty_tables_with_all_columns(tmp_path):
    new_log(tmp_path)
    run = load_run(tmp_path)
    assert run.observed_steps == []
    for name, columns in schema.OBSERVED_TABLES.items():
        assert list(getattr(run, name)) == columns.names
        assert getattr(run, name).empty
    assert run.delta_from_start().empty


def test_an_observation_without_its_steps_part_is_invisible(log):
    (log / "steps" / schema.part_name(10)).unlink()
    run = load_run(log)
    assert run.observed_steps == [0, 20]
    assert run.sequences["step"].unique().tolist() == [0, 20]
    assert run.tokens["step"].unique().tolist() == [0]


sums = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True))
names = st.text(st.characters(codec="utf-8"), max_size=8)
rows = st.lists(
    st.fixed_dictionaries(
        {
            "probe_id": names, "prompt_id": names, "family": st.sampled_from(["chosen", "rejected"]),
            "n_tokens": st.integers(1, 2**31 - 1), "n_nonfinite": st.integers(0, 9),
            **dict.fromkeys(("logp_sum", "ref_logp_sum", "entropy_sum", "riser_mass_sum"), sums),
        }
    ),
    max_size=5,
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(rows, st.integers(0, 10**9))
def test_sequences_come_back_bit_for_bit(tmp_path_factory, rows, step):
    writer = new_log(tmp_path_factory.mktemp("log"))
    columns = schema.SEQUENCES.names[1:]
    frame = pd.DataFrame([{name: row.get(name) for name in columns} for row in rows], columns=columns, dtype=object)
    writer.write(step, sequences=frame, tokens=None, scalars=dict)
    part = pq.ParquetFile(writer.folder / "sequences" / schema.part_name(step)).read()
    assert part.schema.equals(schema.SEQUENCES)
    for name in columns:
        for written, read in zip(frame[name].to_list(), part[name].to_pylist(), strict=True):
            is_nan = isinstance(written, float) and math.isnan(written)
            assert math.isnan(read) if is_nan else (written, type(written)) == (read, type(read))
    back = load_run(writer.folder).sequences
    assert back["step"].tolist() == [step] * len(rows)
    expected = np.array([math.nan if row["logp_sum"] is None else row["logp_sum"] for row in rows], dtype=float)
    np.testing.assert_array_equal(back["logp_sum"].to_numpy(float), expected)


# ---- bad files -------------------------------------------------------------------------------------------------------


def truncate(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def write_foreign_parquet(file):
    pq.write_table(pa.table({"price": [1.0]}), file)


def write_other_types(file):
    table = pq.ParquetFile(file).read()
    pq.write_table(table.set_column(0, "step", pa.array(["0"] * len(table))), file)


BAD = {
    "truncated": truncate,
    "foreign": write_foreign_parquet,
    "other types": write_other_types,
    "garbage": lambda file: file.write_bytes(b"not Parquet at all " * 50),
    "empty": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("table", ["sequences", "tokens", "steps"])
@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD.keys())
def test_a_bad_part_is_named_and_the_rest_can_be_read(log, table, spoil):
    whole = {name: getattr(load_run(log), name) for name in schema.OBSERVED_TABLES}
    spoil(log / table / schema.part_name(10))
    with pytest.raises(RunLogError, match=rf"{table}/step_000000010\.parquet.*errors=\"warn\"") as error:
        getattr(load_run(log), table)
    assert "\n" not in str(error.value)

    run = load_run(log, errors="warn")
    with pytest.warns(UserWarning, match=rf"left out of {table}.*step_000000010\.parquet"):
        frame = getattr(run, table)
    rest = whole[table].query("step != 10").reset_index(drop=True)
    pd.testing.assert_frame_equal(frame, rest[frame.columns])
    for other in whole.keys() - {table}:
        pd.testing.assert_frame_equal(getattr(run, other), whole[other])


def test_a_foreign_part_is_shown_with_what_is_missing_and_what_was_seen(log):
    write_foreign_parquet(log / "sequences" / schema.part_name(10))
    with pytest.raises(RunLogError, match=r"logp_sum \(double\).*seen: price"):
        _ = load_run(log).sequences


def test_a_part_that_is_gone_is_named(log):
    (log / "sequences" / schema.part_name(10)).unlink()
    with pytest.raises(RunLogError, match=r"sequences/step_000000010\.parquet"):
        _ = load_run(log).sequences


@pytest.mark.parametrize("spoil", [truncate, write_foreign_parquet])
def test_a_bad_probes_file_is_named_and_the_observations_stay_readable(log, spoil):
    spoil(log / "probes.parquet")
    run = load_run(log)
    with pytest.raises(RunLogError, match=r"probes\.parquet"):
        _ = run.probes
    assert len(run.sequences) == 6


def test_columns_of_a_later_version_do_no_harm(log):
    file = log / "sequences" / schema.part_name(10)
    table = pq.ParquetFile(file).read()
    later = table.append_column("new_statistic", pa.array([1.0] * len(table)))
    write_parquet(file, later, schema.stamp(load_run(log).meta, "sequences", 10))
    assert load_run(log).sequences["new_statistic"].isna().tolist() == [True, True, False, False, True, True]


# ---- change since the start ------------------------------------------------------------------------------------------


def test_the_change_from_the_start_is_each_probes_own(log):
    frame = load_run(log).delta_from_start()
    by_probe = frame.pivot(index="step", columns="probe_id", values="delta_logp_sum")
    assert by_probe["p0/chosen"].tolist() == [0.0, -0.5, -0.25]
    assert by_probe["p0/rejected"].tolist() == [0.0, -2.0, -6.0]
    assert frame["delta_logp_mean"].tolist() == (frame["delta_logp_sum"] / 2).tolist()


def test_the_change_of_a_resumed_run_counts_from_the_first_step_of_all(log):
    writer = RunLogWriter(log)
    assert writer.resume(10, META) == [20]
    observe(writer, 20, (-3.0, -3.0))
    frame = load_run(log).delta_from_start()
    assert frame.set_index(["step", "probe_id"]).loc[(20, "p0/chosen"), "delta_logp_sum"] == -2.0


def test_the_change_of_a_log_that_begins_late_counts_from_there(tmp_path):
    writer = new_log(tmp_path)
    observe(writer, 40, (-2.0, -2.0))
    observe(writer, 30, (-1.0, -1.0))
    frame = load_run(tmp_path).delta_from_start()
    assert frame["delta_logp_sum"].tolist() == [0.0, 0.0, -1.0, -1.0]


def test_a_probe_that_starts_with_nan_has_no_finite_change(tmp_path):
    writer = new_log(tmp_path)
    observe(writer, 0, (math.nan, -2.0))
    observe(writer, 10, (-1.0, -3.0))
    observe(writer, 20, (-5.0, -4.0))
    frame = load_run(tmp_path).delta_from_start()
    chosen = frame.loc[frame["family"] == "chosen", "delta_logp_sum"]
    assert chosen.isna().all()
    assert frame.loc[frame["family"] == "rejected", "delta_logp_sum"].tolist() == [0.0, -1.0, -2.0]


# ---- single columns, and parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["sequences", "tokens", "steps", "accounts", "probes"])
def test_single_columns_are_those_of_the_table_in_the_order_asked_for(log, table):
    names = list((schema.PROBES if table == "probes" else schema.TABLES[table]).names[2::-1])
    frame = load_run(log).columns(table, names)
    assert list(frame) == names
    pd.testing.assert_frame_equal(frame, getattr(load_run(log), table)[names])


def test_a_table_that_lies_in_memory_is_not_read_again(log):
    run = load_run(log)
    _ = run.sequences
    (log / "sequences" / schema.part_name(10)).unlink()
    assert run.columns("sequences", ["step"])["step"].unique().tolist() == [0, 10, 20]


def test_parts_come_one_by_one_with_the_columns_asked_for(log):
    parts = list(load_run(log).parts("tokens", columns=["logp", "step"]))
    assert [part.column_names for part in parts] == [["logp", "step"]] * 2  # step 20 kept no tokens
    assert [part["step"][0].as_py() for part in parts] == [0, 10]
    (last,) = load_run(log).parts("sequences", [20], ["step"])
    assert last.num_rows == 2


def test_strings_can_be_read_as_codes(log):
    for part in load_run(log).parts("tokens", columns=["probe_id"], dictionaries=["probe_id"]):
        assert pa.types.is_dictionary(part["probe_id"].type)
        assert part["probe_id"].to_pylist() == [IDS[0], IDS[0], IDS[1], IDS[1]]


@pytest.mark.parametrize("columns", [None, ["step"]])
def test_a_foreign_part_is_refused_whichever_columns_are_asked_for(log, columns):
    part = log / "tokens" / schema.part_name(10)
    pq.write_table(pq.read_table(part).replace_schema_metadata(None).drop_columns(["rank"]), part)
    with pytest.raises(RunLogError, match=r"step_000000010.*missing or of another type: rank \(int32\); seen: step"):
        list(load_run(log).parts("tokens", columns=columns, dictionaries=["probe_id"]))


# ---- several runs ----------------------------------------------------------------------------------------------------


def test_runs_are_stacked_with_a_leading_run_column(log, tmp_path):
    other = new_log(tmp_path / "other")
    observe(other, 0, (-7.0, -7.0), **{"probe/margin": 1.0})
    observe(other, 5, (-9.0, -7.0))
    runs = load_runs({"dpo": log, "sft": other.folder})
    for name in ("probes", "sequences", "tokens", "steps"):
        frame = getattr(runs, name)
        assert frame.columns[0] == "run"
        assert frame["run"].unique().tolist() == ["dpo", "sft"]
        own = frame[frame["run"] == "sft"]
        assert len(own) == len(getattr(runs["sft"], name))
    assert len(runs.sequences) == 6 + 4
    assert {"probe/chosen_logp", "probe/margin"} <= set(runs.steps)
    assert runs.meta["dpo"]["trainer"] == "DPOTrainer"
    assert isinstance(runs["dpo"], RunLog)


def test_every_run_counts_its_change_from_its_own_start(log, tmp_path):
    other = new_log(tmp_path / "other")
    observe(other, 0, (-7.0, -7.0))
    observe(other, 5, (-9.0, -7.0))
    frame = load_runs({"dpo": log, "sft": other.folder}).delta_from_start()
    last = frame[frame["family"] == "chosen"].groupby("run")["delta_logp_sum"].last()
    assert last.to_dict() == {"dpo": -0.25, "sft": -2.0}


def test_a_run_that_is_not_there_is_named(log, tmp_path):
    with pytest.raises(RunLogError, match="nowhere"):
        load_runs({"dpo": log, "sft": tmp_path / "nowhere"})


def test_no_runs_at_all_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        load_runs({})


def test_folders_alone_are_called_as_they_are(log, tmp_path):
    new_log(tmp_path / "first-try")
    assert list(load_runs([log.parent, str(tmp_path / "first-try")]).runs) == ["out", "first-try"]


def test_two_runs_of_one_name_are_refused_with_both_and_the_way_out(log, tmp_path):
    new_log(tmp_path / "again" / "out" / "dynamics")
    with pytest.raises(ValueError, match=r"two runs are called 'out': .*out/dynamics and .*again/out.*\{name: path\}"):
        load_runs([log, tmp_path / "again" / "out"])


def test_one_path_is_no_list_of_paths(log):
    for path in (log, str(log)):
        with pytest.raises(ValueError, match="see load_run"):
            load_runs(path)


def test_a_run_without_observations_does_not_change_the_types_of_the_others(log, tmp_path):
    empty = new_log(tmp_path / "empty").folder
    both = load_runs({"empty": empty, "dpo": log})
    for name in ("sequences", "tokens", "steps"):
        alone = getattr(load_run(log), name)
        assert getattr(both, name).drop(columns="run").dtypes[["step"]].equals(alone.dtypes[["step"]])
        assert len(getattr(both, name)) == len(alone)


def test_warnings_instead_of_errors_hold_for_every_run(log):
    truncate(log / "sequences" / schema.part_name(10))
    runs = load_runs({"dpo": log}, errors="warn")
    with pytest.warns(UserWarning, match="step_000000010"):
        assert len(runs.sequences) == 4
