"""Judge a run by the rulebook: of each rule, what it found, the numbers that decide, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from llm_dynamics.rules.faults import find_squeezing
from llm_dynamics.rules.rulebook import BY_NAME, RULES, Kind, Rule
from llm_dynamics.rules.terms import Finding, Outcome, RunTables, changes_of

Status = Literal["found", "clear", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a run.

    Attributes:
        name: The rule's name, such as "squeezing".
        question: What it asks, in plain words.
        kind: What it would be to find it: a "fault" (look at it), a "hope" (what one trains for) or a "course" (what
            runs of this kind do, neither good nor bad).
        status: "found", "clear", or "unknown" (the run does not tell).
        evidence: The numbers that decide, with units, and that the decision is unsure where it is; for "unknown", what
            is missing and what to watch.
        threshold: What counts as found.
        remedy: What to do where a fault is found; empty for other kinds.
        agreement: Share of 2,000 bootstrap resamples of the prompts (of the questions, in reinforcement) that decide
            the same, in [0, 1]; below 0.95 the decision is unsure. None where nothing is drawn. It is the noise of the
            probes, not that of the training run: another seed can decide otherwise.
        unsure: Whether too many resamples decide otherwise, or all rests on one prompt.
    """

    name: str
    question: str
    kind: Kind
    status: Status
    evidence: str
    threshold: str
    remedy: str
    agreement: float | None = None
    unsure: bool = False


def judge(run: RunTables) -> list[Verdict]:
    """Apply every rule to a run.

    A value that is NaN or infinite, or that is missing at one end of the run, decides nothing: the probe is left out,
    and the evidence says how many were. Where a family that a rule needs, its control, is not watched, the rule does
    not tell. Where the first observation came after the first step, "clear" is not told either: what happened before
    was not seen.

    Args:
        run: The tables, log-probs in nats.

    Returns:
        One verdict per rule: what was found first, of that faults first, and what is sure.
    """
    moved = changes_of(run.sequences)
    verdicts = [_verdict(rule, run, _outcome(rule, run, moved)) for rule in RULES]
    order, kinds = ("found", "clear", "unknown"), ("fault", "hope", "course")
    return sorted(
        verdicts, key=lambda one: (order.index(one.status), kinds.index(one.kind), one.status == "found" and one.unsure)
    )


def is_squeezing(sequences: pd.DataFrame) -> tuple[bool, str] | None:
    """Tell by the rule "squeezing" whether the mass moves into the greedy tokens while nearly everything falls.

    Args:
        sequences: The sequences table; only its first and its last observation are compared.

    Returns:
        Whether it is found since the first observation, and the numbers; None where the table does not tell.
    """
    moved = changes_of(sequences)
    outcome = _missing(BY_NAME["squeezing"], moved) or find_squeezing(None, moved)
    return None if isinstance(outcome, str) else (bool(outcome.found[0]), _evidence(outcome))


def _outcome(rule: Rule, run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Return what a rule finds, or why the run does not tell."""
    trained_on = run.meta.get("trained_on")
    if rule.asked_of and trained_on not in rule.asked_of:
        if trained_on is None:
            return f"asked of training on {' or '.join(rule.asked_of)}; this log does not say what was trained on"
        return f"asked of training on {' or '.join(rule.asked_of)} only"
    if rule.reads == "tables":
        return rule.find(run, moved)
    first = run.sequences["step"].min()
    if rule.reads == "start":
        watched = set(run.sequences["family"])
        if missing := [name for name in rule.needs if name not in watched]:
            return _watch(missing)
        if first > 0:
            return f"needs an observation before the first step; the first in this log is of step {first}"
        return rule.find(run, moved)
    outcome = _missing(rule, moved) or rule.find(run, moved)
    if isinstance(outcome, str) or not first > 0:
        return outcome
    if outcome.found[0]:
        return Finding(outcome.found, f"{outcome.numbers}; since step {first}, the first observed", outcome.drawn)
    return f"what happened before step {first}, the first observed, is not known; since then: {outcome.numbers}"


def _missing(rule: Rule, moved: pd.DataFrame) -> str:
    """Say what a rule on changes needs and does not have; empty where it has all."""
    if moved.empty:
        return "needs two observations"
    if missing := [name for name in rule.needs if name not in set(moved["family"])]:
        return _watch(missing)
    finite = set(moved.loc[moved["delta"].notna(), "family"])
    if missing := [name for name in rule.needs if name not in finite]:
        return f"needs finite values of {' and '.join(missing)} at two observations"
    return "" if finite else "needs finite values at two observations"


def _watch(families: list[str]) -> str:
    return f"watch {' and '.join(f'`{name}`' for name in families)} (--watch_families, or families= of the probes)"


def _verdict(rule: Rule, run: RunTables, outcome: Outcome) -> Verdict:
    remedy = rule.remedy if isinstance(rule.remedy, str) else rule.remedy(run)
    if isinstance(outcome, str):
        return Verdict(rule.name, rule.question, rule.kind, "unknown", outcome, rule.limit, remedy)
    return Verdict(
        rule.name,
        rule.question,
        rule.kind,
        "found" if outcome.found[0] else "clear",
        _evidence(outcome),
        rule.limit,
        remedy,
        outcome.agreement,
        bool(outcome.doubt),
    )


def _evidence(finding: Finding) -> str:
    return f"{finding.numbers}; {finding.doubt}" if finding.doubt else finding.numbers
