import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_dynamics.frames import STATISTICS, family_curves, ordered
from llm_dynamics.runlog import RunLogs, RunLogWriter, load_run, load_runs, schema
from llm_dynamics.runlog import reader as reader_module
from tests.runlog.logs import as_before_stamps

from .logs import assert_rows, probes_frame, random_log, value_log, write_log


def by_hand(run, statistic="logp", *, per_token=False, delta=False, interval=(10, 90)):
    """`family_curves` with plain loops."""
    rows = run.sequences.to_dict("records")
    first = min(row["step"] for row in rows)
    families = {row["family"] for row in rows}
    kinds = [(family, family, f"{statistic}_sum") for family in families]
    if statistic == "logp":
        pairs = [family for family in ("chosen", "rejected") if family in families]
        kinds += [(f"argmax ({family} prefix)", family, "argmax_logp_sum") for family in pairs]
        kinds += [] if pairs else [("argmax", None, "argmax_logp_sum")]

    def value(row, column):
        number = row["logp_sum"] - row["ref_logp_sum"] if column == "log_ratio_sum" else row[column]
        return number / row["n_tokens"] if per_token else number

    curves = []
    for shown, family, column in sorted(kinds, key=lambda kind: ordered(k[0] for k in kinds).index(kind[0])):
        own = [row for row in rows if family in (None, row["family"])]
        for step in sorted({row["step"] for row in own}):
            values = []
            for row in own:
                if row["step"] != step:
                    continue
                number = value(row, column)
                if delta:
                    start = [r for r in own if r["step"] == first and r["probe_id"] == row["probe_id"]]
                    number = number - value(start[0], column) if start else math.nan
                if math.isfinite(number):
                    values.append(number)
            low, high = np.percentile(values, interval) if values else (math.nan, math.nan)
            curves.append((step, shown, np.mean(values) if values else math.nan, low, high, len(values)))
    return curves


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("statistic", ["logp", "entropy", "log_ratio"])
def test_curves_equal_plain_loops_with_bad_and_missing_numbers(tmp_path, statistic, per_token, delta):
    run = random_log(tmp_path, n_prompts=6, spoilt=0.15, missing=0.15)
    options = {"per_token": per_token, "delta": delta, "interval": (25, 60)}
    with np.errstate(invalid="ignore"):
        expected = by_hand(run, statistic, **options)
    assert_rows(family_curves(run, statistic=statistic, **options), expected)


def test_a_statistic_may_be_named_as_its_column(tmp_path):
    run = random_log(tmp_path)
    pd.testing.assert_frame_equal(family_curves(run, statistic="entropy_sum"), family_curves(run, statistic="entropy"))
    pd.testing.assert_frame_equal(family_curves(run, statistic="logp_sum"), family_curves(run))


def test_every_statistic_has_a_curve_and_what_was_not_measured_has_no_number(tmp_path):
    run = random_log(tmp_path)
    for statistic in STATISTICS:
        curves = family_curves(run, statistic=statistic)
        measured = statistic in ("logp", "entropy", "argmax_logp", "ref_logp", "log_ratio")
        assert (curves["n"] > 0).all() == measured, statistic
        assert curves["mean"].notna().all() == measured, statistic


@pytest.mark.parametrize("statistic", ["perplexity", "step", "n_tokens", "", "log_ratio_sum_sum"])
def test_an_unknown_statistic_is_refused_with_those_that_there_are(tmp_path, statistic):
    with pytest.raises(ValueError, match=r"no statistic .*; allowed: logp, .*log_ratio"):
        family_curves(random_log(tmp_path), statistic=statistic)


@pytest.mark.parametrize("interval", [(90, 10), (-1, 5), (5, 101), (5,), (math.nan, 5)])
def test_an_interval_that_is_none_is_refused(tmp_path, interval):
    with pytest.raises(ValueError, match="two percentiles"):
        family_curves(random_log(tmp_path), interval=interval)


def test_a_single_observation_has_a_point_and_no_change(tmp_path):
    run = random_log(tmp_path, steps=(0,))
    assert set(family_curves(run)["step"]) == {0}
    assert (family_curves(run, delta=True)["mean"] == 0).all()


def test_a_log_without_observations_gives_an_empty_frame_also_beside_others(tmp_path):
    empty = write_log(tmp_path / "empty", probes_frame(), {})
    full = random_log(tmp_path / "full")
    assert family_curves(empty).empty
    both = family_curves(RunLogs({"empty": empty, "full": full}))
    assert set(both["run"]) == {"full"}
    assert both["mean"].dtype == np.float64
    assert list(family_curves(RunLogs({"empty": empty}))) == list(both)


def test_several_runs_are_stacked_as_each_alone(tmp_path):
    for seed, name in enumerate(("a", "b")):
        random_log(tmp_path / name, seed=seed)
    runs = load_runs([tmp_path / "a", tmp_path / "b"])
    both = family_curves(runs, delta=True)
    assert both.columns[0] == "run"
    for name in ("a", "b"):
        own = both[both["run"] == name].drop(columns="run").reset_index(drop=True)
        pd.testing.assert_frame_equal(own, family_curves(runs[name], delta=True))


