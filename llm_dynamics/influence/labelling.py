"""Labellings of training tokens: which part of the gradient a token's share goes to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_dynamics.influence.tape import Labelling, MicroBatch


def by_sign(batch: MicroBatch) -> Mapping[str, Tensor]:
    """Label tokens by the sign of c_l: "up" (c < 0, pulled up) and "down" (c > 0, pushed down)."""
    return {"up": batch.c < 0, "down": batch.c > 0}


def by_example(batch: MicroBatch) -> Mapping[str, Tensor]:
    """Label tokens by their example, counted over the whole step: "example_0", "example_1", ..."""
    return {f"example_{k}": batch.example == k for k in batch.example.unique().tolist()}


def by_halves(first: str, second: str) -> Labelling:
    """Label tokens by the half of the micro-batch that their example is in: DPO's batches have chosen first.

    Args:
        first: Name of the first half, such as "chosen".
        second: Name of the second.

    Returns:
        The labelling.
    """

    def label(batch: MicroBatch) -> Mapping[str, Tensor]:
        place = batch.example - batch.example.min()
        in_first = 2 * place < place.max() + 1
        return {first: in_first, second: ~in_first}

    return label


def by_push(pulled: str, pushed: str) -> Labelling:
    """Label tokens by whether the loss raises or lowers their example, the sign of sum_l c_l over it.

    Under GRPO and RLOO that is the sign of the advantage, under KTO the desirability of the completion.

    Args:
        pulled: Name of the examples whose coefficients sum to less than zero, such as "correct"; those with no
            coefficient at all are among them.
        pushed: Name of the others, such as "wrong".

    Returns:
        The labelling.
    """

    def label(batch: MicroBatch) -> Mapping[str, Tensor]:
        total = torch.zeros(int(batch.example.max()) + 1, dtype=batch.c.dtype, device=batch.c.device)
        total.index_add_(0, batch.example.flatten(), batch.c.flatten())
        is_pushed = total[batch.example] > 0
        return {pulled: ~is_pushed, pushed: is_pushed}

    return label


def as_one(name: str) -> Labelling:
    """Give all tokens one label.

    Args:
        name: The label.

    Returns:
        The labelling.
    """
    return lambda batch: {name: torch.ones_like(batch.labels, dtype=torch.bool)}
