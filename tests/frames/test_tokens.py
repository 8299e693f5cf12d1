import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.frames import TOKEN_STATISTICS, grouped, ordered, token_curves
from llm_dynamics.frames.grouped import group_stats
from llm_dynamics.frames.tokens import BY
from llm_dynamics.runlog import RunLogError, RunLogs, load_run, schema
from tests.runlog.logs import as_before_stamps

from .logs import FAMILIES, assert_rows, probes_frame, same, write_log


def token_log(folder, *, seed=0, steps=(0, 5, 10), without=(), shuffled=False, spoilt=0.0, n_prompts=2):
    """Write a log with random tokens; those of the steps `without` are not kept."""
    rng = np.random.default_rng(seed)
    probes = probes_frame(n_prompts)
    lengths = rng.integers(1, 6, len(probes))
    ids = np.repeat(probes["probe_id"].to_numpy(), lengths)
    token_ids = rng.integers(0, 4, len(ids))
    observations, tokens = {}, {}
    for step in steps:
        sequences = {"probe_id": probes["probe_id"], "n_tokens": lengths, "logp_sum": -1.0}
        observations[step] = pd.DataFrame(sequences)
        frame = pd.DataFrame(
            {"probe_id": ids, "position": np.concatenate([np.arange(n) for n in lengths]), "token_id": token_ids,
             "logp": -rng.gamma(1, 2, len(ids)), "ref_logp": -rng.gamma(1, 2, len(ids)),
             "rank": rng.integers(1, 99, len(ids))}
        )  # fmt: skip
        bad = rng.random(len(ids)) < spoilt
        frame.loc[bad, "logp"] = rng.choice([np.nan, np.inf, -np.inf], bad.sum())
        frame.loc[bad, "rank"] = -1
        if shuffled:
            frame = frame.sample(frac=1, random_state=step)
        if step not in without:
            tokens[step] = frame
    return write_log(folder, probes, observations, tokens=tokens)


def by_hand(run, statistic="logp", *, by=("family",), delta=False, interval=(10, 90)):
    """`token_curves` with plain loops over the whole table."""
    about = {row["probe_id"]: row for row in run.probes.to_dict("records")}
    rows = [about[row["probe_id"]] | row for row in run.tokens.to_dict("records")]
    first = min(row["step"] for row in rows)

    def value(row):
        if statistic == "log_ratio":
            return row["logp"] - row["ref_logp"]
        return math.nan if statistic == "rank" and row["rank"] < 0 else row[statistic]

    start = {(row["probe_id"], row["position"]): value(row) for row in rows if row["step"] == first}
    groups = {}
    for row in rows:
        number = value(row) - (start.get((row["probe_id"], row["position"]), math.nan) if delta else 0)
        groups.setdefault((*(row[key] for key in by), row["step"]), []).append(number)

    def place(group):
        named = dict(zip(by, group[:-1], strict=True))
        family = named.pop("family", None)
        return (ordered(FAMILIES).index(family) if family else 0, *named.values(), group[-1])

    curves = []
    for group in sorted(groups, key=place):
        finite = [number for number in groups[group] if math.isfinite(number)]
        low, high = np.percentile(finite, interval) if finite else (math.nan, math.nan)
        mean = sum(finite) / len(finite) if finite else math.nan
        curves.append((group[-1], *group[:-1], mean, low, high, len(finite), len(groups[group]) - len(finite)))
    return curves


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("statistic", ["logp", "rank", "log_ratio"])
@pytest.mark.parametrize(
    "by", [("family",), ("position",), ("probe_id",), ("family", "token_id"), ("position", "prompt_id", "family")]
)
def test_curves_of_tokens_equal_plain_loops_over_the_whole_table(tmp_path, by, statistic, delta):
    run = token_log(tmp_path, spoilt=0.15, shuffled=delta)
    with np.errstate(invalid="ignore"):
        expected = by_hand(run, statistic, by=by, delta=delta, interval=(25, 80))
    frame = token_curves(run, statistic, by=by, delta=delta, interval=(25, 80))
    assert list(frame) == ["step", *by, "mean", "low", "high", "n", "n_nonfinite"]
    assert_rows(frame, expected)


def test_one_key_may_be_given_as_a_name(tmp_path):
    run = token_log(tmp_path)
    pd.testing.assert_frame_equal(token_curves(run, by="position"), token_curves(run, by=["position"]))


def test_a_mean_per_family_is_that_of_the_whole_table_in_pandas(tmp_path):
    run = token_log(tmp_path, n_prompts=4)
    whole = run.tokens.merge(run.probes[["probe_id", "family"]], on="probe_id")
    expected = whole.groupby(["family", "step"])["logp"].mean()
    assert token_curves(run).set_index(["family", "step"])["mean"].to_dict() == pytest.approx(expected.to_dict())


def test_sums_of_many_small_floats_are_taken_in_double_precision():
    values = np.full(2_000_000, 0.1, dtype=np.float32)
    stats = group_stats(np.zeros(len(values), dtype=np.int64), values, 1, (10, 90))
    assert stats.mean[0] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_tokens_that_were_not_kept_at_an_observation_leave_a_gap(tmp_path):
    run = token_log(tmp_path, without=(5,))
    assert token_curves(run)["step"].unique().tolist() == [0, 10]


def test_the_change_counts_from_the_first_observation_that_kept_tokens(tmp_path):
    run = token_log(tmp_path, without=(0,))
    curves = token_curves(run, delta=True)
    assert curves["step"].unique().tolist() == [5, 10]
    assert (curves.query("step == 5")["mean"] == 0).all()


