import math

import numpy as np
import pandas as pd
import pytest

from llm_dynamics.frames import align
from llm_dynamics.runlog import RunLogs

from .logs import assert_rows, probes_frame, random_log, same, value_log, write_log

ABOUT = ["run", "stage", "at", "observed", "probe_id", "prompt_id", "family", "n_tokens", "logp_sum"]


def line(xs, ys, x):
    """The value at `x` on straight lines through the points, with plain loops."""
    for place, known in enumerate(xs):
        if known == x:
            return ys[place], True
    for (x0, y0), (x1, y1) in zip(zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=True), strict=False):
        if x0 < x < x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0), False
    raise AssertionError(f"{x} is outside {xs}")


def by_hand(runs, *, between):
    """`align` on steps, of runs of the same probes, with plain loops."""
    observed = {name: sorted({row["step"] for row in run.sequences.to_dict("records")}) for name, run in runs.items()}
    if between == "drop":
        grid = sorted(set.intersection(*map(set, observed.values())))
    else:
        start, end = max(steps[0] for steps in observed.values()), min(steps[-1] for steps in observed.values())
        grid = sorted({step for steps in observed.values() for step in steps if start <= step <= end})
    rows = []
    for name, run in runs.items():
        seen = {(row["step"], row["probe_id"]): row["logp_sum"] for row in run.sequences.to_dict("records")}
        lengths = {row["probe_id"]: row["n_tokens"] for row in run.sequences.to_dict("records")}
        for step in grid:
            for probe in next(iter(runs.values())).probes.to_dict("records"):
                ys = [seen.get((s, probe["probe_id"]), math.nan) for s in observed[name]]
                value, exact = line(observed[name], ys, step)
                about = [probe[key] for key in ("probe_id", "prompt_id", "family")]
                rows.append((name, name, step, exact, *about, lengths.get(probe["probe_id"], math.nan), value))
    return rows


@pytest.mark.parametrize("between", ["drop", "interpolate"])
@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_runs_of_other_intervals_and_lengths_meet_as_plain_loops_say(tmp_path, between, missing):
    runs = {
        name: random_log(tmp_path / name, seed=seed, steps=steps, missing=missing)
        for seed, (name, steps) in enumerate({"a": (0, 5, 10, 15, 20), "b": (0, 10, 20), "c": (0, 3, 10)}.items())
    }
    frame = align(runs, between=between)
    assert list(frame) == ABOUT
    assert_rows(frame, by_hand(runs, between=between))
    assert frame["at"].dtype == np.int64
    assert frame["at"].unique().tolist() == ([0, 10] if between == "drop" else [0, 3, 5, 10])


def test_aligned_runs_have_the_same_rows_and_can_be_subtracted(tmp_path):
    runs = {name: random_log(tmp_path / name, seed=seed, missing=0.2) for seed, name in enumerate("ab")}
    frame = align(runs)
    one, two = (frame[frame["run"] == name].reset_index(drop=True) for name in "ab")
    pd.testing.assert_frame_equal(one[["at", "probe_id"]], two[["at", "probe_id"]])
    wide = frame.pivot(index=["at", "probe_id"], columns="run", values="logp_sum")
    gap = (two["logp_sum"] - one["logp_sum"]).to_numpy()
    assert np.array_equal(np.sort((wide["b"] - wide["a"]).to_numpy()), np.sort(gap), equal_nan=True)


