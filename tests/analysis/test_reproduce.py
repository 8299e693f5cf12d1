"""The reproduction study on a tiny model: real runs, and its tables against plain loops over their logs."""

import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llm_dynamics import load_run

FOLDER = Path(__file__).parents[2] / "analysis" / "reproduce"


@pytest.fixture(scope="module")
def scripts():
    # they import each other by bare names, as scripts do
    names = ("settings", "rows", "train", "claims", "attribution")
    before = {name: sys.modules.pop(name, None) for name in names}
    sys.path.insert(0, str(FOLDER))
    modules = {name: __import__(name) for name in names}
    yield modules
    sys.path.remove(str(FOLDER))
    for name in names:
        del sys.modules[name]
        if before[name] is not None:
            sys.modules[name] = before[name]


@pytest.fixture(scope="module")
def study(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for part in (["chain"], ["cells", "--cells", "0", "4", "5"]):
        scripts["train"].main(["--size", "quick", "--out", str(folder), "--part", *part])
    return folder


def change(folder, family, column="logp_sum"):
    """Mean change of a family between the first and the last observation, by a plain loop."""
    frame = load_run(folder).sequences
    frame = frame[frame["family"] == family]
    changes = []
    for _, rows in frame.groupby("probe_id"):
        by_step = dict(zip(rows["step"], rows[column], strict=True))
        changes.append(by_step[max(by_step)] - by_step[min(by_step)])
    return sum(changes) / len(changes)


def test_the_chain_starts_dpo_where_sft_ended(study):
    seed = study / "seed0"
    for before, after in (("sft", "dpo"), ("extend", "extend_dpo")):
        end = load_run(seed / before).sequences
        start = load_run(seed / after).sequences
        end, start = (
            frame[frame["step"] == step].set_index("probe_id")["logp_sum"].sort_index()
            for frame, step in ((end, end["step"].max()), (start, 0))
        )
        np.testing.assert_allclose(start, end, atol=1e-3)


def test_what_is_done_is_not_done_again(study, scripts, monkeypatch):
    monkeypatch.setattr(scripts["train"], "_train", lambda *_: pytest.fail("trained again"))
    scripts["train"].main(["--size", "quick", "--out", str(study)])


def test_claims_are_decided_by_the_means_of_the_logs(study, scripts):
    frame = scripts["claims"].judge_claims(study).set_index("claim")
    seed = study / "seed0"
    chosen, rejected = (change(seed / "dpo", family) for family in ("chosen", "rejected"))
    row = frame.loc["chosen falls too, more slowly"]
    assert row["value"] == pytest.approx(chosen, abs=1e-9)
    assert row["holds"] == (rejected < chosen < 0)
    assert row["low"] <= row["value"] <= row["high"]
    greedy = [change(seed / run, "chosen", "argmax_logp_sum") for run in ("dpo", "extend_dpo")]
    row = frame.loc["argmax rises less after it"]
    assert row["value"] == pytest.approx(greedy[1] - greedy[0], abs=1e-9)
    assert row["holds"] == (greedy[1] < greedy[0])
    families = [f for f in load_run(seed / "dpo").probes["family"].unique() if f not in ("chosen", "rejected")]
    falls = sum(change(seed / "dpo", family) < 0 for family in families)
    assert frame.loc["nearly all others fall", "holds"] == (falls >= 0.8 * len(families))
    assert "human_random falls" not in frame.index  # the package's own pairs have no such column


def test_a_claim_is_reproduced_only_where_every_seed_says_so(scripts):
    verdict = scripts["claims"].verdict
    seeds = ([True, True], [True, False], [False, False])
    assert [verdict(holds, [True, False]) for holds in seeds] == ["reproduced", "depends", "not"]
    assert {verdict(holds, [False, False]) for holds in seeds} == {"unsure"}


def test_the_table_counts_the_seeds_whose_direction_is_clear(scripts):
    rows = [("DPO", "it falls", seed, True, "-1", -1.0, low, high) for seed, low, high in ((0, -2, -0.5), (1, -2, 0.5))]
    frame = pd.DataFrame(rows, columns=["stage", "claim", "seed", "holds", "seen", "value", "low", "high"])
    assert "**reproduced** (holds in 2 of 2, clear in 1)" in scripts["claims"].as_markdown(frame)
    assert scripts["claims"].is_clear(pd.DataFrame({"low": [0.5, -1, np.nan], "high": [1, 2, np.nan]})).tolist() == [
        True, False, False,
    ]  # fmt: skip


def test_the_causes_of_a_cell_add_up_to_what_was_measured(study, scripts):
    cells, probes = scripts["attribution"].of_cells(study)
    assert list(cells["cell"]) == ["base", "rejected: shuffled words", "rejected: the model's own samples"]
    for number, cell in ((0, "base"), (4, "rejected: shuffled words")):
        run = load_run(study / "seed0" / "cells" / str(number))
        row = cells.set_index("cell").loc[cell]
        assert row["measured"] == pytest.approx(change(study / "seed0" / "cells" / str(number), "chosen"), abs=1e-3)
        rows = run.influence[(run.influence["family"] == "chosen") & (run.influence["cause"] == "down")]
        assert row["down"] == pytest.approx(rows["share"].sum() / rows["probe_id"].nunique(), abs=1e-9)
        assert row["push_share"] == pytest.approx(abs(row["down"]) / (abs(row["down"]) + abs(row["up"])))
        assert row["up"] + row["down"] + row["rest"] == pytest.approx(row["measured"], abs=1e-9)
    assert len(probes) == cells["probes"].sum()


def test_replaced_rejected_responses_are_the_ones_that_are_watched(study):
    kept = load_run(study / "seed0" / "cells" / "0").probes
    shuffled = load_run(study / "seed0" / "cells" / "4").probes
    texts = [frame[frame["family"] == "rejected"].set_index("prompt_id")["response"] for frame in (kept, shuffled)]
    assert set(texts[0].index) == set(texts[1].index)
    assert not any(texts[0][prompt] == texts[1][prompt] for prompt in texts[0].index)


def test_tables_are_written(study, scripts, tmp_path, capsys):
    scripts["claims"].main([str(study), "--out", str(tmp_path)])
    scripts["attribution"].main([str(study), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "rejected falls fastest" in printed
    assert "rejected: shuffled words" in printed
    assert set(pd.read_csv(tmp_path / "claims.csv").columns) == {
        "stage", "claim", "seed", "holds", "seen", "value", "low", "high",
    }  # fmt: skip
    attribution = pd.read_csv(tmp_path / "attribution.csv")
    assert attribution["explained"].max() <= 1
    assert all(map(math.isfinite, attribution["push_share"]))


def test_a_folder_without_runs_is_named(scripts, tmp_path):
    with pytest.raises(ValueError, match="no finished chain"):
        scripts["claims"].judge_claims(tmp_path)
    with pytest.raises(ValueError, match="no finished cell"):
        scripts["attribution"].of_cells(tmp_path)
