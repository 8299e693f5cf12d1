"""How much of each explained step the account explains: a curve against the line below which it is a rough guide."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from llm_dynamics.report.text import percent, rounded
from llm_dynamics.rules import THRESHOLDS

LINE = THRESHOLDS["explained"]
MAX_POINTS = 240
"""Points drawn; where more steps were explained, the lowest of consecutive ones is drawn."""
_NAMED = 6


def explained_by_step(accounts: pd.DataFrame, hardly: pd.Series) -> dict[str, Any] | None:
    """Return the curve of the explained share, as plain JSON types.

    Args:
        accounts: Rows of `schema.ACCOUNTS`.
        hardly: Of each row, whether the step moved too little to be measured (`too_small_to_measure`): its explained
            share is noise.

    Returns:
        `steps`; `explained` at each, 1 - |remainder|^2 / |change|^2; `gradient`, the same for the best multiple of
        -grad, or None; `moved`, |change| over all explained probe tokens, nats; `hardly`, as given; `size`, of how many
        steps each point is the lowest. None where no step has a finite share.
    """
    known = accounts.assign(hardly=hardly)[np.isfinite(accounts["explained"])].sort_values("step")
    if known.empty:
        return None
    size = math.ceil(len(known) / MAX_POINTS)
    # of steps that moved something the lowest; of a stretch in which nothing moved, the lowest of these
    order = known.assign(bin=np.arange(len(known)) // size)
    lowest = order.sort_values(["bin", "hardly", "explained"], kind="stable").drop_duplicates("bin")
    gradient = lowest["explained_by_gradient"]
    return {
        "steps": lowest["step"].astype(int).tolist(),
        "explained": [rounded(value, 9) for value in lowest["explained"]],
        "gradient": [rounded(value) for value in gradient] if np.isfinite(gradient).any() else None,
        "moved": [rounded(value) for value in lowest["measured_norm"]],
        "hardly": lowest["hardly"].tolist(),
        "size": size,
    }


def explained_in_words(accounts: pd.DataFrame, hardly: pd.Series) -> str:
    """Say in a sentence or two in which steps the account is a rough guide only.

    Args:
        accounts: Rows of `schema.ACCOUNTS`.
        hardly: As for `explained_by_step`.

    Returns:
        How many steps are below `LINE` and which; how many moved too little to tell; empty where no share is finite.
    """
    known = accounts.assign(hardly=hardly)[np.isfinite(accounts["explained"])].sort_values("step")
    if known.empty:
        return ""
    hardly = known["hardly"]
    told, low = known[~hardly], known[~hardly & (known["explained"] < LINE)]
    parts = []
    if len(low):
        steps = ", ".join(str(step) for step in low["step"].head(_NAMED)) + (", …" if len(low) > _NAMED else "")
        worst = low.loc[low["explained"].idxmin()]
        parts.append(
            f"Below {percent(LINE)} in {len(low)} of {len(told)} steps ({steps}), lowest "
            f"{percent(worst['explained'])} at step {int(worst['step'])}: "
            'read the shares of these as a rough guide, or explain with rule="gauss2".'
        )
    elif len(told):
        parts.append(f"No step is below {percent(LINE)}; the lowest is {percent(float(told['explained'].min()))}.")
    if hardly.any():
        n = int(hardly.sum())
        limit = THRESHOLDS["measurable_nats"]
        moved = f"{n} step{'s' if n > 1 else ''} moved a probe token by less than {limit:.5f} nats (root mean square)"
        parts.append(f"{moved}, too little to tell: drawn hollow.")
    return " ".join(parts).replace("-", "−")
