"""A probe set as tables: a summary by family, a data frame, a `datasets.Dataset`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from datasets import Dataset

from llm_dynamics.probes.families import FAMILY_ORDER
from llm_dynamics.probes.probe import DroppedProbe, Probe, prompt_as_text
from llm_dynamics.probes.rows import NOT_GIVEN
from llm_dynamics.probes.tokenization import EncodedProbe


def summarise(probes: Sequence[Probe], dropped: Sequence[DroppedProbe], made_by: Mapping[str, Any]) -> pd.DataFrame:
    """Return one row per family that has a probe or a drop; see `ProbeSet.summary`."""
    lines = []
    for family in FAMILY_ORDER:
        members = [probe for probe in probes if probe.family == family]
        reasons = Counter(item.reason for item in dropped if item.family == family)
        not_given = reasons.pop(NOT_GIVEN, 0)
        if not members and not reasons and not not_given:
            continue
        lines.append(
            {
                "family": family,
                "n": len(members),
                "prompts": len({probe.prompt_id for probe in members}),
                "dropped": sum(reasons.values()),
                "not_given": not_given,
                "mean_chars": _mean([len(probe.response) for probe in members]),
                "mean_words": _mean([len(probe.response.split()) for probe in members]),
                "made_by": _provenance(made_by.get(family, {})),
                "drop_reasons": "; ".join(f"{reason}: {n}" for reason, n in reasons.items()),
            }
        )
    return pd.DataFrame(lines).set_index("family")


def as_frame(probes: Sequence[Probe]) -> pd.DataFrame:
    """Return one row per probe; see `ProbeSet.to_frame`."""
    return pd.DataFrame(
        {
            "probe_id": [probe.probe_id for probe in probes],
            "prompt_id": [probe.prompt_id for probe in probes],
            "family": [probe.family for probe in probes],
            "prompt": [prompt_as_text(probe.prompt) for probe in probes],
            "response": [probe.response for probe in probes],
            "source_row": pd.array([probe.source_row for probe in probes], dtype="Int64"),
            "response_ids": pd.Series([probe.response_ids for probe in probes], dtype=object),
        }
    )


def as_dataset(probes: Sequence[Probe]) -> Dataset:
    """Return one row per probe; see `ProbeSet.to_dataset`.

    Raises:
        ValueError: If some prompts are chat and others are text: one column cannot hold both.
    """
    if len({isinstance(probe.prompt, str) for probe in probes}) > 1:
        raise ValueError("Some prompts are chat messages and others text; split the set with `select` first.")
    return Dataset.from_list(
        [
            {
                "probe_id": probe.probe_id,
                "prompt_id": probe.prompt_id,
                "prompt": probe.prompt if isinstance(probe.prompt, str) else [dict(m) for m in probe.prompt],
                "response": probe.response,
                "family": probe.family,
                "source_row": probe.source_row,
                "response_ids": None if probe.response_ids is None else list(probe.response_ids),
            }
            for probe in probes
        ]
    )


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _provenance(made_by: Mapping[str, Any]) -> str:
    """Return how a family was made, in a few words."""
    details = ", ".join(
        f"{key} {value}" for key, value in made_by.items() if key not in ("made_by", "columns", "seed", "join")
    )
    columns = " and ".join(made_by.get("columns", []))
    return " ".join(part for part in (made_by.get("made_by", ""), columns, f"({details})" if details else "") if part)


def probe_table(probes: Sequence[Probe], encoded: Sequence[EncodedProbe]) -> pd.DataFrame:
    """Return what was scored: one row per encoded probe, in the order of `encoded`.

    Args:
        probes: The probe set.
        encoded: Its probes as `encode_probes` left them; dropped ones are absent.

    Returns:
        The columns of `runlog.schema.PROBES`; a chat prompt is JSON.
    """
    by_id = {probe.probe_id: probe for probe in probes}
    scored = [by_id[item.probe_id] for item in encoded]
    return pd.DataFrame(
        {
            "probe_id": [probe.probe_id for probe in scored],
            "prompt_id": [probe.prompt_id for probe in scored],
            "family": [probe.family for probe in scored],
            "prompt": [
                probe.prompt
                if isinstance(probe.prompt, str)
                else json.dumps([dict(message) for message in probe.prompt], ensure_ascii=False)
                for probe in scored
            ],
            "response": [probe.response for probe in scored],
            "source_row": pd.Series([probe.source_row for probe in scored], dtype=object),
            "prompt_ids": [list(item.prompt_ids) for item in encoded],
            "response_ids": [list(item.response_ids) for item in encoded],
            "n_cut": [item.n_cut for item in encoded],
        }
    )
