"""Wrong completions with the tokens that were spared, chosen from a run log without reading it all at once."""

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
_LONGEST = 1200


def spared_runs(runs: Mapping[str, RunLog]) -> set[str]:
    """Return the names of the runs of which a selected token is in the run log."""
    return {name for name, run in runs.items() if len(ranked_completions(run))}


def ranked_completions(run: RunLog) -> pd.DataFrame:
    """Return the wrong completions with selected tokens, that with the highest excess first.

    Args:
        run: The run; its tokens are read step by step.

    Returns:
        Rows of `run.rollouts`, with `excess` (the largest score minus threshold of a selected token, in the score's own
        unit) and `top_score` (its score, which decides where thresholds are infinite).
    """
    found = []
    for part in run.parts("nthr_tokens"):
        columns = ["step", "example", "score", "threshold", "selected"]
        tokens = part.select(columns).to_pandas()
        tokens = tokens[tokens["selected"].eq(True)].astype({"score": float, "threshold": float})
        excess = (tokens["score"] - tokens["threshold"]).rename("excess")
        tokens = tokens.assign(excess=excess, top_score=tokens["score"])
        found.append(tokens.groupby(["step", "example"], as_index=False)[["excess", "top_score"]].max())
    tops = pd.concat(found) if found else pd.DataFrame({"step": [], "example": [], "excess": [], "top_score": []})
    wrong = run.rollouts[run.rollouts["correct"].eq(False)].merge(tops, on=["step", "example"])
    keys = ["excess", "top_score", "step", "example"]
    return wrong.sort_values(keys, ascending=[False, False, True, True], na_position="last")


def sentences(run: RunLog, n_wrong: int = MAX_WRONG, n_correct: int = MAX_CORRECT) -> dict[str, Any]:
    """Return the completions of one run for the template.

    Args:
        run: A run with selected tokens.
        n_wrong: Wrong completions at most, `MAX_PER_QUESTION` of the same prompt.
        n_correct: Correct completions of the same questions at most, as many of each as goes evenly.

    Returns:
        `wrong`, the completions with their tokens; `correct`, plain texts; `n_selecting`, wrong completions in which
        tokens were selected.
    """
    ranked = ranked_completions(run)
    chosen = ranked[ranked.groupby(ranked["prompt"].fillna("")).cumcount() < MAX_PER_QUESTION].head(n_wrong)
    steps = sorted({int(step) for step in chosen["step"]})
    parts = (part.to_pandas() for part in run.parts("nthr_tokens", steps))
    groups = {key: own for part in parts for key, own in part.groupby(["step", "example"])}
    wrong = [_card(row, groups[row["step"], row["example"]]) for row in chosen.to_dict("records")]
    questions = chosen[["step", "question"]].drop_duplicates()
    right = questions.merge(run.rollouts[run.rollouts["correct"].eq(True)], on=["step", "question"])
    right = right.assign(turn=right.groupby(["step", "question"]).cumcount()).sort_values("turn", kind="stable")
    correct = [
        {**_head(row), "text": _cut(visible(row["completion"] or ""))}
        for row in right.head(n_correct).to_dict("records")
    ]
    return {"wrong": wrong, "correct": correct, "n_selecting": len(ranked)}


def _head(row: Mapping[Any, Any]) -> dict[str, Any]:
    prompt = visible(prompt_text(row["prompt"] or "")).strip()
    return {
        "step": int(row["step"]),
        "prompt": prompt if len(prompt) <= _LONGEST // 2 else f"… {prompt[-_LONGEST // 2 :]}",  # the question ends it
        "reward": number(row["reward"]),
    }


def _card(row: Mapping[Any, Any], tokens: pd.DataFrame) -> dict[str, Any]:
    tokens = tokens.sort_values("position").reset_index(drop=True)
    excess = tokens["score"].astype(float) - tokens["threshold"].astype(float)
    chosen = tokens["selected"].eq(True)
    order = tokens.assign(excess=excess)[chosen].sort_values(["excess", "score"], ascending=False).index
    kept, before, spans = _kept(len(tokens), order.to_numpy()), -1, []
    for place, token in enumerate(tokens.to_dict("records")):
        if kept[place]:
            spans.append({**_span(token), "cut": token["position"] != before + 1})
            before = token["position"]
    return {
        **_head(row),
        "success_rate": number(row["success_rate"]),
        "eta": number(row["eta"]),
        "threshold": number(row["threshold"]),
        "tokens": spans,
        "ends": bool(kept[-1]),
        "n_tokens": len(tokens),
        "n_selected": int(chosen.sum()),
        "listed": [_span(token) for token in tokens.loc[order[:MAX_LISTED]].to_dict("records")],
    }


def _kept(n_tokens: int, selected: np.ndarray) -> np.ndarray:
    """Tell which tokens are shown, (n_tokens,), bool: all, or those around the selected ones, the first first."""
    kept = np.zeros(n_tokens, dtype=bool)
    for place in [slice(None)] if n_tokens <= MAX_TOKENS else [slice(max(0, i - _AROUND), i + _AROUND) for i in selected]:
        if n_tokens > MAX_TOKENS and kept.sum() + 2 * _AROUND > MAX_TOKENS:
            break
        kept[place] = True
    return kept


def _span(token: Mapping[Any, Any]) -> dict[str, Any]:
    text, selected = token["token"] or "", bool(token["selected"])
    word = text.lstrip(" ") or text  # the space before a word is not tinted, so that words stay apart
    if selected and not word.strip():  # an outline around nothing would not be seen
        shown = "".join(token_label(char) + ("\n" if char == "\n" else "") for char in word) or "∅"
    else:
        shown = visible(word)
    return {
        "lead": text[: len(text) - len(word)],
        "text": shown,
        "label": token_label(text, 24),
        "id": token["token_id"],
        "selected": selected,
        "level": _level(token["score"], token["threshold"]),
        "score": number(token["score"]),
        "threshold": number(token["threshold"]),
        "before": number(token["advantage_before"]),
        "after": number(token["advantage"]),
    }


def _level(score: float | None, threshold: float | None) -> float:
    """Return score/threshold, or 1 + (score - threshold)/|threshold| for any sign of it; 0 where that is no number."""
    if score is None or not threshold or not (math.isfinite(score) and math.isfinite(threshold)):
        return 0.0
    return 1 + (score - threshold) / abs(threshold)


def number(value: float | None) -> str:
    """Write a number with three digits and a true minus sign; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return (("∞" if value > 0 else "-∞") if math.isinf(value) else f"{value:.3g}").replace("-", "−")


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
