"""Exact trace and Frobenius norm of the V x V blocks of the token-level eNTK, without V, for untied heads.

Where the LM head is a linear layer of its own (not tied, not capped), with weight W and scale s,

    K_{m,l} = s^2 (W C W^T + (h_m . h_l) I),    C = J_h J_h'^T  (d, d),    S = W^T W,
    tr K = s^2 (tr(S C) + V h.h'),    ||K||_F^2 = s^4 (tr(C^T S C S) + 2 (h.h') tr(S C) + V (h.h')^2),

with J_h = dh/dtheta of the head's input h; one is added to h.h' where the head's bias is differentiated too, and it
is 0 where the weight is not (adapters on the layers below).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llm_dynamics.kernel.norms import BlockNorms, prepare_sides
from llm_dynamics.kernel.token_states import TokenStates, units_of
from llm_dynamics.kernel.weights import Weights
from llm_dynamics.likelihood.head import SplitModel
from llm_dynamics.likelihood.packing import TokenizedResponse
from llm_dynamics.likelihood.scoring import DEFAULT_BATCH_TOKENS


def exact_block_norms(
    model: nn.Module,
    probes: Sequence[TokenizedResponse],
    trains: Sequence[TokenizedResponse],
    *,
    weights: Weights | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    split: SplitModel | None = None,
) -> BlockNorms:
    """Compute tr K_{m,l} and ||K_{m,l}||_F exactly, by the formula of this module.

    Costs d backward and d forward-mode passes for each token of the training side, whatever V.

    Args:
        model: As for `token_block_norms`; its LM head a linear layer of its own, without soft-capping.
        probes: As for `token_block_norms`.
        trains: As for `token_block_norms`.
        weights: As for `token_block_norms`.
        batch_tokens: As for `token_block_norms`.
        split: As for `token_block_norms`.

    Returns:
        (M, L) exact values.

    Raises:
        ValueError: For bad responses or nothing to differentiate.
        NotImplementedError: For a head that is tied, where its weight is differentiated, capped or wrapped; and for
            models that cannot be split into backbone and head.
    """
    one, other, weights = prepare_sides(model, probes, trains, 1, weights, batch_tokens, split)
    of_weight, of_bias = _differentiated(model, one.split, weights)
    (head, tokens_m), (_, tokens_l) = one.head_and_values(weights), other.head_and_values(weights)
    v, d = head.weight.shape
    weight, h_m, h_l = (part.double() for part in (head.weight, tokens_m.hidden, tokens_l.hidden))
    gram = weight.T @ weight  # S, (d, d)
    identity = float(of_weight) * (h_m @ h_l.T) + float(of_bias)  # what multiplies I, (M, L)
    trace, square = torch.zeros_like(identity), torch.zeros_like(identity)
    for column, (r, k) in enumerate(units_of(other)):
        c = _jacobian_products(one, other, weights, r, k, d).to(gram)
        sc = gram @ c
        times = identity[:, column]
        trace[:, column] = sc.diagonal(dim1=1, dim2=2).sum(1)
        square[:, column] = (sc * (c @ gram)).sum((1, 2)) + 2 * times * trace[:, column] + v * times.square()
    trace += v * identity
    scale = head.scale
    zeros = torch.zeros(trace.shape, dtype=torch.float64)
    return BlockNorms(square.mul_(scale**4).cpu(), zeros, trace.mul_(scale**2).cpu(), zeros, 0)


def _jacobian_products(
    side: TokenStates, units: TokenStates, weights: Weights, response: int, place: int, d: int
) -> Tensor:
    """Return C_{m,l} = (dh_m/dtheta)(dh_l/dtheta)^T of one token l and all tokens m of `side`, (M, d, d)."""

    def entry(i: int) -> Callable[[Tensor], Tensor]:
        return lambda hidden: hidden[place, i]

    def same(hidden: Tensor) -> Tensor:
        return hidden

    rows = [side.jvp(weights, units.gradient(weights, response, entry(i), trained=True), same, same) for i in range(d)]
    return torch.stack(rows, dim=2)


def _differentiated(model: nn.Module, split: SplitModel, weights: Weights) -> tuple[bool, bool]:
    """Tell whether the head's weight and its bias are among `weights`; refuse heads that the formula does not fit."""
    head: nn.Module = split.model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or split.softcap is not None:
        kind = "soft-capped" if split.softcap is not None else f"a {type(head).__name__}"
        raise NotImplementedError(
            f"the exact norm needs an LM head that is a plain linear layer; this one is {kind}. Use token_block_norms."
        )
    named = dict(model.named_parameters())
    chosen = [named[name] for name in weights]
    of_weight = any(parameter is head.weight for parameter in chosen)
    if of_weight and split.model.get_input_embeddings().weight is head.weight:  # type: ignore[operator]
        raise NotImplementedError(
            "the LM head is tied to the input embeddings and its weight is differentiated: the exact norm has cross "
            "terms that the formula leaves out. Use token_block_norms, or leave the embeddings out of `weights`."
        )
    return of_weight, any(parameter is head.bias for parameter in chosen)
