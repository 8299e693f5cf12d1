import math
from functools import partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.frames import align, compare, delta, family_curves, prompt_interval, token_curves, what_moved
from llm_dynamics.frames.comparison import COMPARE_COLUMNS
from llm_dynamics.runlog import RunLogs, load_run, load_runs
from tests.runlog.logs import as_before_stamps

from .logs import assert_rows, probes_frame, random_log, same, value_log, write_log


def interval_by_hand(values, prompts, *, confidence=0.95, n_resamples=2000, seed=0):
    """`prompt_interval` with plain loops: prompts are drawn, each with all of its probes."""
    by_prompt = {}
    for value, prompt in zip(values, prompts, strict=True):
        if math.isfinite(value):
            by_prompt.setdefault(prompt, []).append(value)
    if len(by_prompt) < 2:
        return math.nan, math.nan
    groups = [by_prompt[prompt] for prompt in sorted(by_prompt)]
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(n_resamples):
        drawn = generator.multinomial(len(groups), [1 / len(groups)] * len(groups))
        sample = [value for times, group in zip(drawn, groups, strict=True) for value in group * int(times)]
        means.append(sum(sample) / len(sample))
    means.sort()

    def quantile(share):
        place = share * (len(means) - 1)
        below = math.floor(place)
        above = min(below + 1, len(means) - 1)
        return means[below] + (means[above] - means[below]) * (place - below)

    return quantile((1 - confidence) / 2), quantile((1 + confidence) / 2)


def by_hand(runs, *, per_token=False, n_resamples=2000):
    """The rows of `compare` with plain loops, families of `what_moved` taken for granted."""
    first, *_ = runs
    changes = {}
    for name, run in runs.items():
        rows = run.sequences.to_dict("records")
        ends = [min(row["step"] for row in rows), max(row["step"] for row in rows)]
        families = {row["family"]: (row["family"], "logp_sum") for row in rows}
        families["argmax (chosen prefix)" if "chosen" in families else "argmax"] = (
            "chosen" if "chosen" in families else None,
            "argmax_logp_sum",
        )
        for shown, (family, column) in families.items():
            for probe in {row["probe_id"]: row for row in rows if family in (None, row["family"])}.values():
                own = [[r[column] for r in rows if r["step"] == end and r["probe_id"] == probe["probe_id"]]
                       for end in ends]  # fmt: skip
                finite = all(len(value) == 1 and math.isfinite(value[0]) for value in own)
                change = (own[1][0] - own[0][0]) / (probe["n_tokens"] if per_token else 1) if finite else math.nan
                changes.setdefault((name, shown), {})[probe["probe_id"]] = (change, probe["prompt_id"])
    moved = {name: what_moved(run).set_index("family") for name, run in runs.items()}
    rows = []
    for family in moved[first].index:
        for name in runs:
            own, base = changes[name, family], {} if name == first else changes[first, family]
            gaps = {p: (own[p][0] - base[p][0], own[p][1]) for p in own if p in base}
            gaps = {p: gap for p, gap in gaps.items() if math.isfinite(gap[0])}
            values, prompts = ([gap[place] for gap in gaps.values()] for place in (0, 1))
            own_interval = interval_by_hand(*zip(*own.values(), strict=True), n_resamples=n_resamples)
            interval = interval_by_hand(values, prompts, n_resamples=n_resamples)
            mean = sum(values) / len(values) if values else math.nan
            rows.append((name, family, *moved[name].loc[family], *own_interval, len(gaps), mean, *interval))
    return rows


@pytest.mark.parametrize("per_token", [False, True])
def test_a_comparison_equals_plain_loops_with_bad_and_missing_numbers(tmp_path, per_token):
    runs = {
        name: random_log(tmp_path / name, seed=seed, steps=(0, 4), n_prompts=5, spoilt=0.1, missing=0.1)
        for seed, name in enumerate("bac")
    }
    frame = compare(runs, per_token=per_token, n_resamples=100)
    assert tuple(frame) == COMPARE_COLUMNS
    assert_rows(frame, by_hand(runs, per_token=per_token, n_resamples=100))


