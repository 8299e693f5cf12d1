"""The tokens of many probes over training, column by column: what the page packs.

A token table of 500 probes x 100 observations x 200 tokens has ten million rows. They are read part by part and kept as
three matrices (observations, tokens), never as rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from llm_dynamics.report.tokens import pick_heatmap_probes
from llm_dynamics.runlog import RunLog
from llm_dynamics.runlog.parts import completed_steps

_STRINGS = ("probe_id", "token", "greedy_token")
_COLUMNS = ("step", "position", "logp", "rank", *_STRINGS)

MAX_CELLS = 16_000_000
"""Token cells (observations x tokens) read of a run: 12 bytes each. More than a page can hold in any case."""
MIN_STEPS = 12
"""Observations that are kept before probes are left out."""


@dataclass(frozen=True)
class TokenTable:
    """The tokens of P probes, N in all, over S observations; probe p owns the columns `bounds[p]` to `bounds[p + 1]`.

    Attributes:
        steps: The observed steps, ascending (S,).
        probe_ids: The probes, those worth a look first (P,).
        bounds: Where each probe's columns begin, and the end of the last (P + 1,).
        positions: Index of each token in its response (N,).
        tokens: The tokens, as places in `strings` (N,).
        strings: Every distinct token; the first is "", which also stands for one that was not kept.
        logp: Their log-probs (S, N) float32, nats; NaN where not finite or not kept.
        rank: Their ranks (S, N) int32, 1 = most likely; 0 where undefined.
        greedy: The most likely token at each prefix, as places in `strings` (S, N) int32.
        n_steps: Observations that kept tokens in the run log; S, or more where not all were read.
        n_probes: Probes that kept tokens in the run log; P, or more.
    """

    steps: list[int]
    probe_ids: list[str]
    bounds: np.ndarray
    positions: np.ndarray
    tokens: np.ndarray
    strings: list[str]
    logp: np.ndarray
    rank: np.ndarray
    greedy: np.ndarray
    n_steps: int
    n_probes: int

    def columns(self, probe: int) -> slice:
        """Return the columns of probe number `probe`."""
        return slice(int(self.bounds[probe]), int(self.bounds[probe + 1]))


def thinned(values: Sequence[int], n: int) -> list[int]:
    """Return `n` of `values`, evenly spaced, the first and the last among them; all where there are no more than `n`.

    Raises:
        ValueError: Where `n` is below 2 and something would have to be left out.
    """
    if len(values) <= n:
        return list(values)
    if n < 2:
        raise ValueError(f"n is {n}; the first and the last stay, so at least 2 are needed")
    return [values[place] for place in np.round(np.linspace(0, len(values) - 1, n)).astype(int)]


def token_steps(run: RunLog) -> list[int]:
    """Return the observed steps that kept tokens, ascending."""
    return sorted(set(completed_steps(run.path, "tokens")) & set(run.observed_steps))


def read_token_table(run: RunLog, max_cells: int = MAX_CELLS) -> TokenTable | None:
    """Read the tokens of a run: all of its probes and observations, if they are no more than `max_cells`.

    Otherwise observations are left out, evenly, down to `MIN_STEPS`; then probes, those of `pick_heatmap_probes` last.

    Args:
        run: The run log; a bad part raises or is left out with a warning, as its `errors` says.
        max_cells: Observations x tokens to read at most; one probe is read whatever its length.

    Returns:
        The table, or None where the run kept no tokens.

    Raises:
        RunLogError: Where a part is unreadable and the run was opened with `errors="raise"`.
    """
    steps = token_steps(run)
    newest = next(run.parts("tokens", reversed(steps), ["probe_id"]), None)
    if newest is None:
        return None
    n_tokens = newest["probe_id"].to_pandas().value_counts()
    probe_ids = [probe for probe in pick_heatmap_probes(run, len(run.probes)) if probe in n_tokens.index]
    sizes = np.cumsum(n_tokens[probe_ids].to_numpy())
    n_kept = max(1, int(np.searchsorted(sizes, max_cells // min(len(steps), MIN_STEPS), side="right")))
    probe_ids = probe_ids[:n_kept]
    reader = _Reader(probe_ids, n_steps=len(steps), n_probes=len(n_tokens))
    kept = thinned(steps, max(2, max_cells // int(sizes[n_kept - 1])))
    for part in run.parts("tokens", kept, _COLUMNS, dictionaries=_STRINGS):
        reader.add(part)
    return reader.table()


class _Reader:
    """Gathers the parts of some probes; a part's rows may come in any order and may lack some."""

    def __init__(self, probe_ids: list[str], **in_log: int) -> None:
        self.probe_ids = probe_ids
        self._in_log = in_log
        self.steps: list[int] = []
        self._wanted = {probe: place for place, probe in enumerate(probe_ids)}
        self._places: dict[str, int] = {"": 0}
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._keys = np.empty(0, np.int64)  # probe << 32 | position of every token seen, sorted
        self._tokens = np.empty(0, np.int32)

    def add(self, part: pa.Table) -> None:
        """Take in the rows of one observation."""
        probe = _coded(part["probe_id"], lambda name: self._wanted.get(name, -1))
        keys = probe.astype(np.int64) << 32 | part["position"].to_numpy()
        order = np.argsort(keys, kind="stable")
        order = order[np.searchsorted(keys, 0, sorter=order) :]  # those of other probes are below 0
        if not order.size:
            return
        keys = keys[order]
        if not np.array_equal(keys, self._keys):
            self._extend(keys, _coded(part["token"], self._place)[order])
        if np.array_equal(keys, self._keys):
            keys = self._keys  # the same array for every observation, so that it is kept once
        logp = part["logp"].to_numpy().astype(np.float32)[order]
        rank = part["rank"].fill_null(0).to_numpy().astype(np.int32)[order]
        greedy = _coded(part["greedy_token"], self._place)[order]
        self.steps.append(part["step"][0].as_py())
        self._parts.append((keys, np.where(np.isfinite(logp), logp, np.nan), np.maximum(rank, 0), greedy))

    def table(self) -> TokenTable | None:
        """Return what was gathered; None where nothing was."""
        if not self.steps:
            return None
        shape = (len(self.steps), len(self._keys))
        logp = np.full(shape, np.nan, np.float32)
        rank, greedy = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for row, (keys, *values) in enumerate(self._parts):
            places = slice(None) if keys is self._keys else np.searchsorted(self._keys, keys)
            for matrix, own in zip((logp, rank, greedy), values, strict=True):
                matrix[row, places] = own
        owners = self._keys >> 32
        return TokenTable(
            steps=self.steps,
            probe_ids=self.probe_ids,
            bounds=np.searchsorted(owners, np.arange(len(self.probe_ids) + 1)),
            positions=(self._keys & 0xFFFFFFFF).astype(np.int64),
            tokens=self._tokens,
            strings=list(self._places),
            logp=logp,
            rank=rank,
            greedy=greedy,
            **self._in_log,
        )

    def _extend(self, keys: np.ndarray, tokens: np.ndarray) -> None:
        merged, first = np.unique(np.concatenate([self._keys, keys]), return_index=True)
        if len(merged) > len(self._keys):
            self._keys, self._tokens = merged, np.concatenate([self._tokens, tokens])[first]

    def _place(self, text: str) -> int:
        return self._places.setdefault(text, len(self._places))


def _coded(column: pa.ChunkedArray, place: Callable[[str], int]) -> np.ndarray:
    """Return the place of each string; that of "" where there is none. `place` is asked once for each distinct one."""
    chunk = column.unify_dictionaries().combine_chunks()
    coded = (chunk if isinstance(chunk, pa.DictionaryArray) else chunk.dictionary_encode()).fill_null("")
    return np.array([place(text) for text in coded.dictionary.to_pylist()], np.int32)[coded.indices.to_numpy()]
