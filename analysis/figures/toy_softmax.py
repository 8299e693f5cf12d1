"""The softmax of the squeezing toys: a negative step on one token, taken as it is, and the settings it is taken from.

z' = z + e (p - 1_y): one step of gradient *ascent* on the cross-entropy of label y in multi-class logistic regression
with logits z = W phi, where e = eta ||phi||^2 [LD, App. E]. [LD] is Ren & Sutherland, *Learning Dynamics of LLM
Finetuning*, ICLR 2025 (arXiv 2407.10490).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

V = 50
TEMPERATURES = {"flat": 20.0, "mild": 2.0, "peaky": 0.8}
"""Of one seeded draw of logits, over which the tokens other than y are spread."""


@dataclass(frozen=True)
class Setting:
    """A context before the step: log-probs (V,), float64, and the label that is pushed down."""

    logp: Tensor
    label: int


def rest(seed: int, temperature: float) -> Tensor:
    """Return q, the distribution over the V - 1 other tokens, most likely first, (V - 1,)."""
    logits = 2 * torch.randn(V - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (logits / temperature).softmax(0).sort(descending=True).values


def with_label(q: Tensor, p_label: float) -> Setting:
    """Return a context whose token 0 is the label with probability `p_label`, the others in proportion to q."""
    p = torch.cat([q.new_tensor([p_label]), (1 - p_label) * q])
    return Setting(p.log(), 0)


def negative_step(logp: Tensor, label: int | Tensor, strength: float) -> Tensor:
    """Return log-probs after one negative step, (..., V): the definition, without any formula for its outcome."""
    onehot = torch.nn.functional.one_hot(torch.as_tensor(label), logp.shape[-1])
    return (logp + strength * (logp.exp() - onehot)).log_softmax(-1)


def repeated(setting: Setting, strength: float, steps: int, momentum: float = 0.0) -> Tensor:
    """Return log-probs before and after each of `steps` negative steps with heavy-ball momentum, (steps + 1, V)."""
    z, velocity = setting.logp, torch.zeros_like(setting.logp)
    onehot = torch.nn.functional.one_hot(torch.tensor(setting.label), len(z))
    path = [z]
    for _ in range(steps):
        velocity = momentum * velocity + strength * (z.softmax(0) - onehot)
        z = z + velocity
        path.append(z.log_softmax(0))
    return torch.stack(path)
