"""What one step of an optimizer does, as a linear map of gradient, moment and weight, read off its state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Factor = Tensor | float
"""A factor of every element (Tensor, of the parameter's shape) or of all of them."""


@dataclass(frozen=True)
class LinearStep:
    """One parameter's step: delta = gradient * g + moment * m_before + decay * theta_before, element-wise.

    With the second moment of the *finished* step inside the factors, the step of every optimizer here is linear in the
    gradient g (after clipping), the first moment before the step and the weight before the step.

    Attributes:
        gradient: Factor of g.
        moment: Factor of the first moment (momentum buffer) before the step; 0 where there is none.
        decay: Factor of theta.
        carry: The moment after the step is `carry * m_before + intake * g` + (weight decay that enters it).
        intake: See `carry`.
    """

    gradient: Factor
    moment: Factor
    decay: Factor
    carry: float
    intake: Factor


@dataclass(frozen=True)
class OptimizerRule:
    """How to read an optimizer.

    Attributes:
        moment: Name of the first moment in the optimizer's state of a parameter.
        step: From the parameter's group, its state after the step, and whether it had a moment before.
    """

    moment: str
    step: Callable[[Mapping[str, Any], Mapping[str, Any], bool], LinearStep]


def rule_for(optimizer: torch.optim.Optimizer) -> OptimizerRule | None:
    """Return how to read `optimizer`; None for one that is not known.

    Known are torch's SGD, Adam, AdamW and RMSprop with all their options, in their plain, foreach, fused and capturable
    implementations. A subclass may do anything in its step, so it is not known.

    Args:
        optimizer: The optimizer itself, out of accelerate's wrapper.

    Returns:
        The rule or None.
    """
    return _RULES.get(type(optimizer))


def _sgd(group: Mapping[str, Any], state: Mapping[str, Any], had_moment: bool) -> LinearStep:
    """torch.optim.SGD: d = g + wd theta; b = mu b + (1 - damp) d, b = d at first; theta -= lr (d + mu b, or b)."""
    lr, mu, sign = _number(group["lr"]), group["momentum"], _sign(group)
    wd = group["weight_decay"]
    if mu == 0:
        return LinearStep(-lr * sign, 0.0, -lr * wd, 0.0, 0.0)
    intake = 1.0 - group["dampening"] if had_moment else 1.0
    if group["nesterov"]:
        gradient, moment = -lr * (1 + mu * intake), -lr * mu * mu
    else:
        gradient, moment = -lr * intake, -lr * mu
    return LinearStep(gradient * sign, moment, gradient * wd, mu, intake * sign)


def _adam(group: Mapping[str, Any], state: Mapping[str, Any], had_moment: bool) -> LinearStep:
    """torch.optim.Adam and AdamW: theta -= lr (m / b1) / (sqrt(v / b2) + eps), v after the step (or its maximum)."""
    lr, wd, sign = _number(group["lr"]), group["weight_decay"], _sign(group)
    beta1, beta2 = (_number(beta) for beta in group["betas"])
    t = _number(state["step"])
    second = _wide(state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"])
    scale = -lr / (1 - beta1**t) / (second.sqrt().div_((1 - beta2**t) ** 0.5).add_(group["eps"]))
    scale = scale.masked_fill_(second == 0, 0.0)  # never a gradient: no token moved the weight, though 1/eps is huge
    gradient = scale * (1 - beta1)
    decoupled = group.get("decoupled_weight_decay", False)
    decay = (-lr * wd if decoupled else gradient * wd) if wd else 0.0
    return LinearStep(gradient * sign, scale * beta1, decay, beta1, (1 - beta1) * sign)


def _rmsprop(group: Mapping[str, Any], state: Mapping[str, Any], had_moment: bool) -> LinearStep:
    """torch.optim.RMSprop: b = mu b + g / (sqrt(v [- mean^2]) + eps); theta -= lr b."""
    lr, wd, mu, sign = _number(group["lr"]), group["weight_decay"], group["momentum"], _sign(group)
    second = _wide(state["square_avg"])
    if group["centered"]:
        mean = _wide(state["grad_avg"])
        second = second - mean * mean
    scale = (1.0 / second.sqrt().add_(group["eps"])).masked_fill_(state["square_avg"] == 0, 0.0)  # as for Adam
    gradient = -lr * scale
    return LinearStep(gradient * sign, -lr * mu, gradient * wd if wd else 0.0, mu, scale * sign)


_RULES = {
    torch.optim.SGD: OptimizerRule("momentum_buffer", _sgd),
    torch.optim.Adam: OptimizerRule("exp_avg", _adam),
    torch.optim.AdamW: OptimizerRule("exp_avg", _adam),
    torch.optim.RMSprop: OptimizerRule("momentum_buffer", _rmsprop),
}


def _sign(group: Mapping[str, Any]) -> float:
    return -1.0 if group.get("maximize", False) else 1.0


def _number(value: Any) -> float:
    return float(value)  # learning rate and step may be tensors


def _wide(tensor: Tensor) -> Tensor:
    """Return a copy in float32 at least."""
    return tensor.detach().to(torch.float64 if tensor.dtype == torch.float64 else torch.float32, copy=True)
