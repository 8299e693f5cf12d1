"""Influence maps of a run log: read, cropped, made ready for the page."""

import base64
import math

import numpy as np
import pandas as pd
import pytest

from llm_dynamics.report import influence_map
from llm_dynamics.report.influence_map import influence_maps
from llm_dynamics.report.influence_map_data import map_data, probe_tokens
from llm_dynamics.report.why import why
from llm_dynamics.runlog import load_run

from .accounts import account, add_maps, bare_run, examples, tokens
from .synthetic import DPO_DELTA, HOSTILE, WORDS, write_accounts, write_run

FAMILIES = {name: DPO_DELTA[name] for name in ("chosen", "rejected")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = write_run(
        tmp_path_factory.mktemp("maps") / "dynamics", "DPOTrainer", FAMILIES, steps=(0, 6), n_prompts=2, keep_tokens=2
    )
    return add_maps(write_accounts(run, steps=range(1, 7)))


def one_map(folder, cells, *, others=()):
    """A run with one map from `{(m, l): share}` of example 0, and training tokens of other examples."""
    run = bare_run(folder)
    frame = pd.DataFrame(
        {"probe_id": "chosen-1", "example": 0, "m": m, "l": place, "share": share}
        for (m, place), share in cells.items()
    )
    n_columns = 1 + max(place for _, place in cells)
    sums = [sum(s for (_, p), s in cells.items() if p == place and math.isfinite(s)) for place in range(n_columns)]
    told = [tokens(sums, target="chosen-1", kind="probe")]
    told += [tokens(shares, target="chosen-1", kind="probe", example=1 + n) for n, shares in enumerate(others)]
    told += [tokens([9.0], target="chosen", example=0)]
    tables = {"influence_maps": frame, "training_tokens": pd.concat(told)}
    return account(run, 1, {"up": 1.0}, tables=tables | {"training_examples": examples((0, "chosen", -1.0))})


# ---- the slow twin ---------------------------------------------------------------------------------------------------


def test_a_map_is_the_table_cell_by_cell_and_its_sums_are_the_tables_sums(run):
    rows = run.influence_maps.to_dict("records")
    maps = influence_maps(run, 10**6)
    assert len(maps) == 6
    for one in maps:
        mine = [row for row in rows if (row["step"], row["probe_id"]) == (one.step, one.probe_id)]
        assert len(mine) == one.shares.size > 50
        for row in mine:
            r, c = one.rows.tolist().index(row["m"]), one.columns.tolist().index(row["l"])
            assert one.shares[r, c] == row["share"]
        for r, m in enumerate(one.rows):
            assert one.row_sums[r] == pytest.approx(sum(row["share"] for row in mine if row["m"] == m))
        for c, place in enumerate(one.columns):
            assert one.column_sums[c] == pytest.approx(sum(row["share"] for row in mine if row["l"] == place))
        assert one.total == pytest.approx(sum(row["share"] for row in mine))


def test_what_other_examples_did_is_the_sum_of_their_training_tokens(run):
    told = run.training_tokens.to_dict("records")
    for one in influence_maps(run, 10**6):
        others = [
            row for row in told
            if (row["step"], row["target"], row["kind"]) == (one.step, one.probe_id, "probe")
            and row["example"] != one.example
        ]  # fmt: skip
        assert one.others == pytest.approx(sum(row["share"] for row in others))
        assert one.n_others == len({row["example"] for row in others}) == 5


def test_causes_of_a_watched_token_are_those_of_the_table(run):
    causes = run.influence_tokens.to_dict("records")
    for one in influence_maps(run, 10**6):
        for r, m in enumerate(one.rows):
            mine = {
                row["cause"]: row for row in causes
                if (row["step"], row["probe_id"], row["position"]) == (one.step, one.probe_id, m)
            }  # fmt: skip
            assert {cause: shares[r] for cause, shares in one.causes.items()} == {
                cause: row["share"] for cause, row in mine.items()
            }
            assert one.measured[r] == mine["up"]["measured"]
            assert one.all_training_tokens[r] == pytest.approx(mine["up"]["share"] + mine["down"]["share"])


def test_embedded_cells_are_the_shares_in_single_precision(run):
    _, data = map_data(run)
    maps = {(one.step, one.probe_id): one for one in influence_maps(run, 10**6)}
    for one in data["maps"]:
        theirs = maps[one["step"], data["probes"][one["probe"]]["id"]]
        cells = np.frombuffer(base64.b64decode(one["cells"]), dtype="<f4").reshape(
            len(one["rows"]), len(one["columns"])
        )
        np.testing.assert_allclose(cells, theirs.shares, rtol=1e-6)
        np.testing.assert_allclose(one["rowSums"], theirs.row_sums, rtol=1e-5)


# ---- what is missing, and what is left out ---------------------------------------------------------------------------


def test_a_run_without_maps_has_none_and_one_without_causes_says_so(tmp_path):
    bare = account(bare_run(tmp_path / "bare"), 1, {"up": 1.0})
    view, data = map_data(bare)
    assert (view["n_maps"], data) == (0, {"probes": [], "maps": []})
    run = one_map(tmp_path / "run", {(0, 0): 1.0, (0, 1): -2.0}, others=[[0.5, 0.25], [-3.0]])
    (one,) = map_data(run).data["maps"]
    assert (one["training"], one["causes"], one["measured"]) == (None, [], None)
    assert (one["others"], one["nOthers"], one["total"]) == (-2.25, 2, -1.0)
    (run.path / "training_tokens" / "step_000000001.parquet").unlink()
    (one,) = map_data(load_run(run.path)).data["maps"]
    assert (one["others"], one["tokens"]) == (None, ["?", "?"])


def test_cells_that_are_not_finite_are_gaps_outside_of_every_sum(tmp_path):
    run = one_map(tmp_path / "run", {(0, 0): math.nan, (0, 1): -2.0, (1, 0): math.inf, (1, 1): 0.5})
    (one,) = influence_maps(run, 100)
    assert np.isnan(one.shares).tolist() == [[True, False], [True, False]]
    assert (one.row_sums.tolist(), one.column_sums.tolist(), one.total) == ([-2.0, 0.5], [0.0, -1.5], -1.5)
    assert one.n_nonfinite == 2


def test_of_long_responses_the_strongest_tokens_stay_and_the_sums_count_all(tmp_path, monkeypatch):
    monkeypatch.setattr(influence_map, "MAX_SIDE", 2)
    shares = {(m, place): float((m + 1) * (-1) ** place * (place != 1)) for m in range(3) for place in range(4)}
    shares[2, 3] = 5.0
    run = one_map(tmp_path / "run", shares)
    (one,) = influence_maps(run, 100)
    assert (one.rows.tolist(), one.columns.tolist()) == ([1, 2], [0, 3])
    assert (one.n_rows, one.n_columns) == (3, 4)
    assert one.row_sums.tolist() == [sum(shares[m, place] for place in range(4)) for m in (1, 2)]
    assert one.column_sums.tolist() == [sum(shares[m, place] for m in range(3)) for place in (0, 3)]
    assert one.told["token"].tolist() == [" w0", " w3"]
    assert map_data(run).view["cropped"]


def test_maps_are_embedded_within_a_budget_and_the_last_step_first(run):
    size = influence_maps(run, 10**6)[0].shares.size
    assert [one.step for one in influence_maps(run, 1)] == [6]
    assert sorted({one.step for one in influence_maps(run, 4 * size)}) == [4, 6]
    view, _ = map_data(run, 4 * size)
    assert (view["n_steps"], view["n_steps_kept"]) == (2, 3)


def test_of_many_steps_and_probes_some_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(influence_map, "MAX_STEPS", 4)
    monkeypatch.setattr(influence_map, "MAX_PROBES", 1)
    run = write_run(tmp_path / "run", "DPOTrainer", FAMILIES, steps=(0, 9), n_prompts=1)
    run = add_maps(write_accounts(run, steps=range(1, 10), n_prompts=1), steps=range(1, 10))
    maps = influence_maps(run, 10**6)
    assert [one.step for one in maps] == [1, 4, 6, 9]
    assert {one.probe_id for one in maps} == {"chosen-0"}


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_watched_tokens_come_from_the_token_table_or_by_their_ids(run, tmp_path):
    assert probe_tokens(run, {"chosen-0": 3, "rejected-1": 1}) == {"chosen-0": WORDS[:3], "rejected-1": WORDS[:1]}
    bare = write_run(tmp_path / "bare", "DPOTrainer", FAMILIES, steps=(0, 6), n_prompts=1, keep_tokens=0)
    bare = add_maps(write_accounts(bare, steps=(1, 2), n_prompts=1))
    named = bare.training_tokens.groupby("token_id")["token"].agg(set)  # ids of these logs are not unique
    found = probe_tokens(bare, {"chosen-0": 40})["chosen-0"]
    assert all(found[place] in named[place] for place in range(13))
    assert found[39] == "#39"  # neither a text nor an id


def test_hostile_tokens_and_prompts_stay_text(tmp_path):
    answers = {"chosen": f"{HOSTILE} \u202e x", "rejected": f"a {HOSTILE} b"}
    run = write_run(
        tmp_path / "run", "DPOTrainer", FAMILIES, steps=(0, 2), n_prompts=1, words=[HOSTILE, "\u202e"], prompt=HOSTILE
    )
    run = add_maps(write_accounts(run, steps=(1, 2), answers=answers, prompt=HOSTILE))
    _, data = why("dpo", run)
    (probe, _), one = data["maps"]["probes"], data["maps"]["maps"][0]
    assert probe["tokens"][:2] == [HOSTILE, "\\u202e"]
    assert "".join(one["tokens"]) == f"a {HOSTILE} b"
    assert one["prompt"].endswith(HOSTILE)
