"""Where the probability mass goes: the exact statistics of one negative gradient step on a label.

A step that pushes label y down with strength e moves the logits of its context by `z' = z + e (p - 1_y)`, where
`p = softmax(z)` [LD, Sec. 3.3 and App. E]. Then, with `tau = (1/e) log sum_j p_j exp(e (p_j - 1[j=y]))`,

    p_i' / p_i = exp(e (p_i - 1[i=y] - tau)),      so i != y rises  <=>  p_i > tau,
    e -> 0:     d log p_i / d e = p_i - 1[i=y] - tau0,      tau0 = sum_j p_j^2 - p_y.

The label always falls, and y*, the most likely other token, always rises. [LD] is Ren & Sutherland, *Learning
Dynamics of LLM Finetuning*, ICLR 2025 (arXiv 2407.10490).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SqueezingStats:
    """Squeezing statistics of N contexts; every field is (N,), in the dtype of the log-probs.

    Attributes:
        p_label: p(y), probability of the label (y-, where the label is a rejected token).
        other_id: y*, the most likely token other than the label, int64; the lowest id where several tie.
        p_other: p(y*).
        log1m_p_other: log(1 - p(y*)), nats, computed as the log of the sum of all other probabilities: it stays
            finite where p(y*) rounds to one.
        collision: sum_v p_v^2, the chance that two draws agree.
        tau0: Riser threshold for e -> 0; negative where every other token rises.
        tau: Riser threshold at strength e.
        riser_count: Number of tokens with p_i > tau, the label excluded, int64.
        riser_mass: Their probability mass before the step.
        moved_to_other: p'(y*) - p(y*), probability that the step adds to y*; positive.
    """

    p_label: Tensor
    other_id: Tensor
    p_other: Tensor
    log1m_p_other: Tensor
    collision: Tensor
    tau0: Tensor
    tau: Tensor
    riser_count: Tensor
    riser_mass: Tensor
    moved_to_other: Tensor


def squeezing_stats(logp: Tensor, labels: Tensor, *, strength: float = 1.0) -> SqueezingStats:
    """Compute the squeezing statistics of a negative step on `labels`, by the formulas of this module.

    Args:
        logp: Log-probabilities (N, V) of N contexts, nats, float32 or float64; -inf is allowed (probability zero).
        labels: Token y of each context, (N,), int64.
        strength: e > 0, the step's size in logits.

    Returns:
        The statistics. A context whose log-probs hold a NaN has NaN statistics (and -1 as `other_id`).

    Raises:
        ValueError: Where shapes do not fit or `strength` is not positive.
    """
    if logp.ndim != 2 or labels.shape != logp.shape[:1]:
        raise ValueError(f"logp must be (N, V) and labels (N,); seen {tuple(logp.shape)} and {tuple(labels.shape)}")
    if not strength > 0:
        raise ValueError(f"strength is {strength}; a negative step has strength > 0")
    column = labels[:, None]
    p = logp.exp()
    p_label = p.gather(1, column)[:, 0]
    collision = torch.linalg.vecdot(p, p)

    others = logp.scatter(1, column, -torch.inf)  # the label can be neither y* nor a riser
    other_id = others.argmax(dim=1)
    star = other_id[:, None]
    p_other = p.gather(1, star)[:, 0]
    log1m_p_other = others.scatter_(1, star, -torch.inf).logsumexp(dim=1).logaddexp(logp.gather(1, column)[:, 0])

    # p(y*) - tau = -log(1 + sum_{j != y*} p_j (exp(e (p_j - 1[j=y] - p(y*))) - 1)) / e: both may round to one, their
    # difference must not; no exponent is positive, so that a large e is harmless
    p = p.scatter_(1, column, 0.0)
    growth = torch.linalg.vecdot(p, (strength * (p - p_other[:, None])).expm1_())
    growth += p_label * (strength * (p_label - 1 - p_other)).expm1()
    above = -growth.log1p() / strength
    tau = p_other - above

    rises = (p.scatter(1, star, 0.0) > tau[:, None].clamp(min=0)).to(p.dtype)  # p_i = 0 stays 0 whatever tau
    riser_count = 1 + rises.sum(dim=1).long()  # y* always rises
    riser_mass = p_other + torch.linalg.vecdot(p, rises)

    broken = collision.isnan()
    nan = torch.full_like(collision, torch.nan)
    return SqueezingStats(
        p_label=p_label,
        other_id=other_id.masked_fill(broken, -1),
        p_other=torch.where(broken, nan, p_other),
        log1m_p_other=torch.where(broken, nan, log1m_p_other),
        collision=collision,
        tau0=collision - p_label,
        tau=tau,
        riser_count=riser_count.masked_fill(broken, -1),
        riser_mass=torch.where(broken, nan, riser_mass),
        moved_to_other=p_other * (strength * above).expm1(),
    )
