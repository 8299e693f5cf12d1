"""Where the mass went in a step: the account of whole next-token distributions at chosen positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from llm_dynamics.influence.account import path_nodes
from llm_dynamics.kernel.derivatives import ResponseLogps
from llm_dynamics.kernel.weights import Weights


@dataclass(frozen=True)
class DistributionAccount:
    """What moved n next-token distributions over V tokens in a step.

    Attributes:
        logp_before: log pi(v) before the step, nats, (n, V), float64.
        measured: Change of log pi(v), nats, (n, V), float64.
        shares: Each cause's part of that change, by cause, (n, V), float64.
    """

    logp_before: Tensor
    measured: Tensor
    shares: Mapping[str, Tensor]

    @property
    def accounted(self) -> Tensor:
        """Sum of the shares, (n, V)."""
        return sum(self.shares.values(), torch.zeros_like(self.measured))

    @property
    def measured_mass(self) -> Tensor:
        """Change of pi(v), (n, V): sums to zero over v."""
        return self.logp_before.exp() * self.measured.expm1()

    @property
    def accounted_mass(self) -> Tensor:
        """Change of pi(v) that the accounted change of log pi(v) makes, pi(v) (exp(accounted) - 1), (n, V)."""
        return self.logp_before.exp() * self.accounted.expm1()

    def movers(self, decode: Callable[[list[int]], str], top: int = 10) -> pd.DataFrame:
        """Return the tokens that gained or lost most mass at each position.

        Args:
            decode: Text of token ids.
            top: Tokens per position, by |measured change of pi|.

        Returns:
            One row per position and token, the largest first: place, token_id, token, p_before, measured_mass,
            accounted_mass, measured, and a column per cause with its share in log pi, nats.
        """
        rows = []
        for place, mass in enumerate(self.measured_mass):
            for v in mass.abs().topk(min(top, len(mass))).indices.tolist():
                rows.append(
                    {
                        "place": place,
                        "token_id": v,
                        "token": decode([v]),
                        "p_before": float(self.logp_before[place, v].exp()),
                        "measured_mass": float(mass[v]),
                        "accounted_mass": float(self.accounted_mass[place, v]),
                        "measured": float(self.measured[place, v]),
                        **{cause: float(share[place, v]) for cause, share in self.shares.items()},
                    }
                )
        return pd.DataFrame(rows)


def account_for_distribution(
    logps: ResponseLogps,
    tokens: Tensor,
    before: Weights,
    after: Weights,
    parts: Mapping[str, Weights],
    *,
    rule: str = "midpoint",
) -> DistributionAccount:
    """Account for the change of the whole next-token distribution at chosen response tokens, cause by cause.

    The same path integral as `account_for_change`, [LD, Eq. 3] with every cause in place of -eta grad, read for all V
    tokens: which tokens gain the mass, and who gave it to them.

    Args:
        logps: Responses of N tokens.
        tokens: Indices among the N tokens, (n,), int64: the distribution is the one that predicts that token.
        before: theta before the step.
        after: theta after the step.
        parts: u_k by cause and name, as `split_update(...).parts`.
        rule: As for `account_for_change`.

    Returns:
        The account; memory (causes + 2) n V floats.
    """
    start = logps.distributions(before, tokens).double()
    measured = logps.distributions(after, tokens).double() - start
    shares = {cause: torch.zeros_like(measured) for cause in parts}
    for at_node, weight in path_nodes(before, after, rule):
        for cause, part in parts.items():
            shares[cause] += weight * logps.jvp_distributions(at_node, part, tokens)[1].double()
    return DistributionAccount(start, measured, shares)
