"""What the page shows: the numbers of each run, ready for the template and for the script."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from llm_dynamics.frames import family_curves, squeezing_curves, what_moved
from llm_dynamics.report import figures
from llm_dynamics.report.families import ARGMAX, GREEDY, GROUPS, ordered, style_of
from llm_dynamics.report.measured import measured
from llm_dynamics.runlog import RunLog, RunLogs

_VARIANTS = [
    (f"{'token' if per_token else 'response'}-{'change' if delta else 'value'}", per_token, delta)
    for per_token in (False, True)
    for delta in (False, True)
]
"""What the switches of the page choose among: name, per token, change from start."""
MAX_FAMILIES = 40
"""Families whose curves are drawn; more are neither told apart by eye nor drawn in time by a browser."""


def run_view(name: str, run: RunLog) -> dict[str, Any]:
    """Return what the template says about one run."""
    moved = what_moved(run)
    shown, rest = measured(run)
    steps = sorted(run.sequences["step"].unique())  # of what could be read
    squeezing = run.sequences[[f"{panel.column}_sum" for panel in figures.PANELS]]
    squeezed = figures.squeezing_families(run.sequences["family"])
    form = run.meta.get("forms") or {}
    return {
        "name": name,
        "trainer": str(run.meta.get("trainer", "")),
        "untemplated": form.get("prompts") == "plain text" and bool(form.get("chat_template")),
        "n_steps": len(steps),
        "first": steps[0] if steps else None,
        "last": steps[-1] if steps else None,
        "n_probes": len(run.probes),
        "moved": _moved_rows(moved),
        "left_out": int(moved["n_nonfinite"].iloc[:-1].sum()),
        "squeezed": [{"name": family, "style": style_of(family)} for family in squeezed],
        "squeezing_measured": bool(squeezing.notna().any(axis=None)),
        "measured": shown,
        "meta": rest,
    }


def script_data(runs: RunLogs) -> dict[str, Any]:
    """Return what `page.js` draws from, as plain JSON types."""
    curves, squeezing = {}, {}
    drawn = _families(runs)[0]
    for name, run in runs.runs.items():
        curves[name] = {
            variant: _traces(figures.curve_traces(curve[curve["family"].isin(drawn)]))
            for variant, per_token, delta in _VARIANTS
            for curve in [family_curves(run, per_token=per_token, delta=delta)]
        }
        frame = squeezing_curves(run)
        squeezing[name] = {panel.column: _traces(figures.panel_traces(frame, panel)) for panel in figures.PANELS}
    styles = {family: style_of(family) for family in drawn}
    return {
        "compares": any(len(run.observed_steps) > 1 for run in runs.runs.values()),
        "families": {family: {"light": style.light, "dark": style.dark} for family, style in styles.items()},
        "titles": {
            variant: figures.curve_title(per_token=per_token, delta=delta) for variant, per_token, delta in _VARIANTS
        },
        "curves": curves,
        "squeezing": squeezing,
    }


def legend(runs: RunLogs) -> dict[str, Any]:
    """Return the families that are drawn by kind, and how many are not, for the legend."""
    drawn, left_out = _families(runs)
    families = [{"name": family, **asdict(style_of(family))} for family in drawn]
    groups = [{"name": group, "members": [own for own in families if own["group"] == group]} for group in GROUPS]
    return {"groups": [group for group in groups if group["members"]], "left_out": left_out}


def _moved_rows(moved: pd.DataFrame) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{str(key): value for key, value in row.items()} for row in moved.to_dict("records")]
    largest = max((abs(row["delta"]) for row in rows if math.isfinite(row["delta"])), default=0.0) or 1.0
    for row in rows:
        row["style"] = style_of(row["family"])
        row["share"] = abs(row["delta"]) / largest if math.isfinite(row["delta"]) else 0.0
        row["shown"] = f"{ARGMAX} (all prefixes)" if row["family"] == ARGMAX else row["family"]
        row["last"] = row["family"] in GREEDY
    return rows


def _traces(traces: Iterable[go.Scatter]) -> list[dict[str, Any]]:
    return [trace.to_plotly_json() for trace in traces]


def _families(runs: RunLogs) -> tuple[list[str], int]:
    """Return the families that are drawn, and how many more there are."""
    families = ordered({family for run in runs.runs.values() for family in family_curves(run)["family"]})
    drawn = [family for place, family in enumerate(families) if place < MAX_FAMILIES or family == ARGMAX]
    return drawn, len(families) - len(drawn)
