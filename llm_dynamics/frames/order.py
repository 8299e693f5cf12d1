"""The order in which families come, in every frame, table and figure."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

ARGMAX = "argmax"
"""Name of the pseudo-family of the greedy tokens of all probes, where a run has no chosen or rejected ones."""


def argmax_of(family: str) -> str:
    """Return the name of the pseudo-family of the greedy tokens along the prefixes of `family`."""
    return f"{ARGMAX} ({family} prefix)"


KNOWN = (
    "chosen",
    "rejected",
    "chosen_initial",
    "chosen_semantic",
    "rejected_semantic",
    "chosen_format",
    "rejected_format",
    "chosen_selfr",
    "other_train",
    "other_test",
    "human_random",
    "ungrammatical",
    "random",
    "random_tokens",
)
"""Known families in their canonical order."""

GREEDY = (argmax_of("chosen"), argmax_of("rejected"), ARGMAX)
"""The pseudo-families of greedy tokens, in their order; they come last."""

_PLACE = {family: (0, place) for place, family in enumerate(KNOWN)} | {
    family: (2, place) for place, family in enumerate(GREEDY)
}


def ordered(families: Iterable[str]) -> list[str]:
    """Sort families: the known ones in canonical order, unknown ones alphabetically, greedy pseudo-families last."""
    return sorted(set(families), key=lambda family: (*_PLACE.get(family, (1, 0)), family))


def in_order(frame: pd.DataFrame, *then: str) -> pd.DataFrame:
    """Sort the rows of a frame by `family` in canonical order, then by the columns `then`; the index starts at 0."""
    places = {family: place for place, family in enumerate(ordered(frame["family"]))}
    keyed = frame.assign(_place=frame["family"].map(places)).sort_values(["_place", *then], ignore_index=True)
    return keyed.drop(columns="_place")