def test_a_resumed_log_is_one_curve(tmp_path):
    values = {"p/chosen": {0: -5, 10: -6, 20: -9}}
    run = value_log(tmp_path, values)
    writer = RunLogWriter(tmp_path)
    assert writer.resume(10, {}) == [20]
    again = run.sequences[run.sequences["step"] == 10].assign(logp_sum=-7.0)
    writer.write(15, sequences=again, tokens=None, scalars=dict)
    curve = family_curves(load_run(tmp_path), delta=True).query("family == 'chosen'")
    assert curve[["step", "mean"]].to_numpy().tolist() == [[0, 0], [10, -1], [15, -2]]


# ---- chains ----------------------------------------------------------------------------------------------------------


def test_the_steps_of_a_chain_are_counted_through_and_its_joint_is_one_point(tmp_path):
    sft = value_log(tmp_path / "sft", {"p/chosen": {0: -9, 10: -5, 15: -4}})
    dpo = value_log(tmp_path / "dpo", {"p/chosen": {0: -4.01, 10: -6}})
    curve = family_curves({"all": [sft, dpo]}, delta=True).query("family == 'chosen'")
    assert curve["run"].unique() == ["all"]
    assert curve["step"].tolist() == [0, 10, 15, 25]
    assert curve["mean"].tolist() == pytest.approx([0, 4, 4.99, 3])  # the joint is what DPO saw before its first step
    pd.testing.assert_frame_equal(family_curves({"all": RunLogs({"one": sft, "two": dpo})}, delta=True).query(
        "family == 'chosen'"), curve)  # fmt: skip


def test_a_stage_that_was_not_watched_before_its_first_step_leaves_the_end_of_the_one_before(tmp_path):
    sft = value_log(tmp_path / "sft", {"p/chosen": {0: -9, 10: -5}})
    dpo = value_log(tmp_path / "dpo", {"p/chosen": {5: -4, 10: -6}})
    curve = family_curves({"all": [sft, dpo]}).query("family == 'chosen'")
    assert curve[["step", "mean"]].to_numpy().tolist() == [[0, -9], [10, -5], [15, -4], [20, -6]]


def test_three_stages_of_one_name_are_counted_through(tmp_path):
    runs = [value_log(tmp_path / str(n) / "out", {"p/chosen": {0: -n, 10: -n - 1}}) for n in range(3)]
    curve = family_curves({"all": runs}).query("family == 'chosen'")
    assert curve[["step", "mean"]].to_numpy().tolist() == [[0, 0], [10, -1], [20, -2], [30, -3]]


def test_a_stage_that_starts_elsewhere_than_the_one_before_ended_is_told(tmp_path):
    sft = value_log(tmp_path / "sft", {"p/chosen": {0: -9, 10: -5}})
    other = value_log(tmp_path / "dpo", {"p/chosen": {0: -9, 10: -6}})
    with pytest.warns(UserWarning, match=r"'dpo' does not start where 'sft' ended: .*differ by 2 nats per token"):
        family_curves({"all": [sft, other]})


def test_a_stage_without_observations_is_refused(tmp_path):
    runs = [random_log(tmp_path / "sft"), write_log(tmp_path / "dpo", probes_frame(), {})]
    with pytest.raises(ValueError, match="stage 'dpo' of the chain sft -> dpo has no observation"):
        family_curves({"all": runs})


@pytest.mark.parametrize("runs", ["runs/dpo", {"a": "runs/dpo"}, {"a": ["runs/dpo"]}, ["runs/dpo"]])
def test_a_folder_without_a_run_is_refused(runs):
    with pytest.raises(ValueError, match="no run log at runs/dpo"):
        family_curves(runs)


@pytest.mark.parametrize("runs", [None, 5, {"a": None}, {"a": [None]}, [None], b"runs/dpo"])
def test_what_is_no_run_is_refused(runs):
    with pytest.raises(TypeError, match=r"allowed: a (RunLog|run log)"):
        family_curves(runs)


@pytest.mark.parametrize("runs", [{}, [], {"a": []}])
def test_no_run_is_refused(runs):
    with pytest.raises(ValueError, match="no run"):
        family_curves(runs)


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_only_the_columns_needed_are_read(tmp_path, monkeypatch):
    random_log(tmp_path)
    read = set()
    real = reader_module.read_part
    monkeypatch.setattr(
        reader_module, "read_part", lambda *args, **more: read.add(tuple(args[2])) or real(*args, **more)
    )
    family_curves(load_run(tmp_path), statistic="entropy")
    assert read == {("step", "probe_id", "prompt_id", "family", "n_tokens", "entropy_sum")}


def test_tables_in_memory_are_used_and_not_read_again(tmp_path):
    run = random_log(tmp_path)
    before = family_curves(run)
    _ = run.sequences
    for part in (tmp_path / "sequences").iterdir():
        part.unlink()
    pd.testing.assert_frame_equal(family_curves(run), before)


def test_a_column_that_only_some_parts_measured_is_a_gap_and_no_fault(tmp_path):
    run = random_log(tmp_path)
    part = tmp_path / "sequences" / schema.part_name(5)
    as_before_stamps(tmp_path)
    table = pq.read_table(part)
    place = table.column_names.index("entropy_sum")
    nulls = schema.SEQUENCES.empty_table().column("entropy_sum").type
    pq.write_table(table.set_column(place, table.schema.field(place), pa.nulls(len(table), nulls)), part)
    curve = family_curves(load_run(run.path), statistic="entropy").query("family == 'chosen'")
    assert curve["n"].tolist() == [3, 0, 3]
