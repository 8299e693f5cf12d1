"""Everything that `appendix_c.py` measures at one moment of training, between U trained and P observed responses.

[LD] is Ren & Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025 (arXiv 2407.10490), appendix C. Its bound is
on the kernel K of the logits. Log-probs see K through A = I - 1 pi^T alone, and A 1 = 0: what K has along the sum of
all logits never shows. The same bound holds of the visible kernel, A_o K_uo A_u^T, and leaves less to be lost: with
G = -c A^T e_y, ||Delta log pi||_F^2 / (eta^2 sum_l c_l^2) <= ||A_o K_uo A_u^T||_F^2, to first order in eta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from llm_dynamics.kernel import (
    TokenKernel,
    kernel_proxies,
    last_layer_kernel,
    predict_from_kernel,
    relative_stability,
    response_block_norms,
    token_kernel,
)
from llm_dynamics.kernel.derivatives import ResponseLogps
from llm_dynamics.kernel.token_states import TokenStates
from llm_dynamics.likelihood.packing import TokenizedResponse


@dataclass(frozen=True)
class Snapshot:
    """Measures at one moment; tables are (P, U), observed by trained, float64, unless said otherwise.

    Attributes:
        stage: Which run, "sft" or "dpo".
        step: Optimizer steps done in it.
        exact: The exact token kernel T, (M, L).
        last: The LM head's own part of it, (M, L).
        norm: ||K_uo||_F, estimated.
        norm_error: Its standard error.
        visible: ||A_o K_uo A_u^T||_F, estimated.
        visible_error: Its standard error.
        lbk: Root of LBK over the step's size: [LD]'s lower bound of `norm`.
        spectral: The same of the tighter bound of `llm_dynamics.kernel.proxies`.
        visible_bound: The lower bound of `visible`.
        sign_delta: SignDelta of the step, nats.
        moved: Measured change of the observed responses' log-prob in the step, nats, sums over tokens.
        predicted: The same by T, to first order.
        logp: Log-prob of the observed responses, nats, sums over tokens, (P,).
    """

    stage: str
    step: int
    exact: TokenKernel
    last: Tensor
    norm: Tensor
    norm_error: Tensor
    visible: Tensor
    visible_error: Tensor
    lbk: Tensor
    spectral: Tensor
    visible_bound: Tensor
    sign_delta: Tensor
    moved: Tensor
    predicted: Tensor
    logp: Tensor

    def of_responses(self, table: Tensor) -> Tensor:
        """Sum an (M, L) table over the tokens of every pair of responses."""
        kernel = self.exact
        return TokenKernel(table, kernel.probes, kernel.train, kernel.kind, kernel.parameters).sums()


def measure(
    model: nn.Module,
    spare: nn.Module,
    trains: Sequence[TokenizedResponse],
    probes: Sequence[TokenizedResponse],
    *,
    stage: str,
    step: int,
    step_size: float,
    draws: int,
) -> Snapshot:
    """Measure `model` as it is now, over all its parameters.

    Proxies need a step: from the model's weights, one plain gradient step of `step_size` on the summed negative
    log-likelihood of each trained response alone, taken in `spare`.

    Args:
        model: The model in training; left as it was.
        spare: Another of the same architecture, whose weights are overwritten.
        trains: U responses.
        probes: P responses.
        stage: Kept in the result.
        step: Kept in the result.
        step_size: Of the plain steps.
        draws: Random vectors per block norm.
    """
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    logps, labels = ResponseLogps(model, probes), torch.tensor([y for probe in probes for y in probe.response_ids])
    everywhere = torch.arange(logps.n_tokens)
    before = logps.distributions(weights, everywhere)
    exact = token_kernel(model, trains, probes, parameters=list(weights), memory_budget_mb=2048)
    norms = response_block_norms(model, probes, trains, draws=draws, weights=weights)
    visible, visible_error = visible_norms(model, probes, trains, draws=draws, weights=weights)
    columns: dict[str, list[Tensor]] = {
        name: [] for name in ("lbk", "spectral", "visible_bound", "sign_delta", "moved", "predicted")
    }
    for u, trained in enumerate(trains):
        step_on(model, spare, weights, trained, step_size)
        proxies = kernel_proxies(model, spare, probes, [trained])
        columns["lbk"].append(proxies.lbk.sqrt() / step_size)
        columns["spectral"].append(proxies.spectral_lbk.sqrt() / step_size)
        columns["sign_delta"].append(proxies.sign_delta)
        after = ResponseLogps(spare, probes).distributions(dict(spare.named_parameters()), everywhere)
        change = after.detach() - before
        squares = _by_response(change.double().square().sum(1), logps.owner)
        columns["visible_bound"].append((squares / len(trained.response_ids)).sqrt() / step_size)
        columns["moved"].append(_by_response(change.gather(1, labels[:, None])[:, 0], logps.owner))
        c = -(exact.train.response == u).double()
        columns["predicted"].append(_by_response(predict_from_kernel(exact, step_size, c), logps.owner))
    tables = {name: torch.stack(values, dim=1) for name, values in columns.items()}
    tables |= {"norm": norms.norm, "norm_error": norms.norm_error, "visible": visible, "visible_error": visible_error}
    last = last_layer_kernel(model, probes, trains)
    logp = _by_response(before.gather(1, labels[:, None])[:, 0], logps.owner)
    return Snapshot(stage, step, exact=exact, last=last, logp=logp, **tables)


def visible_norms(
    model: nn.Module,
    probes: Sequence[TokenizedResponse],
    trains: Sequence[TokenizedResponse],
    *,
    draws: int,
    weights: dict[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Estimate ||A_o K_uo A_u^T||_F and its standard error, (P, U) each.

    As `response_block_norms`, with the log-probs in place of the logits: with e of random signs at every token and
    every entry of the vocabulary, E ||J_o J_u^T e||^2 is the squared norm.
    """
    observed, trained = TokenStates(model, probes), TokenStates(model, trains)
    head, generator = observed.split.head, torch.Generator().manual_seed(0)
    squares = torch.zeros(draws, len(probes), len(trains), dtype=torch.float64)

    def log_probs(hidden: Tensor) -> Tensor:
        return head(hidden).log_softmax(-1)

    def squared(tangent: Tensor) -> Tensor:
        return tangent.square().sum(1, keepdim=True)

    for u, response in enumerate(trains):
        for draw in range(draws):
            shape = len(response.response_ids), observed.split.vocab_size
            e = 2 * torch.randint(2, shape, generator=generator) - 1
            direction = trained.gradient(weights, u, lambda hidden, e=e: (log_probs(hidden) * e).sum())
            of_tokens = observed.jvp(
                weights, direction, log_probs, lambda tangent: tangent.square().sum(1, keepdim=True)
            )
            squares[draw, :, u] = _by_response(of_tokens[:, 0], observed.owner)
    norm = squares.mean(0).sqrt()
    return norm, squares.std(0) / draws**0.5 / (2 * norm)


