"""What the numbers say, in plain sentences that may turn out false: the rulebook's hopes and courses as yes and no."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm_dynamics.rules import RunTables, Verdict, judge


@dataclass(frozen=True)
class Statement:
    """One sentence about a run, whether it holds there, and the numbers that decide.

    Attributes:
        claim: The sentence.
        holds: Whether the run bears it out.
        evidence: The numbers, with units.
    """

    claim: str
    holds: bool
    evidence: str


def reading(run: RunTables) -> list[Statement]:
    """Hold what one hopes of a run, and what runs of its kind do, against its numbers.

    Args:
        run: The run log.

    Returns:
        A statement for each rule that finds no fault and that the run can answer; one that says so where there is none.
    """
    return statements(judge(run))


def statements(verdicts: Sequence[Verdict]) -> list[Statement]:
    """Return the statements of a run that is judged already, in the order of the rulebook's kinds."""
    told = [verdict for verdict in verdicts if verdict.kind != "fault" and verdict.status != "unknown"]
    said = [Statement(verdict.name, verdict.status == "found", verdict.evidence) for verdict in told]
    untold = next((verdict.evidence for verdict in verdicts if verdict.name == "chosen rises"), "")
    return said or [Statement("The run can be judged", False, untold)]
