"""Wrong completions with the tokens that were spared, read from the run log step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from llm_dynamics.report.text import prompt_text, token_label, visible
from llm_dynamics.runlog import RunLog

MAX_WRONG = 12
"""Wrong completions shown over all runs; at least one of each run that selected tokens."""
MAX_CORRECT = 4
"""Correct completions of the same questions, likewise."""
MAX_PER_QUESTION = 3
MAX_TOKENS = 240
"""Tokens shown of a completion: where it has more, those around the selected ones."""
MAX_LISTED = 12
"""Selected tokens listed in numbers below a completion."""
_AROUND = 16
_PROMPT = 600


def ranked_completions(run: RunLog) -> pd.DataFrame:
    """Return the wrong completions of which a selected token was logged, that with the highest excess first.

    Returns:
        Rows of `run.rollouts` with `excess`, the largest score minus threshold of a selected token (the score's own
        unit), and `score`, that token's (it decides where thresholds are infinite).
    """
    tops = []
    for part in run.parts("nthr_tokens"):
        tokens = part.select(["step", "example", "score", "threshold", "selected"]).to_pandas()
        tokens = tokens[tokens["selected"].eq(True)].astype({"score": float, "threshold": float})
        tokens = tokens.assign(excess=tokens["score"] - tokens["threshold"])
        tops.append(tokens.groupby(["step", "example"])[["excess", "score"]].max())
    wrong = run.rollouts[run.rollouts["correct"].eq(False)]
    if not any(map(len, tops)):
        return wrong.head(0)
    found = wrong.merge(pd.concat(tops), on=["step", "example"])
    return found.sort_values(["excess", "score", "step", "example"], ascending=[False, False, True, True])


def sentences(run: RunLog, ranked: pd.DataFrame, n_wrong: int, n_correct: int) -> dict[str, Any]:
    """Return the completions of one run for the template.

    Args:
        run: The run.
        ranked: Its `ranked_completions`, at least one.
        n_wrong: Wrong completions at most, `MAX_PER_QUESTION` of the same prompt.
        n_correct: Correct completions of the same questions at most, evenly of each.

    Returns:
        `wrong`, completions with their tokens; `correct`, plain texts; `n_selecting`, the length of `ranked`.
    """
    chosen = ranked[ranked.groupby(ranked["prompt"].fillna("")).cumcount() < MAX_PER_QUESTION].head(n_wrong)
    parts = [part.to_pandas() for part in run.parts("nthr_tokens", sorted(set(chosen["step"])))]
    groups = {key: own for part in parts for key, own in part.groupby(["step", "example"])}
    questions = chosen[["step", "question"]].drop_duplicates()
    right = questions.merge(run.rollouts[run.rollouts["correct"].eq(True)], on=["step", "question"])
    turn = right.groupby(["step", "question"]).cumcount().sort_values(kind="stable")
    correct = right.loc[turn.index].head(n_correct).to_dict("records")
    return {
        "wrong": [_card(row, groups[row["step"], row["example"]]) for row in chosen.to_dict("records")],
        "correct": [{**_head(row), "text": visible(row["completion"] or "")} for row in correct],
        "n_selecting": len(ranked),
    }


def _head(row: Mapping[Any, Any]) -> dict[str, Any]:
    prompt = visible(prompt_text(row["prompt"] or "")).strip()
    return {
        "step": row["step"],
        "prompt": prompt if len(prompt) <= _PROMPT else f"… {prompt[-_PROMPT:]}",  # the question ends it
        **{name: number(row[name]) for name in ("reward", "success_rate", "eta", "threshold")},
    }


def _card(row: Mapping[Any, Any], tokens: pd.DataFrame) -> dict[str, Any]:
    tokens = tokens.sort_values("position").astype({"score": float, "threshold": float}).reset_index(drop=True)
    selected = tokens[tokens["selected"].eq(True)]
    strongest = (selected["score"] - selected["threshold"]).sort_values(ascending=False, kind="stable").index
    shown = tokens[_kept(len(tokens), strongest.tolist())]
    follows = shown["position"].diff().eq(1) | shown["position"].eq(0)
    spans = [{**_span(token), "cut": not on} for token, on in zip(shown.to_dict("records"), follows, strict=True)]
    return {
        **_head(row),
        "tokens": spans,
        "ends": shown.index[-1] == tokens.index[-1],
        "n_tokens": len(tokens),
        "n_selected": len(selected),
        "listed": [_span(token) for token in tokens.loc[strongest[:MAX_LISTED]].to_dict("records")],
    }


def _kept(n_tokens: int, selected: list[int]) -> np.ndarray:
    """Tell which tokens are shown, (n_tokens,), bool: all, or those around the strongest selected ones."""
    kept = np.full(n_tokens, n_tokens <= MAX_TOKENS)
    for place in selected:
        if kept.sum() + 2 * _AROUND > MAX_TOKENS:
            break
        kept[max(0, place - _AROUND) : place + _AROUND] = True
    return kept


def _span(token: Mapping[Any, Any]) -> dict[str, Any]:
    text = token["token"] or ""
    word = text.lstrip(" ") or text  # the space before a word is not tinted, so that words stay apart
    level = token["score"] / abs(token["threshold"] or math.nan)
    return {
        "lead": text[: len(text) - len(word)],
        # an outline around white space alone would not be seen
        "text": visible(word) if word.strip() or not token["selected"] else token_label(word) + "\n" * word.count("\n"),
        "label": token_label(text, 24),
        "id": token["token_id"],
        "selected": bool(token["selected"]),
        "strength": f"{min(abs(level) / 2, 1) if level == level else 0:.2f}",
        "against": level < 0,
        **{name: number(token[name]) for name in ("score", "threshold", "advantage_before", "advantage")},
    }


def number(value: float | None) -> str:
    """Write a number with three digits and a true minus sign; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return (("∞" if value > 0 else "-∞") if math.isinf(value) else f"{value:.3g}").replace("-", "−")
