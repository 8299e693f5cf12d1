"""Curves of families and of the margin, averaged over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from llm_dynamics import family_curves
from llm_dynamics.frames import ordered
from llm_dynamics.runlog import RunLog

MARGIN = "margin"
"""Name of the pseudo-family chosen - rejected in frames and files."""
SEED_COLUMNS = ("family", "step", "mean", "low", "high", "seeds", "probes")


def seed_curves(logs: Sequence[RunLog], *, delta: bool = False) -> pd.DataFrame:
    """Return the curve of each family, averaged over seeds.

    Args:
        logs: The logs of one run, a seed each.
        delta: Change of each probe since the first observation of its own log.

    Returns:
        One row per family (greedy pseudo-families included) and step, families in canonical order: `family`, `step`;
        `mean`, over seeds of the mean over probes of the summed log-prob, nats; `low`, `high`, the lowest and highest
        seed (NaN of one seed); `seeds`; `probes`, of all seeds. Only steps at which every seed that watches the family
        has a finite mean.
    """
    return _over_seeds(logs, lambda log: family_curves(log, delta=delta))


def seed_margins(logs: Sequence[RunLog]) -> pd.DataFrame:
    """Return the margin chosen - rejected, averaged over seeds: the columns of `seed_curves`, `family` being "margin".

    The margin of a prompt is the mean log-prob of its chosen responses minus that of its rejected ones, nats, summed
    over tokens; prompts without both do not count. Empty where no log has such a prompt.
    """
    return _over_seeds(logs, _margins)


def _margins(log: RunLog) -> pd.DataFrame:
    frame = log.columns("sequences", ["step", "prompt_id", "family", "logp_sum"])
    frame = frame[frame["family"].isin(["chosen", "rejected"]) & np.isfinite(frame["logp_sum"])]
    sides = frame.pivot_table("logp_sum", ["step", "prompt_id"], "family", aggfunc="mean")
    if not {"chosen", "rejected"} <= set(sides):
        return pd.DataFrame()
    gaps = (sides["chosen"] - sides["rejected"]).dropna().groupby("step")
    return pd.DataFrame({"family": MARGIN, "mean": gaps.mean(), "n": gaps.size()}).reset_index()


def _over_seeds(logs: Sequence[RunLog], curve: Callable[[RunLog], pd.DataFrame]) -> pd.DataFrame:
    frames = [frame.assign(seed=place) for place, log in enumerate(logs) if len(frame := curve(log))]
    if not frames:
        return pd.DataFrame(columns=list(SEED_COLUMNS))
    every = pd.concat(frames, ignore_index=True)
    watching = every.groupby("family")["seed"].nunique()
    every = every[np.isfinite(every["mean"])]
    grouped = every.groupby(["family", "step"])
    table = grouped["mean"].agg(["mean", "min", "max", "count"]).join(grouped["n"].sum().rename("probes")).reset_index()
    table = table[table["count"] == table["family"].map(watching)]
    table = table.rename(columns={"min": "low", "max": "high", "count": "seeds"})
    table.loc[table["seeds"] == 1, ["low", "high"]] = np.nan
    places = {family: place for place, family in enumerate(ordered(every["family"]))}
    table = table.sort_values(
        ["family", "step"], key=lambda column: column.map(places) if column.name == "family" else column
    )
    return table[list(SEED_COLUMNS)].reset_index(drop=True)
