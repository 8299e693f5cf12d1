"""The influence tables of a finished step: what each cause did to each family, probe or token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from llm_dynamics.callbacks.finished_step import FinishedStep
from llm_dynamics.callbacks.sharding import gather_frames, sum_over_processes, union_over_processes
from llm_dynamics.influence import StepAccount, account_for_change, accounted_change

REMAINDER = "remainder"
DETAILS = ("family", "probe", "token")


@dataclass(frozen=True)
class ProbeAccount:
    """The account of a step over all processes.

    Attributes:
        influence: Rows of `schema.INFLUENCE`, step excepted.
        tokens: Rows of `schema.INFLUENCE_TOKENS`, or None where not asked for.
        measured_norm: |measured change| over all explained probe tokens, nats.
        remainder_norm: |measured - accounted| over all explained probe tokens, nats.
    """

    influence: pd.DataFrame
    tokens: pd.DataFrame | None
    measured_norm: float
    remainder_norm: float

    @property
    def explained(self) -> float:
        """1 - |measured - accounted|^2 / |measured|^2 over all explained probe tokens; NaN where nothing moved."""
        return 1 - (self.remainder_norm / self.measured_norm) ** 2 if self.measured_norm != 0 else float("nan")


def account_of_probes(step: FinishedStep, detail: str) -> ProbeAccount:
    """Account for a step.

    Args:
        step: The step.
        detail: "family" (reverse mode: one gradient per family and node), "probe" or "token" (forward mode: one
            directional derivative per cause and node).

    Returns:
        The account, the same on every process.
    """
    if detail == "family":
        influence, tokens = _by_family(step), None
        accounted = (
            None if step.logps is None else accounted_change(step.logps, step.before, step.after, rule=step.rule)
        )
    else:
        account = None if step.logps is None else _account(step, None)
        influence = gather_frames(_by_probe(step, account), "order")
        tokens = gather_frames(_by_token(step, account), "order") if detail == "token" else None
        accounted = None if account is None else account.accounted
    missed = 0.0 if accounted is None else float((step.measured - accounted).square().sum())
    whole = float(step.measured.square().sum())
    missed, whole = sum_over_processes(np.array([missed, whole])) ** 0.5
    return ProbeAccount(influence, tokens, float(whole), float(missed))


def explained_by_gradient(step: FinishedStep) -> float:
    """Return the share of the measured change of all probe tokens that -grad explains, at its best multiple.

    The classical account with the raw gradient of the step in place of the optimizer's update, and the multiple that
    fits the measured change best rather than the learning rate: <measured, J g>^2 / (|measured|^2 |J g|^2), J taken at
    the weights before the step. One directional derivative.

    Args:
        step: The step, while its gradients still exist.

    Returns:
        A share in [0, 1]; NaN where nothing moved.
    """
    sums = np.zeros(3)
    if step.logps is not None:
        gradient = {name: p.grad for name, p in step.tape.parameters.items() if p.grad is not None}
        along = step.logps.jvp(step.before, gradient)[1].double()
        sums = np.array([step.measured @ along, step.measured @ step.measured, along @ along])
    both, measured, moved = sum_over_processes(sums)
    return float(both**2 / (measured * moved)) if measured * moved > 0 else float("nan")


def _account(step: FinishedStep, groups: torch.Tensor | None) -> StepAccount:
    assert step.logps is not None
    return account_for_change(
        step.logps, step.before, step.after, step.update.parts, rule=step.rule, groups=groups, measured=step.measured
    )


def _by_family(step: FinishedStep) -> pd.DataFrame:
    families, causes = list(step.counts), union_over_processes(step.update.parts)
    shares, measured = np.zeros((len(causes), len(families))), np.zeros(len(families))
    if step.logps is not None:
        account = _account(step, torch.stack([step.family_mean(family) for family in families]))
        measured = account.measured.numpy()
        for k, cause in enumerate(causes):
            shares[k] = account.shares[cause].numpy()
    shares, measured = sum_over_processes(shares), sum_over_processes(measured)
    rows = [
        {"family": family, "probe_id": None, "n_probes": step.counts[family], "cause": cause, "share": share[f]}
        for f, family in enumerate(families)
        for cause, share in [*zip(causes, shares, strict=True), (REMAINDER, measured - shares.sum(axis=0))]
    ]
    return pd.DataFrame(rows).assign(measured=np.repeat(measured, len(causes) + 1))


def _by_probe(step: FinishedStep, account: StepAccount | None) -> pd.DataFrame:
    if account is None or step.logps is None:
        return pd.DataFrame()
    owner = step.logps.owner

    def per_probe(values: torch.Tensor) -> np.ndarray:
        return torch.zeros(len(step.table), dtype=torch.float64).index_add_(0, owner, values).numpy()

    base = step.table[["family", "probe_id"]].assign(
        n_probes=1, measured=per_probe(account.measured), order=list(step.order)
    )
    shares = {**account.shares, REMAINDER: account.remainder}
    return pd.concat([base.assign(cause=cause, share=per_probe(share)) for cause, share in shares.items()])


def _by_token(step: FinishedStep, account: StepAccount | None) -> pd.DataFrame:
    if account is None or step.logps is None:
        return pd.DataFrame()
    owner = step.logps.owner.numpy()
    base = pd.DataFrame(
        {
            "probe_id": step.table["probe_id"].to_numpy()[owner],
            "position": torch.cat([torch.arange(n) for n in step.logps.lengths.tolist()]).numpy(),
            "measured": account.measured.numpy(),
            "order": np.array(step.order)[owner],
        }
    )
    shares = {**account.shares, REMAINDER: account.remainder}
    return pd.concat([base.assign(cause=cause, share=share.numpy()) for cause, share in shares.items()])
