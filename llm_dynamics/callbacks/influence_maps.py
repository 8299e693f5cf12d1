"""Influence maps: which probes get one, and what else is told of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from llm_dynamics.callbacks.finished_step import FinishedStep
from llm_dynamics.callbacks.probe_account import account_of_probes

AUTO = "auto"
N_AUTO = 2
"""Probes of `map_probes="auto"`: one chosen and one rejected response, where both families are watched."""


def pick_map_probes(wanted: Sequence[str] | int, probes: pd.DataFrame, families: Sequence[str]) -> list[str]:
    """Return the probes whose influence maps are kept.

    Args:
        wanted: Probe ids; or how many, taken in turn from `families`, each in the order of the probe set; or "auto"
            for `N_AUTO`.
        probes: The probes accounted for: `probe_id`, `family`.
        families: The families that a number is drawn from.

    Returns:
        Probe ids; fewer than a number asks for where the families have fewer.
    """
    if not isinstance(wanted, int | str):
        return list(wanted)
    n = N_AUTO if isinstance(wanted, str) else wanted
    drawn = probes[probes["family"].isin(families)]
    turn = drawn.groupby("family", sort=False).cumcount()
    place = drawn["family"].map({family: place for place, family in enumerate(families)})
    in_turn = drawn.assign(turn=turn, place=place).sort_values(["turn", "place"], kind="stable")
    return [str(probe_id) for probe_id in in_turn["probe_id"].head(n)]


def account_of_tokens(step: FinishedStep, probe_ids: Sequence[str]) -> pd.DataFrame:
    """Account for the tokens of some probes: what a map's one training example is to be held against.

    Args:
        step: The step.
        probe_ids: The probes.

    Returns:
        Rows of `schema.INFLUENCE_TOKENS`, step excepted, of these probes over all processes: one directional derivative
        of their responses alone per cause.
    """
    mine = [place for place, probe_id in enumerate(step.table["probe_id"]) if probe_id in probe_ids]
    alone = replace(
        step,
        table=step.table.iloc[mine].reset_index(drop=True),
        order=[step.order[place] for place in mine],
        encoded=[step.encoded[place] for place in mine],
    )
    tokens = account_of_probes(alone, "token").tokens
    assert tokens is not None  # what the detail "token" is about
    return tokens
