"""Scores of a group's tokens: how much a token has to do with the group's correct responses.

For the responses to one question, P the correct ones, G = g h^T a token's gradient by the LM head:

    s_m   = sum over i in P, k of w_i <G_m, G_{i,k}>              score of token m
    s+_i' = 1/|y_i'| sum over its tokens m of s_m                 anchor score of correct response i'
    tau   = beta min over i' in P of s+_i'                        threshold

with w_i = 1 in [NTHR] (Deng et al., arXiv 2505.18830) and 1/|y_i| in [THR] (arXiv 2510.03669). [NTHR] says "all *other*
correct responses" of the anchor score in its text and sums over all of them in its formula: `include_self` decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llm_dynamics.kernel.exact import token_kernel
from llm_dynamics.kernel.last_layer import anchor_products, anchor_scores
from llm_dynamics.kernel.output_head import OutputHead
from llm_dynamics.kernel.residuals import PAPER_RULE, ResidualRule
from llm_dynamics.kernel.token_states import HeadTokens
from llm_dynamics.likelihood.head import SplitModel
from llm_dynamics.likelihood.packing import TokenizedResponse


@dataclass(frozen=True)
class GroupScores:
    """Scores of one group.

    Attributes:
        tokens: s of each token that was to be scored, (N,).
        anchors: s+ of each correct response, (R,); NaN for one without tokens.
    """

    tokens: Tensor
    anchors: Tensor

    def threshold(self, beta: float) -> float:
        """Return tau = beta min s+; `beta` itself where it is infinite, and where there is no anchor, inf."""
        known = self.anchors[~self.anchors.isnan()]
        if len(known) == 0:
            return math.inf
        return beta if math.isinf(beta) else beta * known.min().item()


def score_group(
    head: OutputHead,
    correct: HeadTokens,
    tokens: HeadTokens,
    *,
    own: Tensor | None = None,
    include_self: bool = True,
    by_length: bool = False,
    rule: ResidualRule = PAPER_RULE,
) -> GroupScores:
    """Score tokens against the correct responses of their group, by the LM head alone.

    Args:
        head: The LM head.
        correct: Tokens of the R correct responses.
        tokens: The N tokens to be scored.
        own: Index of the correct response that each token to be scored belongs to, (N,), -1 for none; None: -1 for all.
        include_self: Whether tokens of a correct response, and its anchor score, count that response.
        by_length: w_i = 1/|y_i| ([THR]) rather than 1 ([NTHR]).
        rule: Temperature and vocabulary; the papers' residual `e_y - pi` by default.

    Returns:
        The scores, float32, or float64 for a float64 head.
    """
    lengths = correct.lengths.to(head.weight.device, head.dtype)
    w = 1 / lengths.clamp(min=1) if by_length else torch.ones_like(lengths)
    found = anchor_products(head, tokens, correct, weights=w, rule=rule)
    scores = found.scores
    if own is not None and not include_self:
        scores = scores.clone()
        for i in own[own >= 0].unique().tolist():
            mine = own == i
            if len(correct.labels) == correct.lengths[i]:
                scores[mine] = 0  # no other: not the rounding error of a difference, which would have a sign
                continue
            itself = _some(tokens, mine), correct.of_response(i)
            scores[mine] -= w[i] * anchor_scores(head, *itself, rule=rule)
    return GroupScores(scores, _anchors(found.products, w, lengths, include_self))


def score_group_exactly(
    model: nn.Module,
    correct: Sequence[TokenizedResponse],
    correct_spans: Sequence[Sequence[tuple[int, int]]],
    scored: Sequence[TokenizedResponse],
    *,
    own: Sequence[int] | None = None,
    include_self: bool = True,
    by_length: bool = False,
    split: SplitModel | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Score tokens by the exact token kernel, over all trainable parameters.

    Args:
        model: The model.
        correct: The R correct responses.
        correct_spans: Of each, the spans (start, stop) of response tokens that the loss counts.
        scored: The responses whose tokens are scored.
        own: Index of the correct response that each of `scored` is, -1 for none; None: -1 for all.
        include_self: As for `score_group`.
        by_length: As for `score_group`.
        split: The model's halves from `split_model`.

    Returns:
        Scores of every token of each of `scored`, and the anchor scores (R,), as in `score_group`.
    """
    lengths = torch.tensor([sum(b - a for a, b in spans) for spans in correct_spans], dtype=torch.float64)
    w = 1 / lengths.clamp(min=1) if by_length else torch.ones_like(lengths)
    owner = torch.tensor([i for i, spans in enumerate(correct_spans) for _ in spans], dtype=torch.int64)

    def sums(trained: Sequence[TokenizedResponse], **choice: object) -> Tensor:
        """Return what a step on each trained row does to each correct response, (rows, R)."""
        values = token_kernel(model, trained, correct, probe_rows=correct_spans, split=split, **choice).values  # type: ignore[arg-type]
        return values.new_zeros(len(correct), values.shape[1]).index_add_(0, owner, values).T

    between = sums(correct, train_rows=correct_spans)
    products = between.new_zeros(len(correct), len(correct)).index_add_(0, owner, between)
    anchors = _anchors(products, w.to(products), lengths.to(products), include_self)
    if not scored:
        return [], anchors
    sizes = [len(response.response_ids) for response in scored]
    parts = sums(scored).split(sizes)
    if own is not None and not include_self:
        for part, i in zip(parts, own, strict=True):
            if i >= 0:
                part[:, i] = 0
    return [part @ w.to(products) for part in parts], anchors


def _anchors(products: Tensor, w: Tensor, lengths: Tensor, include_self: bool) -> Tensor:
    """Return s+ of each response from <M_r, M_r'>, (R, R); NaN for one without tokens."""
    if not include_self:
        products = products - products.diagonal().diag()
    return torch.where(lengths > 0, (products @ w) / lengths.clamp(min=1), torch.nan)


def _some(tokens: HeadTokens, chosen: Tensor) -> HeadTokens:
    count = torch.tensor([int(chosen.sum())])
    return replace(tokens, hidden=tokens.hidden[chosen], labels=tokens.labels[chosen], lengths=count)
