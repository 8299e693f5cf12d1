"""From a sequences table to the scalars of an observation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

from llm_dynamics.likelihood.tables import SQUEEZE_COLUMNS

SQUEEZED_FAMILIES = ("rejected", "chosen")
"""The first of these that is watched has its squeezing statistics in the trainer's rows; the run log keeps all."""


def observation_metrics(sequences: pd.DataFrame, start: Mapping[str, float]) -> dict[str, float]:
    """Average an observation by family.

    Args:
        sequences: The sequences table of one observation.
        start: log-prob sum of each probe at the first observation, nats, by probe id.

    Returns:
        By ASCII name, all in nats per response unless said:
        `probe/<family>_logp`, mean over the family's probes of log pi(y | x); `probe/<family>_delta`, mean change since
        the first observation; `probe/argmax_logp`, mean over the chosen probes (all probes where there are none) of the
        greedy log-prob at every own prefix; `probe/margin`, mean over prompts of chosen minus rejected;
        `probe/n_nonfinite`, tokens with NaN or infinite statistics; `squeeze/<family>_<statistic>`, mean per token.
        A family with a non-finite probe has a non-finite mean: nothing is averaged away.
    """
    metrics: dict[str, float] = {}
    frame = sequences.assign(delta=sequences["logp_sum"] - sequences["probe_id"].map(start))
    for family, rows in frame.groupby("family", sort=False):
        metrics[f"probe/{family}_logp"] = _mean(rows["logp_sum"])
        metrics[f"probe/{family}_delta"] = _mean(rows["delta"])
    families = set(frame["family"])
    on_chosen = frame[frame["family"] == "chosen"] if "chosen" in families else frame
    metrics["probe/argmax_logp"] = _mean(on_chosen["argmax_logp_sum"])
    if {"chosen", "rejected"} <= families:
        sides = [
            rows.groupby("prompt_id")["logp_sum"].agg(lambda sums: sums.mean(skipna=False))
            for rows in (frame[frame["family"] == "chosen"], frame[frame["family"] == "rejected"])
        ]
        paired = sides[0].index.intersection(sides[1].index)
        metrics["probe/margin"] = _mean(sides[0][paired] - sides[1][paired])
    metrics["probe/n_nonfinite"] = float(frame["n_nonfinite"].sum())
    squeezed = next((name for name in SQUEEZED_FAMILIES if name in families), str(frame["family"].iloc[0]))
    rows = frame[frame["family"] == squeezed]
    for name in (*SQUEEZE_COLUMNS, "riser_count", "entropy"):
        total = rows[f"{name}_sum"].sum(skipna=False)
        metrics[f"squeeze/{squeezed}_{name}"] = float(total / rows["n_tokens"].sum())
    return metrics


def finite_only(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that a tracker can take: TensorBoard and MLflow refuse NaN and infinity."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _mean(values: pd.Series) -> float:
    return float(values.mean(skipna=False)) if len(values) else math.nan
