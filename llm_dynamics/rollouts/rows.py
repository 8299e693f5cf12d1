"""Rollouts as plain responses: what the exact kernel and the log read of a padded batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from llm_dynamics.likelihood.packing import TokenizedResponse


@dataclass(frozen=True)
class LossRow:
    """One completion of a batch.

    Attributes:
        response: Its prompt and completion ids, without padding.
        counted: Which completion tokens the loss takes, (length,), bool, on the CPU.
        spans: The same as runs (start, stop).
    """

    response: TokenizedResponse
    counted: Tensor
    spans: list[tuple[int, int]]


def loss_rows(batch: Mapping[str, Any], mask: Tensor) -> list[LossRow]:
    """Take the padding off a batch of rollouts.

    Args:
        batch: `prompt_ids`, `prompt_mask`, `completion_ids`, each (B, ...), as TRL's trainers make them.
        mask: Which completion tokens the loss takes, (B, T), bool.

    Returns:
        B rows; a completion reaches to its last token that counts.
    """
    rows = []
    prompts = zip(batch["prompt_ids"].cpu(), batch["prompt_mask"].cpu().bool(), strict=True)
    for (prompt, seen), ids, counted in zip(prompts, batch["completion_ids"].cpu(), mask.cpu(), strict=True):
        places = counted.nonzero()[:, 0].tolist()
        length = places[-1] + 1 if places else 0
        response = SimpleNamespace(prompt_ids=prompt[seen].tolist(), response_ids=ids[:length].tolist())
        rows.append(LossRow(response, counted[:length], _runs(places)))
    return rows


def _runs(places: list[int]) -> list[tuple[int, int]]:
    starts = [place for i, place in enumerate(places) if i == 0 or places[i - 1] != place - 1]
    stops = [place + 1 for i, place in enumerate(places) if i + 1 == len(places) or places[i + 1] != place + 1]
    return list(zip(starts, stops, strict=True))
