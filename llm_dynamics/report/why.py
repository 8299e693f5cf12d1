"""What the section "Why did it move?" shows: for the template and for the script, run by run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_dynamics.report.account_words import balance_in_words, in_words, notes, steps_explained, steps_in_words
from llm_dynamics.report.causes import (
    Cause,
    FamilyAccount,
    Names,
    cause_names,
    family_accounts,
    label_of,
    waterfall_order,
)
from llm_dynamics.report.families import style_of
from llm_dynamics.report.influence_map_data import MAX_CELLS, map_data
from llm_dynamics.report.palette import cause_colours
from llm_dynamics.report.text import nats, rounded
from llm_dynamics.report.why_explained import explained_by_step, explained_in_words
from llm_dynamics.report.why_tokens import target_data
from llm_dynamics.rules import too_small_to_measure
from llm_dynamics.runlog import RunLog, RunLogs

MAX_BARS = 120
"""Steps drawn; where more were explained, consecutive ones are added up."""
MAX_TOKENS = 60_000
"""Training tokens embedded over all runs: about a megabyte."""


Extent = tuple[float, float]
"""The least and the largest level of a waterfall, nats."""


def why_section(runs: RunLogs) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Tell why the families of all runs moved, side by side.

    Args:
        runs: The runs; what those without accounts lack is told.

    Returns:
        What the template says: `runs`, one mapping per explained run, and `unexplained`, the names of the others. And
        what the scripts draw from, one mapping per explained run. A family's waterfalls have one scale in all runs.
    """
    explained = {name: run for name, run in runs.runs.items() if run.explained_steps}
    accounts = {name: family_accounts(run) for name, run in explained.items()}
    levels: dict[str, list[float]] = {}
    for account in (one for own in accounts.values() for one in own.values()):
        levels.setdefault(account.family, []).extend(_levels(account))
    scales = {family: (min(own), max(own)) for family, own in levels.items()}
    n = max(1, len(explained))
    pairs = [
        why(name, run, max_tokens=MAX_TOKENS // n, max_cells=MAX_CELLS // n, accounts=accounts[name], scales=scales)
        for name, run in explained.items()
    ]
    unexplained = [name for name in runs.runs if name not in explained]
    return {"runs": [view for view, _ in pairs], "unexplained": unexplained}, [data for _, data in pairs]


def why(
    name: str,
    run: RunLog,
    max_tokens: int = MAX_TOKENS,
    max_cells: int = MAX_CELLS,
    *,
    accounts: dict[str, FamilyAccount] | None = None,
    scales: Mapping[str, Extent] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell why the families of a run moved.

    Args:
        name: The run's name.
        run: A run with accounts.
        max_tokens: Training tokens to embed at most; the first target is embedded whatever its size.
        max_cells: Cells of influence maps to embed at most; one map is embedded whatever its size.
        accounts: Those of `family_accounts`, where they are known already.
        scales: The scale of each family's waterfall; its own where None.

    Returns:
        What the template says about it (places of the drawing are percentages of its width), and what `why.js` and
        `influence_map.js` draw from, as plain JSON types: `families`, bars per explained step by family; `explained`,
        the explained share by step; `targets`, the strongest training tokens and examples of each; `maps`.
    """
    names, accounts = cause_names(run), family_accounts(run) if accounts is None else accounts
    hardly, explained_of = too_small_to_measure(run), steps_explained(run)
    targets, maps = target_data(run, max_tokens), map_data(run, max_cells)
    view = {
        "name": name,
        "trainer": str(run.meta.get("trainer", "")),
        "n_explained": len(run.explained_steps),
        "explained_of": explained_of,
        "steps": steps_in_words(*explained_of),
        "balance": balance_in_words(run.accounts),
        "explained": explained_in_words(run.accounts, hardly),
        "notes": notes(run.accounts),
        "families": [_waterfall(account, names, (scales or {}).get(family)) for family, account in accounts.items()],
        "table": _table(accounts, names),
        "targets": _menu(targets.shown),
        "n_targets": targets.n_targets,
        "n_shown": len(targets.shown),
        "n_token_steps": targets.n_steps,
        "token_steps": _token_steps(run),
        "maps": maps.view,
    }
    steps = {family: _by_step(account, names) for family, account in accounts.items()}
    data = {"families": steps, "explained": explained_by_step(run.accounts, hardly), "targets": targets.shown}
    return view, data | {"maps": maps.data}


def _token_steps(run: RunLog) -> str:
    """Say why training tokens were kept of some explained steps alone, and how they are kept of all."""
    every = int((run.meta.get("influence") or {}).get("tokens_every") or 1)
    if every > 1:
        return f"tokens_every={every} keeps them at the first step and each {every}th; tokens_every=1 at all"
    return "the others had no loss, or their update or their forward could not be taken apart"


def _levels(account: FamilyAccount) -> list[float]:
    """Return the levels that a family's waterfall passes through, nats, from no change on."""
    return [0.0, *np.cumsum([cause.share for cause in account.causes]).tolist(), account.measured]


def _waterfall(account: FamilyAccount, names: Names, scale: Extent | None = None) -> dict[str, Any]:
    """Return the bars of a family with their places in percent of the width, from the least to the largest level."""
    levels = _levels(account)[:-1]
    low, high = scale or (min(levels), max(levels))
    width = (high - low) or 1.0

    def bar(start: float, end: float) -> dict[str, float]:
        first, last = (100 * (level - low) / width for level in (start, end))
        return {"left": min(first, last), "size": abs(last - first), "start": first, "end": last}

    bars = [
        {
            "label": label_of(cause, names),
            "colours": cause_colours(cause.name, cause.part),
            "share": cause.share,
            "gathered": ", ".join(f"{label_of(one, names)} {nats(one.share, True)}" for one in cause.gathered),
            **bar(start, end),
        }
        for cause, start, end in zip(account.causes, levels[:-1], levels[1:], strict=True)
    ]
    return {
        "name": account.family,
        "style": style_of(account.family),
        "words": in_words(account, names),
        "bars": bars,
        "measured": account.measured,
        "total": bar(0.0, account.measured),
        "zero": 100 * -low / width,
        "n_probes": account.n_probes,
        "probes_left_out": account.n_probes_left_out,
        "left_out": account.n_left_out,
    }


def _table(accounts: dict[str, FamilyAccount], names: Names) -> dict[str, Any]:
    """Return families by causes, the parts by prompt added up and nothing gathered."""
    merged = {family: account.merged() for family, account in accounts.items()}
    causes = waterfall_order(cause for own in merged.values() for cause in own)
    rows = [
        {
            "name": family,
            "style": style_of(family),
            "shares": [math.fsum(part.share for part in own.get(cause, [])) for cause in causes],
            "measured": accounts[family].measured,
        }
        for family, own in merged.items()
    ]
    return {"causes": [names.get(cause, cause) for cause in causes], "rows": rows}


def _by_step(account: FamilyAccount, names: Names) -> dict[str, Any]:
    """Return the bars of each explained step; consecutive ones are added up where there are too many."""
    size = math.ceil(len(account.steps) / MAX_BARS)
    starts = np.arange(0, len(account.steps), size)

    def binned(values: np.ndarray) -> list[float | None]:
        return [rounded(value) for value in np.add.reduceat(values, starts)]

    def trace(cause: Cause) -> dict[str, Any]:
        light, dark = cause_colours(cause.name, cause.part)
        return {"name": label_of(cause, names), "light": light, "dark": dark, "y": binned(cause.by_step)}

    return {
        "steps": [account.steps[min(start + size, len(account.steps)) - 1] for start in starts.tolist()],
        "size": size,
        "causes": [trace(cause) for cause in account.causes],
        "measured": binned(account.measured_by_step),
    }


def _menu(targets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group the targets for the menu; `place` is the index into the embedded data."""
    groups: dict[str, list[dict[str, Any]]] = {"families": [], "probes": []}
    for place, target in enumerate(targets):
        groups["probes" if target["kind"] == "probe" else "families"].append({"place": place, "name": target["label"]})
    return [{"label": label, "members": members} for label, members in groups.items() if members]
