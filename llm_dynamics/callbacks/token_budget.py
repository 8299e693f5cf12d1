"""Which probes keep their token tables when not all fit the budget."""

from __future__ import annotations

import random

import pandas as pd

BYTES_PER_TOKEN_ROW = 70.0
"""Measured on SmolLM2-135M, zstd, 1,000 to 5,000 rows a part: 52 to 61 bytes a row."""
BYTES_PER_PART = 12_000.0
"""Parquet's own bytes of a part with these columns."""


def choose_token_probes(probes: pd.DataFrame, observations: int, budget: float, *, seed: int) -> list[str] | str:
    """Choose the probes that keep token statistics.

    Whole prompts are kept or left, so that families can be compared token by token.

    Args:
        probes: The probes table; `probe_id`, `prompt_id` and `response_ids` are read.
        observations: Observations that the run will make.
        budget: Bytes that the token tables may take.
        seed: Seed of the order in which prompts are drawn.

    Returns:
        "all", or the ids of the chosen probes in the table's order; empty where nothing fits.
    """
    rows = (budget / observations - BYTES_PER_PART) / BYTES_PER_TOKEN_ROW
    lengths = probes["response_ids"].map(len)
    if lengths.sum() <= rows:
        return "all"
    by_prompt = lengths.groupby(probes["prompt_id"]).sum().sort_index()
    order = list(by_prompt.index)
    random.Random(seed).shuffle(order)
    kept: set[str] = set()
    for prompt in order:
        if by_prompt[prompt] <= rows:
            kept.add(prompt)
            rows -= by_prompt[prompt]
    return probes.loc[probes["prompt_id"].isin(kept), "probe_id"].tolist()
