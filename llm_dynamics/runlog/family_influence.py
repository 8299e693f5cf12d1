"""What each cause did to each family, whether a run logged families, probes or both."""

from __future__ import annotations

import numpy as np
import pandas as pd

FAMILY_INFLUENCE_COLUMNS = ("step", "family", "cause", "share", "own_share", "measured", "n_probes", "n_nonfinite")
_KEYS = ["step", "family", "cause"]
_VALUES = ["share", "own_share", "measured"]


def family_influence(influence: pd.DataFrame) -> pd.DataFrame:
    """Average the influence table over the probes of each family.

    Where a step has a row of its own for a family (`probe_id` null), that row is taken; else the mean over the family's
    probes. A probe with a `share` or a `measured` that is not finite at some step is left out of all steps with all its
    causes, and counted: so the shares still add up to `measured`, and steps can be added up. A step at which that holds
    for all probes of the family leaves none out of other steps.

    Args:
        influence: Columns of `schema.INFLUENCE`.

    Returns:
        One row per step, family and cause, by step and then in the order logged. `share`, `own_share` (NaN where some
        probe of the mean has none) and `measured` in nats, of the summed log-prob, mean over probes; `n_probes`, probes
        of the mean; `n_nonfinite`, probes left out.
    """
    own_row = influence["probe_id"].isna()
    per_family = influence[own_row].assign(n_nonfinite=0)[list(FAMILY_INFLUENCE_COLUMNS)]
    known = pd.MultiIndex.from_frame(per_family[["step", "family"]])
    probes = influence[~own_row]
    probes = probes[~pd.MultiIndex.from_frame(probes[["step", "family"]]).isin(known)]
    frame = pd.concat([per_family, _mean_over_probes(probes)], ignore_index=True)
    return frame.sort_values("step", kind="stable", ignore_index=True)


def _mean_over_probes(probes: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `family_influence` for a frame with one row per probe and cause."""
    bad = ~(np.isfinite(probes["share"]) & np.isfinite(probes["measured"]))
    broken = bad.groupby([probes["step"], probes["family"], probes["probe_id"]]).transform("any")
    no_probe = broken.groupby([probes["step"], probes["family"]]).transform("all")  # such a step is left out by itself
    left_out = broken | (broken & ~no_probe).groupby([probes["family"], probes["probe_id"]]).transform("any")
    kept = probes[_VALUES].mask(left_out)
    grouped = kept.assign(
        step=probes["step"],
        family=probes["family"],
        cause=probes["cause"],
        n_probes=~left_out,
        n_nonfinite=left_out,
        has_own=probes["own_share"].notna() | left_out,
    ).groupby(_KEYS, sort=False)
    means = grouped[_VALUES].mean()
    means["own_share"] = means["own_share"].where(grouped["has_own"].all())
    counts = grouped[["n_probes", "n_nonfinite"]].sum().astype("int64")
    return means.join(counts).reset_index()[list(FAMILY_INFLUENCE_COLUMNS)]
