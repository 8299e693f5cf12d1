"""The token kernel of the LM head alone, in closed form, and its sums over many anchors at linear cost.

The gradient of log pi(y_l) by the LM head's weight W (V, d) is the outer product `g_l h_l^T` of the label's residual
`g_l = e_{y_l} - pi_l` (V,) and the head's input h_l (d,), so that

    T_last[m, l] = (g_m . g_l) (h_m . h_l),        sum_l w_l T_last[m, l] = g_m^T M h_m,   M = sum_l w_l g_l h_l^T.

This is the score of Deng et al., *On the Effect of Negative Gradient in Group Relative Deep Reinforcement Optimization*
(arXiv 2505.18830) [NTHR]. `residuals` offers two readings of g.

Where the head is tied to the input embeddings, only its role as head is counted; its bias is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_dynamics.kernel.output_head import OutputHead, as_given, output_head
from llm_dynamics.kernel.residuals import EXACT_RULE, ResidualRule
from llm_dynamics.kernel.token_states import HeadTokens, TokenStates
from llm_dynamics.likelihood.head import SplitModel
from llm_dynamics.likelihood.packing import TokenizedResponse
from llm_dynamics.likelihood.scoring import DEFAULT_BATCH_TOKENS


class AnchorSum:
    """M = sum_l w_l g_l h_l^T over anchor tokens, added up in any number of blocks, against which tokens are scored.

    Attributes:
        matrix: M, (V, d) or (columns, d), in the dtype of the residuals; None before the first anchor.

    Example:
        >>> g, h = torch.eye(3), torch.ones(3, 2)
        >>> AnchorSum().add(g[:2], h[:2]).score(g, h)
        tensor([2., 2., 0.])
    """

    def __init__(self) -> None:
        self.matrix: Tensor | None = None

    def add(self, residuals: Tensor, hidden: Tensor, weights: Tensor | None = None) -> AnchorSum:
        """Add L anchors.

        Args:
            residuals: g, (L, V), or (L, columns) of a part of the vocabulary; from `label_residuals`.
            hidden: h, (L, d).
            weights: w, (L,); None: all one.

        Returns:
            This object.

        Raises:
            ValueError: Where shapes do not fit.
        """
        n, columns = residuals.shape
        shape = (columns, hidden.shape[-1])
        fits = hidden.ndim == 2 and len(hidden) == n and (weights is None or weights.shape == (n,))
        if not fits or (self.matrix is not None and self.matrix.shape != shape):
            known = "" if self.matrix is None else f", to add to a sum of shape {tuple(self.matrix.shape)}"
            raise ValueError(
                "anchors need residuals (L, columns), hidden (L, d) and weights (L,) or None; seen "
                f"{tuple(residuals.shape)}, {tuple(hidden.shape)} and "
                f"{None if weights is None else tuple(weights.shape)}{known}"
            )
        hidden = hidden.to(residuals)
        if weights is not None:
            hidden = hidden * weights.to(residuals)[:, None]
        with as_given(residuals):
            self.matrix = residuals.T @ hidden if self.matrix is None else self.matrix.addmm_(residuals.T, hidden)
        return self

    def score(self, residuals: Tensor, hidden: Tensor) -> Tensor:
        """Return sum_l w_l (g_m . g_l)(h_m . h_l) = g_m^T M h_m for tokens m.

        Args:
            residuals: g, (N, V), or the same columns as those of the anchors.
            hidden: h, (N, d).

        Returns:
            (N,), in the dtype of the residuals.

        Raises:
            ValueError: Where there are no anchors yet, or shapes do not fit.
        """
        if self.matrix is None:
            raise ValueError("there are no anchors to score against: call `add` first")
        columns, d = self.matrix.shape
        if residuals.shape[1:] != (columns,) or hidden.shape != (len(residuals), d):
            raise ValueError(
                f"tokens need residuals (N, {columns}) and hidden (N, {d}), as the anchors had; seen "
                f"{tuple(residuals.shape)} and {tuple(hidden.shape)}"
            )
        with as_given(residuals):
            return torch.linalg.vecdot(residuals @ self.matrix, hidden.to(residuals))


def anchor_scores(
    head: OutputHead,
    tokens: HeadTokens,
    anchors: HeadTokens,
    *,
    weights: Tensor | None = None,
    by_response: bool = False,
    rule: ResidualRule = EXACT_RULE,
) -> Tensor:
    """Compute sum_l w_l T_last[m, l] of every token m over all anchor tokens l.

    Linear in tokens: two passes over the vocabulary in blocks of columns; neither (N, V) nor the whole of M is formed.

    Args:
        head: The LM head.
        tokens: N tokens m to be scored.
        anchors: L anchor tokens l.
        weights: w, (L,); None: all one.
        by_response: Keep the sums over the anchor responses apart, such as to leave a response out of its own sum.
        rule: Which residual, at which temperature, over which vocabulary.

    Returns:
        (N,), or (N, R) for R anchor responses; float32, or float64 for a float64 head; on the head's device.

    Raises:
        ValueError: Where shapes or ids do not fit.
    """
    n_anchors = len(anchors.labels)
    if weights is not None and weights.shape != (n_anchors,):
        raise ValueError(
            f"weights must be (L,), one for each of {n_anchors} anchor tokens; seen {tuple(weights.shape)}"
        )
    h_m, h_l = (side.hidden.to(head.weight.device, head.dtype) for side in (tokens, anchors))
    sizes = anchors.lengths.tolist() if by_response else [n_anchors]
    total = torch.zeros(len(h_m), len(sizes), dtype=head.dtype, device=h_m.device)
    w = torch.ones(n_anchors, dtype=head.dtype) if weights is None else weights
    for g_m, g_l in head.residuals([(h_m, tokens.labels), (h_l, anchors.labels)], rule):
        for r, part in enumerate(zip(g_l.split(sizes), h_l.split(sizes), w.split(sizes), strict=True)):
            total[:, r] += AnchorSum().add(*part).score(g_m, h_m)
    return total if by_response else total[:, 0]


@dataclass(frozen=True)
class AnchorProducts:
    """What tokens have to do with anchor responses, and these with each other, by the LM head alone.

    Attributes:
        scores: sum_r w_r <G_m, M_r> of each token m, (N,), with G_m = g_m h_m^T and M_r their sum over response r.
        products: <M_r, M_r'>, (R, R), of the responses unweighted.
    """

    scores: Tensor
    products: Tensor


def anchor_products(
    head: OutputHead,
    tokens: HeadTokens,
    anchors: HeadTokens,
    *,
    weights: Tensor | None = None,
    rule: ResidualRule = EXACT_RULE,
) -> AnchorProducts:
    """Compute `anchor_scores` of tokens, and the inner products of the anchor responses with each other.

    With `M_r = sum_{k in r} g_k h_k^T` (V, d), the score of all tokens of response r' against response r adds up to
    `<M_r', M_r>`: anchors need no scores of their own. Per token about four products with the head's weight in all (the
    logits twice where they do not fit into `output_head.KEPT_BYTES`), per pair of responses one of length V d.

    Args:
        head: The LM head.
        tokens: N tokens to be scored, none or more.
        anchors: Tokens of R responses; a response may be empty. R may be zero: then scores are.
        weights: w, (R,), one for each response; None: all one.
        rule: Which residual, at which temperature, over which vocabulary.

    Returns:
        Scores and products, float32, or float64 for a float64 head; on the head's device.

    Raises:
        ValueError: Where shapes or ids do not fit.
    """
    sizes = anchors.lengths.tolist()
    if weights is not None and weights.shape != (len(sizes),):
        raise ValueError(f"weights must be (R,), one for each of {len(sizes)} responses; seen {tuple(weights.shape)}")
    h_m, h_l = (side.hidden.to(head.weight.device, head.dtype) for side in (tokens, anchors))
    w = (torch.ones(len(sizes)) if weights is None else weights).to(h_l)
    scores = h_m.new_zeros(len(h_m))
    products = h_m.new_zeros(len(sizes), len(sizes))
    if not sizes:
        return AnchorProducts(scores, products)
    width = (len(sizes) + 1) * h_l.shape[1]
    for g_m, g_l in head.residuals([(h_m, tokens.labels), (h_l, anchors.labels)], rule, beside=width):
        with as_given(g_l):
            sums = torch.stack([g.T @ h for g, h in zip(g_l.split(sizes), h_l.split(sizes), strict=True)])
            flat = sums.flatten(1)
            products.addmm_(flat, flat.T)
            if len(h_m):
                matrix = (w @ flat).view(sums.shape[1:])
                scores += torch.linalg.vecdot(g_m @ matrix, h_m)
    return AnchorProducts(scores, products)


def residual_products(
    head: OutputHead, probes: HeadTokens, trains: HeadTokens, *, rule: ResidualRule = EXACT_RULE
) -> Tensor:
    """Compute g_m . g_l: the part of `last_layer_table` that comes from predictions and labels.

    Args:
        head: The LM head.
        probes: M probe tokens.
        trains: L training tokens.
        rule: Which residual, at which temperature, over which vocabulary.

    Returns:
        (M, L), float32, or float64 for a float64 head; on the head's device.

    Raises:
        ValueError: Where the vocabulary is not the head's.
    """
    shape = len(probes.labels), len(trains.labels)
    products = torch.zeros(shape, dtype=head.dtype, device=head.weight.device)
    for g_m, g_l in head.residuals([(probes.hidden, probes.labels), (trains.hidden, trains.labels)], rule):
        with as_given(products):
            products.addmm_(g_m, g_l.T)
    return products


def last_layer_table(
    head: OutputHead, probes: HeadTokens, trains: HeadTokens, *, rule: ResidualRule = EXACT_RULE
) -> Tensor:
    """Compute the whole table T_last[m, l] = (g_m . g_l) (h_m . h_l), in blocks of columns.

    Args:
        head: The LM head.
        probes: M probe tokens.
        trains: L training tokens.
        rule: Which residual, at which temperature, over which vocabulary.

    Returns:
        (M, L), float32, or float64 for a float64 head; on the head's device.

    Raises:
        ValueError: Where the vocabulary is not the head's.
    """
    products = residual_products(head, probes, trains, rule=rule)
    with as_given(products):
        return products.mul_(probes.hidden.to(products) @ trains.hidden.to(products).T)


def last_layer_scores(
    model: nn.Module,
    tokens: Sequence[TokenizedResponse],
    anchors: Sequence[TokenizedResponse],
    *,
    weights: Tensor | None = None,
    by_response: bool = False,
    rule: ResidualRule = EXACT_RULE,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    split: SplitModel | None = None,
) -> Tensor:
    """Score every token of some responses against the anchor responses, under `model`: `anchor_scores` from token ids.

    Args:
        model: A Hugging Face causal LM, PEFT adapters and TRL's fused head included.
        tokens: Responses whose N tokens are scored.
        anchors: Responses whose tokens are the anchors.
        weights: As for `anchor_scores`.
        by_response: As for `anchor_scores`.
        rule: As for `anchor_scores`.
        batch_tokens: Most tokens in one forward, padding included.
        split: The model's halves from `split_model`, to save the check.

    Returns:
        As `anchor_scores`, on the CPU.

    Raises:
        ValueError: For bad responses or options.
        NotImplementedError: For models that cannot be split into backbone and head.

    Example:
        >>> last_layer_scores(model, wrong_answers, right_answers, rule=PAPER_RULE)  # doctest: +SKIP
    """
    scored = TokenStates(model, tokens, batch_tokens=batch_tokens, split=split)
    against = TokenStates(model, anchors, batch_tokens=batch_tokens, split=scored.split)
    head = output_head(scored.split)
    return anchor_scores(
        head, scored.values(), against.values(), weights=weights, by_response=by_response, rule=rule
    ).cpu()


def last_layer_kernel(
    model: nn.Module,
    probes: Sequence[TokenizedResponse],
    trains: Sequence[TokenizedResponse],
    *,
    rule: ResidualRule = EXACT_RULE,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    split: SplitModel | None = None,
) -> Tensor:
    """Compute T_last of all probe tokens and all training tokens under `model`: `last_layer_table` from token ids.

    Args:
        model: A Hugging Face causal LM, PEFT adapters and TRL's fused head included.
        probes: Responses with M tokens in all.
        trains: Responses with L tokens in all.
        rule: As for `last_layer_table`.
        batch_tokens: Most tokens in one forward, padding included.
        split: The model's halves from `split_model`, to save the check.

    Returns:
        (M, L), float32, or float64 for a float64 model; on the CPU.

    Raises:
        ValueError: For bad responses or options.
        NotImplementedError: For models that cannot be split into backbone and head.
    """
    rows = TokenStates(model, probes, batch_tokens=batch_tokens, split=split)
    columns = TokenStates(model, trains, batch_tokens=batch_tokens, split=rows.split)
    return last_layer_table(output_head(rows.split), rows.values(), columns.values(), rule=rule).cpu()
