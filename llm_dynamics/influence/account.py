"""The account of a step: the shares of every cause in the measured change of every probe token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from llm_dynamics.kernel.derivatives import ResponseLogps
from llm_dynamics.kernel.weights import Weights, precise

_HALF_GAUSS = 1 / (2 * math.sqrt(3))
RULES: Mapping[str, tuple[tuple[float, float], ...]] = MappingProxyType(
    {
        "start": ((0.0, 1.0),),
        "midpoint": ((0.5, 1.0),),
        "gauss2": ((0.5 - _HALF_GAUSS, 0.5), (0.5 + _HALF_GAUSS, 0.5)),
    }
)
"""Quadrature rules: (node t, weight) on [0, 1]; their remainders are O(lr^2), O(lr^3) and O(lr^5)."""

_DOT_BLOCK = 2**15


@dataclass(frozen=True)
class StepAccount:
    """What moved G quantities in a step: log-probs of N probe tokens, or weighted sums of them.

    Attributes:
        shares: Each cause's part of the change by cause, nats, (G,), float64.
        measured: The change as measured: value after minus value before, (G,), float64.
    """

    shares: Mapping[str, Tensor]
    measured: Tensor

    @property
    def accounted(self) -> Tensor:
        """Sum of the shares, (G,)."""
        return sum(self.shares.values(), torch.zeros_like(self.measured))

    @property
    def remainder(self) -> Tensor:
        """Measured minus accounted, (G,): what the quadrature misses, and rounding of the forward passes."""
        return self.measured - self.accounted

    @property
    def explained(self) -> float:
        """1 - |remainder|^2 / |measured|^2; NaN where nothing changed."""
        return explained_share(self.measured, self.accounted)


def explained_share(measured: Tensor, accounted: Tensor) -> float:
    """Return 1 - |measured - accounted|^2 / |measured|^2.

    Args:
        measured: Changes, (N,).
        accounted: What is said of them, (N,).

    Returns:
        At most 1; NaN where changes are not finite, or nothing changed: there is no share of nothing.
    """
    missed, whole = (measured - accounted).double().square().sum(), measured.double().square().sum()
    return float(1 - missed / whole) if whole != 0 else math.nan


def account_for_change(
    logps: ResponseLogps,
    before: Weights,
    after: Weights,
    parts: Mapping[str, Weights],
    *,
    rule: str = "midpoint",
    groups: Tensor | None = None,
    measured: Tensor | None = None,
) -> StepAccount:
    """Account for the change of probe log-probs between two weights, cause by cause.

    With delta = theta_after - theta_before = sum_k u_k, the share of cause k in the change of log pi_m is the integral
    over the straight path between the weights,

        share_k,m = int_0^1 <d log pi_m(theta_before + t delta)/d theta, u_k> dt,

    which is linear in u_k, so that the shares add up to the measured change exactly (completeness, as of integrated
    gradients); here by a quadrature rule, one directional derivative per node and cause (forward mode), or, given
    groups, one gradient per node and group, dotted with every part (reverse mode).

    Args:
        logps: The probe responses, N tokens.
        before: theta before the step, by name, of the trained parameters.
        after: theta after the step, same names.
        parts: u_k by cause and name, as `split_update(...).parts`; they should add up to after - before.
        rule: "start" (the classical first-order account, remainder O(lr^2)), "midpoint" (O(lr^3), the same cost) or
            "gauss2" (O(lr^5), twice the cost).
        groups: Weights of G sums over tokens, (G, N): the account is then of these sums, and its cost grows with G
            rather than with the number of causes. None: every token, G = N.
        measured: The change of every token, (N,), where it is known already (`measured_change`).

    Returns:
        Shares and measured change, nats.

    Raises:
        ValueError: For a rule that is not known, or groups of the wrong shape.
    """
    _check_rule(rule)
    if measured is None:
        measured = measured_change(logps, before, after)
    if groups is None:
        shares = {cause: torch.zeros_like(measured) for cause in parts}
        for at_node, weight in path_nodes(before, after, rule):
            for cause, part in parts.items():
                shares[cause] += weight * logps.jvp(at_node, part)[1].double()
        return StepAccount(shares, measured)
    if groups.dim() != 2 or groups.shape[1] != logps.n_tokens:
        raise ValueError(f"groups must be (G, N) with N = {logps.n_tokens} probe tokens; seen {tuple(groups.shape)}")
    shares = {cause: torch.zeros(len(groups), dtype=torch.float64) for cause in parts}
    for at_node, weight in path_nodes(before, after, rule):
        for g, token_weights in enumerate(groups):
            if not token_weights.any():
                continue
            products = inner_products(logps.gradient(at_node, token_weights), parts)
            for cause, product in products.items():
                shares[cause][g] += weight * product
    return StepAccount(shares, groups.double() @ measured)


def measured_change(logps: ResponseLogps, before: Weights, after: Weights) -> Tensor:
    """Return log pi_m(theta_after) - log pi_m(theta_before), nats, (N,), float64: two forwards."""
    return logps.values(after).double() - logps.values(before).double()


def accounted_change(logps: ResponseLogps, before: Weights, after: Weights, *, rule: str = "midpoint") -> Tensor:
    """Return the change that the path's derivative accounts for, all causes together, (N,), float64, nats.

    One directional derivative along after - before per node: what `account_for_change` sums to, token by token, at the
    cost of a single cause.

    Args:
        logps: The probe responses.
        before: theta before the step.
        after: theta after the step.
        rule: As for `account_for_change`.

    Returns:
        The change by token.
    """
    delta = {name: precise(after[name].detach()) - precise(before[name].detach()) for name in before}
    total = torch.zeros(logps.n_tokens, dtype=torch.float64)
    for at_node, weight in path_nodes(before, after, rule):
        total += weight * logps.jvp(at_node, delta)[1].double()
    return total


def path_gradient(
    logps: ResponseLogps, before: Weights, after: Weights, token_weights: Tensor, *, rule: str = "midpoint"
) -> dict[str, Tensor]:
    """Return int_0^1 d/d theta of sum_m w_m log pi_m(theta_before + t delta) dt, by the rule's nodes.

    Args:
        logps: The probe responses.
        before: theta before the step.
        after: theta after the step.
        token_weights: w, (N,).
        rule: As for `account_for_change`.

    Returns:
        The averaged gradient by name: its product with a part of the update is that part's share.
    """
    total: dict[str, Tensor] = {}
    for at_node, weight in path_nodes(before, after, rule):
        gradient = logps.gradient(at_node, token_weights)
        for name, value in gradient.items():
            total[name] = total[name].add_(value, alpha=weight) if name in total else value.mul_(weight)
    return total


def inner_products(gradient: Weights, parts: Mapping[str, Weights]) -> dict[str, float]:
    """Return <gradient, u_k> for every part, products summed in float64 over blocks."""
    totals = dict.fromkeys(parts, 0.0)
    for name, value in gradient.items():
        ours = value.reshape(-1)
        for cause, part in parts.items():
            if name in part:
                totals[cause] += _dot(ours, part[name].to(ours).reshape(-1))
    return totals


def _dot(x: Tensor, y: Tensor) -> float:
    whole = len(x) // _DOT_BLOCK * _DOT_BLOCK
    blocks = torch.linalg.vecdot(x[:whole].view(-1, _DOT_BLOCK), y[:whole].view(-1, _DOT_BLOCK))
    return float(blocks.double().sum()) + float(x[whole:].double() @ y[whole:].double())


def path_nodes(before: Weights, after: Weights, rule: str) -> Iterator[tuple[dict[str, Tensor], float]]:
    """Yield the weights at each node of a rule on the straight path from `before` to `after`, and the node's weight.

    Raises:
        ValueError: For a rule that is not known.
    """
    _check_rule(rule)
    for t, weight in RULES[rule]:
        yield _between(before, after, t), weight


def _check_rule(rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; allowed: {', '.join(RULES)}")


def _between(before: Weights, after: Weights, t: float) -> dict[str, Tensor]:
    """Return the weights at t on the straight path from before (0) to after (1)."""
    if t == 0.0:
        return {name: precise(value.detach()) for name, value in before.items()}
    return {name: torch.lerp(precise(before[name].detach()), precise(after[name].detach()), t) for name in before}
