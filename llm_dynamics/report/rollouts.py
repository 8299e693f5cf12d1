"""What the section "Did correct answers rise, and which tokens were spared?" shows: reading, table, curves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from llm_dynamics.report.rollout_sentences import MAX_CORRECT, MAX_WRONG, ranked_completions, sentences
from llm_dynamics.report.text import nats, percent, rounded
from llm_dynamics.runlog import RunLog, RunLogs

PANELS = (
    ("reward", "Mean reward", "of the rollouts logged; band: 95 % interval over questions"),
    ("delta", "Δ of correct responses", "nats by which one step raises them; band: 95 % interval over questions"),
    ("selected", "Wrong tokens selected", "share of the wrong tokens in scored groups"),
)
"""Name, title and explanation of each figure."""

_COLOURS = (
    ("#0b5cad", "#6db3f2"), ("#b93a06", "#ff8a5b"), ("#00714f", "#3fc998"), ("#7f3f98", "#cf9ce6"),
    ("#8f620b", "#ddbe55"), ("#66666e", "#a9a9b3"),
)  # fmt: skip
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "x")


def rollout_views(runs: RunLogs) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Tell what steps did to correct responses, and which tokens of wrong ones were spared.

    Args:
        runs: The runs of the page; those that logged neither rollouts nor displacements are left out.

    Returns:
        What the template says, and what `rollouts.js` draws from as plain JSON types, a curve per run and panel:
        `run`, `panel`, its look, and over `steps` the `mean`, `low` and `high` (rewards; nats; shares from 0 to 1).
        None where no run is left.
    """
    shown = {name: run for name, run in runs.runs.items() if len(run.rollouts) or len(run.displacements)}
    ranked = {name: ranked_completions(run) for name, run in shown.items()}
    n_selecting = max(1, sum(map(bool, map(len, ranked.values()))))
    n_wrong, n_correct = (max(1, limit // n_selecting) for limit in (MAX_WRONG, MAX_CORRECT))
    rows, curves, texts = [], [], []
    for number, (name, run) in enumerate(shown.items()):
        look, deltas = _look(number), question_deltas(run.displacements)
        by_step = deltas.groupby("step")["delta"]
        own = {"reward": _reward_curve(run), "delta": _curve(by_step.mean(), by_step), "selected": _selected_curve(run)}
        curves += [{"run": name, "panel": panel, **look, **data} for panel, data in own.items() if data["steps"]]
        rows.append({"name": name, "look": look, **_row(run, deltas, own["reward"]["mean"])})
        said = sentences(run, ranked[name], n_wrong, n_correct) if len(ranked[name]) else {"note": _why_none(run)}
        texts.append({"name": name, **said})
    view = {
        "rows": rows,
        "reading": reading(rows),
        "panels": [panel for panel in PANELS if any(curve["panel"] == panel[0] for curve in curves)],
        "left_out": sum(row["left_out"] for row in rows),
        "texts": texts,
    }
    return (view, curves) if shown else None


def question_deltas(displacements: pd.DataFrame) -> pd.DataFrame:
    """Return Delta(x) of each question and step.

    Args:
        displacements: Columns of `schema.DISPLACEMENTS`; log-probs in nats, summed over a response's tokens.

    Returns:
        Columns `step`, `question`; `delta`, mean over the question's correct responses of log-prob after minus before
        the step (nats); `n`, responses of that mean; `n_fell`, those that fell. What is not finite is left out.
    """
    change = displacements["logp_after"].astype(float) - displacements["logp_before"].astype(float)
    frame = displacements[["step", "question"]].assign(delta=change, fell=change < 0)[np.isfinite(change)]
    by_question = frame.groupby(["step", "question"], as_index=False)
    return by_question.agg(delta=("delta", "mean"), n=("delta", "size"), n_fell=("fell", "sum"))


def scored_wrong(rollouts: pd.DataFrame) -> pd.DataFrame:
    """Return the wrong rollouts of scored groups: those among whose tokens a method may select."""
    return rollouts[rollouts["correct"].eq(False) & rollouts["threshold"].notna()]


def reading(rows: list[dict[str, Any]]) -> str:
    """Say in plain words what the table says, and nothing else.

    Args:
        rows: Of the table: `name`, `delta` (nats a step), `fell` (share), `n_selected` and `n_wrong` (tokens).

    Returns:
        A sentence on correct responses, and one on selected tokens where there were any to choose among.
    """
    moves, spared = list[str](), list[str]()
    for row in rows:
        under = f" under {row['name']}" if len(rows) > 1 else ""
        if math.isfinite(row["delta"]):
            unit, them = ("", "") if moves else (" nats a step on average", " of them")
            moved = f"{'fell' if row['delta'] < 0 else 'rose'} by {nats(abs(row['delta']))}"
            moves.append(f"{moved}{unit}{under} ({percent(row['fell'])}{them} fell)")
        if row["n_wrong"]:
            tokens = f"{row['n_selected']:,} of {row['n_wrong']:,} wrong tokens were selected"
            spared.append(f"{tokens}{under} ({percent(row['n_selected'] / row['n_wrong'])})")
    said = f"Correct responses {_listed(moves)}." if moves else "No change of a correct response was measured."
    return f"{said} In scored groups, {_listed(spared)}." if spared else said


def _row(run: RunLog, deltas: pd.DataFrame, rewards: list[float]) -> dict[str, Any]:
    wrong, n_responses = scored_wrong(run.rollouts), int(deltas["n"].sum())
    return {
        "n_rollouts": len(run.rollouts),
        "first_reward": rewards[0] if rewards else math.nan,
        "last_reward": rewards[-1] if rewards else math.nan,
        "delta": float(deltas["delta"].mean()),
        "fell": int(deltas["n_fell"].sum()) / n_responses if n_responses else math.nan,
        "n_questions": len(deltas),
        "left_out": len(run.displacements) - n_responses,
        "n_selected": int(wrong["n_selected"].sum()),
        "n_wrong": int(wrong["n_tokens"].sum()),
    }


def _reward_curve(run: RunLog) -> dict[str, Any]:
    rollouts = run.rollouts[np.isfinite(run.rollouts["reward"].astype(float))]
    by_question = rollouts.groupby(["step", "question"])["reward"].mean()
    return _curve(rollouts.groupby("step")["reward"].mean(), by_question.groupby("step"))


def _selected_curve(run: RunLog) -> dict[str, Any]:
    sums = scored_wrong(run.rollouts).groupby("step")[["n_selected", "n_tokens"]].sum()
    sums = sums[sums["n_tokens"] > 0]
    return _curve(sums["n_selected"] / sums["n_tokens"])


def _curve(means: pd.Series, questions: Any = None) -> dict[str, Any]:
    """Return a curve by step; `questions` are the values of each step's questions, for the 95 % normal interval."""
    half = means * math.nan if questions is None else 1.96 * questions.std() / np.sqrt(questions.size())
    ends = {"mean": means, "low": means - half, "high": means + half}
    return {"steps": means.index.tolist(), **{name: [rounded(value) for value in own] for name, own in ends.items()}}


def _look(number: int) -> dict[str, Any]:
    """Return how the run at place `number` is drawn: the lengths are coprime, so that no two of 210 look the same."""
    light, dark = _COLOURS[number % len(_COLOURS)]
    dash, symbol = _DASHES[number % len(_DASHES)], _SYMBOLS[number % len(_SYMBOLS)]
    return {"light": light, "dark": dark, "dash": dash, "symbol": symbol, "width": 2.2}


def _why_none(run: RunLog) -> str:
    """Say why a run has no sentence with a selected token."""
    wrong = scored_wrong(run.rollouts)
    if run.rollouts.empty:
        return "This run logged no rollouts, so there is no sentence to show."
    if wrong["n_selected"].sum():
        return "This run kept no tokens of its rollouts, so there is no sentence to show."
    if len(wrong):
        return "No wrong token was selected: none was above its threshold, or the method weights all and selects none."
    if run.rollouts["success_rate"].between(0, 1, inclusive="neither").any():
        return "The method of this run scores no tokens and selects no tokens."
    return "No question had both correct and wrong completions, so there was nothing to score or select."


def _listed(clauses: list[str]) -> str:
    *most, last = clauses
    return f"{', '.join(most)} and {last}" if most else last