def test_a_token_without_a_start_is_left_out_and_counted(tmp_path):
    run = token_log(tmp_path)
    part = tmp_path / "tokens" / schema.part_name(0)
    as_before_stamps(tmp_path)
    pq.write_table(pq.read_table(part).slice(1), part)
    last = token_curves(load_run(run.path), by="probe_id", delta=True).query("step == 10").set_index("probe_id")
    assert last.loc["p0/chosen", "n_nonfinite"] == 1
    assert last["n_nonfinite"].sum() == 1


def test_a_run_that_kept_no_tokens_has_no_curves(tmp_path):
    run = token_log(tmp_path / "a", without=(0, 5, 10))
    frame = token_curves(run, by=("family", "position"))
    assert frame.empty
    assert list(frame) == ["step", "family", "position", "mean", "low", "high", "n", "n_nonfinite"]
    other = token_log(tmp_path / "b")
    assert set(token_curves({"a": run, "b": other})["run"]) == {"b"}


def test_what_was_not_measured_counts_neither_as_a_number_nor_as_a_fault(tmp_path):
    curves = token_curves(token_log(tmp_path), "entropy")
    assert len(curves) == 9
    assert (curves[["n", "n_nonfinite"]] == 0).all(axis=None)
    assert curves["mean"].isna().all()


def test_every_statistic_of_the_tokens_table_has_curves(tmp_path):
    run = token_log(tmp_path)
    numbers = [f.name for f in schema.TOKENS if pa.types.is_floating(f.type)] + ["rank", "riser_count", "log_ratio"]
    assert sorted(TOKEN_STATISTICS) == sorted(numbers)
    for statistic in TOKEN_STATISTICS:
        assert len(token_curves(run, statistic)) == 9


def test_runs_and_chains_count_as_in_every_frame(tmp_path):
    sft, dpo = token_log(tmp_path / "sft", seed=1), token_log(tmp_path / "dpo", seed=1)
    both = token_curves(RunLogs({"sft": sft, "dpo": dpo}))
    assert both["run"].unique().tolist() == ["sft", "dpo"]
    chain = token_curves({"all": [sft, dpo]}, delta=True)
    assert chain["step"].unique().tolist() == [0, 5, 10, 15, 20]
    assert (chain.query("step in (0, 10)")["mean"].abs() < 1e-12).all()  # the second run repeats the first


def test_a_part_of_many_row_groups_with_their_own_dictionaries_is_read_whole(tmp_path):
    run = token_log(tmp_path)
    before = token_curves(run, by="probe_id")
    as_before_stamps(tmp_path)
    for part in (tmp_path / "tokens").iterdir():
        pq.write_table(pq.read_table(part), part, row_group_size=2)
    pd.testing.assert_frame_equal(token_curves(load_run(tmp_path), by="probe_id"), before)


def test_a_broken_part_is_named_or_passed_over_as_the_run_was_opened(tmp_path):
    token_log(tmp_path)
    (tmp_path / "tokens" / schema.part_name(5)).write_bytes(b"broken")
    with pytest.raises(RunLogError, match="step_000000005"):
        token_curves(load_run(tmp_path))
    with pytest.warns(UserWarning, match="step_000000005"):
        curves = token_curves(load_run(tmp_path, errors="warn"))
    assert curves["step"].unique().tolist() == [0, 10]


def test_tokens_of_an_unknown_probe_are_named(tmp_path):
    run = token_log(tmp_path)
    as_before_stamps(tmp_path)
    pq.write_table(pq.read_table(tmp_path / "probes.parquet").slice(1), tmp_path / "probes.parquet")
    with pytest.raises(ValueError, match=r"a probe that probes\.parquet lacks: 'p0/chosen'"):
        token_curves(load_run(run.path))


@pytest.mark.parametrize("by", ["token", (), ("family", "family"), ("family", "step"), "run"])
def test_keys_that_are_none_are_refused_with_those_allowed(tmp_path, by):
    with pytest.raises(ValueError, match=f"allowed: one or several of {', '.join(BY)}"):
        token_curves(token_log(tmp_path), by=by)


@pytest.mark.parametrize("statistic", ["token_id", "logp_sum", "position", "greedy_token"])
def test_a_statistic_that_is_none_is_refused_with_those_allowed(tmp_path, statistic):
    with pytest.raises(ValueError, match="allowed: logp, ref_logp"):
        token_curves(token_log(tmp_path), statistic)


# ---- the statistics of groups ----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.floats(width=32)), max_size=40),
    interval=st.tuples(st.integers(0, 50), st.integers(50, 100)),
    size=st.sampled_from([5, 70_000]),
    dtype=st.sampled_from([np.float32, np.float64]),
    per_group=st.sampled_from([0, 50]),
)
def test_groups_equal_numpy_group_by_group_however_they_are_sorted(rows, interval, size, dtype, per_group):
    codes = np.array([code for code, _ in rows], dtype=np.int64)
    values = np.array([value for _, value in rows], dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "PER_GROUP", per_group)  # 0: one by one
        stats = group_stats(codes, values, size, interval)
    for group in range(size if size == 5 else 6):
        own = values[codes == group].astype(float)
        finite = own[np.isfinite(own)]
        assert stats.n[group] == len(finite)
        assert stats.n_nonfinite[group] == len(own) - len(finite)
        expected = (math.nan,) * 3
        if len(finite):
            expected = (math.fsum(finite) / len(finite), *np.percentile(finite, interval))
        scale = max(1.0, np.abs(finite).max(initial=0))
        found = (stats.mean[group], stats.low[group], stats.high[group])
        assert all(same(a / scale, b / scale) for a, b in zip(found, expected, strict=True)), (found, expected)