def test_a_shift_of_every_probe_is_found_with_certainty_however_different_the_probes_are(tmp_path):
    starts = {f"p{n}/chosen": -10.0 * n for n in range(6)}
    a = value_log(tmp_path / "a", {name: {0: v, 9: 2 * v} for name, v in starts.items()})
    b = value_log(tmp_path / "b", {name: {0: v, 9: 2 * v + 1} for name, v in starts.items()})
    row = compare({"a": a, "b": b}).query("run == 'b' and family == 'chosen'").iloc[0]
    assert row[["difference", "difference_low", "difference_high"]].tolist() == pytest.approx([1, 1, 1])
    assert row["high"] - row["low"] > 10  # unpaired, the probes would hide it
    per_token = compare({"a": a, "b": b}, per_token=True).query("run == 'b' and family == 'chosen'").iloc[0]
    assert per_token["difference"] == pytest.approx(0.5)


def test_only_probes_that_are_the_same_in_both_are_paired(tmp_path):
    probes = probes_frame(4, ("chosen",))
    other = probes.assign(response=["another answer", *probes["response"][1:]])
    runs = {}
    for name, table, change in (("a", probes, -1.0), ("b", other, -3.0)):
        ends = {
            step: pd.DataFrame({"probe_id": table["probe_id"], "n_tokens": 2, "logp_sum": value})
            for step, value in ((0, -10.0), (5, -10.0 + change))
        }
        runs[name] = write_log(tmp_path / name, table, ends)
    row = compare(runs).query("run == 'b' and family == 'chosen'").iloc[0]
    assert row[["n_probes", "n_paired", "difference"]].tolist() == [4, 3, -2.0]


def test_runs_that_share_no_probe_are_compared_without_a_difference(tmp_path):
    a = value_log(tmp_path / "a", {"p/chosen": {0: -1, 5: -2}, "q/chosen": {0: -1, 5: -2}})
    b = value_log(tmp_path / "b", {"r/chosen": {0: -1, 5: -4}, "s/zebra": {0: -1, 5: -4}})
    frame = compare({"a": a, "b": b})
    assert frame["delta"].tolist()[:2] == [-1, -3]
    assert (frame["n_paired"] == 0).all()
    assert frame[["difference", "difference_low", "difference_high"]].isna().all(axis=None)
    assert frame["family"].tolist() == ["chosen", "chosen", "zebra", "argmax (chosen prefix)", "argmax (chosen prefix)"]


def test_runs_come_in_the_order_given_and_families_in_the_canonical_one(tmp_path):
    runs = RunLogs({name: random_log(tmp_path / name) for name in ("zulu", "alpha")})
    frame = compare(runs)
    assert frame["run"].tolist() == ["zulu", "alpha"] * 4
    assert frame["family"].unique().tolist() == ["chosen", "rejected", "zebra", "argmax (chosen prefix)"]


def test_a_chain_is_compared_from_its_start_to_its_end(tmp_path):
    sft = value_log(tmp_path / "sft", {"p/chosen": {0: -9, 5: -5}})
    dpo = value_log(tmp_path / "dpo", {"p/chosen": {0: -5, 5: -7}})
    row = compare({"chain": [sft, dpo]}).iloc[0]
    assert row[["start", "end", "delta"]].tolist() == [-9, -7, 2]


def test_stages_of_other_probes_pair_with_nothing(tmp_path):
    sft = value_log(tmp_path / "sft", {"p/chosen": {0: -9, 5: -5}})
    dpo = value_log(tmp_path / "dpo", {"q/chosen": {3: -5, 5: -7}})
    assert (compare({"sft": sft, "chain": [sft, dpo]})["n_paired"] == 0).all()


