"""The LM head in closed form: what rows of response tokens have to do with the head's weight, at one position each.

The gradient of log pi(y_l) by the logits is `g_l` (V,), by the head's weight `g_l h_l^T`, by the hidden state
`W^T g_l`. No (T, V) cotangent is ever pushed through a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from llm_dynamics.kernel.layers import Lookup, wide
from llm_dynamics.kernel.output_head import OutputHead
from llm_dynamics.kernel.residuals import EXACT_RULE


@dataclass(frozen=True)
class HeadRows:
    """N tokens of R rows as the head sees them.

    Attributes:
        hidden: h, (N, d).
        labels: y, (N,), int64.
        weights: Factor of each token in its row, (N,).
        row: The row of each token, (N,), int64, ascending.
        norm: log sum_v exp z_v, (N,).
        log1m_label: log(1 - pi(y)), (N,), exact also where pi(y) rounds to one.
    """

    hidden: Tensor
    labels: Tensor
    weights: Tensor
    row: Tensor
    norm: Tensor
    log1m_label: Tensor

    def of(self, rows: Sequence[int]) -> HeadRows:
        """Return the tokens of some rows, numbered from 0 in the order given."""
        places = [(self.row == row).nonzero()[:, 0] for row in rows]
        counts = torch.tensor([len(place) for place in places], device=self.row.device)
        row = torch.repeat_interleave(torch.arange(len(rows), device=self.row.device), counts)
        return replace(self.at(torch.cat(places)), row=row)

    def at(self, tokens: Tensor) -> HeadRows:
        """Return some of the tokens, their rows numbered as they were."""
        return HeadRows(**{name: value[tokens] for name, value in vars(self).items()})


def join(parts: Sequence[HeadRows], first_rows: Sequence[int]) -> HeadRows:
    """Put the tokens of several responses into one, their rows numbered from `first_rows`."""
    moved = [replace(part, row=part.row + first) for part, first in zip(parts, first_rows, strict=True)]
    return HeadRows(**{field.name: torch.cat([vars(part)[field.name] for part in moved]) for field in fields(HeadRows)})


def meet_head(
    head: OutputHead, hidden: Tensor, labels: Tensor, weights: Tensor, row: Tensor
) -> tuple[HeadRows, Tensor]:
    """Take N tokens through the head and back.

    Args:
        head: The head.
        hidden: h, (N, d).
        labels: y, (N,).
        weights: Factor of each token, (N,).
        row: Row of each token, (N,).

    Returns:
        The tokens, and the gradient of each token's weighted log-prob by its hidden state, (N, d), float32 at least.
    """
    blocks = head.blocks(len(hidden), EXACT_RULE)
    whole = head.logits(hidden, blocks[0]) if len(blocks) == 1 else None
    if whole is None:
        norms = head.normalisers(hidden, labels, EXACT_RULE)
    else:
        norms = head.normalisers_of([whole], labels, EXACT_RULE)
    rows = HeadRows(hidden, labels, weights, row, *norms)
    back = torch.zeros(hidden.shape, dtype=head.dtype, device=head.weight.device)
    for columns in blocks:
        back.addmm_(_residuals(head, rows, columns, whole), head.weight[columns].to(head.dtype))
    return rows, back * weights[:, None]


def head_gram(
    head: OutputHead, left: HeadRows, right: HeadRows, shape: tuple[int, int], *, weight: bool, bias: bool
) -> Tensor:
    """Return the head's own part of the kernel, (M, L): (g_m . g_l) (h_m . h_l) by its weight, g_m . g_l by its bias.

    Args:
        head: The head.
        left: Tokens of the M rows.
        right: Tokens of the L columns.
        shape: (M, L).
        weight: Whether the head's weight is among the parameters.
        bias: Whether its bias is.

    Returns:
        The part, float32 at least.
    """
    total = torch.zeros(shape, dtype=head.dtype, device=head.weight.device)
    at_once = head.width(len(right.hidden), EXACT_RULE, fewest=1)
    for some in torch.arange(len(left.hidden), device=left.hidden.device).split(at_once):
        part = left.at(some)
        products = torch.zeros(len(some), len(right.hidden), dtype=head.dtype, device=head.weight.device)
        for columns in head.blocks(max(len(some), len(right.hidden)), EXACT_RULE):
            products.addmm_(_residuals(head, part, columns), _residuals(head, right, columns).T)
        inputs = wide(part.hidden) @ wide(right.hidden).T if weight else torch.zeros_like(products)
        products *= (inputs + float(bias)) * part.weights[:, None] * right.weights
        by_column = products.new_zeros(len(some), shape[1]).index_add_(1, right.row, products)
        total.index_add_(0, part.row, by_column)
    return total


def tied_gram(head: OutputHead, rows: HeadRows, table: Lookup, count: int) -> Tensor:
    """Return inner products of gradients by one matrix in its two roles, (M, L): as head of M rows, as embedding of L.

    Only the vocabulary entries that the embedding looked up count: `sum_v (sum_n w_n g_n[v] h_n) . E[l, v]`.

    Args:
        head: The head, whose weight is the embedding table.
        rows: Tokens of the M rows.
        table: Gradients of L rows by the entries looked up.
        count: M.

    Returns:
        The products, float32 at least.
    """
    g = _residuals(head, rows, table.ids) * rows.weights[:, None]  # (N, n)
    hidden = wide(rows.hidden)
    if len(g) == count:
        by_weight = g[:, :, None] * hidden[:, None, :]  # (M, n, d)
    else:
        sizes = torch.bincount(rows.row, minlength=count).tolist()
        by_weight = torch.stack([a.T @ b for a, b in zip(g.split(sizes), hidden.split(sizes), strict=True)])
    return by_weight.flatten(1) @ wide(table.g).flatten(1).T


def _residuals(head: OutputHead, rows: HeadRows, columns: slice | Tensor, z: Tensor | None = None) -> Tensor:
    """Return the gradient of each token's log-prob by `W h + b` at some columns, (N, columns).

    `z` are the logits there where they are known; they are overwritten.
    """
    z = head.logits(rows.hidden, columns) if z is None else z
    return head.residuals_of(z, rows.labels, rows.norm, rows.log1m_label, columns, EXACT_RULE)
