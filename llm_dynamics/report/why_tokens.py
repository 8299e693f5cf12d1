"""The training tokens and examples that moved each target, as plain JSON types for the script of the page."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from llm_dynamics.report.families import ordered
from llm_dynamics.report.text import prompt_line, rounded, shortened, visible
from llm_dynamics.report.training_tokens import Sentence, TargetTokens, strongest_examples, strongest_tokens
from llm_dynamics.report.why_prompts import Prompts
from llm_dynamics.runlog import RunLog

MAX_TARGETS = 24

_Row = Mapping[Hashable, Any]


class _About(NamedTuple):
    """What is known of training examples and probes."""

    examples: pd.DataFrame
    by_place: Mapping[tuple[int, int], _Row]
    probes: Mapping[str, _Row]
    prompts: Prompts


class Targets(NamedTuple):
    """The targets whose training tokens the page shows.

    Attributes:
        shown: One mapping of plain JSON types per target, families first.
        n_targets: Targets that the run has.
        n_steps: Explained steps of which training tokens were kept.
    """

    shown: list[dict[str, Any]]
    n_targets: int
    n_steps: int


def target_data(run: RunLog, max_tokens: int) -> Targets:
    """Return the strongest training tokens, in their sentences, and examples of each target.

    Args:
        run: A run with accounts.
        max_tokens: Training tokens to embed at most; the first target is embedded whatever its size.

    Returns:
        The targets; those that would exceed `max_tokens` are left out.
    """
    found = strongest_tokens(run)
    about = _About(
        run.training_examples,
        {(row["step"], row["example"]): row for row in run.training_examples.to_dict("records")},
        {row["probe_id"]: row for row in run.probes.to_dict("records")},
        Prompts(run.training_examples, run.probes),
    )
    targets: list[dict[str, Any]] = []
    n_tokens = 0
    for target in _in_order(found)[:MAX_TARGETS]:
        n_tokens += sum(len(piece.tokens) for one in (*target.down, *target.up) for piece in one.pieces)
        if targets and n_tokens > max_tokens:
            break
        targets.append(_target(target, about))
    return Targets(targets, len(found), len({step for target in found for step in target.examples["step"]}))


def _in_order(targets: Sequence[TargetTokens]) -> list[TargetTokens]:
    """Sort targets: families in canonical order, then probes as logged."""
    places = {
        family: place for place, family in enumerate(ordered(one.target for one in targets if one.kind != "probe"))
    }
    return sorted(targets, key=lambda one: places.get(one.target, len(places)) if one.kind != "probe" else len(places))


def _target(target: TargetTokens, about: _About) -> dict[str, Any]:
    probe = about.probes.get(target.target, {}) if target.kind == "probe" else {}
    strong = [mark["share"] for one in (*target.down, *target.up) for mark in one.strong]
    hurting, helping = strongest_examples(target, about.examples)
    return {
        "name": target.target,
        "kind": target.kind,
        "label": f"{probe['family']}: {prompt_line(probe['prompt'], 50)}" if probe else target.target,
        "limit": rounded(float(np.median(np.abs(strong)))) if strong else 1.0,
        "leftOut": target.n_nonfinite,
        "down": [_sentence(one, about, probe) for one in target.down],
        "up": [_sentence(one, about, probe) for one in target.up],
        "hurting": _examples(hurting, about.prompts),
        "helping": _examples(helping, about.prompts),
    }


def _sentence(sentence: Sentence, about: _About, probe: _Row) -> dict[str, Any]:
    example = about.by_place.get((sentence.step, sentence.example), {})
    role, prompt, prompt_id = (example.get(key) for key in ("role", "prompt", "prompt_id"))
    return {
        "step": sentence.step,
        "role": visible(role) if isinstance(role, str) else "",
        "prompt": about.prompts.line(prompt, prompt_id),
        "own": isinstance(prompt_id, str) and prompt_id == probe.get("prompt_id"),
        "nTokens": sentence.n_tokens,
        "marks": [
            {key: rounded(mark[key]) for key in ("place", "position", "share", "c", "logp")}
            | {"token": shown_token(mark["token"])}
            for mark in sentence.strong
        ],
        "pieces": [
            {
                "start": piece.start,
                "tokens": [shown_token(token) for token in piece.tokens],
                "shares": [rounded(share, 3) for share in piece.shares.tolist()],
            }
            for piece in sentence.pieces
        ],
    }


def _examples(frame: pd.DataFrame, prompts: Prompts) -> list[dict[str, Any]]:
    return [
        {
            "role": visible(str(row["role"])),
            "prompt": prompts.line(row["prompt"], row["prompt_id"]),
            "response": shortened(str(row["response"]), 160),
            "share": rounded(row["share"]),
            "nSteps": int(row["n_steps"]),
        }
        for row in frame.to_dict("records")
    ]


def shown_token(token: str) -> str:
    """Return a token as it stands in a sentence: line breaks are drawn, so that a sentence stays a paragraph."""
    return visible(str(token).replace("\n", "↵"))