FRAMES = {
    "compare": compare,
    "family_curves": partial(family_curves, delta=True),
    "delta": delta,
    "token_curves": partial(token_curves, delta=True),
}


@pytest.mark.parametrize("name", FRAMES)
def test_stages_in_which_an_id_names_another_response_are_refused(name, tmp_path):
    sft = value_log(tmp_path / "sft", {"p/chosen": {0: -9, 5: -5}, "q/chosen": {0: -9, 5: -5}})
    dpo = value_log(tmp_path / "dpo", {"p/chosen": {0: -5, 5: -7}, "q/chosen": {0: -5, 5: -7}})
    as_before_stamps(dpo.path)
    probes = pd.read_parquet(dpo.path / "probes.parquet")
    probes.loc[probes["probe_id"] == "p/chosen", "response"] = "another"
    pq.write_table(
        pa.Table.from_pandas(probes, pq.read_schema(dpo.path / "probes.parquet")), dpo.path / "probes.parquet"
    )
    said = r"'dpo' cannot go on where 'sft' ended.*other response of 1 \('p/chosen'\)"
    with pytest.raises(ValueError, match=said):
        FRAMES[name]({"chain": [sft, load_run(tmp_path / "dpo")]})


def test_a_single_observation_and_a_single_prompt_have_a_row_and_no_interval(tmp_path):
    frame = compare({"a": value_log(tmp_path / "a", {"p/chosen": {0: -9}})})
    assert frame["start"].iloc[0] == -9
    assert frame[["delta", "low", "high"]].isna().all(axis=None)


def test_a_run_without_observations_has_no_rows(tmp_path):
    empty = write_log(tmp_path / "empty", probes_frame(), {})
    assert compare({"a": empty}).empty
    assert set(compare({"a": empty, "b": random_log(tmp_path / "b")})["run"]) == {"b"}


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(tmp_path):
    runs = {name: random_log(tmp_path / name, seed=seed, n_prompts=8) for seed, name in enumerate("ab")}
    pd.testing.assert_frame_equal(compare(runs), compare(runs))
    assert not compare(runs)["low"].equals(compare(runs, seed=1)["low"])


# ---- the interval ----------------------------------------------------------------------------------------------------

numbers = st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(numbers, st.sampled_from("abcde")), max_size=12),
    confidence=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
def test_the_interval_equals_plain_loops(rows, confidence, seed):
    values = pd.Series([value for value, _ in rows], dtype=float)
    prompts = pd.Series([prompt for _, prompt in rows], dtype=object)
    options = {"confidence": confidence, "n_resamples": 40, "seed": seed}
    found = prompt_interval(values, prompts, **options)
    expected = interval_by_hand(values, prompts, **options)
    scale = max([1.0, *(abs(v) for v in values if math.isfinite(v))])
    assert all(same(a / scale, b / scale) for a, b in zip(found, expected, strict=True)), (found, expected)


def test_the_order_of_rows_does_not_matter():
    values, prompts = pd.Series([1.0, 2.0, 4.0, 8.0]), pd.Series(["b", "a", "c", "a"])
    assert prompt_interval(values, prompts) == pytest.approx(prompt_interval(values[::-1], prompts[::-1]))


def test_nineteen_of_twenty_intervals_hold_the_true_mean():
    rng = np.random.default_rng(1)
    prompts = pd.Series(np.repeat(np.arange(40), 3))
    hits = 0
    for _ in range(200):
        values = np.repeat(rng.normal(0, 1, 40), 3) + rng.normal(0, 0.3, 120)  # probes of a prompt move together
        low, high = prompt_interval(pd.Series(values), prompts, n_resamples=300)
        hits += low <= 0 <= high
    assert 175 <= hits <= 198  # 0.95 x 200 = 190; drawn by probe instead of by prompt it would be about 145


