"""How far each family moved over one run."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llm_dynamics.frames.order import ARGMAX, ordered
from llm_dynamics.runlog import RunLog

MOVED_COLUMNS = ("family", "n_probes", "start", "end", "delta", "delta_per_token", "n_nonfinite")


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
