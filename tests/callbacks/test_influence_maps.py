"""Which probes get an influence map, and what is kept beside it."""

import numpy as np
import pandas as pd
import pytest

from llm_dynamics.callbacks.influence_maps import pick_map_probes
from llm_dynamics.callbacks.influence_settings import InfluenceSettings
from tests.callbacks.explained import explain, short_probes
from tests.conftest import FIRST
from tests.training import save_tiny_model

PROBES = pd.DataFrame(
    {
        "probe_id": ["a/chosen", "a/rejected", "a/other", "b/chosen", "b/rejected", "b/other"],
        "family": ["chosen", "rejected", "other"] * 2,
    }
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run with maps of two probes, at each detail."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    return {
        detail: explain(
            "dpo", folder, tmp_path_factory.mktemp(detail), probes=short_probes(), max_steps=3,
            influence={"map_probes": "auto", "detail": detail, "tokens_every": 2},
        )[1]
        for detail in ("family", "token")
    }  # fmt: skip


# ---- which -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "picked"),
    [
        ("auto", ["a/chosen", "a/rejected"]),
        (1, ["a/chosen"]),
        (3, ["a/chosen", "a/rejected", "b/chosen"]),
        (9, ["a/chosen", "a/rejected", "b/chosen", "b/rejected"]),
        (0, []),
        (("b/other",), ["b/other"]),
    ],
)
def test_a_number_of_maps_is_drawn_from_chosen_and_rejected_in_turn(wanted, picked):
    assert pick_map_probes(wanted, PROBES, ["chosen", "rejected"]) == picked
    assert InfluenceSettings(map_probes=wanted).of_probes(PROBES).mapped == picked


def test_without_chosen_and_rejected_a_number_is_drawn_from_the_first_family():
    others = PROBES[PROBES["family"] == "other"]
    assert InfluenceSettings(map_probes="auto").of_probes(others).mapped == ["a/other", "b/other"]
    only = InfluenceSettings(map_probes=2, families=("rejected", "other")).of_probes(PROBES)
    assert only.mapped == ["a/rejected", "b/rejected"]


@pytest.mark.parametrize("wanted", ["a/chosen", -1, True, False])
def test_what_is_no_list_number_or_auto_is_refused(wanted):
    with pytest.raises(ValueError, match=r"map_probes is .*; allowed: a list of texts or 0, 1, ... or 'auto'"):
        InfluenceSettings(map_probes=wanted)


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_auto_keeps_maps_of_a_chosen_and_a_rejected_response_at_the_steps_of_training_tokens(runs):
    run = runs["family"]
    assert run.meta["influence"]["map_probes"] == [f"{FIRST}/chosen", f"{FIRST}/rejected"]
    kept = run.influence_maps[["step", "probe_id"]].drop_duplicates()
    assert sorted(map(tuple, kept.to_numpy())) == [
        (step, f"{FIRST}/{family}") for step in (1, 2) for family in ("chosen", "rejected")
    ]


def test_of_the_tokens_of_mapped_probes_every_cause_is_kept_beside_the_map(runs):
    """The same rows that detail="token" keeps of them."""
    keys = ["step", "probe_id", "position", "cause"]
    mine = runs["family"].influence_tokens.set_index(keys).sort_index()
    every = runs["token"].influence_tokens.set_index(keys).sort_index()
    assert set(mine.index.get_level_values("probe_id")) == {f"{FIRST}/chosen", f"{FIRST}/rejected"}
    assert set(mine.index.get_level_values("step")) == {1, 2}
    assert len(every) > len(mine)
    for column in ("share", "measured"):
        np.testing.assert_allclose(mine[column], every.loc[mine.index, column], atol=1e-6)


def test_rows_of_a_map_and_the_other_examples_add_up_to_the_causes_of_the_token(runs):
    run = runs["family"]
    causes = run.influence_tokens
    labels = causes[causes["cause"].isin(["up", "down"])].groupby(["step", "probe_id"])["share"].sum()
    tokens = run.training_tokens.query("kind == 'probe'")
    everything = tokens.groupby(["step", "target"])["share"].sum().rename_axis(["step", "probe_id"])
    np.testing.assert_allclose(labels, everything.loc[labels.index], atol=1e-3)
    assert labels.abs().min() > 1e-3
