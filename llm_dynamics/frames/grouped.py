"""Mean and percentiles by group, of millions of numbers at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroupStats:
    """Statistics of G groups; NaN where a group has no finite value.

    Attributes:
        mean: Means, float64 (G,).
        low: Lower percentiles, float64 (G,).
        high: Upper percentiles, float64 (G,).
        n: Finite values (G,).
        n_nonfinite: Values that are NaN or infinite (G,).
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray
    n_nonfinite: np.ndarray


def group_stats(codes: np.ndarray, values: np.ndarray, size: int, interval: tuple[float, float]) -> GroupStats:
    """Return mean and percentiles of `values` within each group.

    Sums are taken in float64 whatever the type of the values; percentiles are interpolated linearly between the two
    neighbouring values, as numpy and pandas do.

    Args:
        codes: The group of each value, 0 <= code < size (N,).
        values: Floating-point numbers (N,).
        size: G, the number of groups.
        interval: Two percentiles, in percent.

    Returns:
        The statistics.
    """
    finite = np.isfinite(values)
    n_all = np.bincount(codes, minlength=size)
    if not finite.all():
        codes, values = codes[finite], values[finite]
    n = np.bincount(codes, minlength=size)
    sums = np.bincount(codes, weights=values, minlength=size)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums / n
    by_value = np.argsort(values)
    # numpy sorts integers of 16 bits or fewer in linear time
    small = codes.astype(np.uint16 if size <= 2**16 else np.int64)[by_value]
    ranked = values[by_value[np.argsort(small, kind="stable")]]  # by group, ascending within each
    first = np.cumsum(n) - n
    low, high = (_at_rank(ranked, first, n, percent / 100) for percent in interval)
    return GroupStats(mean, low, high, n, n_all - n)


def _at_rank(ranked: np.ndarray, first: np.ndarray, n: np.ndarray, share: float) -> np.ndarray:
    out = np.full(len(n), np.nan)
    filled = n > 0
    place = share * (n[filled] - 1)
    below = np.floor(place).astype(np.int64)
    above = np.minimum(below + 1, n[filled] - 1)
    left = ranked[first[filled] + below].astype(np.float64)
    right = ranked[first[filled] + above].astype(np.float64)
    out[filled] = left + (right - left) * (place - below)
    return out
