"""What the page's search knows of every probe: family, texts, change, and where its tokens are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from llm_dynamics.report.packing import packed_bytes
from llm_dynamics.report.text import prompt_text, rounded, visible
from llm_dynamics.runlog import RunLog, RunLogs

LONGEST = (20_000, 4_000, 1_000, 300, 80)
"""Characters that are kept of a prompt or a response: the first of these with which the index fits."""


class ProbeIndex:
    """Every probe of some runs: their texts, each kept once, and the columns of a table.

    Attributes:
        n_probes: Probes of all runs.
        cut_to: Characters kept of a longer text; None where none had to be cut.
    """

    def __init__(self, runs: RunLogs) -> None:
        tables = [_probes(name, run) for name, run in runs.runs.items()]
        self._table = pd.concat(tables, ignore_index=True)
        self._texts = _Places(_texts(self._table))
        self._runs, self._families = _Places(self._table["run"]), _Places(self._table["family"])
        self._groups = _Places(zip(self._table["run"], self._table["prompt_id"], strict=True))
        self.n_probes = len(self._table)
        self.cut_to: int | None = None

    def place(self, run: str, probe_id: str) -> int:
        """Return the place of a probe in the index.

        Raises:
            KeyError: Where the run has no such probe.
        """
        found = self._table.index[(self._table["run"] == run) & (self._table["probe_id"] == probe_id)]
        if not len(found):
            raise KeyError(f"run {run!r} has no probe {probe_id!r}")
        return int(found[0])

    def as_json(self, blocks: Mapping[tuple[str, str], int], longest: int) -> dict[str, Any]:
        """Return the index as plain JSON types.

        Args:
            blocks: The place of each block by run and probe; a probe that is not in it has no token detail.
            longest: Characters to keep of each text.

        Returns:
            `texts`, `families`, `runs`, and `probes`: columns `run`, `family`, `prompt`, `response` (places in these
            lists), `group` (probes of one prompt and run share it), `id`, `change` (nats, of the summed log-prob from
            the first observation to the last; null where not finite) and `block` (-1 without token detail).
        """
        table = self._table
        return {
            "texts": [_cut(text, longest) for text in self._texts],
            "families": list(self._families),
            "runs": list(self._runs),
            "probes": {
                "run": self._runs.of(table["run"]),
                "family": self._families.of(table["family"]),
                "prompt": self._texts.of(table["prompt"]),
                "response": self._texts.of(table["response"]),
                "group": self._groups.of(zip(table["run"], table["prompt_id"], strict=True)),
                "id": table["probe_id"].tolist(),
                "change": [rounded(change) for change in table["change"]],
                "block": [blocks.get(key, -1) for key in zip(table["run"], table["probe_id"], strict=True)],
            },
        }

    def packed(self, blocks: Mapping[tuple[str, str], int], more: Mapping[str, Any], max_chars: int) -> str:
        """Return the index and what else the script needs as one compressed text, its texts cut until it fits.

        Args:
            blocks: As for `as_json`.
            more: Further keys of the JSON object.
            max_chars: Characters of the packed text; with texts of the least length it is returned whatever its size.
        """
        longest_text = max((len(text) for text in self._texts), default=0)
        content = ""
        for longest in LONGEST:
            value = {**more, **self.as_json(blocks, longest)}
            content = packed_bytes(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())
            self.cut_to = longest if longest_text > longest else None
            if len(content) <= max_chars:
                break
        return content


class _Places(dict[Any, int]):
    """Distinct values in the order they came, by place."""

    def __init__(self, values: Iterable[Any]) -> None:
        super().__init__((value, place) for place, value in enumerate(dict.fromkeys(values)))

    def of(self, values: Iterable[Any]) -> list[int]:
        return [self[value] for value in values]


def _probes(name: str, run: RunLog) -> pd.DataFrame:
    table = run.probes[["probe_id", "prompt_id", "family"]].assign(run=name)
    table["prompt"] = [_shown(prompt_text(prompt)) for prompt in run.probes["prompt"].fillna("")]
    table["response"] = [_shown(response) for response in run.probes["response"].fillna("")]
    moved = run.delta_from_start()
    last = moved[moved["step"] == moved["step"].max()].drop_duplicates("probe_id")
    return table.assign(change=table["probe_id"].map(last.set_index("probe_id")["delta_logp_sum"]))


def _texts(table: pd.DataFrame) -> Iterable[str]:
    """Yield prompts and responses in turn: what was cut from one text compresses well beside its like."""
    for prompt, response in zip(table["prompt"], table["response"], strict=True):
        yield prompt
        yield response


def _shown(text: str) -> str:
    return visible(text[: LONGEST[0] + 1])  # one more than is kept, so that `_cut` sees that there is more


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
