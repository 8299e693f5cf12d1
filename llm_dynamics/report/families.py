"""The families of probes: their names for people, and how each is drawn; their order is that of `frames`.

Hue tells the kind of response (chosen and its kin, rejected and its kin, answers to other prompts, texts that are no
answer); dash and marker tell the members of a kind apart, so that colour is never the only cue.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

from llm_dynamics.frames.order import ARGMAX as ARGMAX
from llm_dynamics.frames.order import GREEDY as GREEDY
from llm_dynamics.frames.order import argmax_of as argmax_of
from llm_dynamics.frames.order import ordered as ordered


@dataclass(frozen=True)
class FamilyStyle:
    """How a family is drawn and named.

    Attributes:
        group: The kind of response.
        light: Colour on a light background; at least 4.5 : 1 on the page's.
        dark: Colour on a dark background; likewise.
        dash: A plotly dash name.
        symbol: A plotly marker name.
        width: Line width in pixels.
        meaning: What the family is, in a few words.
    """

    group: str
    light: str
    dark: str
    dash: str
    symbol: str
    width: float
    meaning: str


_CHOSEN, _REJECTED, _OTHER, _NOISE = "chosen and kin", "rejected and kin", "other prompts", "not answers"
_GREEDY, _UNKNOWN = "greedy", "further families"

STYLES: dict[str, FamilyStyle] = {
    "chosen": FamilyStyle(_CHOSEN, "#0b5cad", "#6db3f2", "solid", "circle", 3, "the preferred response, y⁺"),
    "rejected": FamilyStyle(_REJECTED, "#b93a06", "#ff8a5b", "solid", "circle", 3, "the rejected response, y⁻"),
    "chosen_initial": FamilyStyle(
        _CHOSEN, "#1b7485", "#5cc3d6", "dot", "diamond", 1.6, "sampled from the untrained model"
    ),
    "chosen_semantic": FamilyStyle(
        _CHOSEN, "#2d70b0", "#93c1ec", "dash", "square", 1.6, "chosen's meaning in other words"
    ),
    "rejected_semantic": FamilyStyle(
        _REJECTED, "#bb530a", "#f7ae6b", "dash", "square", 1.6, "rejected's meaning in other words"
    ),
    "chosen_format": FamilyStyle(
        _CHOSEN, "#5b67b0", "#a9b0f0", "dashdot", "triangle-up", 1.6, "chosen's form with another meaning"
    ),
    "rejected_format": FamilyStyle(
        _REJECTED, "#8f620b", "#ddbe55", "dashdot", "triangle-up", 1.6, "rejected's form with another meaning"
    ),
    "chosen_selfr": FamilyStyle(
        _CHOSEN, "#0a7589", "#4fd0de", "longdash", "star-diamond", 1.6, "chosen, rephrased by the model itself"
    ),
    "other_train": FamilyStyle(
        _OTHER, "#00714f", "#3fc998", "solid", "cross", 1.8, "the answer to another training prompt"
    ),
    "other_test": FamilyStyle(_OTHER, "#3a7938", "#93cb85", "dash", "x", 1.8, "the answer to a held-out prompt"),
    "human_random": FamilyStyle(_NOISE, "#7f3f98", "#cf9ce6", "solid", "pentagon", 1.6, "an unrelated human sentence"),
    "ungrammatical": FamilyStyle(_NOISE, "#a8407a", "#f095c4", "dash", "triangle-down", 1.6, "chosen's words shuffled"),
    "random": FamilyStyle(_NOISE, "#75647e", "#b9a9c2", "dot", "hexagon", 1.6, "a held-out answer's words shuffled"),
    "random_tokens": FamilyStyle(
        _NOISE, "#66666e", "#a9a9b3", "dashdot", "star", 1.6, "tokens drawn from the vocabulary"
    ),
    argmax_of("chosen"): FamilyStyle(
        _GREEDY, "#16181d", "#f2f1ee", "dash", "circle-open", 2.2, "the likeliest token after each prefix of chosen"
    ),
    argmax_of("rejected"): FamilyStyle(
        _GREEDY, "#55585f", "#bdbcb8", "dot", "square-open", 2.2, "the likeliest token after each prefix of rejected"
    ),
    ARGMAX: FamilyStyle(
        _GREEDY, "#16181d", "#f2f1ee", "dash", "circle-open", 2.2, "the likeliest token after each own prefix"
    ),
}
"""Known families in their canonical order, then the greedy pseudo-families."""

GROUPS = (_CHOSEN, _REJECTED, _OTHER, _NOISE, _UNKNOWN, _GREEDY)
"""Kinds of response, in the order of the legend."""

_FURTHER = (("#7a5a3a", "#d0b090"), ("#4d6b6b", "#9fc4c4"), ("#8a3f4f", "#e6a0ae"), ("#4f5f8a", "#aab8e0"))
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("bowtie", "hourglass", "diamond-tall", "diamond-wide", "hexagram")


def style_of(family: str) -> FamilyStyle:
    """Return how `family` is drawn; an unknown family gets a style that depends on its name alone."""
    if family in STYLES:
        return STYLES[family]
    number = crc32(family.encode())  # not hash(): that differs from one process to the next
    light, dark = _FURTHER[number % len(_FURTHER)]
    dash, symbol = _DASHES[number % len(_DASHES)], _SYMBOLS[number // 7 % len(_SYMBOLS)]
    return FamilyStyle(_UNKNOWN, light, dark, dash, symbol, 1.6, "a family of this run's own")
