"""The rows of the study: which of the released probe rows are trained on, and what is watched."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from settings import FAMILIES, Size
from transformers import PreTrainedTokenizerBase

from llm_dynamics import ProbeSet
from llm_dynamics.demo.preferences import load_preferences
from llm_dynamics.probes.hh import HH_COLUMNS

Row = dict[str, Any]


@dataclass(frozen=True)
class StudyRows:
    """Pairs to train on, and the probes.

    Attributes:
        pairs: Rows of `prompt`, `chosen`, `rejected` and the columns of the released file.
        probes: Responses to some of the training prompts.
        source: Name of the file, for the tables.
    """

    pairs: list[Row]
    probes: ProbeSet
    source: str


def study_rows(size: Size, tokenizer: PreTrainedTokenizerBase, seed: int, file: Path | None) -> StudyRows:
    """Draw the rows of one seed.

    Args:
        size: How many, and how long at most.
        tokenizer: Counts the tokens.
        seed: Of the draw: training rows, watched prompts, partners of `other_test`.
        file: The released probe file; None: the package's own pairs in its place, for a check that the code runs.

    Returns:
        Pairs and probes.

    Raises:
        ValueError: If the file has too few rows that are short enough.
    """
    if file is None:
        rows, columns = _built_in_rows(), {name: name for name in ("chosen", "rejected")}
    else:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        columns = {name: HH_COLUMNS[name] for name in FAMILIES if name in HH_COLUMNS}
        columns["other_train"] = HH_COLUMNS["other_train"][0]
        limits = {"prompt": size.prompt_tokens, "chosen": size.response_tokens, "rejected": size.response_tokens}
        limits = dict.fromkeys(columns.values(), 2 * size.response_tokens) | limits
        rows = [row for row in rows if _fits(row, limits, tokenizer)]
    if len(rows) <= size.pairs:
        raise ValueError(f"{len(rows)} rows fit into {size}; {size.pairs} are to be trained on and some held out")
    order = np.random.default_rng(seed).permutation(len(rows))
    shuffled = [rows[place] for place in order]
    pairs, held_out = shuffled[: size.pairs], shuffled[size.pairs :]
    probes = ProbeSet.from_records(
        pairs, columns=columns, n_prompts=size.prompts, seed=seed, source={"kind": str(file and file.name)}
    )
    offline = [name for name in FAMILIES if name not in columns and name in _OFFLINE]
    for name in offline:
        probes = probes.add_family(name, training_rows=pairs, held_out=held_out, tokenizer=tokenizer, seed=seed)
    return StudyRows(pairs, probes, "the package's own pairs" if file is None else file.name)


_OFFLINE = ("other_train", "other_test", "ungrammatical", "random")


def _built_in_rows() -> list[Row]:
    return [
        {"prompt": row["prompt"][-1]["content"], **{name: row[name][-1]["content"] for name in ("chosen", "rejected")}}
        for row in load_preferences("train")
    ]


def _fits(row: Row, limits: dict[str, int], tokenizer: PreTrainedTokenizerBase) -> bool:
    lengths = {column: len(tokenizer(row[column] or "")["input_ids"]) for column in limits}
    return all(lengths[column] <= limit for column, limit in limits.items()) and min(lengths.values()) >= 4
