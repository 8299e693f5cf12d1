"""What the section "Did correct answers rise, and which tokens were spared?" shows: curves, table, reading."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from llm_dynamics.report.rollout_sentences import MAX_CORRECT, MAX_WRONG, sentences, spared_runs
from llm_dynamics.report.text import precise_nats, rounded
from llm_dynamics.runlog import RunLog, RunLogs

CURVES = (
    ("reward", "Mean reward", "of the rollouts logged; band: 95 % interval over questions"),
    ("delta", "Δ of correct responses", "nats that one step adds to their log-prob; band as before"),
    ("selected", "Share of wrong tokens selected", "of those in scored groups"),
)
"""Name, title and explanation of each curve."""

_COLOURS = (
    ("#0b5cad", "#6db3f2"), ("#b93a06", "#ff8a5b"), ("#00714f", "#3fc998"), ("#7f3f98", "#cf9ce6"),
    ("#8f620b", "#ddbe55"), ("#66666e", "#a9a9b3"),
)  # fmt: skip
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "x")


def rollout_runs(runs: RunLogs) -> dict[str, RunLog]:
    """Return the runs that logged at least one rollout or displacement."""
    return {name: run for name, run in runs.runs.items() if len(run.rollouts) or len(run.displacements)}


def rollout_views(runs: RunLogs) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Tell what a step did to correct responses, and which tokens of wrong ones were spared.

    Args:
        runs: The runs of the page.

    Returns:
        What the template says, and what `rollouts.js` draws from as plain JSON types, one curve per run and panel:
        `run`, `panel`, its look, and over `steps` the `mean`, `low` and `high` (rewards; nats; shares from 0 to 1).
        None where no run has anything to show.
    """
    shown = rollout_runs(runs)
    if not shown:
        return None
    selecting = spared_runs(shown)
    places = max(1, len(selecting))
    rows, curves, texts = [], [], []
    for number, (name, run) in enumerate(shown.items()):
        look, deltas = _look(number), question_deltas(run.displacements)
        rows.append({"name": name, "look": look, **_row(run, deltas)})
        own = {"reward": _reward_curve(run), "delta": _delta_curve(deltas), "selected": _selected_curve(run)}
        curves += [{"run": name, "panel": panel, **look, **data} for panel, data in own.items() if data["steps"]]
        texts.append(
            {"name": name, **sentences(run, max(1, MAX_WRONG // places), max(1, MAX_CORRECT // places))}
            if name in selecting
            else {"name": name, "note": _no_sentences(run)}
        )
    drawn = {curve["panel"] for curve in curves}
    view = {
        "rows": rows,
        "reading": reading(rows),
        "panels": [{"name": name, "title": title, "says": says} for name, title, says in CURVES if name in drawn],
        "left_out": sum(row["left_out"] for row in rows),
        "texts": texts,
    }
    return view, curves


def question_deltas(displacements: pd.DataFrame) -> pd.DataFrame:
    """Return Delta(x) of each question and step.

    Args:
        displacements: Columns of `schema.DISPLACEMENTS`; log-probs in nats, summed over a response's tokens.

    Returns:
        Columns `step`, `question`; `delta`, mean over the question's correct responses of log-prob after minus before
        the step (nats); `n`, responses of that mean; `n_fell`, those that fell. What is not finite is left out.
    """
    change = (displacements["logp_after"] - displacements["logp_before"]).astype(float)
    frame = displacements[["step", "question"]].assign(delta=change, fell=change < 0)[np.isfinite(change)]
    return frame.groupby(["step", "question"], as_index=False).agg(
        delta=("delta", "mean"), n=("delta", "size"), n_fell=("fell", "sum")
    )


def scored_wrong(rollouts: pd.DataFrame) -> pd.DataFrame:
    """Return the wrong rollouts of scored groups: those whose tokens the method chose among."""
    return rollouts[rollouts["correct"].eq(False) & rollouts["threshold"].notna()]


def reading(rows: list[dict[str, Any]]) -> str:
    """Say in plain words what the rows of the table say, and nothing else.

    Args:
        rows: Of the table: `name`, `delta` (nats a step), `fell` (share), `n_selected` and `n_wrong` (tokens).

    Returns:
        One sentence on correct responses and one on selected tokens, each where there is something to say.
    """
    alone = len(rows) == 1
    moves = [
        f"{_moved(row['delta'], first=not place)}{'' if alone else ' under ' + row['name']}"
        f"{',' if alone else ' ('}{' ' if alone else ''}{_percent(row['fell'])} of them fell{'' if alone else ')'}"
        for place, row in enumerate(row for row in rows if math.isfinite(row["delta"]))
    ]
    spared = [
        f"{row['n_selected']:,} of {row['n_wrong']:,} wrong tokens ({_percent(row['n_selected'] / row['n_wrong'])})"
        f"{'' if alone else ' under ' + row['name']}"
        for row in rows
        if row["n_wrong"]
    ]
    said = [f"Correct responses {_listed(moves)}."] if moves else ["No displacement of a correct response was measured."]
    return " ".join(said + ([f"Selected were {_listed(spared)}."] if spared else []))


def _row(run: RunLog, deltas: pd.DataFrame) -> dict[str, Any]:
    rollouts, wrong = run.rollouts, scored_wrong(run.rollouts)
    rewards = _reward_curve(run)["mean"]
    n_responses = int(deltas["n"].sum())
    return {
        "n_rollouts": len(rollouts),
        "first_reward": rewards[0] if rewards else math.nan,
        "last_reward": rewards[-1] if rewards else math.nan,
        "delta": float(deltas["delta"].mean()),
        "fell": int(deltas["n_fell"].sum()) / n_responses if n_responses else math.nan,
        "n_questions": len(deltas),
        "left_out": len(run.displacements) - n_responses,
        "n_selected": int(wrong["n_selected"].fillna(0).sum()),
        "n_wrong": int(wrong["n_tokens"].fillna(0).sum()),
    }


def _reward_curve(run: RunLog) -> dict[str, Any]:
    rollouts = run.rollouts[np.isfinite(run.rollouts["reward"].astype(float))]
    by_question = rollouts.groupby(["step", "question"])["reward"].mean()
    return _curve(rollouts.groupby("step")["reward"].mean(), by_question.groupby("step"))


def _delta_curve(deltas: pd.DataFrame) -> dict[str, Any]:
    by_step = deltas.groupby("step")["delta"]
    return _curve(by_step.mean(), by_step)


def _selected_curve(run: RunLog) -> dict[str, Any]:
    sums = scored_wrong(run.rollouts).groupby("step")[["n_selected", "n_tokens"]].sum()
    sums = sums[sums["n_tokens"] > 0]
    return _curve(sums["n_selected"] / sums["n_tokens"])


def _curve(means: pd.Series, questions: Any = None) -> dict[str, Any]:
    """Return a curve by step; `questions` are the values of each step's questions, for the 95 % normal interval."""
    half = means * math.nan if questions is None else 1.96 * questions.std() / np.sqrt(questions.size())
    return {
        "steps": [int(step) for step in means.index],
        "mean": [rounded(mean) for mean in means],
        "low": [rounded(low) for low in means - half],
        "high": [rounded(high) for high in means + half],
    }


def _look(number: int) -> dict[str, Any]:
    """Return how the run at place `number` is drawn: the lengths are coprime, so that no two of 210 look the same."""
    light, dark = _COLOURS[number % len(_COLOURS)]
    dash, symbol = _DASHES[number % len(_DASHES)], _SYMBOLS[number % len(_SYMBOLS)]
    return {"light": light, "dark": dark, "dash": dash, "symbol": symbol, "width": 2.2}


def _no_sentences(run: RunLog) -> str:
    """Say why a run has no sentence with a selected token."""
    rollouts, wrong = run.rollouts, scored_wrong(run.rollouts)
    if rollouts.empty:
        return "This run logged no rollouts, so there is no sentence to show."
    if len(wrong) and wrong["n_selected"].sum():
        return "This run kept no tokens of its rollouts, so there is no sentence to show."
    if len(wrong):
        return (
            f"None of the {int(wrong['n_tokens'].sum()):,} wrong tokens in scored groups was selected: none was above "
            "its threshold, or the method weighs all tokens instead of selecting some."
        )
    if rollouts["success_rate"].between(0, 1, inclusive="neither").any():
        return "The method of this run scores no tokens and selects no tokens."
    return "No question had both correct and wrong completions, so no token was scored and none selected."


def _moved(delta: float, *, first: bool) -> str:
    size = precise_nats(abs(delta), sign=False)
    return f"{'rose' if delta > 0 else 'fell' if delta < 0 else 'moved'} by {size}{' nats a step' if first else ''}"


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share in (0.0, 1.0) or 0.0995 <= share < 0.995 else 1}f} %"


def _listed(clauses: Iterable[str]) -> str:
    *most, last = clauses
    return f"{', '.join(most)} and {last}" if most else last
