"""The tap where a model returns logits: coefficients of the label log-probs out of the gradient of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that carries no loss."""

_ROWS = 256
"""Rows of V logits that are worked on at a time."""


def coefficients_from_logits(logits: Tensor, gradient: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the label log-probs, and c_l of the nearest loss that sees only them.

    A loss of the label log-probs has dL/dz_l = c_l (e_y - pi_l). For any loss, c_l is the least-squares coefficient

        c_l = <dL/dz_l, e_y - pi_l> / |e_y - pi_l|^2

    and what the residual leaves over (label smoothing, an entropy bonus) is no part of it.

    Args:
        logits: z, (B, T, V).
        gradient: dL/dz, (B, T, V).
        labels: y at the position that predicts it, -100 where there is none, (B, S) with S = T or S = T - 1.

    Returns:
        log pi(y), nats, and c, each (B, S), float32 at least; 0 where there is no label.
    """
    shape = labels.shape
    flat = labels.reshape(-1)
    logps = logits.new_zeros(flat.shape, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
    c = torch.zeros_like(logps)
    rows, slopes = logits[:, : shape[1]].flatten(0, 1), gradient[:, : shape[1]].flatten(0, 1)
    for places in (flat != IGNORED).nonzero()[:, 0].split(_ROWS):
        ids = flat[places]
        z = rows[places].to(logps.dtype)
        residual = residual_of(z, ids)
        logps[places] = z.gather(1, ids[:, None])[:, 0] - z.logsumexp(dim=1)
        size = residual.square().sum(dim=1)
        along = (slopes[places].to(residual.dtype) * residual).sum(dim=1)
        c[places] = torch.where(size > 0, along / size.clamp(min=torch.finfo(size.dtype).tiny), 0.0)
    return logps.view(shape), c.view(shape)


def gradient_of_logits(logits: Tensor, c: Tensor, labels: Tensor) -> Tensor:
    """Return d/dz of sum_l c_l log pi(y_l): c_l (e_y - pi_l), (B, T, V), in the dtype of the logits.

    Args:
        logits: z, (B, T, V).
        c: Coefficients (B, S), zero where there is no label.
        labels: y, (B, S).
    """
    result = torch.zeros_like(logits)
    for b in range(len(labels)):
        for places in (c[b] != 0).nonzero()[:, 0].split(_ROWS):
            residual = residual_of(logits[b, places], labels[b, places])
            result[b, places] = (residual * c[b, places, None].to(residual.dtype)).to(logits.dtype)
    return result


def residual_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return e_y - pi, (N, V), float32 at least, of logits (N, V) and labels (N,)."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    residual = -wide.softmax(dim=1)
    # 1 - pi_y as the sum of the others: exact where pi_y rounds to one
    others = residual.scatter(1, labels[:, None], 0.0).sum(dim=1)
    return residual.scatter(1, labels[:, None], -others[:, None])
