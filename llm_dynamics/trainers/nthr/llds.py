"""The LLDS penalty: likelihood of responses worth keeping must not fall between rollout and now."""

from __future__ import annotations

import torch
from torch import Tensor


def llds_penalty(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Compute the penalty of [LLDS] (arXiv 2512.04220), without its factor lambda.

        1/B sum over i with A_i >= 0 of 1/|y_i| 1[sum_k D_ik > 0] sum_k max(0, D_ik),   D = log pi_old - log pi

    It is zero, and so is its gradient, while the weights are those of the rollout.

    Args:
        logps: log pi of each token, (B, T), with gradient, nats.
        old_logps: The same at rollout, (B, T).
        advantages: A, (B,) or (B, T) (then a response counts where none of its tokens' advantages is negative).
        mask: Which tokens count, (B, T).

    Returns:
        A scalar, nats per token.
    """
    mask = mask.bool()
    fall = torch.where(mask, old_logps.detach() - logps, 0.0)  # of padding not even infinities are seen
    kept = advantages >= 0 if advantages.ndim == 1 else ((advantages >= 0) | ~mask).all(dim=1)
    counts = kept & (fall.detach().sum(dim=1) > 0)
    per_response = fall.clamp(min=0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return torch.where(counts, per_response, torch.zeros_like(per_response)).mean()