def step_on(
    model: nn.Module, spare: nn.Module, weights: dict[str, Tensor], trained: TokenizedResponse, step_size: float
) -> None:
    """Set `spare` to the model's weights after one plain gradient step on one response."""
    one = ResponseLogps(model, [trained])
    uphill = one.gradient(weights, torch.ones(one.n_tokens))
    with torch.no_grad():
        for name, weight in spare.named_parameters():
            weight.copy_(weights[name] + step_size * uphill[name])


def compare(snapshot: Snapshot, start: Snapshot) -> dict[str, float]:
    """Return what is told of a whole snapshot: changes since `start` and rank correlations.

    Relative changes are Frobenius norms of the difference over that of the start; "whole responses" are tables summed
    over the tokens of both responses; rank correlations of two measures are over o for each u, then means over u; the
    share of T in the last layer is <T_last, T> / ||T||_F^2.
    """
    now, then = snapshot.exact.values.double(), start.exact.values.double()
    last, last_then = snapshot.last.double(), start.last.double()
    sums, sums_last = snapshot.of_responses(now), snapshot.of_responses(last)
    sums_then, last_sums_then = start.of_responses(then), start.of_responses(last_then)
    measured = snapshot.moved
    found = {
        "relative change of T": relative_change(now, then),
        "relative change of last layer": relative_change(last, last_then),
        "relative change of T, whole responses": relative_change(sums, sums_then),
        "relative change of last layer, whole responses": relative_change(sums_last, last_sums_then),
        "cosine of T with start": float((now * then).sum() / (now.norm() * then.norm())),
        "rank correlation of last layer with T, tokens": rank_correlation(last, now),
        "rank correlation of last layer with T, whole responses": rank_correlation(sums_last, sums),
        "share of T in last layer": float((last * now).sum() / now.square().sum()),
        "explained share of the plain steps": float(
            1 - (measured - snapshot.predicted).square().sum() / measured.square().sum()
        ),
    }
    ranked = {"||K||": "norm", "visible norm": "visible", "sqrt(LBK)": "lbk", "SignDelta": "sign_delta"}
    for name, field in ranked.items():
        stability = relative_stability(getattr(start, field), getattr(snapshot, field))
        found |= {f"relative stability of {name}, u = {u}": float(value) for u, value in enumerate(stability)}
    stability = relative_stability(sums_then, sums)
    found |= {f"relative stability of T, u = {u}": float(value) for u, value in enumerate(stability)}
    norms = {"||K||": snapshot.norm, "visible norm": snapshot.visible}
    measures = {"sqrt(LBK)": snapshot.lbk, "|SignDelta|": snapshot.sign_delta.abs(), "|T|": sums.abs()}
    for norm_name, norm in norms.items():
        for name, values in measures.items():  # the same rank correlation over o, between two measures
            of_trained = relative_stability(norm, values)
            found[f"rank correlation of {name} with {norm_name}"] = float(of_trained.mean())
    found["rank correlation of visible norm with ||K||"] = float(relative_stability(*norms.values()).mean())
    return found


def relative_change(now: Tensor, then: Tensor) -> float:
    """Return ||now - then||_F / ||then||_F."""
    return float((now - then).norm() / then.norm())


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation over all entries of two tables."""
    return float(pd.Series(a.flatten().numpy()).corr(pd.Series(b.flatten().numpy()), method="spearman"))


def _by_response(values: Tensor, owner: Tensor) -> Tensor:
    """Sum values of tokens, (M,), by response, (P,), float64."""
    return torch.zeros(int(owner.max()) + 1, dtype=torch.float64).index_add_(0, owner, values.double())
