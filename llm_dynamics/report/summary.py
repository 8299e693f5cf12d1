"""Frames that answer "what moved?" and "where did the mass go?" from one run log.

Non-finite values are never averaged in and never hidden: each frame says how many probes it had to leave out.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from llm_dynamics.report.families import ARGMAX, argmax_of, ordered
from llm_dynamics.runlog import RunLog

MOVED_COLUMNS = ("family", "n_probes", "start", "end", "delta", "delta_per_token", "n_nonfinite")
CURVE_COLUMNS = ("step", "family", "mean", "low", "high", "n")
SQUEEZING = (
    "p_label",
    "p_other",
    "collision",
    "tau0",
    "tau",
    "riser_count",
    "riser_mass",
    "moved_to_other",
    "log1m_p_other",
    "entropy",
)
"""Statistics of `squeezing_curves`; each is a `<name>_sum` column of the sequences table."""


def what_moved(run: RunLog) -> pd.DataFrame:
    """Tell how far each family moved from the first to the last observation.

    Args:
        run: The run log.

    Returns:
        One row per family in canonical order and a last row `argmax`: the greedy tokens along the prefixes of the
        chosen probes (of all probes where no family is called chosen). Columns: `family`; `n_probes`, probes of the
        family; `start`, `end` and `delta`, means over probes of the summed log-prob (nats) at the first observation,
        at the last, and of the change; `delta_per_token`, mean over probes of change / tokens (nats per token);
        `n_nonfinite`, probes whose start or end is NaN, infinite or missing. Those are left out of the means. Empty
        where nothing was observed.
    """
    sequences = run.sequences
    if sequences.empty:
        return pd.DataFrame(columns=list(MOVED_COLUMNS))
    columns = ["logp_sum", "argmax_logp_sum"]
    by_probe = sequences.sort_values("step").set_index("probe_id")
    start = by_probe.loc[by_probe["step"] == by_probe["step"].min(), columns].add_suffix("_start")
    end = by_probe.loc[by_probe["step"] == by_probe["step"].max(), columns].add_suffix("_end")
    # every probe that was ever seen has a row, so that one that is missing at an end is counted as left out
    probes = by_probe.groupby(level=0)[["family", "n_tokens"]].first().join([start, end])
    rows = [_moved(family, probes[probes["family"] == family], "logp_sum") for family in ordered(probes["family"])]
    chosen = probes[probes["family"] == "chosen"]
    rows.append(_moved(ARGMAX, probes if chosen.empty else chosen, "argmax_logp_sum"))
    return pd.DataFrame(rows, columns=list(MOVED_COLUMNS))


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
    return _in_order(curves)[list(CURVE_COLUMNS)]


def squeezing_curves(run: RunLog) -> pd.DataFrame:
    """Return the squeezing statistics of each family over training, averaged over response tokens.

    A statistic s is `sum_probes s_sum / sum_probes n_tokens`, so that every token context counts the same. A probe
    whose sum is not finite is left out of numerator and denominator alike.

    Args:
        run: The run log.

    Returns:
        Columns `step`, `family`, the names of `SQUEEZING`, and `n_nonfinite`: probes left out of at least one of the
        statistics that were measured. A statistic that was not measured is NaN throughout.
    """
    sequences = run.sequences
    if sequences.empty:
        return pd.DataFrame(columns=["step", "family", *SQUEEZING, "n_nonfinite"])
    frame = sequences[["step", "family"]].copy()
    left_out = pd.Series(False, index=sequences.index)
    for name in SQUEEZING:
        value = sequences[f"{name}_sum"].astype(float)
        finite = pd.Series(np.isfinite(value), index=sequences.index)
        frame[name] = value.where(finite)
        frame[f"{name}_tokens"] = sequences["n_tokens"].where(finite)
        if finite.any():
            left_out |= ~finite
    totals = frame.assign(n_nonfinite=left_out).groupby(["family", "step"], sort=True).sum(min_count=1)
    curves = pd.DataFrame({name: totals[name] / totals[f"{name}_tokens"] for name in SQUEEZING})
    curves["n_nonfinite"] = totals["n_nonfinite"].astype(int)
    return _in_order(curves.reset_index())[["step", "family", *SQUEEZING, "n_nonfinite"]]


def _moved(family: str, probes: pd.DataFrame, column: str) -> tuple[str, int, float, float, float, float, int]:
    start, end = probes[f"{column}_start"], probes[f"{column}_end"]
    kept = np.isfinite(start) & np.isfinite(end)
    change = (end - start)[kept]
    return (
        family,
        len(probes),
        float(start[kept].mean()),
        float(end[kept].mean()),
        float(change.mean()),
        float((change / probes["n_tokens"][kept]).mean()),
        int((~kept).sum()),
    )


def _in_order(curves: pd.DataFrame) -> pd.DataFrame:
    places = {family: place for place, family in enumerate(ordered(curves["family"]))}
    keyed = curves.assign(place=curves["family"].map(places)).sort_values(["place", "step"], ignore_index=True)
    return keyed.drop(columns="place")


def margin_path(run: RunLog) -> tuple[float, float]:
    """Return the margin chosen - rejected at the first and last observation, as `probe/margin` defines it.

    Returns:
        Mean over prompts that have both, of the mean summed log-prob of chosen minus that of rejected, nats; pairs
        that are not finite are left out.
    """
    frame = run.sequences
    values = []
    for step in (frame["step"].min(), frame["step"].max()):
        seen = frame[frame["step"] == step]
        sides = [
            seen[seen["family"] == family].groupby("prompt_id")["logp_sum"].mean() for family in ("chosen", "rejected")
        ]
        margins = sides[0] - sides[1]
        values.append(float(margins[np.isfinite(margins)].mean()))
    return values[0], values[1]
