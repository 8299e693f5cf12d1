"""Where in training was each observation? In steps, epochs, or as a share of the whole."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd

from llm_dynamics.frames.runs import Chain

On = Literal["step", "epoch", "progress"]
DECIMALS = 6
"""Epochs are compared to this many decimals: trainers add up fractions."""


def positions(name: str, chain: Chain, on: On) -> pd.Series:
    """Return where each observation of a chain lies.

    Args:
        name: Name of the chain, for messages.
        chain: The runs; steps and epochs are counted through.
        on: "step" (optimizer steps), "epoch" (as the trainer counted), or "progress" (step / last observed step; 0 in
            a run with a single observation at step 0).

    Returns:
        The position by step (counted through), both ascending; int64 for steps, float64 otherwise.

    Raises:
        ValueError: Where nothing was observed, `on` is none of these, or an epoch was not logged.
    """
    if on not in ("step", "epoch", "progress"):
        raise ValueError(f'on is {on!r}; allowed: "step", "epoch", "progress"')
    offsets = chain.offsets
    steps = [(stage, step) for stage, own in chain.steps().items() for step in own]
    if not steps:
        raise ValueError(f"run {name!r} has no observation")
    total = np.array([offsets[stage] + step for stage, step in steps], dtype=np.int64)
    if on == "step":
        return pd.Series(total, index=total)
    if on == "progress":
        return pd.Series(total / max(1, total[-1]), index=total)
    epochs: dict[tuple[str, int], float] = {}
    done = 0.0
    for stage, run in chain.stages.items():
        own = run.columns("steps", ["step", "epoch"]).astype({"epoch": "float64"})
        epochs |= {(stage, int(step)): done + epoch for step, epoch in own.itertuples(index=False)}
        done += own["epoch"].max()
    at = np.array([epochs.get(place, np.nan) for place in steps])
    if np.isnan(at).any():
        stage, step = steps[int(np.isnan(at).argmax())]
        raise ValueError(f'run {name!r} logged no epoch at step {step} of {stage!r}; on="step" needs none')
    return pd.Series(np.round(at, DECIMALS), index=total)