def test_no_number_is_made_up_without_being_asked_for(tmp_path):
    a = value_log(tmp_path / "a", {"p/chosen": {0: -1, 4: -2, 8: -3}})
    b = value_log(tmp_path / "b", {"p/chosen": {0: -1, 8: -5}})
    frame = align({"a": a, "b": b})
    assert frame["observed"].all()
    assert frame["at"].tolist() == [0, 8, 0, 8]
    filled = align({"a": a, "b": b}, between="interpolate").query("run == 'b'")
    assert filled[["at", "observed", "logp_sum"]].to_numpy().tolist() == [[0, True, -1], [4, False, -3], [8, True, -5]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_lies_between_numbers_that_are_none_is_none_and_what_was_measured_stays(tmp_path, bad):
    a = value_log(tmp_path / "a", {"p/chosen": {0: -1, 4: bad, 8: -3, 12: -4}})
    b = value_log(tmp_path / "b", {"p/chosen": {0: -1, 2: -1, 6: -1, 8: -2, 10: -1, 12: 0}})
    own = align({"a": a, "b": b}, between="interpolate").query("run == 'a'").set_index("at")["logp_sum"]
    assert own[[0, 8, 10, 12]].tolist() == [-1, -3, -3.5, -4]
    assert same(own[4], bad)
    assert not np.isfinite(own[[2, 6]]).any()


def test_progress_brings_runs_of_different_length_together(tmp_path):
    short = value_log(tmp_path / "a", {"p/chosen": {0: -1, 5: -2, 10: -3}})
    long = value_log(tmp_path / "b", {"p/chosen": {0: -1, 100: -2, 200: -3, 300: -4, 400: -5}})
    frame = align({"a": short, "b": long}, on="progress")
    assert frame["at"].tolist() == [0, 0.5, 1] * 2
    assert frame["logp_sum"].tolist() == [-1, -2, -3, -1, -3, -5]


def test_thirds_of_progress_meet_exactly(tmp_path):
    runs = {str(n): value_log(tmp_path / str(n), {"p/chosen": {k * n: -k for k in range(4)}}) for n in (1, 7, 1000)}
    assert len(align(runs, on="progress")) == 3 * 4


def test_epochs_that_were_added_up_meet_in_spite_of_rounding(tmp_path):
    sums = {"a": 0.3, "b": 0.1 + 0.2}
    assert sums["a"] != sums["b"]
    runs = {name: value_log(tmp_path / name, {"p/chosen": {5: -1}}, epochs={5: at}) for name, at in sums.items()}
    assert align(runs, on="epoch")["at"].tolist() == [0.3, 0.3]


def test_epochs_are_those_of_the_trainer(tmp_path):
    small = value_log(tmp_path / "a", {"p/chosen": {0: -1, 10: -2}}, epochs={0: 0.0, 10: 1.0})
    large = value_log(tmp_path / "b", {"p/chosen": {0: -1, 5: -4, 7: -6}}, epochs={0: 0.0, 5: 1.0, 7: 1.4})
    frame = align({"a": small, "b": large}, on="epoch")
    assert frame[["run", "at", "logp_sum"]].to_numpy().tolist() == [
        ["a", 0, -1], ["a", 1, -2], ["b", 0, -1], ["b", 1, -4],
    ]  # fmt: skip


def test_a_run_without_epochs_is_named(tmp_path):
    runs = {"a": value_log(tmp_path / "a", {"p/chosen": {0: -1, 10: -2}}, epochs={0: 0.0})}
    with pytest.raises(ValueError, match=r"run 'a' logged no epoch at step 10 of 'a'"):
        align(runs, on="epoch")


def test_single_observations_align_at_the_start(tmp_path):
    runs = {name: random_log(tmp_path / name, steps=(0,)) for name in "ab"}
    for on in ("step", "progress"):
        assert set(align(runs, on=on)["at"]) == {0}
        assert set(align(runs, on=on, between="interpolate")["at"]) == {0}


def test_chains_count_steps_epochs_and_progress_through(tmp_path):
    def log(name, values, epochs):
        return value_log(tmp_path / name, {"p/chosen": values}, epochs=epochs)

    sft = log("sft", {0: -9, 10: -5, 20: -4}, {0: 0.0, 10: 1.0, 20: 2.0})
    dpo = log("dpo", {0: -4, 10: -6, 20: -7}, {0: 0.0, 10: 0.5, 20: 1.0})
    straight = log("straight", {0: -9, 20: -8, 40: -7}, {0: 0.0, 20: 1.0, 40: 3.0})
    for on, at in {"step": [0, 20, 40], "progress": [0, 0.5, 1], "epoch": [0, 1, 3]}.items():
        frame = align({"chain": [sft, dpo], "straight": straight}, on=on)
        own = frame[frame["run"] == "chain"]
        assert own["at"].tolist() == at
        assert own["stage"].tolist() == ["sft", "sft" if on == "epoch" else "dpo", "dpo"]
        assert own["logp_sum"].tolist() == ([-9, -5, -7] if on == "epoch" else [-9, -4, -7])
    assert set(frame[frame["run"] == "straight"]["stage"]) == {"straight"}


def test_several_statistics_come_as_columns(tmp_path):
    run = random_log(tmp_path)
    frame = align({"a": run}, statistic=["entropy", "log_ratio"])
    assert list(frame)[-2:] == ["entropy_sum", "log_ratio_sum"]
    expected = run.sequences["logp_sum"] - run.sequences["ref_logp_sum"]
    assert frame["log_ratio_sum"].tolist() == pytest.approx(expected.tolist())


# ---- probes that differ ----------------------------------------------------------------------------------------------


def differing(tmp_path, **columns):
    """Two runs, the second with other values in some columns of its first probe."""
    probes = probes_frame()
    other = probes.copy()
    for name, value in columns.items():
        other[name] = [value, *other[name].tolist()[1:]]
    frames = [pd.DataFrame({"probe_id": p["probe_id"], "n_tokens": 2, "logp_sum": -1.0}) for p in (probes, other)]
    return RunLogs(
        {
            name: write_log(tmp_path / name, table, {0: frame})
            for name, table, frame in zip(("one", "two"), (probes, other), frames, strict=True)
        }
    )


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"response": "something else"}, "other response of 1 .'p0/chosen'."),
        ({"prompt": "something else"}, "other prompt of 1"),
        ({"response_ids": [2, 4]}, "other response tokens of 1"),
        ({"response_ids": [2]}, "other response tokens of 1"),
        ({"prompt_ids": [9]}, "other prompt tokens of 1"),
        ({"family": "zebra"}, "other family of 1"),
        ({"prompt_id": "x"}, "other prompt id of 1"),
        ({"probe_id": "new"}, "it lacks 1 .'p0/chosen'., it alone has 1 .'new'."),
    ],
)
def test_probes_that_differ_are_refused_by_what_differs_and_left_out_on_request(tmp_path, columns, words):
    runs = differing(tmp_path, **columns)
    with pytest.raises(ValueError, match=rf"'two' against 'one': {words}.*probes=\"common\" keeps the 8 of (9|10)"):
        align(runs)
    with pytest.warns(UserWarning, match=r": [12] of (9|10) left out"):
        frame = align(runs, probes="common")
    assert "p0/chosen" not in set(frame["probe_id"])
    assert len(frame) == 2 * 8


