"""Split what an optimizer step did to the weights into additive causes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from llm_dynamics.influence.optimizers import Factor, LinearStep, OptimizerRule, rule_for
from llm_dynamics.kernel.weights import Weights

MOMENTUM, OTHER, DECAY, ROUNDING, STEP = "momentum", "other", "decay", "rounding", "step"
PRECISION = "precision"
"""Causes that are not labels of tokens; `step` is the whole update of an optimizer that is not known, `precision` what
training in a lower precision makes of the labels' parts beyond their tokens' shares."""

_SURELY_NOT_ROUNDING = 10
"""Times the precision of a weight's format; rounding of weights and of the optimizer's arithmetic stays within 3."""

_CAUSES = (MOMENTUM, OTHER, DECAY, ROUNDING, STEP, PRECISION, "remainder")


@dataclass(frozen=True)
class BeforeStep:
    """What a step is about to overwrite, by parameter name.

    Attributes:
        weights: theta before the step.
        moments: The first moment before the step, of parameters that have one.
        gradients: The gradient, where the step may overwrite it: torch's foreach SGD with Nesterov momentum does.
        moved: Whether the weights had changed already when the optimizer was about to step, as by hooks that step
            inside backward.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    moved: bool = False

    @classmethod
    def of(
        cls, optimizer: Any, parameters: Mapping[str, nn.Parameter], begun_at: dict[str, Tensor] | None = None
    ) -> BeforeStep:
        """Copy what the step of `optimizer` will overwrite.

        Args:
            optimizer: Accelerate's wrapper or torch's own.
            parameters: The trained parameters by name.
            begun_at: Copies of them from when the step began, before its forward; None: taken now.
        """
        inner = innermost(optimizer)
        rule = rule_for(inner)
        overwritten = {id(p) for group in inner.param_groups if group.get("nesterov", False) for p in group["params"]}
        moments, gradients = {}, {}
        for name, parameter in parameters.items():
            moment = inner.state.get(parameter, {}).get(rule.moment) if rule is not None else None
            if moment is not None:
                moments[name] = moment.detach().clone()
            if parameter.grad is not None and id(parameter) in overwritten:
                gradients[name] = parameter.grad.detach().clone()
        weights = copied(parameters) if begun_at is None else begun_at
        moved = begun_at is not None and not all(torch.equal(p, weights[name]) for name, p in parameters.items())
        return cls(weights, moments, gradients, moved)


@dataclass(frozen=True)
class UpdateSplit:
    """The additive parts of one parameter update.

    Attributes:
        parts: Change of the weights by cause and parameter name, float32 at least; the parts add up to
            theta_after - theta_before. A cause that does not occur (no weight decay, no momentum yet) is missing.
        per_gradient: What one unit of gradient, before clipping, did to each weight: a token's gradient contribution
            times this is its part of the update. Empty where the optimizer is not known.
        note: What a reader should know, such as an optimizer that is not known; else None.
    """

    parts: dict[str, dict[str, Tensor]]
    per_gradient: dict[str, Factor]
    note: str | None = None