@pytest.mark.parametrize("options", [{"confidence": 0}, {"confidence": 1}, {"confidence": 95}, {"n_resamples": 0}])
def test_a_confidence_that_is_none_is_refused(options):
    with pytest.raises(ValueError, match="0 < confidence < 1"):
        prompt_interval(pd.Series([1.0]), pd.Series(["a"]), **options)


# ---- what is taken for a run --------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    return [random_log(tmp_path / name / "dynamics", seed=seed) for seed, name in enumerate(("a", "b"))]


@pytest.mark.parametrize("form", ["paths", "strings", "list", "tuple", "mixed", "mapping", "loaded"])
def test_runs_are_taken_as_logs_or_as_their_folders(form, two, tmp_path):
    expected = compare({"a": two[0], "b": two[1]})
    paths = [tmp_path / "a", tmp_path / "b"]
    given = {
        "paths": tuple(paths),
        "strings": tuple(map(str, paths)),
        "list": (paths,),
        "tuple": (tuple(two),),
        "mixed": (str(paths[0]), two[1]),
        "mapping": ({"a": str(paths[0]), "b": two[1]},),
        "loaded": (load_runs(paths),),
    }[form]
    pd.testing.assert_frame_equal(compare(*given), expected)


def test_every_frame_takes_folders(two, tmp_path):
    paths = [str(tmp_path / "a"), tmp_path / "b"]
    named = {"a": two[0], "b": two[1]}
    for frame in (align, delta, family_curves):
        pd.testing.assert_frame_equal(frame(paths), frame(named))
    for frame in (delta, family_curves):
        pd.testing.assert_frame_equal(frame(paths[0]), frame(two[0]))
    with pytest.warns(UserWarning, match="'b' does not start where 'a' ended"):  # they are no chain, but read as one
        chained = family_curves({"chain": paths})
    assert chained["step"].max() == 20


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("no such folder",), ValueError, "no run log at no such folder"),
        ((["a", "no such folder"],), ValueError, "no run log at"),
        ((5,), TypeError, "runs is int; allowed: a run log"),
        ((None,), TypeError, "runs is NoneType"),
        (([],), ValueError, "no run was given"),
        (({"x": 5},), TypeError, "'x' is int; allowed"),
        (({"x": [None]},), TypeError, "'x' is NoneType; allowed"),
        (([{"x": 1}],), TypeError, "'run 1' is dict; allowed"),
        ((["b", "b"],), ValueError, "two runs are called 'b'; name them"),
        (({"x": []}, "b"), TypeError, "the first of several runs is dict"),
        ((pd.DataFrame(),), TypeError, "runs is DataFrame"),
    ],
)
def test_what_is_no_run_is_refused_by_name(given, error, message, two, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        compare(*given)


@pytest.mark.parametrize("steps", [(), (0,), (7,)])
def test_a_run_with_fewer_than_two_observations_has_moved_by_nothing_that_is_known(steps, two, tmp_path):
    young = random_log(tmp_path / "young" / "dynamics", seed=2, steps=steps)
    for frame in (compare(young), compare(two[0], young).query("run == 'young'")):
        assert len(frame) == (4 if steps else 0)
        unknown = ["delta", "delta_per_token", "low", "high", "difference", "difference_low", "difference_high"]
        assert frame[unknown].isna().all(axis=None)
        assert np.isfinite(frame["start"].to_numpy(dtype=float)).all()


def test_tables_join_on_family_without_loss(two):
    run = two[0]
    curves, moved, compared = family_curves(run), what_moved(run), compare(run)
    assert set(moved["family"]) <= set(curves["family"])
    assert set(moved["family"]) == set(compared["family"])
    joined = curves.query("step == 10").merge(moved, on="family", how="inner")
    assert len(joined) == len(moved)
    assert np.allclose(joined["mean"], joined["end"])
    sequences = run.sequences.merge(run.probes, on=["probe_id", "family"], validate="many_to_one")
    assert len(sequences) == len(run.sequences)
