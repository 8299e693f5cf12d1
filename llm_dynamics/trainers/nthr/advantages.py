"""What each method makes of a batch's advantages: (B,) of responses in, (B, T) of tokens out.

All are pure; B responses, T positions. A token "counts" where the loss takes it: it is no padding, no tool output and
in no truncated response that is masked.
"""

from __future__ import annotations

import torch
from torch import Tensor


def by_token(advantages: Tensor, length: int) -> Tensor:
    """Give every token its response's advantage: (B,) to (B, T)."""
    return advantages[:, None].expand(-1, length).clone()


def selected_tokens(advantages: Tensor, scores: Tensor, thresholds: Tensor, candidates: Tensor) -> Tensor:
    """Tell which tokens NTHR selects: those of wrong responses with a penalty and a score above the threshold.

    Args:
        advantages: A, (B,). A wrong response without a penalty (A >= 0, as with rewards of many values) is left alone.
        scores: s of each token, (B, T); anything where it is no candidate.
        thresholds: tau of each response's group, (B,).
        candidates: Tokens of wrong responses of mixed groups that count, (B, T), bool.

    Returns:
        (B, T), bool.
    """
    return candidates & (advantages < 0)[:, None] & (scores > thresholds[:, None])


def downweighted(advantages: Tensor, selected: Tensor, etas: Tensor) -> Tensor:
    """Multiply the advantage of selected tokens with eta ([NTHR]; "random", with tokens drawn otherwise).

    Args:
        advantages: A, (B,).
        selected: Which tokens, (B, T), bool.
        etas: eta of each response's group, (B,).

    Returns:
        (B, T).
    """
    return torch.where(selected, (etas * advantages)[:, None], by_token(advantages, selected.shape[1]))


def thr(
    advantages: Tensor, scores: Tensor, thresholds: Tensor, correct: Tensor, mixed: Tensor, q: float
) -> tuple[Tensor, Tensor]:
    """Reweight tokens by their hidden reward ([THR]): A <- 1[|THR| > tau] (1 + sign(THR) q) A, in mixed groups.

    Args:
        advantages: A, (B,).
        scores: s of each token, (B, T), with w_i = 1/|y_i|; THR = s in correct responses, -s in wrong ones.
        thresholds: tau of each response's group, (B,).
        correct: Which responses are correct, (B,), bool.
        mixed: Which tokens count and belong to a mixed group, (B, T), bool; others keep their advantage.
        q: Strength.

    Returns:
        The advantages and the hidden rewards (THR), (B, T) each.
    """
    reward = torch.where(correct[:, None], scores, -scores)
    kept = (reward.abs() > thresholds[:, None]).to(advantages)
    plain = by_token(advantages, scores.shape[1])
    return torch.where(mixed, kept * (1 + reward.sign() * q) * plain, plain), reward


def pos_only(advantages: Tensor, length: int) -> Tensor:
    """Drop penalties: A <- max(A, 0)."""
    return by_token(advantages.clamp(min=0), length)


def w_reinforce(correct: Tensor, known: Tensor, weight: float, length: int) -> Tensor:
    """Replace advantages by a reward without group normalisation: `weight` if correct, -1 if wrong ([NSR]: weight 0).

    Args:
        correct: Which responses are correct, (B,), bool.
        known: Which responses have a reward at all, (B,), bool; others have advantage 0.
        weight: Of correct responses.
        length: T.

    Returns:
        (B, T), float32.
    """
    reward = torch.where(correct, weight, -1.0) * known
    return by_token(reward.float(), length)


def random_tokens(count: int, lengths: list[int], seed: int) -> list[Tensor]:
    """Draw tokens of several responses at random, without replacement.

    Args:
        count: How many in all, at most the sum of `lengths`.
        lengths: Tokens of each response.
        seed: The draw depends on nothing else.

    Returns:
        For each response, which of its tokens were drawn, (length,), bool.
    """
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(sum(lengths), dtype=torch.bool)
    drawn[torch.randperm(len(drawn), generator=draw)[:count]] = True
    return list(drawn.split(lengths))
