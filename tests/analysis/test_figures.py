"""The figures that are made of run logs: their numbers against plain loops over the files, and what they refuse.

The files are those of `analysis/figures/example_log`: real runs of the tiny model, see `make_example_log.py` there.
"""

import importlib
import math
import os
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from llm_dynamics import load_run
from llm_dynamics.influence import MicroBatch

FIGURES = Path(__file__).parents[2] / "analysis" / "figures"
EXAMPLE = FIGURES / "example_log"
LLD = FIGURES.parent / "results" / "lld.csv"
CHAIN = ("sft", "dpo", "extend", "extend_dpo")


@pytest.fixture(scope="module", autouse=True)
def _scripts_can_be_imported():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FIGURES)
        yield


def draw(script, out, *arguments):
    """Run a script's `main` and return its CSV; its pictures must show something."""
    importlib.import_module(script).main([*map(str, arguments), "--out", str(out)])
    with Image.open(out.with_suffix(".png")) as image:
        pixels = np.asarray(image.convert("L"))
    assert 0.005 < (pixels < 200).mean() < 0.7, "the picture is blank, or black"
    assert out.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert out.with_suffix(".pdf").stat().st_size > 8000
    return pd.read_csv(out.with_suffix(".csv"))


def refused(script, capsys, *arguments):
    """Run a script that must refuse its arguments, and return what it says."""
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main(list(map(str, arguments)))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def rows_of(folder, table):
    """All rows of a table of a run, as dictionaries, read without the package."""
    parts = sorted((folder / "dynamics" / table).glob("step_*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def change_by_loop(folder, family, column="logp_sum"):
    """Mean change of a family from the first to every observation, by step."""
    rows = [row for row in rows_of(folder, "sequences") if row["family"] == family]
    start = {row["probe_id"]: row[column] for row in rows if row["step"] == 0}
    by_step = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row[column] - start[row["probe_id"]])
    return {step: mean(values) for step, values in by_step.items()}


def margins_by_loop(folder):
    gaps = {}
    rows = rows_of(folder, "sequences")
    for one in rows:
        for other in rows:
            same = (one["step"], one["prompt_id"]) == (other["step"], other["prompt_id"])
            if same and (one["family"], other["family"]) == ("chosen", "rejected"):
                gaps.setdefault(one["step"], []).append(one["logp_sum"] - other["logp_sum"])
    return {step: mean(values) for step, values in gaps.items()}


def copy_run(name, to, *, seed=0, keep=lambda table, step: True):
    """Copy a run of the example without some of its parts."""
    source = EXAMPLE / f"seed{seed}" / name
    for file in source.rglob("*.*"):
        step = int(file.stem.removeprefix("step_")) if file.stem.startswith("step_") else None
        if step is None or keep(file.parent.name, step):
            place = to / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    return to


def rewrite(file, change):
    """Change a part of a log: `change` takes its rows as a frame and returns them."""
    table = pq.read_table(file)
    pq.write_table(pa.Table.from_pandas(change(table.to_pandas()), table.schema, preserve_index=False), file)


# ---- the example log ------------------------------------------------------------------------------------------


def test_the_example_log_is_small_and_its_accounts_balance():
    assert sum(file.stat().st_size for file in EXAMPLE.rglob("*") if file.is_file()) < 400_000
    for name in CHAIN:
        for seed in (0, 1):
            run = load_run(EXAMPLE / f"seed{seed}" / name)
            assert len(run.observed_steps) == 3
            assert run.sequences["family"].nunique() == 7
        run = load_run(EXAMPLE / "seed0" / name)
        assert (run.accounts["explained"] > 0.99).all()
        sums = run.family_influence().groupby(["step", "family"]).agg({"share": "sum", "measured": "first"})
        assert np.allclose(sums["share"], sums["measured"], atol=1e-6)
    assert all(load_run(EXAMPLE / "seed1" / name).accounts.empty for name in CHAIN)


def test_packing_a_log_keeps_its_values_types_and_other_files(tmp_path):
    module = importlib.import_module("make_example_log")
    source = tmp_path / "dynamics"
    (source / "tokens").mkdir(parents=True)
    (source / "meta.json").write_text("{}")
    shutil.copy(EXAMPLE / "seed0/sft/dynamics/probes.parquet", source)
    (source / "tokens" / "step_000000000.parquet").write_text("large")
    module.pack(source, tmp_path / "packed")
    assert sorted(file.name for file in (tmp_path / "packed").rglob("*")) == ["meta.json", "probes.parquet"]
    assert pq.read_table(tmp_path / "packed" / "probes.parquet").equals(pq.read_table(source / "probes.parquet"))


def test_tokens_of_an_extended_batch_are_labelled_by_the_answer_they_belong_to():
    module = importlib.import_module("make_example_log")
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6]}, {"input_ids": [5, 9, 7]}]
    label = module.ByCompletion(SimpleNamespace(train_dataset=rows), n_chosen=2)
    ids = torch.tensor([[5, 9, 7], [5, 6, 0], [5, 6, 7]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    labels = ids[:, 1:]
    zeros = torch.zeros(labels.shape)
    batch = MicroBatch({"input_ids": ids, "attention_mask": mask}, labels, zeros, zeros, labels, True, None)
    masks = label(batch)
    assert masks["chosen"].tolist() == [[False, False], [True, True], [True, True]]
    assert torch.equal(masks["rejected"], ~masks["chosen"])


# ---- Fig. 3 ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft_figure(tmp_path_factory):
    """The CSV of Fig. 3 of the whole example."""
    return draw("ld_fig3", tmp_path_factory.mktemp("third") / "figure", "--runs", EXAMPLE)


def test_sft_curves_are_means_over_seeds_of_means_over_probes(sft_figure):
    curves = sft_figure[sft_figure["panel"] == "curve"]
    assert set(curves["run"]) == {"sft"}
    for family in ("chosen", "rejected_semantic", "ungrammatical"):
        by_seed = [change_by_loop(EXAMPLE / f"seed{seed}" / "sft", family) for seed in (0, 1)]
        own = curves[curves["family"] == family].set_index("step")
        assert list(own.index) == list(by_seed[0])
        for step in own.index:
            values = [change[step] for change in by_seed]
            assert own.at[step, "mean"] == pytest.approx(mean(values), rel=1e-4, abs=1e-9)
            assert own.at[step, "low"] == pytest.approx(min(values), rel=1e-4, abs=1e-9)
            assert own.at[step, "high"] == pytest.approx(max(values), rel=1e-4, abs=1e-9)
            assert (own.at[step, "seeds"], own.at[step, "probes"]) == (2, 4)


def test_accumulated_influence_is_the_sum_of_shares_over_steps_and_adds_up_to_the_measured_change(sft_figure):
    table = sft_figure[sft_figure["panel"] == "influence"]
    assert list(dict.fromkeys(table["run"])) == ["sft", "extend", "dpo", "extend_dpo"]
    for name in CHAIN:
        own = table[table["run"] == name]
        rows = rows_of(EXAMPLE / "seed0" / name, "influence")
        for family in ("chosen", "other_train"):
            column = own[own["family"] == family].set_index("cause")["mean"]
            told = [cause for cause in column.index if cause not in ("everything else", "measured")]
            for cause in told:
                total = sum(row["share"] for row in rows if (row["family"], row["cause"]) == (family, cause))
                assert column[cause] == pytest.approx(total, rel=1e-4, abs=1e-4)
            measured = {row["step"]: row["measured"] for row in rows if row["family"] == family}
            assert column["measured"] == pytest.approx(sum(measured.values()), rel=1e-4)
            assert column.drop("measured").sum() == pytest.approx(column["measured"], abs=2e-3)
        assert set(own["seeds"]) == {1}


def test_update_types_bear_the_names_of_roles_and_come_in_order(sft_figure):
    table = sft_figure.dropna(subset="update")
    updates = {name: list(dict.fromkeys(own["update"])) for name, own in table.groupby("run")}
    assert updates["sft"] == ["trained tokens, pulled up", "momentum of trained tokens", "everything else", "measured"]
    assert updates["extend"] == [
        "chosen tokens",
        "rejected tokens",
        "momentum of chosen tokens",
        "momentum of rejected tokens",
        "everything else",
        "measured",
    ]
    assert updates["dpo"][:4] == [
        "chosen tokens, pulled up",
        "rejected tokens, pushed down",
        "momentum of chosen tokens",
        "momentum of rejected tokens",
    ]


def test_without_training_examples_update_types_are_named_after_their_direction(tmp_path):
    run = copy_run("dpo", tmp_path / "dpo", keep=lambda table, step: table != "training_examples")
    table = importlib.import_module("accumulated").accumulated_influence([load_run(run)])
    assert list(dict.fromkeys(table["update"]))[:4] == [
        "tokens pulled up",
        "tokens pushed down",
        "momentum of tokens pulled up",
        "momentum of tokens pushed down",
    ]


def test_accounts_are_averaged_over_the_seeds_that_have_one():
    folders = [EXAMPLE / "seed0" / name for name in ("dpo", "extend_dpo")] + [EXAMPLE / "seed1" / "dpo"]
    accumulated = importlib.import_module("accumulated").accumulated_influence
    table = accumulated([load_run(folder) for folder in folders])
    cell = table[(table["family"] == "chosen") & (table["cause"] == "down")].iloc[0]
    totals = [
        sum(row["share"] for row in rows_of(folder, "influence") if (row["family"], row["cause"]) == ("chosen", "down"))
        for folder in folders[:2]
    ]
    assert cell["mean"] == pytest.approx(mean(totals), rel=1e-9)
    assert cell["seeds"] == 2


def test_runs_without_accounts_have_no_heat_map_and_the_script_says_so(tmp_path, capsys):
    table = draw("ld_fig3", tmp_path / "figure", "--runs", *(f"{name}={EXAMPLE}/seed1/{name}" for name in CHAIN))
    assert set(table["panel"]) == {"curve"}
    assert "no account in sft, extend, dpo, extend_dpo" in capsys.readouterr().out


def test_a_step_with_a_number_that_is_not_finite_is_left_out_of_the_account_of_its_family_alone(tmp_path):
    run = copy_run("dpo", tmp_path / "dpo")

    def spoil(frame):
        frame.loc[(frame["family"] == "chosen") & (frame["cause"] == "down"), "share"] = math.nan
        return frame

    rewrite(run / "dynamics/influence/step_000000002.parquet", spoil)
    accumulated = importlib.import_module("accumulated").accumulated_influence
    spoilt, whole = accumulated([load_run(run)]), accumulated([load_run(EXAMPLE / "seed0" / "dpo")])
    rows = rows_of(EXAMPLE / "seed0" / "dpo", "influence")
    for cause in ("up", "down"):
        kept = [r["share"] for r in rows if (r["family"], r["cause"]) == ("chosen", cause) and r["step"] != 2]
        cell = spoilt[(spoilt["family"] == "chosen") & (spoilt["cause"] == cause)]
        assert cell["mean"].item() == pytest.approx(sum(kept), rel=1e-6)
    others = [table[table["family"] != "chosen"].reset_index(drop=True) for table in (spoilt, whole)]
    pd.testing.assert_frame_equal(*others)


def test_momentum_that_is_not_told_apart_is_a_row_where_it_matters(tmp_path):
    run = copy_run("dpo", tmp_path / "dpo")
    for part in (run / "dynamics/influence").iterdir():  # as a run with history="total" writes it
        rewrite(
            part,
            lambda frame: frame[~frame["cause"].isin(["momentum", "momentum_up"])].replace(
                {"cause": {"momentum_down": "momentum"}}
            ),
        )
    table = importlib.import_module("accumulated").accumulated_influence([load_run(run)])
    assert "momentum, not told apart" in set(table["update"])
    whole = importlib.import_module("accumulated").accumulated_influence([load_run(EXAMPLE / "seed0" / "dpo")])
    assert "momentum, not told apart" not in set(whole["update"])


# ---- Fig. 4 ---------------------------------------------------------------------------------------------------


def test_dpo_values_greedy_tokens_and_margin_are_those_of_the_log(tmp_path, capsys):
    folder = EXAMPLE / "seed1" / "dpo"
    table = draw("ld_fig4", tmp_path / "figure", "--runs", f"dpo={folder}")
    rows = [row for row in rows_of(folder, "sequences") if row["family"] == "chosen"]
    for family, column in (("chosen", "logp_sum"), ("argmax (chosen prefix)", "argmax_logp_sum")):
        own = table[(table["panel"] == "value") & (table["family"] == family)].set_index("step")
        assert list(own.index) == [0, 2, 4]
        for step in own.index:
            assert own.at[step, "mean"] == pytest.approx(mean(r[column] for r in rows if r["step"] == step), rel=1e-4)
        assert own["low"].isna().all()
        moved = table[(table["panel"] == "change") & (table["family"] == family)].set_index("step")["mean"]
        changes = change_by_loop(folder, "chosen", column)
        assert moved.to_dict() == pytest.approx(changes, rel=1e-4, abs=1e-9)
        assert f"{moved[4]:+.2f} nats" in capsys.readouterr().out or column == "argmax_logp_sum"
    margin = table[table["panel"] == "margin"].set_index("step")["mean"]
    assert margin.to_dict() == pytest.approx(margins_by_loop(folder), rel=1e-4)


def test_only_steps_that_every_seed_observed_are_averaged(tmp_path):
    short = copy_run("dpo", tmp_path / "dpo", seed=1, keep=lambda table, step: step != 4)
    logs = [load_run(EXAMPLE / "seed0" / "dpo"), load_run(short)]
    curves = importlib.import_module("log_curves")
    for table in (curves.seed_curves(logs), curves.seed_curves(logs, delta=True), curves.seed_margins(logs)):
        assert set(table["step"]) == {0, 2}
        assert set(table["seeds"]) == {2}


def test_a_family_that_one_seed_watches_is_averaged_over_that_seed(tmp_path):
    run = copy_run("dpo", tmp_path / "dpo", seed=1)
    for part in (run / "dynamics/sequences").iterdir():
        rewrite(part, lambda frame: frame[frame["family"] != "human_random"])
    table = importlib.import_module("log_curves").seed_curves([load_run(EXAMPLE / "seed0" / "dpo"), load_run(run)])
    seeds = table.groupby("family", sort=False)["seeds"].unique().map(list).to_dict()
    assert seeds.pop("human_random") == [1]
    assert set(map(tuple, seeds.values())) == {(2,)}
    assert list(seeds)[:4] == ["chosen", "rejected", "chosen_semantic", "rejected_semantic"]


def test_one_observation_is_drawn_and_said(tmp_path, capsys):
    run = copy_run("dpo", tmp_path / "dpo", keep=lambda table, step: step == 0)
    table = draw("ld_fig4", tmp_path / "figure", "--runs", f"dpo={run}")
    assert "one observation" in capsys.readouterr().out
    assert (table.loc[table["panel"] == "change", "mean"] == 0).all()
    copy_run("sft", tmp_path / "sft", keep=lambda table, step: step == 0)
    draw("ld_fig3", tmp_path / "third", "--runs", tmp_path)
    assert "one observation" in capsys.readouterr().out


def test_missing_families_leave_their_panels_empty(tmp_path):
    run = copy_run("dpo", tmp_path / "dpo")
    kept = ("chosen", "other_train")
    for part in (run / "dynamics/sequences").iterdir():
        rewrite(part, lambda frame: frame[frame["family"].isin(kept)])
    table = draw("ld_fig4", tmp_path / "figure", "--runs", f"dpo={run}")
    assert set(table["family"]) == {*kept, "argmax (chosen prefix)"}
    assert "margin" not in set(table["panel"])
    other = copy_run("extend_dpo", tmp_path / "extend_dpo")
    five = draw("ld_fig5", tmp_path / "five", "--runs", f"dpo={run}", f"extend_dpo={other}")
    assert set(five.loc[five["family"] == "rejected", "pipeline"]) == {"extended"}


# ---- Fig. 5 ---------------------------------------------------------------------------------------------------


def test_both_pipelines_are_counted_from_the_start_of_dpo(tmp_path, capsys):
    table = draw("ld_fig5", tmp_path / "figure", "--runs", EXAMPLE)
    curves = table[(table["panel"] == "curve") & (table["family"] == "chosen")]
    places = {stage: own["x"].tolist() for stage, own in curves.groupby("stage")}
    assert places == {"sft": [-8, -4, 0], "extend": [-12, -6, 0], "dpo": [0, 2, 4], "extend_dpo": [0, 2, 4]}
    assert dict(zip(curves["stage"], curves["pipeline"], strict=True)) == {
        "sft": "plain",
        "dpo": "plain",
        "extend": "extended",
        "extend_dpo": "extended",
    }
    at_start = curves[curves["x"] == 0].groupby("pipeline")["mean"].agg(["min", "max"])
    assert np.allclose(at_start["min"], at_start["max"], rtol=1e-5), "DPO starts from the model of the stage before"
    for stage in ("dpo", "extend_dpo"):
        moved = table[(table["panel"] == "change over dpo") & (table["stage"] == stage)].set_index("family")["mean"]
        for family in ("chosen", "rejected"):
            by_seed = [change_by_loop(EXAMPLE / f"seed{seed}" / stage, family)[4] for seed in (0, 1)]
            assert moved[family] == pytest.approx(mean(by_seed), rel=1e-3, abs=1e-3)
        ends = [margins_by_loop(EXAMPLE / f"seed{seed}" / stage) for seed in (0, 1)]
        assert moved["margin"] == pytest.approx(mean(end[4] - end[0] for end in ends), rel=1e-3)
    assert "2 seeds" in capsys.readouterr().out


def test_without_the_stage_before_the_pipelines_begin_with_dpo(tmp_path, capsys):
    runs = [f"{name}={EXAMPLE}/seed0/{name}" for name in ("dpo", "extend_dpo")]
    table = draw("ld_fig5", tmp_path / "figure", "--runs", *runs, "--families", "human_random", "margin")
    assert set(table.loc[table["panel"] == "curve", "stage"]) == {"dpo", "extend_dpo"}
    assert "no run extend" in capsys.readouterr().out


# ---- what the scripts refuse ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "runs", "said"),
    [
        ("ld_fig3", ["nowhere"], ["there is no folder nowhere", "folder/seed*/NAME"]),
        ("ld_fig3", ["sft=nowhere"], ["no run log at nowhere", "output_dir"]),
        ("ld_fig3", ["sft=nowhere/seed*/sft"], ["no folder matches 'nowhere/seed*/sft'"]),
        (
            "ld_fig3",
            [FIGURES],
            ["holds no run called sft, extend, dpo, extend_dpo", "seen there", "--runs NAME=FOLDER"],
        ),
        ("ld_fig3", [f"dpo={EXAMPLE}/seed0/dpo"], ["needs the run sft or extend; found: dpo"]),
        ("ld_fig3", [f"kto={EXAMPLE}/seed0/dpo"], ["no run is called 'kto'", "allowed: sft, extend, dpo, extend_dpo"]),
        ("ld_fig4", [f"dpo={EXAMPLE}/seed0/dpo", f"dpo={EXAMPLE}/seed0/dpo"], ["given twice as 'dpo'"]),
        ("ld_fig4", [f"{EXAMPLE}/seed0/sft"], ["no run is called 'sft'", "allowed: dpo"]),
        (
            "ld_fig5",
            [f"sft={EXAMPLE}/seed0/sft", f"dpo={EXAMPLE}/seed0/dpo"],
            ["missing: extend_dpo; found: sft, dpo", "--runs extend_dpo=FOLDER"],
        ),
        ("ld_fig5", [EXAMPLE, "--families", "nonsense"], ["nonsense not watched", "'chosen'", "'margin'"]),
        ("nthr_fig1", [f"sft={EXAMPLE}/seed0/sft"], ["has no displacements", "displacement=True"]),
        ("nthr_fig1", [EXAMPLE], ["NAME=FOLDER", "grpo=runs/demo-grpo/grpo"]),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_way_out(script, runs, said, capsys, tmp_path):
    message = " ".join(refused(script, capsys, "--out", tmp_path / "figure", "--runs", *runs).split())
    for part in said:
        assert part in message
    assert not list(tmp_path.iterdir())


def test_a_run_without_one_finite_log_prob_is_refused(tmp_path, capsys):
    run = copy_run("dpo", tmp_path / "dpo")
    for part in (run / "dynamics/sequences").iterdir():
        rewrite(part, lambda frame: frame.assign(logp_sum=math.nan, argmax_logp_sum=math.nan))
    assert "nothing to draw" in refused("ld_fig4", capsys, "--runs", tmp_path)


def test_wildcards_and_repeated_names_are_seeds_and_a_folder_is_searched():
    open_runs = importlib.import_module("log_runs").open_runs
    paths = [log.path for log in open_runs([f"sft={EXAMPLE}/seed*/sft"], known=["sft"])["sft"]]
    assert paths == [EXAMPLE / f"seed{seed}" / "sft" / "dynamics" for seed in (0, 1)]
    several = open_runs([f"sft={EXAMPLE}/seed1/sft", f"sft={EXAMPLE}/seed0/sft"], known=["sft"])
    assert [log.path for log in several["sft"]] == paths[::-1]
    found = open_runs([str(EXAMPLE)], known=["dpo", "sft"])
    assert {name: len(logs) for name, logs in found.items()} == {"dpo": 2, "sft": 2}
    assert len(open_runs([str(EXAMPLE / "seed0")], known=["sft"])["sft"]) == 1


# ---- lazy likelihood displacement ---------------------------------------------------------------------------------


def lld_rows():
    return pd.read_csv(LLD).to_dict("records")


def test_every_method_is_set_beside_grpo_on_the_same_question_in_order(tmp_path, capsys):
    table = draw("nthr_fig1", tmp_path / "figure")
    deltas = {(row["seed"], row["question"], row["arm"]): row["delta"] for row in lld_rows()}
    assert len(table) * 4 == len(deltas)
    assert table["grpo"].is_monotonic_increasing
    assert table["place"].tolist() == list(range(1, len(table) + 1))
    for row in table.to_dict("records"):
        for arm in ("grpo", "nthr", "random", "pos_only"):
            assert row[arm] == pytest.approx(deltas[row["seed"], row["question"], arm], rel=1e-5)
    gains = [deltas[s, q, "nthr"] - value for (s, q, arm), value in deltas.items() if arm == "grpo"]
    above = sum(gain > 1e-5 for gain in gains)
    assert f"{mean(gains):+.4f} to GRPO, above it in {above}\n" in capsys.readouterr().out


def test_displacements_of_run_logs_are_means_over_the_correct_answers_of_a_question(tmp_path):
    runs = [f"{name}={EXAMPLE}/seed0/{name}" for name in ("grpo", "nthr")]
    table = draw("nthr_fig1", tmp_path / "figure", "--runs", *runs)
    for name, own in table.groupby("run"):
        groups = {}
        for row in rows_of(EXAMPLE / "seed0" / name, "displacements"):
            groups.setdefault((row["step"], row["question"]), []).append(row["logp_after"] - row["logp_before"])
        assert len(own) == len(groups) > 1
        assert own["delta"].is_monotonic_increasing
        for row in own.to_dict("records"):
            values = groups[row["step"], row["question"]]
            assert row["delta"] == pytest.approx(mean(values), rel=1e-5)
            assert row["n_correct"] == len(values)


def test_overlap_of_gwhes_is_counted_as_in_the_published_table(tmp_path, capsys):
    table = draw("nthr_gwhes", tmp_path / "figure")
    said = " ".join(capsys.readouterr().out.split())
    published = " ".join((LLD.parent / "lld.md").read_text().split())
    assert "hold 11 of the 15 with the lowest Delta (chance: 3.8)" in said
    assert "hold 11 of the 15 with the lowest Delta (chance: 3.8)" in published
    assert "rank correlation of GWHES with Delta: -0.90" in said
    assert "rank correlation -0.90" in published
    facts = [row for row in lld_rows() if row["arm"] == "grpo"]
    found = table[table["panel"] == "overlap"].set_index("n")["found"]
    for n in (1, 7, 15, 40, len(facts)):
        high = sorted(facts, key=lambda row: -row["gwhes"])[:n]
        low = sorted(facts, key=lambda row: row["delta"])[:n]
        assert found[n] == sum(row in low for row in high)


def test_range_of_a_random_order_is_that_of_all_subsets():
    random_range = importlib.import_module("nthr_gwhes").random_range
    for total, n in ((6, 2), (7, 3), (8, 5), (5, 5)):
        counts = sorted(sum(item < n for item in chosen) for chosen in combinations(range(total), n))
        expected = tuple(counts[math.ceil(level * len(counts)) - 1] for level in (0.025, 0.975))
        assert random_range(n, total) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.drop(columns="delta"), "lacks the columns delta"),
        (lambda table: table[table["arm"] != "grpo"], "has no arm 'grpo'"),
        (lambda table: pd.concat([table, table]), "two rows"),
    ],
)
def test_a_table_that_is_not_of_lld_is_refused(change, said, tmp_path, capsys):
    change(pd.read_csv(LLD)).to_csv(tmp_path / "bad.csv", index=False)
    for script in ("nthr_fig1", "nthr_gwhes"):
        assert said in " ".join(refused(script, capsys, "--csv", tmp_path / "bad.csv").split())
    assert "there is no file" in refused("nthr_fig1", capsys, "--csv", tmp_path / "none.csv")


