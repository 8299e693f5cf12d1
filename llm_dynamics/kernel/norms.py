"""Trace and Frobenius norm of the V x V blocks K_{m,l} = (dz_m/dtheta)(dz_l/dtheta)^T of the token eNTK, estimated.

K is that of Ren & Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025 (arXiv 2407.10490) [LD, Prop. 1]; the
ranking of ||K_uo|| over observed responses o is what its appendix C calls relatively stable. Of the training side l it
takes the gradient that autograd gives in training: none by the padding token's embedding (see `token_kernel`).

Estimators (Hutchinson): with e of independent random signs, `w = J_l^T e` is one backward pass, and one forward-mode
pass along w gives `K_{m,l} e`, all V entries, at every probe token m at once. Then

    E ||K_{m,l} e||^2 = ||K_{m,l}||_F^2,        E e^T K_{m,l} e = tr K_{m,l}      (the same e on both sides).

`exact_norms` has the exact values, without V, for models with an LM head of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_dynamics.kernel.token_states import TokenStates, trainable_weights, units_of
from llm_dynamics.kernel.weights import Weights
from llm_dynamics.likelihood.head import SplitModel
from llm_dynamics.likelihood.packing import TokenizedResponse
from llm_dynamics.likelihood.scoring import DEFAULT_BATCH_TOKENS


@dataclass(frozen=True)
class BlockNorms:
    """Squared Frobenius norms and traces of kernel blocks; fields are float64 on the CPU, (M, L) or (P, U).

    Attributes:
        squared_norm: ||K||_F^2, estimate or exact.
        squared_norm_error: Standard error of the estimate over draws; NaN for a single draw, zero for exact values.
        trace: tr K; None for blocks of whole responses, which have none.
        trace_error: Its standard error.
        draws: Random vectors per block; 0: exact.
    """

    squared_norm: Tensor
    squared_norm_error: Tensor
    trace: Tensor | None
    trace_error: Tensor | None
    draws: int

    @property
    def norm(self) -> Tensor:
        """||K||_F: root of `squared_norm`."""
        return self.squared_norm.sqrt()

    @property
    def norm_error(self) -> Tensor:
        """Standard error of `norm`, to first order: that of the square over 2 ||K||_F; zero for a block of zeros."""
        return torch.where(self.squared_norm_error == 0, 0.0, self.squared_norm_error / (2 * self.norm))


def token_block_norms(
    model: nn.Module,
    probes: Sequence[TokenizedResponse],
    trains: Sequence[TokenizedResponse],
    *,
    draws: int = 4,
    generator: torch.Generator | None = None,
    weights: Weights | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    split: SplitModel | None = None,
) -> BlockNorms:
    """Estimate tr K_{m,l} and ||K_{m,l}||_F of all probe tokens m and all training tokens l.

    One backward of one sequence and one forward-mode pass over the other side, for each token of the side that has
    fewer, and each draw. Median relative error of the norm about 0.16 / 0.07 / 0.04 at 1 / 4 / 16 draws.

    Args:
        model: A Hugging Face causal LM, PEFT adapters and TRL's fused head included.
        probes: Responses with M tokens in all.
        trains: Responses with L tokens in all.
        draws: Random vectors e per token.
        generator: Their source, on the CPU; default: seeded with 0, so that two checkpoints are met by the same draws.
        weights: What is differentiated, tensors by parameter name; default: the model's trainable parameters.
        batch_tokens: Most tokens in one forward, padding included.
        split: The model's halves from `split_model`, to save the check.

    Returns:
        (M, L) estimates with their standard errors.

    Raises:
        ValueError: For bad responses, draws below one, or nothing to differentiate.
        NotImplementedError: For models that cannot be split into backbone and head.
    """
    one, other, weights = prepare_sides(model, probes, trains, draws, weights, batch_tokens, split)
    swapped = len(one.labels) < len(other.labels)  # K_{l,m} = K_{m,l}^T has the same norm and trace
    side, units = (other, one) if swapped else (one, other)
    generator = generator or torch.Generator().manual_seed(0)
    moments = [
        [_products(side, units, weights, r, slice(k, k + 1), generator, swapped) for _ in range(draws)]
        for r, k in units_of(units)
    ]
    squares, traces = torch.stack([torch.stack(of_unit) for of_unit in moments], dim=2).unbind(-1)  # (draws, M, L)
    if swapped:
        squares, traces = squares.mT, traces.mT
    return BlockNorms(squares.mean(0), _standard_error(squares), traces.mean(0), _standard_error(traces), draws)


def response_block_norms(
    model: nn.Module,
    probes: Sequence[TokenizedResponse],
    trains: Sequence[TokenizedResponse],
    *,
    draws: int = 4,
    generator: torch.Generator | None = None,
    weights: Weights | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    split: SplitModel | None = None,
) -> BlockNorms:
    """Estimate ||K_{o,u}||_F^2 = sum_m sum_l ||K_{m,l}||_F^2 of all probe responses o and training responses u.

    The whole response draws one random vector over its tokens and the vocabulary, so that a draw costs one backward and
    one forward-mode pass however long the response is.

    Args:
        model: As for `token_block_norms`.
        probes: P responses o.
        trains: U responses u.
        draws: Random vectors per response.
        generator: As for `token_block_norms`.
        weights: As for `token_block_norms`.
        batch_tokens: As for `token_block_norms`.
        split: As for `token_block_norms`.

    Returns:
        (P, U) estimates with their standard errors, without traces.

    Raises:
        ValueError: As for `token_block_norms`.
        NotImplementedError: As for `token_block_norms`.
    """
    side, units, weights = prepare_sides(model, probes, trains, draws, weights, batch_tokens, split)
    swapped = len(side.lengths) < len(units.lengths)
    if swapped:
        side, units = units, side
    generator = generator or torch.Generator().manual_seed(0)
    squares = torch.zeros(draws, len(side.lengths), len(units.lengths), dtype=torch.float64)
    for u in range(len(units.lengths)):
        for draw in range(draws):
            of_tokens = _products(side, units, weights, u, slice(None), generator, swapped)[:, 0]
            squares[draw, :, u].index_add_(0, side.owner, of_tokens)
    if swapped:
        squares = squares.mT
    return BlockNorms(squares.mean(0), _standard_error(squares), None, None, draws)


def relative_stability(before: Tensor, after: Tensor) -> Tensor:
    """Compute how alike the ranking of ||K_uo|| over observed responses o is at two checkpoints [LD, App. C].

    Args:
        before: Norms (or any increasing function of them) at one checkpoint, (P, U): responses o by trained ones u.
        after: The same at another checkpoint.

    Returns:
        Spearman's rank correlation over o for each u, (U,), float64: 1 for the same ranking, NaN where all norms of a
        column are equal. Ties share their mean rank.

    Raises:
        ValueError: Where the shapes differ, or fewer than two responses are observed.
    """
    if before.ndim != 2 or before.shape != after.shape or len(before) < 2:
        raise ValueError(
            "norms at both checkpoints must be (P, U) with P >= 2 observed responses; seen "
            f"{tuple(before.shape)} and {tuple(after.shape)}"
        )
    a, b = (_ranks(norms) - (len(norms) + 1) / 2 for norms in (before, after))
    return (a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()


def prepare_sides(
    model: nn.Module,
    probes: Sequence[TokenizedResponse],
    trains: Sequence[TokenizedResponse],
    draws: int,
    weights: Weights | None,
    batch_tokens: int,
    split: SplitModel | None,
) -> tuple[TokenStates, TokenStates, Weights]:
    """Return both sides as functions of the weights, and the weights, for arguments as of `token_block_norms`.

    Args:
        model: As for `token_block_norms`.
        probes: As for `token_block_norms`.
        trains: As for `token_block_norms`.
        draws: As for `token_block_norms`.
        weights: As for `token_block_norms`.
        batch_tokens: As for `token_block_norms`.
        split: As for `token_block_norms`.

    Returns:
        The probes, the training responses, and what is differentiated.

    Raises:
        ValueError: As for `token_block_norms`.
    """
    if draws < 1:
        raise ValueError(f"draws is {draws}; an estimate needs at least one random vector")
    one = TokenStates(model, probes, batch_tokens=batch_tokens, split=split)
    other = TokenStates(model, trains, batch_tokens=batch_tokens, split=one.split)
    return one, other, trainable_weights(model, weights)


def _products(
    side: TokenStates,
    units: TokenStates,
    weights: Weights,
    response: int,
    places: slice,
    generator: torch.Generator,
    swapped: bool,
) -> Tensor:
    """Return ||K e||^2 and e^T K e of all tokens of `side` against the given ones of `units`, (N, 2), float64.

    The second is meant for a single place. `units` is the training side, unless swapped.
    """
    head, vocab_size = side.split.head, side.split.vocab_size
    count = len(range(*places.indices(int(units.lengths[response]))))
    e = 2 * torch.randint(2, (count, vocab_size), generator=generator) - 1

    def both(product: Tensor) -> Tensor:  # K e of a block of tokens, (n, V)
        square = torch.linalg.vecdot(product, product)
        return torch.stack([square, product @ e[0].to(product)], dim=1).double()

    def objective(hidden: Tensor) -> Tensor:
        logits = head(hidden[places])
        return (logits * e.to(logits)).sum()

    gradient = units.gradient(weights, response, objective, trained=not swapped)
    return side.jvp(weights, gradient, head, both, trained=swapped)


def _standard_error(values: Tensor) -> Tensor:
    """Return the standard error of the mean over the first axis; NaN for one value."""
    if len(values) == 1:
        return torch.full_like(values[0], torch.nan)
    return values.std(dim=0) / len(values) ** 0.5


def _ranks(values: Tensor) -> Tensor:
    """Return ranks 1..P down each column, (P, U), float64; ties share their mean rank."""
    below = (values[None] < values[:, None]).sum(1).double()
    same = (values[None] == values[:, None]).sum(1).double()
    return below + (same + 1) / 2