@dataclass
class MomentHistory:
    """The first moment, split by the labels of the tokens that filled it: m_k <- carry m_k + intake s g_k.

    Attributes:
        by_label: The moment's part by label and parameter name.
    """

    by_label: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def split_update(
    optimizer: Any,
    parameters: Mapping[str, nn.Parameter],
    before: BeforeStep,
    gradients: Mapping[str, Weights],
    *,
    clip_factor: float = 1.0,
    history: MomentHistory | None = None,
) -> UpdateSplit:
    """Split the step that `optimizer` just took into causes that add up to it.

    For AdamW with D = 1 / (sqrt(v / b2) + eps), v after the step, and clip factor s:

        theta_after - theta_before = - lr beta1 m_before D / b1        momentum
                                     - lr (1 - beta1) s g_k D / b1     one part per label k (up, down)
                                     - lr (1 - beta1) g_rest D / b1    other: g_rest = grad - s sum_k g_k
                                     - lr wd theta_before              decay
                                     + what the stored weights round   rounding

    and likewise for SGD, Adam and RMSprop (`optimizers.rule_for`). With an optimizer that is not known, or where not
    it alone moved the weights (`BeforeStep.moved`), the measured change is one part, `step`, and a note says so.

    Args:
        optimizer: After its step; its state and the (clipped) `.grad` of the parameters as the step left them.
        parameters: The trained parameters by name.
        before: `BeforeStep.of` taken before the step.
        gradients: Parts of the gradient before clipping, by label and parameter name, as `LossTape.parts` has them,
            averaged over processes as `.grad` is.
        clip_factor: s, what clipping multiplied the gradient with.
        history: Splits `momentum` into `momentum_<label>`; brought up to date with this step. It knows only the steps
            it was given: all of them since training began, or the rest stays `momentum`.

    Returns:
        The split. To save memory, `gradients` is overwritten: its tensors become the labels' parts.

    Raises:
        ValueError: For a label with the name of another cause.
    """
    if taken := [label for label in gradients if label in _CAUSES or label.startswith(f"{MOMENTUM}_")]:
        raise ValueError(f"labels of tokens are named like other causes of an update: {taken}; rename them")
    inner = innermost(optimizer)
    rule = rule_for(inner)
    groups = {id(p): group for group in inner.param_groups for p in group["params"]}
    parts: dict[str, dict[str, Tensor]] = {}
    per_gradient: dict[str, Factor] = {}
    changed_by_others: list[str] = []
    without_state = False
    for name, parameter in parameters.items():
        stepped = parameter.grad is not None and id(parameter) in groups
        if not stepped and torch.equal(parameter, before.weights[name]):
            continue
        change = _wide(parameter) - _wide(before.weights[name])
        moment, step = before.moments.get(name), None
        if rule is not None and stepped and not before.moved:
            step = _linear_step(rule, groups[id(parameter)], inner.state[parameter], moment is not None)
            without_state |= step is None
        if step is None:
            parts.setdefault(STEP, {})[name] = change
            continue
        assert parameter.grad is not None
        per_gradient[name] = step.gradient * clip_factor
        clipped = {
            label: _wide(by_name[name]).mul_(clip_factor) for label, by_name in gradients.items() if name in by_name
        }
        gradient = before.gradients.get(name, parameter.grad)
        mine = _other_parts(step, gradient, before.weights[name], moment, clipped, history, name)
        if history is not None:
            _carry(history, step, clipped, name)
        mine |= {label: gradient.mul_(step.gradient) for label, gradient in clipped.items()}
        for cause, part in mine.items():
            parts.setdefault(cause, {})[name] = part
            change -= part
        parts.setdefault(ROUNDING, {})[name] = change
        if _is_more_than_rounding(change, parameter, mine):
            changed_by_others.append(name)
    note = None
    if changed_by_others:
        note = (
            f"{ROUNDING} is more than rounding in {len(changed_by_others)} parameters, such as "
            f"{changed_by_others[0]}: not {type(inner).__name__} alone changed them (a hook, or another callback?)"
        )
    if rule is None:
        note = f"{type(inner).__name__} is not known: its whole update is one cause, `{STEP}`"
    elif before.moved:
        note = (
            "the weights changed before the optimizer's step: hooks that step inside backward, or another callback. "
            f"The whole change is one cause, `{STEP}`"
        )
    elif without_state:
        note = f"{type(inner).__name__} took no step of its own: what changed is one cause, `{STEP}`"
    elif parts.get(STEP):
        note = f"parameters without a gradient changed, such as {next(iter(parts[STEP]))}: see the cause `{STEP}`"
    return UpdateSplit(parts, per_gradient, note)


def copied(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return copies of parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def checksum(parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """Return one sum per parameter over its bits as whole numbers: another value of one element changes it."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [
        parameter.detach().view(whole[parameter.element_size()]).sum(dtype=torch.int64)
        for parameter in parameters.values()
    ]


def _linear_step(
    rule: OptimizerRule, group: Mapping[str, Any], state: Mapping[str, Any], had_moment: bool
) -> LinearStep | None:
    """Return one parameter's step; None where its state shows that the optimizer never took one."""
    try:
        return rule.step(group, state, had_moment)
    except KeyError:
        return None


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside accelerate's wrappers."""
    while isinstance(optimizer, AcceleratedOptimizer):  # any other wrapper may do more than what it wraps
        optimizer = optimizer.optimizer
    inner: torch.optim.Optimizer = optimizer
    return inner


def _other_parts(
    step: LinearStep,
    gradient: Tensor,
    weight: Tensor,
    moment: Tensor | None,
    clipped: Mapping[str, Tensor],
    history: MomentHistory | None,
    name: str,
) -> dict[str, Tensor]:
    """Return one parameter's parts by cause: all but the labels' and rounding."""
    rest = _wide(gradient).clone()
    for part in clipped.values():
        rest -= part
    parts = {OTHER: rest.mul_(step.gradient)}
    if moment is not None:
        left = _wide(moment).clone()
        for label, by_name in (history.by_label if history is not None else {}).items():
            if name in by_name:
                parts[f"{MOMENTUM}_{label}"] = by_name[name] * step.moment
                left -= by_name[name]
        parts[MOMENTUM] = left.mul_(step.moment)
    if not isinstance(step.decay, float) or step.decay != 0:
        parts[DECAY] = _wide(weight) * step.decay
    return parts


def _is_more_than_rounding(change: Tensor, parameter: Tensor, parts: Mapping[str, Tensor]) -> bool:
    """Tell whether what is left of a parameter's change is out of proportion to its format, by norms."""
    size = float(_wide(parameter).norm()) + sum(float(part.norm()) for part in parts.values())
    return float(change.norm()) > _SURELY_NOT_ROUNDING * torch.finfo(parameter.dtype).eps * size


def _carry(history: MomentHistory, step: LinearStep, clipped: Mapping[str, Tensor], name: str) -> None:
    for label in dict.fromkeys([*history.by_label, *clipped]):  # in one order in every process: sums depend on it
        by_name = history.by_label.setdefault(label, {})
        carried = by_name[name] * step.carry if name in by_name else None
        added = clipped[label] * step.intake if label in clipped else None
        both = [term for term in (carried, added) if term is not None]
        if both:
            by_name[name] = both[0] + both[1] if len(both) == 2 else both[0]


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least; the same one where it is."""
    tensor = tensor.detach()
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
