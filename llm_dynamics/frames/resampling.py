"""How sure is a decision that rests on means over a few prompts? The bootstrap, over prompts.

The probes of a prompt move together, so prompts are drawn, with replacement, each with all of its probes. A decision
that flips when a few prompts are left out or counted twice is a matter of which prompts are watched. It says nothing of
another seed of the training run.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pandas as pd

N_RESAMPLES = 2000


class Resamples:
    """The groups of a sample, and how often each is drawn in each of R resamples; resample 0 is the sample itself.

    The draws are seeded: the same groups, in any order, give the same resamples. Of fewer than two groups there are
    none: R = 0. Q (1 + R) numbers are held.

    Attributes:
        size: Number of groups, Q.

    Args:
        groups: The group of each row, such as its prompt; NaN is none.
        n_resamples: R.
        seed: Seed of the draws.
    """

    def __init__(self, groups: pd.Series, *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> None:
        self._index = pd.Index(groups.dropna().unique()).sort_values()
        self.size = len(self._index)
        self._weights = _weights(self.size, n_resamples, seed)  # (1 + R, Q)

    def mean(self, values: pd.Series, groups: pd.Series) -> np.ndarray:
        """Return the mean of `values` over its rows in every resample.

        Args:
            values: Numbers; NaN is left out.
            groups: The group of each row, of those that the resamples were made of.

        Returns:
            (1 + R,): first that of the sample itself. NaN where a resample has no value.
        """
        numbers = values.to_numpy(dtype=float)
        places = self._index.get_indexer(pd.Index(groups))
        kept = ~np.isnan(numbers) & (places >= 0)
        sums = np.bincount(places[kept], weights=numbers[kept], minlength=self.size)  # (Q,)
        counts = np.bincount(places[kept], minlength=self.size)  # (Q,)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return (self._weights @ sums) / (self._weights @ counts)


@lru_cache(maxsize=2)
def _weights(size: int, n_resamples: int, seed: int) -> np.ndarray:
    """Return how often each of `size` groups is drawn, (1 + R, Q): a dozen rules draw the same prompts."""
    itself = np.ones((1, size))
    if size < 2:
        return itself
    drawn = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=n_resamples)
    return np.vstack([itself, drawn])


def agreement(decisions: np.ndarray) -> float | None:
    """Return the share of the resamples that decide as the sample does.

    Args:
        decisions: (1 + R,), first that of the sample itself; or (1,), where nothing is resampled.

    Returns:
        The share, in [0, 1]; None where nothing is resampled.
    """
    return float((decisions[1:] == decisions[0]).mean()) if len(decisions) > 1 else None