def test_gwhes_needs_its_column_and_a_share(tmp_path, capsys):
    pd.read_csv(LLD).drop(columns="gwhes").to_csv(tmp_path / "bad.csv", index=False)
    assert "lacks the columns gwhes" in refused("nthr_gwhes", capsys, "--csv", tmp_path / "bad.csv")
    assert "--low is 2.0; allowed" in refused("nthr_gwhes", capsys, "--low", "2")


# ---- as scripts ---------------------------------------------------------------------------------------------------


def test_a_figure_is_drawn_from_the_command_line_without_a_display(tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MPLBACKEND")}
    done = subprocess.run(
        [sys.executable, "-W", "error", FIGURES / "ld_fig4.py", "--runs", EXAMPLE, "--out", "deep/er/figure"],
        cwd=tmp_path,
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {file.suffix for file in (tmp_path / "deep" / "er").iterdir()} == {".png", ".pdf", ".csv"}


@pytest.mark.parametrize("script", ["ld_fig3", "ld_fig4", "ld_fig5", "nthr_fig1", "nthr_gwhes"])
def test_help_tells_what_is_drawn_with_commands_and_the_difference_to_the_paper(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    for part in (f"python analysis/figures/{script}.py", "arXiv", "Where this differs from the paper", "--out"):
        assert part in said
    assert script in (FIGURES / "README.md").read_text()
