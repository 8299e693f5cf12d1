"""The LLDS penalty: likelihood of responses worth keeping must not fall between rollout and now."""

from __future__ import annotations

import torch
from torch import Tensor


def llds_penalty(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, kept_share: Tensor) -> Tensor:
    """Compute the penalty of [LLDS] (arXiv 2512.04220), without its factor lambda.

        1/|Y| sum over y in Y of 1/|y| sum over actions a of y of 1[sum_{k in a} D_k > 0] sum_{k in a} max(0, D_k)

    with D = log pi_old - log pi and Y the responses of the generation with A >= 0, the paper's Y_pre. An action is what
    the model wrote without a break: a whole response, or one turn of it where a tool answered in between. A batch that
    is a part of the generation gives its part of the sum, so that the mean over the parts is the penalty of the whole.
    It is zero, and so is its gradient, while the weights are those of the rollout.

    Args:
        logps: log pi of each token, (B, T), with gradient, nats.
        old_logps: The same at rollout, (B, T).
        advantages: A, (B,).
        mask: Which tokens count, (B, T).
        kept_share: |Y| / number of responses of the generation, a scalar or (B,).

    Returns:
        A scalar, nats per token of a kept response.
    """
    mask = mask.bool()
    fall = torch.where(mask, old_logps.detach() - logps, 0.0)  # of padding not even infinities are seen
    before = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
    action = (mask & ~before).long().cumsum(dim=1)  # (B, T), 0 before the first
    total = fall.new_zeros(len(mask), mask.shape[1] + 1).scatter_add(1, action, fall.detach())
    counts = (advantages >= 0)[:, None] & (total.gather(1, action) > 0)
    per_response = torch.where(counts, fall.clamp(min=0), 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    share = torch.where(advantages >= 0, kept_share, 1.0)  # where nothing is kept, nothing is divided by 0
    return (per_response / share).mean()