def test_runs_that_share_no_probe_are_refused(tmp_path):
    runs = {"a": value_log(tmp_path / "a", {"p/chosen": {0: -1}}), "b": value_log(tmp_path / "b", {"q/chosen": {0: 1}})}
    with pytest.raises(ValueError, match="none is the same in all"):
        align(runs, probes="common")


def test_stages_of_a_chain_must_watch_the_same_probes_too(tmp_path):
    runs = differing(tmp_path, response="something else")
    with pytest.raises(ValueError, match="'chain: two' against 'chain: one'"):
        align({"chain": runs})


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_runs_without_a_common_position_are_refused_with_theirs_and_a_way_out(tmp_path):
    runs = {"a": random_log(tmp_path / "a", steps=(1, 3)), "b": random_log(tmp_path / "b", steps=(2, 4))}
    with pytest.raises(ValueError, match=r"no step in common \('a': 1, 3; 'b': 2, 4\).*interpolate"):
        align(runs)
    assert align(runs, between="interpolate")["at"].unique().tolist() == [2, 3]
    later = {"a": runs["a"], "b": random_log(tmp_path / "c", steps=(5, 6))}
    with pytest.raises(ValueError, match=r"no step in common .*try on=\"progress\""):
        align(later, between="interpolate")


def test_a_run_without_observations_is_named(tmp_path):
    with pytest.raises(ValueError, match="run 'a' has no observation"):
        align({"a": write_log(tmp_path / "a", probes_frame(), {})})


@pytest.mark.parametrize("options", [{"on": "time"}, {"between": "spline"}, {"probes": "any"}, {"statistic": "loss"}])
def test_options_that_are_none_are_refused_with_those_allowed(tmp_path, options):
    with pytest.raises(ValueError, match="allowed: "):
        align({"a": random_log(tmp_path)}, **options)


def test_a_log_with_two_rows_of_a_probe_at_one_step_is_named(tmp_path):
    run = random_log(tmp_path)
    run.__dict__["sequences"] = pd.concat([run.sequences, run.sequences.tail(1)])
    with pytest.raises(ValueError, match=r"run 'a' has two rows of probe 'p2/zebra' at step 10"):
        align({"a": run})
