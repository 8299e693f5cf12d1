"""What the numbers say, in plain sentences that may turn out false."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_dynamics.frames import margin_path, what_moved
from llm_dynamics.report.families import ARGMAX
from llm_dynamics.report.text import precise_nats
from llm_dynamics.runlog import RunLog

_Row = Mapping[Hashable, Any]
_Moved = Mapping[str, _Row]
"""Rows of `what_moved` by family."""


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


def reading(run: RunLog) -> list[Statement]:
    """Check what is expected of a run of this kind ([LD], arXiv 2407.10490, sections 3.2 and 3.3) against its numbers.

    A preference run (families chosen and rejected, `DPO` in the trainer's name): rejected falls fastest, most families
    fall, the greedy tokens rise, and whether chosen fell while its margin grew (likelihood displacement). An SFT run
    (`SFT` in the trainer's name): chosen and `other_train` rise, rejected rises and then falls, ungrammatical falls.
    Any other run: how many families fell and whether the greedy tokens rose. All of it is about means over probes of
    summed log-probs; a claim about a family that is not watched is left out.

    Args:
        run: The run log.

    Returns:
        The statements; one that says so where there are fewer than two observations.
    """
    n_steps = run.sequences["step"].nunique()
    if n_steps < 2:
        seen = "only one observation" if n_steps else "no observation"
        return [Statement("The log-probabilities moved", False, f"{seen}: nothing to compare yet")]
    rows = what_moved(run).to_dict("records")
    moved = {str(row["family"]): row for row in rows if math.isfinite(row["delta"])}
    trainer = str(run.meta.get("trainer", ""))
    if "DPO" in trainer and {"chosen", "rejected"} <= moved.keys():
        said = [_falls_fastest(moved), _most_fall(moved), _argmax_rises(moved), _displacement(moved, margin_path(run))]
    elif "SFT" in trainer:
        said = [
            _moves(moved, "chosen", up=True, claim="chosen rises"),
            _moves(moved, "other_train", up=True, claim="other_train rises: answers leak to other prompts"),
            _bell(run, moved),
            _moves(moved, "ungrammatical", up=False, claim="ungrammatical falls"),
        ]
    else:
        said = [_most_fall(moved), _argmax_rises(moved)]
    kept = [statement for statement in said if statement is not None]
    return kept or [Statement("The run can be judged", False, "none of the families in question has finite values")]


def _falls_fastest(moved: _Moved) -> Statement:
    claim, own = "rejected falls fastest", moved["rejected"]
    evidence = f"rejected {_rate(own)}"
    if own["delta"] >= 0:
        return Statement(claim, False, f"it did not fall: {evidence}")
    others = sorted((row for family, row in moved.items() if family not in ("rejected", ARGMAX)), key=_delta)
    faster = [row for row in others if row["delta"] < own["delta"]]
    if faster:
        named = ", ".join(f"{row['family']} {_rate(row)}" for row in faster)
        return Statement(claim, False, f"{evidence}; faster: {named}")
    return Statement(
        claim, True, evidence + (f"; next lowest: {others[0]['family']} {_rate(others[0])}" if others else "")
    )


def _most_fall(moved: _Moved) -> Statement | None:
    families = [row for family, row in moved.items() if family != ARGMAX]
    if not families:
        return None
    stayed = [row for row in families if row["delta"] >= 0]
    fell = len(families) - len(stayed)
    evidence = f"{fell} of {len(families)} fell"
    if stayed:
        evidence += "; not: " + ", ".join(f"{row['family']} {_nats(row['delta'])}" for row in stayed)
    return Statement("most families fall", fell > len(families) / 2, evidence)


def _argmax_rises(moved: _Moved) -> Statement | None:
    prefix = "chosen's prefixes" if "chosen" in moved else "the probes' prefixes"
    return _moves(moved, ARGMAX, up=True, claim=f"argmax rises: the greedy tokens along {prefix} gain")


def _displacement(moved: _Moved, margins: tuple[float, float]) -> Statement:
    chosen = moved["chosen"]
    before, after = margins
    holds = bool(chosen["delta"] < 0 and after > before)
    evidence = f"chosen {_path(chosen)}; margin chosen − rejected {_nats(before, unit=False)} → {_nats(after)}"
    if chosen["delta"] >= 0:
        evidence += "; chosen did not fall"
    left_out = [f"{row['n_nonfinite']} of {row['n_probes']} {family}" for family, row in moved.items()
                if family in ("chosen", "rejected") and row["n_nonfinite"]]  # fmt: skip
    if left_out:
        evidence += f"; left out: {', '.join(left_out)} (not finite at both ends)"
    return Statement("likelihood displacement: chosen falls although its margin over rejected grows", holds, evidence)


def _moves(moved: _Moved, family: str, *, up: bool, claim: str) -> Statement | None:
    if family not in moved:
        return None
    row = moved[family]
    holds = bool(row["delta"] > 0 if up else row["delta"] < 0)
    return Statement(claim, holds, f"{_path(row)} ({_nats(row['delta_per_token'])} per token)")


def _bell(run: RunLog, moved: _Moved) -> Statement | None:
    if "rejected" not in moved:
        return None
    rows = run.sequences[run.sequences["family"] == "rejected"].drop_duplicates(["probe_id", "step"])
    own = rows.pivot(index="probe_id", columns="step", values="logp_sum")
    kept = own[np.isfinite(own).all(axis=1)]  # a mean over other probes at each step could rise by itself
    if kept.empty:
        return None
    steps, values = kept.columns.tolist(), [float(value) for value in kept.to_numpy().mean(axis=0)]
    start, top, end = values[0], max(values), values[-1]
    holds = bool(start < top > end)
    peak = f"highest {_nats(top, sign=False)} at step {steps[values.index(top)]} ({_nats(top - start)})"
    evidence = f"start {_nats(start, sign=False)}, {peak}, end {_nats(end, sign=False)} ({_nats(end - top)} from there)"
    if len(values) < 3:
        evidence += "; two observations cannot show it"
    if len(kept) < len(own):
        evidence += f"; left out: {len(own) - len(kept)} of {len(own)} rejected (not finite at every observation)"
    return Statement("rejected first rises, then falls", holds, evidence)


def _delta(row: _Row) -> float:
    return float(row["delta"])


def _rate(row: _Row) -> str:
    return f"{_nats(row['delta'])} ({_nats(row['delta_per_token'])} per token)"


def _path(row: _Row) -> str:
    start, end = _nats(row["start"], sign=False, unit=False), _nats(row["end"], sign=False)
    return f"{start} → {end}, change {_nats(row['delta'])}"


def _nats(value: float, *, sign: bool = True, unit: bool = True) -> str:
    text = precise_nats(value, sign)
    return f"{text} nats" if unit else text
