"""A task for reinforcement that a small model gets right about half of the time: products of two digits."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

QUESTION = "What is {a} x {b}? Answer in one short sentence."


def product_questions(seed: int = 0) -> list[dict[str, Any]]:
    """Return the questions for all pairs of digits from 2 to 9, shuffled.

    Args:
        seed: Of the order.

    Returns:
        64 rows with `prompt` (a chat of one message) and `answer`, the product.
    """
    rows = [
        {"prompt": [{"role": "user", "content": QUESTION.format(a=a, b=b)}], "answer": a * b}
        for a in range(2, 10)
        for b in range(2, 10)
    ]
    random.Random(seed).shuffle(rows)
    return rows


def product_pairs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a right and a wrong answer to each question, to be watched.

    Args:
        rows: As `product_questions` returns them.

    Returns:
        Rows with `prompt`, `chosen` and `rejected`, as texts.
    """
    pairs = []
    for row in rows:
        asked = row["prompt"][0]["content"].split("?")[0].removeprefix(QUESTION.split("{")[0])
        pairs.append(
            {
                "prompt": row["prompt"],
                "chosen": f"{asked} is {row['answer']}.",
                "rejected": f"{asked} is {row['answer'] + 2}.",
            }
        )
    return pairs


def product_reward(completions: Sequence[Any], answer: Sequence[int], **kwargs: Any) -> list[float]:
    """Reward a completion whose last whole number is the product: 1, else 0.

    Args:
        completions: Texts, or chats of one message, as TRL hands them over.
        answer: The products.
        **kwargs: What else TRL hands over.

    Returns:
        One reward each.
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    numbers = [re.findall(r"\d+", text.replace(",", "")) for text in texts]
    return [float(bool(n) and int(n[-1]) == right) for n, right in zip(numbers, answer, strict=True)]


def letter_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """Reward a completion with an "e" in it, which an untrained model writes now and then: 1, else 0."""
    return [float("e" in (c if isinstance(c, str) else c[-1]["content"])) for c in completions]
