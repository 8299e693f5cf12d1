"""GWHES: how much a GRPO step on one question pushes its own correct responses down, by the LM head alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gwhes(products: Tensor, correct: Tensor) -> float:
    """Compute the group weighted hidden embedding score of a question.

    With M_i = sum over tokens of response i of g h^T (V, d), P and N the correct and wrong responses, p = |P| / G:

        GWHES = 1/|P| sum_{i in P} [ p_minus sum_{j in N} <M_i, M_j> - p_plus sum_{i' in P} <M_i, M_i'> ]
        p_minus = p / sqrt(p (1 - p)),   p_plus = (1 - p) / sqrt(p (1 - p))

    the negative of what one gradient step would do to the mean log-prob of correct responses if only the LM head learnt
    and each token had its response's advantage. High: the question displaces its correct answers. After [NTHR] (Deng et
    al., arXiv 2505.18830), who rank questions with it.

    Args:
        products: <M_i, M_j>, (G, G), as `anchor_products(...).products`.
        correct: Which responses are correct, (G,), bool.

    Returns:
        The score.

    Raises:
        ValueError: Where the group is not mixed.

    Example:
        >>> gwhes(torch.eye(2), torch.tensor([True, False]))
        -1.0
    """
    p = float(correct.double().mean())
    if not 0 < p < 1:
        raise ValueError(f"the group has {int(correct.sum())} correct responses of {len(correct)}; it must be mixed")
    wide = products.double().cpu()
    correct = correct.cpu()
    spread = math.sqrt(p * (1 - p))
    down = p / spread * wide[correct][:, ~correct].sum()
    up = (1 - p) / spread * wide[correct][:, correct].sum()
    return float((down - up) / torch.count_nonzero(correct))
