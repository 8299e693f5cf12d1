"""What the section "Which tokens?" shows: every probe to search in, and the token detail of as many as fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_dynamics.report.families import ordered, style_of
from llm_dynamics.report.probe_index import ProbeIndex
from llm_dynamics.report.text import visible
from llm_dynamics.report.token_blocks import LEVELS, RESOLUTIONS, TokenBlocks, token_blocks
from llm_dynamics.report.token_table import MAX_CELLS, TokenTable, read_token_table
from llm_dynamics.runlog import RunLogs

MAX_CHARS = 6_500_000
"""Characters of the section's data: with plotly.js (4.9 million) and the other sections, a page stays below 15 MB."""
MAX_INDEX_CHARS = 2_000_000
"""Of these, what the probes' texts may take."""


@dataclass(frozen=True)
class TokenSection:
    """What the page needs to show tokens.

    Attributes:
        data: The index of all probes, then one block per probe with token detail: a packed text a line.
        view: What the template says.
    """

    data: str
    view: dict[str, Any]


def token_section(runs: RunLogs, max_chars: int = MAX_CHARS) -> TokenSection:
    """Pack the probes of some runs.

    Args:
        runs: The runs. The probe that is shown first is the last run's: in a pipeline it is the one that people came to
            see.
        max_chars: Characters of the data at most, of which every run gets the same share; what one leaves over goes to
            the larger ones. The texts of all probes and one block per run are kept whatever their size.

    Returns:
        The section.
    """
    index = ProbeIndex(runs)
    cells = MAX_CELLS // len(runs.runs)
    tables = {name: table for name, run in runs.runs.items() if (table := read_token_table(run, cells)) is not None}
    dictionary = {"": 0}
    # the index is packed twice: to know what room it leaves, and with the places of the blocks that fit
    sketch = {(name, probe): place for name, table in tables.items() for place, probe in enumerate(table.probe_ids)}
    texts = {"strings": [text for table in tables.values() for text in table.strings]}
    size = len(index.packed(sketch, texts, min(MAX_INDEX_CHARS, max_chars // 3)))
    kept = _packed_runs(tables, dictionary, max_chars - int(1.05 * size) - 1000)
    places: dict[tuple[str, str], int] = {}
    blocks: list[str] = []
    for name, own in kept.items():
        for probe_id, block in zip(own.probe_ids, own.blocks, strict=True):
            blocks.append(block)
            places[name, probe_id] = len(blocks)
    last = next((name for name in reversed(list(runs.runs)) if name in kept), None)
    more = {
        "strings": [visible(text.replace("\r", "␍")) for text in dictionary],
        "levels": LEVELS,
        "resolutions": RESOLUTIONS,
        "steps": {name: own.steps for name, own in kept.items()},
        "first": index.place(last, kept[last].probe_ids[0]) if last else 0,
    }
    data = index.packed(places, more, max_chars - sum(map(len, blocks)))
    families = ordered({family for run in runs.runs.values() for family in run.probes["family"]})
    view = {
        "n_probes": index.n_probes,
        "n_detailed": len(blocks),
        "runs": list(runs.runs),
        "families": [{"name": family, "style": style_of(family)} for family in families],
        "notes": [*_notes(runs, kept), *_cut_note(index)],
    }
    return TokenSection("\n".join([data, *blocks]), view)


def _packed_runs(tables: dict[str, TokenTable], dictionary: dict[str, int], room: int) -> dict[str, TokenBlocks]:
    """Pack the runs, the smallest first, and return them in the order of `tables`."""
    kept = {}
    by_size = sorted(tables, key=lambda name: tables[name].logp.size)
    for place, name in enumerate(by_size):
        kept[name] = token_blocks(tables[name], dictionary, room // (len(by_size) - place))
        room -= sum(map(len, kept[name].blocks))
    return {name: kept[name] for name in tables}


def _notes(runs: RunLogs, kept: dict[str, TokenBlocks]) -> list[str]:
    """Say what the log or the page lacks."""
    notes = []
    for name, run in runs.runs.items():
        n_probes, n_steps = len(run.probes), len(run.observed_steps)
        own = kept.get(name)
        if own is None:
            notes.append(f"{name} kept no tokens in its log.")
            continue
        if own.n_probes < n_probes:
            notes.append(f"{name} kept tokens of {own.n_probes} of its {n_probes} probes in its log.")
        if len(own.blocks) < own.n_probes:
            notes.append(
                f"{name}: tokens of {len(own.blocks)} of the {own.n_probes} probes that kept them fit into this page, "
                "those of the prompts that moved most."
            )
        if len(own.steps) < own.n_steps:
            notes.append(
                f"{name}: {len(own.steps)} of the {own.n_steps} observations with tokens fit into this page, evenly "
                "spaced, the first and the last among them."
            )
        elif own.n_steps < n_steps:
            notes.append(f"{name} kept tokens at {own.n_steps} of its {n_steps} observations.")
    return notes


def _cut_note(index: ProbeIndex) -> list[str]:
    if index.cut_to is None:
        return []
    return [f"Prompts and responses are cut to {index.cut_to:,} characters; the search sees no more."]
