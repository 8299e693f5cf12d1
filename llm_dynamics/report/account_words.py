"""The step account in words: sentences computed from the numbers, whatever these turn out to be."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from llm_dynamics.report.causes import OTHERS, OWN, Cause, FamilyAccount, Names
from llm_dynamics.report.text import nats, percent
from llm_dynamics.runlog import RunLog

_NAMED = 0.05
"""A cause is named in the sentence where it is at least this part of the largest."""
_MOST = 4


def in_words(account: FamilyAccount, names: Names) -> str:
    """Say in one sentence why a family moved.

    Args:
        account: The family's account.
        names: The causes' names.

    Returns:
        What was measured, then the largest causes by size with their signs, and what all others add up to.
    """
    n_steps = len(account.steps)
    over = f"over {n_steps} explained step{'s' if n_steps != 1 else ''}"
    moved = account.measured
    fell = f"{account.family} {'fell' if moved < 0 else 'rose'} {nats(abs(moved))} nats {over}"
    merged = account.merged()
    totals = {name: math.fsum(cause.share for cause in parts) for name, parts in merged.items()}
    largest = max((abs(total) for total in totals.values()), default=0.0)
    by_size = sorted(totals, key=lambda name: -abs(totals[name]))
    named = [name for name in by_size if abs(totals[name]) >= _NAMED * largest and totals[name]][:_MOST]
    if not named:
        return f"{account.family} did not move {over}."
    clauses = [_clause(names.get(name, name), totals[name], merged[name]) for name in named]
    rest = math.fsum(total for name, total in totals.items() if name not in named)
    if len(named) < len(totals):
        clauses.append(f"everything else adds {nats(rest, True)}")
    return f"{fell}: {'; '.join(clauses)}."


def steps_explained(run: RunLog) -> tuple[int, int]:
    """Return how many of the run's optimizer steps were explained, and of how many that were watched."""
    explained, observed = run.explained_steps, run.observed_steps
    first = min([explained[0] - 1, *observed[:1]])
    return len(explained), max(explained[-1], *observed[-1:], int(run.meta.get("finished_at_step") or 0)) - first


def steps_in_words(explained: int, done: int) -> str:
    """Say how many of a run's optimizer steps were explained."""
    if explained >= done:
        return f"All {done} optimizer steps were explained." if done > 1 else "The one optimizer step was explained."
    shown = f"{explained} of {done} optimizer steps were explained"
    return f"{shown}; the bars add up over those, not over the whole run."


def balance_in_words(accounts: pd.DataFrame) -> str:
    """Say how much of the measured change the account explains, and how much the raw gradient would.

    Args:
        accounts: Rows of `schema.ACCOUNTS`.

    Returns:
        A sentence or two; the figures are pooled over the steps: 1 - sum |remainder|^2 / sum |measured|^2.
    """
    pooled = _pooled(accounts, accounts["remainder_norm"] ** 2)
    if pooled is None:
        return "How much the account explains is not known: its norms are not finite."
    text = (
        f"The account explains {percent(pooled)} of the measured change "
        "(1 − |remainder|² / |change|² over the tokens of the explained probes)"
    )
    by_gradient = accounts["explained_by_gradient"]
    alone = _pooled(accounts, (1 - by_gradient) * accounts["measured_norm"] ** 2)
    if alone is not None:
        text += f"; the plain gradient in place of the optimizer's update, scaled as well as can be: {percent(alone)}"
    return f"{text}."


def notes(accounts: pd.DataFrame) -> list[str]:
    """Return the notes of the accounts, each once, with the steps that it is about."""
    noted = accounts.dropna(subset=["note"])
    return [
        str(note) if len(rows) == len(accounts) else f"{note} ({len(rows)} of {len(accounts)} steps)"
        for note, rows in noted.groupby("note", sort=False)
    ]


def _clause(name: str, total: float, parts: list[Cause]) -> str:
    text = f"{name} {'pushed it down' if total < 0 else 'pulled it up'} by {nats(abs(total))}"
    split = {cause.part: cause.share for cause in parts}
    if {OWN, OTHERS} <= split.keys():
        text += f" (its own prompt’s {nats(split[OWN], True)}, other prompts’ {nats(split[OTHERS], True)})"
    return text


def _pooled(accounts: pd.DataFrame, missed: pd.Series) -> float | None:
    """Return 1 - sum missed / sum |measured|^2 over the steps where both are finite, or None where there is none."""
    change = accounts["measured_norm"] ** 2
    good = np.isfinite(missed) & np.isfinite(change)
    total = float(change[good].sum())
    return 1 - float(missed[good].sum()) / total if total > 0 else None
