"""CHES: which preference pairs will displace the likelihood of their own chosen response.

Razin et al., *Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization* (arXiv 2410.08847)
[CHES], Definitions 2 and 3, with h_k the LM head's input that predicts token k:

    CHES = < sum_k h+_k, sum_l h-_l > - || sum_k h+_k ||^2
    length-normalised: the first term divided by |y+| |y-|, the second by |y+|^2

High means displacement: it is the token kernel of the LM head with every product of residuals g . g set to one. With
`residuals=True` the products are kept:

    sum_k sum_l (g+_k . g-_l)(h+_k . h-_l) - sum_k sum_k' (g+_k . g+_k')(h+_k . h+_k')
        = < grad log pi(y+), grad log pi(y-) > - || grad log pi(y+) ||^2      by the LM head's weight,

which is exactly minus the first-order change of log pi(y+ | x) where the head alone takes a unit gradient step on the
margin log pi(y+ | x) - log pi(y- | x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_dynamics.kernel.last_layer import last_layer_table
from llm_dynamics.kernel.output_head import OutputHead, output_head
from llm_dynamics.kernel.residuals import EXACT_RULE, ResidualRule
from llm_dynamics.kernel.token_states import HeadTokens, TokenStates
from llm_dynamics.likelihood.head import SplitModel
from llm_dynamics.likelihood.packing import TokenizedResponse
from llm_dynamics.likelihood.scoring import DEFAULT_BATCH_TOKENS


@dataclass(frozen=True)
class ChesScores:
    """Scores of P preference pairs; each field is (P,), float32, or float64 for float64 hidden states.

    Attributes:
        ches: The score as a sum over tokens; grows with the responses' lengths.
        normalised: The length-normalised score, by which [CHES] filters data (it keeps the lowest 5%).
    """

    ches: Tensor
    normalised: Tensor


def pair_scores(
    chosen: HeadTokens, rejected: HeadTokens, head: OutputHead | None = None, *, rule: ResidualRule = EXACT_RULE
) -> ChesScores:
    """Compute CHES of P pairs from their tokens.

    Args:
        chosen: Tokens of the P chosen responses.
        rejected: Tokens of the P rejected responses, in the same order.
        head: The LM head, to keep the products of residuals; None: plain CHES, which needs hidden states only.
        rule: With `head`: which residual.

    Returns:
        The scores, on the device of the hidden states.

    Raises:
        ValueError: Where the numbers of responses differ.
    """
    pairs = len(chosen.lengths)
    if len(rejected.lengths) != pairs:
        raise ValueError(
            f"every pair needs one chosen and one rejected response; seen {pairs} and {len(rejected.lengths)}"
        )
    n_chosen, n_rejected = (side.lengths.to(chosen.hidden.device) for side in (chosen, rejected))
    if head is None:
        plus, minus = _sums(chosen), _sums(rejected)
        cross, own = torch.linalg.vecdot(plus, minus), torch.linalg.vecdot(plus, plus)
    else:
        rows = [_pair(chosen, rejected, i, head, rule) for i in range(pairs)]
        cross, own = torch.tensor(rows, dtype=head.dtype, device=chosen.hidden.device).T
    return ChesScores(cross - own, cross / (n_chosen * n_rejected) - own / n_chosen.square())


def ches_scores(
    model: nn.Module,
    chosen: Sequence[TokenizedResponse],
    rejected: Sequence[TokenizedResponse],
    *,
    residuals: bool = False,
    rule: ResidualRule = EXACT_RULE,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    split: SplitModel | None = None,
) -> ChesScores:
    """Compute CHES of P preference pairs under `model` (for [CHES], the model before preference training).

    Args:
        model: A Hugging Face causal LM, PEFT adapters and TRL's fused head included.
        chosen: P chosen responses.
        rejected: P rejected responses, in the same order.
        residuals: Keep the products of residuals, see the module; costs two passes over the vocabulary for each pair.
        rule: With `residuals`: which residual.
        batch_tokens: Most tokens in one forward, padding included.
        split: The model's halves from `split_model`, to save the check.

    Returns:
        The scores, on the CPU.

    Raises:
        ValueError: For bad responses, or where their numbers differ.
        NotImplementedError: For models that cannot be split into backbone and head.
    """
    plus = TokenStates(model, chosen, batch_tokens=batch_tokens, split=split)
    minus = TokenStates(model, rejected, batch_tokens=batch_tokens, split=plus.split)
    head = output_head(plus.split) if residuals else None
    scores = pair_scores(plus.values(), minus.values(), head, rule=rule)
    return ChesScores(scores.ches.cpu(), scores.normalised.cpu())


def _sums(tokens: HeadTokens) -> Tensor:
    """Sum the hidden states of each response, (P, d)."""
    hidden = tokens.hidden if tokens.hidden.dtype == torch.float64 else tokens.hidden.float()
    zeros = torch.zeros(len(tokens.lengths), hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    return zeros.index_add_(0, tokens.owner.to(hidden.device), hidden)


def _pair(
    chosen: HeadTokens, rejected: HeadTokens, pair: int, head: OutputHead, rule: ResidualRule
) -> tuple[float, float]:
    """Return the two terms of one pair."""
    plus, minus = chosen.of_response(pair), rejected.of_response(pair)
    both = HeadTokens(
        torch.cat([plus.hidden, minus.hidden]),
        torch.cat([plus.labels, minus.labels]),
        torch.tensor([len(plus.labels), len(minus.labels)]),
    )
    table = last_layer_table(head, plus, both, rule=rule)
    own, cross = table.split(both.lengths.tolist(), dim=1)
    return cross.sum().item(), own.sum().item()
