"""Mean and percentiles by group, of millions of numbers at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PER_GROUP = 50
"""Groups that are larger than this on average are sorted one by one."""


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
    first = np.cumsum(n) - n
    ranked = _ranked(codes, values, first, n)
    low, high = (_at_rank(ranked, first, n, percent / 100) for percent in interval)
    return GroupStats(mean, low, high, n, n_all - n)


def _ranked(codes: np.ndarray, values: np.ndarray, first: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return the values group by group, ascending within each; those of group g begin at `first[g]` (N,)."""
    # numpy sorts integers of 16 bits or fewer in linear time, and values faster than places
    small = codes.astype(np.uint16 if len(n) <= 2**16 else np.int64)
    if len(n) * PER_GROUP <= len(values):
        ranked = values[np.argsort(small, kind="stable")]
        for start, length in zip(first, n, strict=True):
            ranked[start : start + length].sort()
        return ranked
    by_value = np.argsort(values)
    return values[by_value[np.argsort(small[by_value], kind="stable")]]


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
