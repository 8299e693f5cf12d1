"""Prompts of training examples as people read them: without the template that all of them share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from llm_dynamics.report.text import prompt_line, prompt_text

_LEAST = 8
"""Characters that must be shared before any is left out."""


class Prompts:
    """Writes the prompts of a run's training examples as one line each.

    A probe's prompt is written as the probe set has it. Other prompts were decoded from what the model was fed, chat
    template included: what all of them begin with and end with is left out, and an ellipsis stands for it.

    Args:
        examples: Columns of `schema.TRAINING_EXAMPLES`.
        probes: Columns of `schema.PROBES`.
    """

    def __init__(self, examples: pd.DataFrame, probes: pd.DataFrame) -> None:
        self._known: Mapping[Any, str] = dict(zip(probes["prompt_id"], probes["prompt"], strict=True))
        # a chat is kept as JSON, and `prompt_line` reads that
        fed = [prompt for prompt in examples["prompt"].dropna().unique() if prompt_text(prompt) == prompt]
        self._begin, self._end = _shared(fed)

    def line(self, prompt: Any, prompt_id: Any, longest: int = 90) -> str:
        """Return a prompt as one short line, visible; "" where there is none.

        Args:
            prompt: As in `schema.TRAINING_EXAMPLES`, or not a text.
            prompt_id: Id of the probes with this prompt, or not a text.
            longest: Most characters.
        """
        if isinstance(prompt_id, str) and isinstance(self._known.get(prompt_id), str):
            return prompt_line(self._known[prompt_id], longest)
        if not isinstance(prompt, str):
            return ""
        cut = prompt.removeprefix(self._begin) if self._begin else prompt
        text = cut.removesuffix(self._end) if self._end else cut
        return prompt_line(text if cut == prompt else f"…{text}", longest)


def _shared(texts: Sequence[str]) -> tuple[str, str]:
    """Return what all texts begin with, to a line's or a word's end, and what all end with, the punctuation kept."""
    if len(texts) < 2:
        return "", ""
    begin = _common_start(texts)
    begin = begin[: max(begin.rfind("\n"), begin.rfind(">"), begin.rfind(" ") if "\n" not in begin else -1) + 1]
    end = _common_start([text[len(begin) :][::-1] for text in texts])[::-1]
    end = re.sub(r"^[\w\s.,;:!?'\")\]}…]*", "", end)
    return begin if len(begin) >= _LEAST else "", end if len(end) >= _LEAST else ""


def _common_start(texts: Sequence[str]) -> str:
    low, high = min(texts), max(texts)  # all others lie between these two, and share what they share
    n = next((place for place, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))
    return low[:n]
