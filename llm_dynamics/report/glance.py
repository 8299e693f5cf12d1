"""What stands first on the page: what moved, why, and what to try, a few lines per run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llm_dynamics.report.families import GREEDY
from llm_dynamics.report.text import nats
from llm_dynamics.rules import THRESHOLDS

LEAST = THRESHOLDS["least_nats"]

MOST = 4
"""Families named of those that fell, and of those that rose; chosen and rejected are always among them."""

_MOMENTUM = "Momentum is what the optimizer still applies of the gradients of earlier steps."


def glance(view: Mapping[str, Any], verdicts: Mapping[str, Any], account: Mapping[str, Any] | None) -> dict[str, Any]:
    """Sum up one run.

    Args:
        view: What `content.run_view` says of the run.
        verdicts: What `normal.normal_view` says of it.
        account: What `why.why_section` says of it, or None where none of its steps was explained.

    Returns:
        `name`, `trainer`, `n_probes`, `n_steps`, `first` and `last` step; `untemplated`, whether
        the model's chat template is there and not used; `compares`, whether there is anything to
        compare; `fell` and `rose`, each `n`, `named` (rows of `what_moved`, the largest change first) and `more` (how
        many are not named); `n_families`; `greedy`, the change of the greedy tokens in nats, or None; `why`, a
        sentence, or None; `found`, the verdicts that found a fault; `hoped`, those on hopes that came true.
    """
    rows = [row for row in view["moved"] if math.isfinite(row["delta"])]
    families = [row for row in rows if row["family"] not in GREEDY]
    return {
        **{key: view[key] for key in ("name", "trainer", "n_probes", "n_steps", "first", "last", "untemplated")},
        "compares": view["n_steps"] > 1 and bool(families),
        "fell": _named([row for row in families if row["delta"] < -LEAST]),
        "rose": _named([row for row in families if row["delta"] > LEAST]),
        "n_families": len(families),
        "greedy": next((row["delta"] for row in rows if row["family"] in GREEDY), None),
        "why": None if account is None else _why(account["families"], account["explained_of"]),
        "found": verdicts["found"],
        "hoped": verdicts["hoped"],
    }


def _named(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Name chosen and rejected whatever their size, then what moved most; the largest change first."""
    worth = sorted(rows, key=lambda row: (row["family"] not in ("chosen", "rejected"), -abs(row["delta"])))[:MOST]
    named = sorted(worth, key=lambda row: -abs(row["delta"]))
    return {"n": len(rows), "named": named, "more": len(rows) - len(named)}


def _why(accounts: Sequence[Mapping[str, Any]], explained_of: tuple[int, int]) -> str | None:
    """Say what pushed and what pulled hardest at chosen, or at the first family there is, in the explained steps."""
    if not accounts:
        return None
    account = next((own for own in accounts if own["name"] == "chosen"), accounts[0])
    moved = account["measured"]
    down = min(account["bars"], key=lambda bar: float(bar["share"]), default=None)
    up = max(account["bars"], key=lambda bar: float(bar["share"]), default=None)
    parts = []
    if down and down["share"] < 0:
        parts.append(f"pushed down most by {down['label']} ({nats(down['share'], True)})")
    if up and up["share"] > 0:
        parts.append(f"pulled up most by {up['label']} ({nats(up['share'], True)})")
    ordered = parts if moved < 0 else parts[::-1]
    explained, done = explained_of
    steps = f"{explained} of {done} steps" if explained < done else f"all {done} steps" if done > 1 else "the one step"
    told = f"{account['name']} {nats(moved, True)} nats in {steps}: {', '.join(ordered)}."
    return f"{told} {_MOMENTUM}" if "momentum" in told else told
