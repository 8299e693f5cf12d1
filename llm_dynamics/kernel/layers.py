"""Gradients of rows by one parameter, in the form that is cheapest to keep, and inner products of two such sets.

The gradient of a row by a linear layer's weight is `sum_s g[r, s] a[s]^T` over positions s, with the layer's input a
and the gradient g by its output. Inner products follow without ever forming it (the "ghost" trick, math.md):

    T[m, l] = sum_{s, t} (a~_s . a_t) (g~[m, s] . g[l, t])

All products are taken in float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """R gradients by the weight of a linear layer, as factors.

    Attributes:
        a: Inputs of the layer at S positions, (S, d_in).
        g: Gradients of each row by its outputs, (R, S, d_out).
        nested: Whether the S positions are the first S of the sequence, so that a shorter prefix has a prefix of `a`.
    """

    a: Tensor
    g: Tensor
    nested: bool

    def dense(self) -> Dense:
        """Return the gradients themselves, (R, d_out, d_in)."""
        return Dense(torch.matmul(wide(self.g).transpose(1, 2), wide(self.a)))


@dataclass(frozen=True)
class Lookup:
    """R gradients by an embedding table, at the table's rows that were looked up.

    Attributes:
        ids: Distinct rows of the table, ascending, (n,), int64.
        g: Gradients by them, (R, n, d).
    """

    ids: Tensor
    g: Tensor


@dataclass(frozen=True)
class Dense:
    """R gradients as they are, (R, ...)."""

    rows: Tensor


Form = Factors | Lookup | Dense

PRODUCT_BYTES_ON_CPU = 12 * 2**20
"""Largest temporary of a product on a CPU, so that it stays in the last-level cache."""


def wide(x: Tensor) -> Tensor:
    """Return `x` in float32 at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def lookup(ids: Tensor, g: Tensor) -> Lookup:
    """Add up gradients (R, S, d) by the outputs of an embedding at positions with the same id (S,)."""
    distinct, place = torch.unique(ids, return_inverse=True)
    return Lookup(distinct, g.new_zeros(g.shape[0], len(distinct), g.shape[2]).index_add_(1, place, g))


def concatenate(parts: Sequence[Form]) -> Form:
    """Put rows of the same calls of the same layer side by side."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Dense):
        return Dense(torch.cat([part.rows for part in parts if isinstance(part, Dense)]))
    return replace(first, g=torch.cat([part.g for part in parts if not isinstance(part, Dense)]))


def gram(left: Form, rights: Sequence[Form]) -> Tensor:
    """Return the inner products of M gradients with the L of several sets, (M, L), by one parameter.

    Args:
        left: One set of gradients.
        rights: Others, all in one form; several prefixes of one sequence are cheaper together than one by one.

    Returns:
        The products, the sets of `rights` side by side.
    """
    first = rights[0]
    if isinstance(left, Factors) and isinstance(first, Factors):
        return _factors_with_factors(left, [right for right in rights if isinstance(right, Factors)])
    return torch.cat([_gram_of_two(left, right) for right in rights], dim=1)


def _gram_of_two(left: Form, right: Form) -> Tensor:
    if isinstance(left, Dense) and isinstance(right, Dense):
        return wide(left.rows).flatten(1) @ wide(right.rows).flatten(1).T
    if isinstance(left, Lookup) and isinstance(right, Lookup):
        shared = left.ids[torch.isin(left.ids, right.ids, assume_unique=True)]
        g_left = wide(left.g[:, torch.searchsorted(left.ids, shared)])
        g_right = wide(right.g[:, torch.searchsorted(right.ids, shared)])
        return g_left.flatten(1) @ g_right.flatten(1).T
    if isinstance(left, Factors) and isinstance(right, Dense):
        # what each weight gradient, taken as a change of the weight, does to the layer's outputs: (L, S, d_out)
        change = torch.matmul(wide(left.a), wide(right.rows).transpose(1, 2))
        return sum_over_positions(wide(left.g), change)
    if isinstance(left, Dense) and isinstance(right, Factors):
        return _gram_of_two(right, left).T
    raise TypeError(f"no rule for {type(left).__name__} with {type(right).__name__}")


def _factors_with_factors(left: Factors, rights: Sequence[Factors]) -> Tensor:
    m, s, d_out = left.g.shape
    longest = max(rights, key=lambda right: right.a.shape[0])
    at_left = sum(r.g.shape[0] * s * (r.g.shape[1] + m) for r in rights)
    at_right = m * s * longest.a.shape[0] + sum(m * r.g.shape[0] * r.g.shape[1] for r in rights)
    if at_left < at_right:  # multiply-adds per output of the layer
        return torch.cat([_factors_with_factors(right, [left]).T for right in rights], dim=1)
    at_once = m
    if left.g.device.type == "cpu":
        at_once = max(1, PRODUCT_BYTES_ON_CPU // max(1, longest.a.shape[0] * d_out * max(4, left.g.element_size())))
    blocks = [replace(left, g=g) for g in left.g.split(at_once)]
    if all(right.nested for right in rights):
        return torch.cat([_through(block, longest.a, rights) for block in blocks])
    return torch.cat([torch.cat([_through(b, right.a, [right]) for right in rights], dim=1) for b in blocks])


def _through(left: Factors, a: Tensor, rights: Sequence[Factors]) -> Tensor:
    """Multiply with several sets whose inputs are prefixes of `a`."""
    moved = _moved(left, a)
    return torch.cat([sum_over_positions(moved[:, : right.a.shape[0]], wide(right.g)) for right in rights], dim=1)


def _moved(left: Factors, a: Tensor) -> Tensor:
    """Return sum_s (a_left[s] . a[t]) g_left[m, s], (M, T, d_out): what `left` weighs with outputs at positions of `a`.

    This order of contraction costs M S T d_out; g~ . g at all pairs of positions first would cost L times as much.
    """
    between = wide(a) @ wide(left.a).T  # (T, S)
    return torch.bmm(between.expand(left.g.shape[0], -1, -1), wide(left.g))


def sum_over_positions(x: Tensor, y: Tensor) -> Tensor:
    """Return sum_s x[m, s] . y[l, s], (M, L), of (M, S, d) and (L, S, d)."""
    if x.is_contiguous() and y.is_contiguous():
        return x.flatten(1) @ y.flatten(1).T
    return torch.bmm(x.transpose(0, 1), y.permute(1, 2, 0)).sum(0)  # takes strided slices as they are
