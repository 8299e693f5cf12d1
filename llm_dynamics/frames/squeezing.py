"""Where the mass goes: the squeezing statistics of each family over training."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llm_dynamics.frames.order import in_order
from llm_dynamics.runlog import RunLog

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
    sequences = run.columns("sequences", ["step", "family", "n_tokens", *(f"{name}_sum" for name in SQUEEZING)])
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
    return in_order(curves.reset_index(), "step")[["step", "family", *SQUEEZING, "n_nonfinite"]]
