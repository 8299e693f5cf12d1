"""The curve of each family over training."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llm_dynamics.frames.order import ARGMAX, argmax_of, in_order
from llm_dynamics.frames.runs import Runs, is_single, named_chains, stacked
from llm_dynamics.frames.statistics import sum_column

CURVE_COLUMNS = ("step", "family", "mean", "low", "high", "n")


def family_curves(
    runs: Runs,
    *,
    per_token: bool = False,
    delta: bool = False,
    statistic: str = "logp",
    interval: tuple[float, float] = (10, 90),
) -> pd.DataFrame:
    """Return the curve of each family over training.

    Only the columns that are needed are read. A value that is NaN or infinite, or missing, is left out; `n` says how
    many are in.

    Args:
        runs: A run log; several by name, `load_runs(...)`; or a mapping whose values may be chains of runs that
            continue one another, such as `{"pipeline": [sft, dpo]}`: their steps are counted through.
        per_token: Divide each probe's sum by its number of tokens.
        delta: Subtract each probe's own value at the first observation, before means and percentiles are taken.
        statistic: `logp`, or another name in `frames.STATISTICS`: any `_sum` column of the sequences table, with or
            without the `_sum`; `log_ratio` is log-prob minus that of the reference.
        interval: The percentiles `low` and `high`, in percent.

    Returns:
        Columns `step`, `family`, `mean`, `low`, `high` (mean and percentiles over probes of the sum over tokens, or of
        the mean per token; nats for log-probs and entropies) and `n` (probes that they are taken over: those with a
        finite value at this step); a leading `run` where `runs` is not a single run log. Of `logp`, the greedy tokens
        appear as well, as `argmax (chosen prefix)` and `argmax (rejected prefix)`; in a run that has neither family, as
        `argmax` over all prefixes.

    Raises:
        ValueError: For an unknown statistic, or an interval that is not 0 <= low <= high <= 100.

    Example:
        >>> family_curves(load_run("runs/dpo"), delta=True).pivot(
        ...     index="step", columns="family", values="mean"
        ... )  # doctest: +SKIP
    """
    check_interval(interval)
    wanted = ["logp", "argmax_logp"] if sum_column(statistic) == "logp_sum" else [statistic]
    curves = {
        name: _curves(chain.observations(wanted), statistic, per_token=per_token, delta=delta, interval=interval)
        for name, chain in named_chains(runs).items()
    }
    return next(iter(curves.values())) if is_single(runs) else stacked(curves)


def check_interval(interval: tuple[float, float]) -> None:
    """Refuse percentiles that are none.

    Raises:
        ValueError: Where not 0 <= low <= high <= 100.
    """
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 100:
        raise ValueError(f"interval is {interval!r}; allowed: two percentiles (low, high), 0 <= low <= high <= 100")


def _curves(
    sequences: pd.DataFrame, statistic: str, *, per_token: bool, delta: bool, interval: tuple[float, float]
) -> pd.DataFrame:
    column = sum_column(statistic)
    parts = [sequences.assign(value=sequences[column])]
    if column == "logp_sum":
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
    low, high = (values.quantile(percent / 100) for percent in interval)
    curves = pd.DataFrame({"mean": values.mean(), "low": low, "high": high, "n": values.count()}).reset_index()
    return in_order(curves, "step")[list(CURVE_COLUMNS)]
