"""How to read the probe file released with *Learning Dynamics of LLM Finetuning* (ICLR 2025)."""

from __future__ import annotations

from types import MappingProxyType

from llm_dynamics.probes.rows import Columns, DropIf

HH_COLUMNS: Columns = MappingProxyType(
    {
        "chosen": "chosen",
        "rejected": "rejected",
        "chosen_initial": "chosen_initial",
        "chosen_semantic": "chosen_gptsemantic",
        "rejected_semantic": "reject_gptsemantic",
        "chosen_format": "chosen_gptformat",
        "rejected_format": "reject_gptformat",
        "chosen_selfr": "chosen_selfr",
        "other_train": ("irr_train", "irr_test"),
        "human_random": "irr_hum",
        "ungrammatical": "random_permute",
        "random": "random_nonhum",
    }
)
"""Families of the probe file released with *Learning Dynamics of LLM Finetuning*.

Its `irr_test` was drawn from the *training* split, so it is a second `other_train` (`<prompt_id>/other_train-2`), not
`other_test`; `random_nonhum` is its words shuffled.
"""

HH_DROP_IF: DropIf = MappingProxyType({"chosen_selfr": "@@@"})
"""Most `chosen_selfr` of that file are the rephrasing prompt's own few-shot text, marked by `@@@`; this drops them."""
