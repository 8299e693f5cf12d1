"""The account of a run's steps as a table: what each kind of update did to each family, added up and drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from looks import heat_map
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from llm_dynamics.frames import ordered
from llm_dynamics.runlog import RunLog

MEASURED, ELSE = "measured", "everything else"
NEGLIGIBLE = 0.005
"""Momentum of tokens that are not told apart is a row of its own above this part of the largest number."""
ROW_HEIGHT, FRAME_HEIGHT, NAMES_HEIGHT = 0.19, 0.3, 0.6
"""Inches: of a row of a heat-map, of its title and margins, of the names of the families below the last."""
_NO_PUSH = ("other", "decay", "rounding", "step", "remainder")


def accumulated_influence(logs: Sequence[RunLog]) -> pd.DataFrame:
    """Return what each kind of update did to each family, summed over the explained steps and averaged over seeds.

    `nats = mean over seeds of sum over steps of family_influence().share`. A step in which a number of a family is not
    finite is left out for that family, all its causes at once, so that a column still adds up.

    Args:
        logs: The logs of one run, a seed each; those without accounts are passed over.

    Returns:
        One row per update type and family: `family`; `cause`, as logged, "everything else" (other gradient, decay,
        rounding, remainder, and momentum where it is negligible) or "measured"; `update`, its name for people; `mean`,
        nats, of the summed log-prob, mean over probes; `seeds`. Types that push first, then their momentum, the rest,
        and what was measured: the sum of all. Empty where no step was explained.
    """
    logs = [log for log in logs if log.explained_steps]
    if not logs:
        return pd.DataFrame(columns=["family", "cause", "update", "mean", "seeds"])
    tables = pd.concat([_total(log).assign(seed=place) for place, log in enumerate(logs)], ignore_index=True)
    wide = tables.pivot(index=["seed", "family"], columns="cause", values="nats").fillna(0.0)
    limit = float(wide.abs().max().max())
    small = [cause for cause in wide if cause in _NO_PUSH]
    small += [cause for cause in wide if cause == "momentum" and wide[cause].abs().max() < NEGLIGIBLE * limit]
    wide[ELSE] = wide[small].sum(axis=1)
    wide = wide.drop(columns=small)
    by_family = wide.groupby("family")
    means, seeds = by_family.mean(), by_family.size()
    names = update_names(logs)
    rows = [
        {"family": family, "cause": cause, "update": names.get(cause, _named(cause)), "mean": means.at[family, cause]}
        for cause in _update_order(means.columns)
        for family in ordered(means.index)
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(seeds=frame["family"].map(seeds))


def steps_in_words(logs: Sequence[RunLog]) -> str:
    """Say how many optimizer steps were explained, such as "4 of 12 steps": in the first seed that has any."""
    log = next(log for log in logs if log.explained_steps)
    explained, observed = log.explained_steps, log.observed_steps
    first = min([explained[0] - 1, *observed[:1]])
    return f"{len(explained)} of {max([explained[-1], *observed[-1:]]) - first} steps"


def update_names(logs: Sequence[RunLog]) -> dict[str, str]:
    """Name the causes `up` and `down` after the one role of the examples that they belong to, where it is one.

    In DPO all tokens that are pulled up are the chosen responses'; in SFT all are `trained`.
    """
    moved = {"up": "pulled up", "down": "pushed down"}
    examples = pd.concat([log.training_examples for log in logs], ignore_index=True)
    roles = {
        "up": set(examples.loc[examples["c_sum"] < 0, "role"]),
        "down": set(examples.loc[examples["c_sum"] > 0, "role"]),
    }
    names = {}
    for cause, opposite in (("up", "down"), ("down", "up")):
        if len(roles[cause]) == 1 and not roles[cause] & roles[opposite]:
            tokens = f"{next(iter(roles[cause]))} tokens"
            names |= {cause: f"{tokens}, {moved[cause]}", f"momentum_{cause}": f"momentum of {tokens}"}
        else:
            tokens = f"tokens {moved[cause]}"
            names |= {cause: tokens, f"momentum_{cause}": f"momentum of {tokens}"}
    return names


def draw_accounts(part: SubFigure, tables: Mapping[str, pd.DataFrame]) -> list[Axes]:
    """Draw the heat-maps of several runs one below the other, their columns in line; returns their panels.

    Args:
        part: An empty part of a figure, `height_of` it high.
        tables: What `accumulated_influence` gave, by run; none of them empty.
    """
    families = ordered(family for table in tables.values() for family in table["family"])
    rows = [table["update"].nunique() for table in tables.values()]
    panels = list(part.subplots(len(rows), 1, squeeze=False, height_ratios=rows).flat)
    for panel, table in zip(panels, tables.values(), strict=True):
        draw_accumulated(panel, table, families)
        panel.tick_params(labelbottom=panel is panels[-1])
    return panels


def height_of(tables: Mapping[str, pd.DataFrame]) -> float:
    """Return the height that `draw_accounts` needs, inches."""
    return sum(FRAME_HEIGHT + ROW_HEIGHT * table["update"].nunique() for table in tables.values()) + NAMES_HEIGHT


def draw_accumulated(axes: Axes, table: pd.DataFrame, families: Sequence[str]) -> None:
    """Draw a table of `accumulated_influence` as a heat-map with its numbers; a dash where a family has no account.

    Args:
        axes: Where.
        table: Of one run.
        families: Columns, in order.
    """
    updates = list(dict.fromkeys(table["update"]))
    values = table.pivot(index="update", columns="family", values="mean").reindex(index=updates, columns=families)
    limit = float(values.abs().max().max()) or 1.0
    heat_map(axes, values, label="nats", limit=limit)
    decimals = min(max(int(limit < 1000), 2 - math.floor(math.log10(limit))), 4)
    for row, column in np.ndindex(*values.shape):
        value = values.iat[row, column]
        text = "–" if np.isnan(value) else f"{round(value, decimals) + 0.0:+.{decimals}f}".replace("-", "−")
        colour = "white" if abs(value) > 0.55 * limit else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
    axes.set_xticks(range(len(families)), list(families), rotation=35, ha="right", rotation_mode="anchor")
    if MEASURED in updates:
        axes.axhline(updates.index(MEASURED) - 0.5, color="black", linewidth=0.8)
    axes.tick_params(length=0)


def _total(log: RunLog) -> pd.DataFrame:
    """Return `family`, `cause`, `nats` of one run; `measured` is a cause beside the others."""
    frame = log.family_influence()
    bad = ~(np.isfinite(frame["share"]) & np.isfinite(frame["measured"]))
    frame = frame[~bad.groupby([frame["step"], frame["family"]]).transform("any")]
    once = frame.drop_duplicates(["step", "family"]).assign(cause=MEASURED, share=lambda rows: rows["measured"])
    return (
        pd.concat([frame, once])
        .groupby(["family", "cause"], as_index=False)["share"]
        .sum()
        .rename(columns={"share": "nats"})
    )


def _update_order(causes: Iterable[str]) -> list[str]:
    """Sort update types: pushes, their momentum, other momentum, everything else, measured."""
    last = {"momentum": 2, ELSE: 3, MEASURED: 4}
    names = sorted(causes)
    known = ordered(name.removeprefix("momentum_") for name in names)
    place = {"up": -2, "down": -1} | {name: number for number, name in enumerate(known) if name not in ("up", "down")}
    return sorted(
        names,
        key=lambda name: (last.get(name, int(name.startswith("momentum_"))), place[name.removeprefix("momentum_")]),
    )


def _named(cause: str) -> str:
    if cause in (MEASURED, ELSE):
        return cause
    if cause == "momentum":
        return "momentum, not told apart"
    label = cause.removeprefix("momentum_")
    return f"momentum of {label} tokens" if label != cause else f"{label} tokens"
