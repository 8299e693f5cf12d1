"""How sure is a mean over a few prompts? A confidence interval by resampling prompts."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llm_dynamics.frames.resampling import Resamples


def prompt_interval(
    values: pd.Series, prompts: pd.Series, *, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return a percentile bootstrap interval of the mean of `values`.

    Prompts are drawn with replacement, each with all of its probes (`Resamples`). The interval says what another choice
    of prompts might give; it knows nothing of another seed of training.

    Args:
        values: One number per probe; what is not finite is left out.
        prompts: The prompt of each probe.
        confidence: Share of the resampled means within the interval.
        n_resamples: How many times prompts are drawn.
        seed: Seed of the draws; the order of the rows does not matter.

    Returns:
        The quantiles (1 - confidence) / 2 and (1 + confidence) / 2 of the resampled means; NaN where fewer than two
        prompts have a finite value.

    Raises:
        ValueError: Where `confidence` is not within (0, 1) or `n_resamples` is not positive.
    """
    if not 0 < confidence < 1 or n_resamples < 1:
        raise ValueError(
            f"confidence is {confidence} and n_resamples {n_resamples}; allowed: 0 < confidence < 1, n_resamples >= 1"
        )
    finite = np.isfinite(values.to_numpy(dtype=float))
    values, prompts = values[finite], prompts[finite]
    resamples = Resamples(prompts, n_resamples=n_resamples, seed=seed)
    if resamples.size < 2:
        return float("nan"), float("nan")
    means = resamples.mean(values, prompts)[1:]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
