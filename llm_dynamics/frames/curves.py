"""The curve of each family over training."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llm_dynamics.frames.order import ARGMAX, argmax_of, in_order
from llm_dynamics.runlog import RunLog

CURVE_COLUMNS = ("step", "family", "mean", "low", "high", "n")


def family_curves(run: RunLog, *, per_token: bool = False, delta: bool = False) -> pd.DataFrame:
    """Return the curve of each family over training.

    Args:
        run: The run log.
        per_token: Divide each probe's sum by its number of tokens.
        delta: Subtract each probe's own value at the first observation, before means and percentiles are taken.

    Returns:
        Columns `step`, `family`, `mean`, `low`, `high` (mean, 10th and 90th percentile over probes of the log-prob, in
        nats) and `n` (probes that they are taken over: those with a finite value at this step). The greedy tokens
        appear as `argmax (chosen prefix)` and `argmax (rejected prefix)`; in a run that has neither family, as
        `argmax` over all prefixes.
    """
    sequences = run.sequences
    parts = [sequences.assign(value=sequences["logp_sum"])]
    paired = [family for family in ("chosen", "rejected") if (sequences["family"] == family).any()]
    for family in paired:
        own = sequences[sequences["family"] == family]
        parts.append(own.assign(value=own["argmax_logp_sum"], family=argmax_of(family)))
    if not paired:
        parts.append(sequences.assign(value=sequences["argmax_logp_sum"], family=ARGMAX))
    frame = pd.concat(parts, ignore_index=True)
    if frame.empty:
        return pd.DataFrame(columns=list(CURVE_COLUMNS))
    if per_token:
        frame["value"] /= frame["n_tokens"]
    if delta:
        at_start = frame.loc[frame["step"] == frame["step"].min(), ["probe_id", "family", "value"]]
        frame = frame.merge(at_start, on=["probe_id", "family"], how="left", suffixes=("", "_start"))
        frame["value"] -= frame["value_start"]
    frame["value"] = frame["value"].where(np.isfinite(frame["value"]))
    values = frame.groupby(["family", "step"], sort=True)["value"]
    curves = pd.DataFrame(
        {"mean": values.mean(), "low": values.quantile(0.1), "high": values.quantile(0.9), "n": values.count()}
    ).reset_index()
    return in_order(curves, "step")[list(CURVE_COLUMNS)]
