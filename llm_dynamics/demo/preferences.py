"""The demo's preference pairs: hand-written for this project, shipped in it (`llm_dynamics/data/README.md`)."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

SYSTEM = "Answer in one sentence."
"""Also spares the model's own system prompt, three times as long, in every forward of the demo."""
REPHRASED = ("chosen_semantic", "rejected_semantic", "chosen_format", "rejected_format")
COLUMNS = {"chosen": "chosen", "rejected": "rejected", "human_random": "human_random"} | {n: n for n in REPHRASED}


def load_preferences(split: str) -> list[dict[str, Any]]:
    """Return the rows of a split in TRL's conversational form.

    Args:
        split: "train" or "test".

    Returns:
        Rows with `prompt`, `chosen` and `rejected` as chat messages, and the texts of `human_random` and, in some rows,
        of the four rephrases (None elsewhere).

    Raises:
        ValueError: For another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split is {split!r}; allowed: "train", "test"')
    text = files("llm_dynamics.data").joinpath("demo_preferences.jsonl").read_text(encoding="utf-8")
    rows = [row for row in map(json.loads, text.splitlines()) if row["split"] == split]
    return [
        {
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
            "topic": row["topic"],
            "human_random": row["human_random"],
            **{name: row.get(name) for name in REPHRASED},
        }
        for row in rows
    ]
