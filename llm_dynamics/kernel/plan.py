"""How much work and memory a kernel costs, counted in advance: prefixes, batches of rows, blocks that are kept.

The loss of a token reaches no later position, so its rows need the sequence up to it only: a response is taken in
passes over prefixes of several lengths, which saves work and memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_dynamics.kernel.rows import ResponseRows

Contraction = Literal["auto", "gram", "materialise"]

CACHE_BYTES = 3 * 2**20
"""Largest temporary that a batched backward should make on a CPU: beyond, page faults double its time (measured)."""
_FORWARDS_PER_PASS = {"cpu": 2.0}
_FORWARDS_PER_PASS_ELSEWHERE = 16.0  # launches, not arithmetic, make a short pass cost what it costs
_TEMPORARIES = 8  # of the widest layer's size, alive at once in a batched backward
_KEPT_SHARE, _STREAM_SHARE = 0.55, 0.25  # of the memory budget; the rest is for temporaries
_DENSE_GROWTH = 2.0


@dataclass(frozen=True)
class Sizes:
    """What one position and one row of a model take.

    Attributes:
        linear: Input width, output width and calls of each linear weight.
        lookup_width: Summed widths of the embeddings looked up.
        dense: Elements of all parameters that are materialised.
        widest: Widest output of a layer.
        heads: Attention heads.
        itemsize: Bytes of a number.
        device: Kind of device.
    """

    linear: dict[str, tuple[int, int, int]]
    lookup_width: int
    dense: int
    widest: int
    heads: int
    itemsize: int
    device: str

    def row_bytes(self, length: int, materialised: frozenset[str]) -> int:
        """Bytes that one row's gradients take, kept in factors or materialised."""
        kept = self.dense + length * self.lookup_width
        for name, (d_in, d_out, calls) in self.linear.items():
            kept += d_in * d_out if name in materialised else length * d_out * calls
        return kept * self.itemsize

    def input_bytes(self, length: int) -> int:
        """Bytes of the layers' inputs, which all rows of a pass share."""
        return length * sum(d_in * calls for d_in, _, calls in self.linear.values()) * self.itemsize

    def temporary_bytes(self, length: int) -> int:
        """Bytes of one row's largest temporary in a backward."""
        return length * max(self.widest, self.heads * length) * self.itemsize


@dataclass(frozen=True)
class Pass:
    """Rows of one response that share a forward.

    Attributes:
        source: The response and all of its rows.
        length: Tokens of the prefix that the forward runs over.
        batches: Numbers of the rows (in `source.spans`) of each batched backward.
    """

    source: ResponseRows
    length: int
    batches: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(len(batch) for batch in self.batches)


@dataclass(frozen=True)
class Plan:
    """A plan for a kernel of two sides.

    Attributes:
        keeps_train: Whether gradients of the training side are kept and those of the probes pass by, or the reverse.
        blocks: Passes of the side that is kept, in blocks that fit into memory.
        stream: Passes of the other side, repeated for every block.
        materialised_kept: Linear weights whose gradients are materialised on the side that is kept.
        materialised_stream: The same of the other side.
    """

    keeps_train: bool
    blocks: list[list[Pass]]
    stream: list[Pass]
    materialised_kept: frozenset[str]
    materialised_stream: frozenset[str]

    @property
    def rows(self) -> int:
        """Rows that go through a backward, repetitions counted."""
        return sum(_rows(block) + _rows(self.stream) for block in self.blocks)

    @property
    def cost(self) -> float:
        """Position-rows of all backwards, with each forward as a few rows."""
        return sum(_cost(block) + _cost(self.stream) for block in self.blocks)


def make_plan(
    train: Sequence[ResponseRows],
    probes: Sequence[ResponseRows],
    sizes: Sizes,
    *,
    budget: int,
    contraction: Contraction,
    truncate: bool,
) -> Plan:
    """Plan both ways, keeping either side, and return the cheaper one.

    Args:
        train: Rows of the training side.
        probes: Rows of the probes.
        sizes: What positions and rows take.
        budget: Bytes.
        contraction: "gram" or "materialise" to force all linear layers, "auto" to count.
        truncate: Whether passes may run over prefixes.

    Returns:
        The plan.
    """
    plans = []
    for keeps_train in (True, False):
        kept, stream = (train, probes) if keeps_train else (probes, train)
        dense_kept, dense_stream = _materialised(kept, stream, sizes, contraction)
        room, room_in_stream = int(budget * _KEPT_SHARE), int(budget * _STREAM_SHARE)
        passes = [p for s in kept for p in _passes(s, sizes, dense_kept, budget, truncate, room)]
        blocks: list[list[Pass]] = []
        free = 0
        for one in passes:
            size = one.rows * sizes.row_bytes(one.length, dense_kept) + sizes.input_bytes(one.length)
            if size > free or not blocks:
                blocks.append([])
                free = room
            blocks[-1].append(one)
            free -= size
        passing = [p for s in stream for p in _passes(s, sizes, dense_stream, budget, truncate, room_in_stream)]
        plans.append(Plan(keeps_train, blocks, passing, dense_kept, dense_stream))
    return min(plans, key=lambda plan: plan.cost)


def _passes(
    source: ResponseRows, sizes: Sizes, dense: frozenset[str], budget: int, truncate: bool, room: int
) -> list[Pass]:
    stops = [stop for _, stop in source.spans]
    order = sorted(range(len(stops)), key=lambda row: -stops[row])  # longest first: what it keeps serves the others
    passes = []
    while order:
        length = source.prompt_length + stops[order[0]] - 1 if truncate else len(source.ids)
        share = (
            _rows_per_pass([stops[row] for row in order], source.prompt_length, sizes.device)
            if truncate
            else len(order)
        )
        fits = (room - sizes.input_bytes(length)) // max(1, sizes.row_bytes(length, dense))
        _check_fits(fits, length, room, budget)
        share = min(fits, share)
        here, order = order[:share], order[share:]
        most = _rows_per_batch(length, sizes, budget)
        size = math.ceil(len(here) / math.ceil(len(here) / most))  # even batches
        batches = tuple(tuple(here[i : i + size]) for i in range(0, len(here), size))
        passes.append(Pass(source, length, batches))
    return passes


def _rows_per_pass(stops: Sequence[int], prompt_length: int, device: str) -> int:
    """Return how many rows should share a prefix: more save forwards, fewer save positions.

    n passes cost (mean prefix + span / 2n) (rows + n forward), least where n^2 = span rows / (2 forward mean prefix).
    """
    span = max(stops) - min(stops)
    forward = _FORWARDS_PER_PASS.get(device, _FORWARDS_PER_PASS_ELSEWHERE)
    mean = prompt_length + sum(stops) / len(stops)
    passes = max(1, round(math.sqrt(span * len(stops) / (2 * forward * mean))))
    return math.ceil(len(stops) / passes)


def _rows_per_batch(length: int, sizes: Sizes, budget: int) -> int:
    temporary = max(1, sizes.temporary_bytes(length))
    room = int(budget * (1 - _KEPT_SHARE - _STREAM_SHARE))
    fits = room // (_TEMPORARIES * temporary)
    _check_fits(fits, length, room, budget)
    return min(fits, max(1, CACHE_BYTES // temporary)) if sizes.device == "cpu" else fits


def _check_fits(rows: int, length: int, room: int, budget: int) -> None:
    if rows < 1:
        raise ValueError(
            f"memory_budget_mb={budget / 2**20:.3g} leaves {room / 2**20:.3g} MB for one row of {length} tokens, which "
            "does not fit: raise the budget, choose fewer parameters, or shorten the prompt"
        )


def _materialised(
    kept: Sequence[ResponseRows], stream: Sequence[ResponseRows], sizes: Sizes, contraction: Contraction
) -> tuple[frozenset[str], frozenset[str]]:
    """Choose by multiply-adds over the whole job which linear weights' gradients are formed, on each side."""
    if contraction != "auto":
        every = frozenset(sizes.linear) if contraction == "materialise" else frozenset()
        return every, every
    u, o = _Totals(kept), _Totals(stream)
    chosen: tuple[set[str], set[str]] = (set(), set())
    for name, (d_in, d_out, calls) in sizes.linear.items():
        c, area = calls, d_in * d_out
        both = c * (o.row_positions + u.row_positions) * area + o.rows * u.rows * area
        gram = c * c * o.positions * u.positions * d_in + d_out * min(
            c * c * o.row_positions * u.positions + c * o.rows * u.row_positions,
            c * c * o.positions * u.row_positions + c * o.row_positions * u.rows,
        )
        only_u = c * u.row_positions * area + u.rows * (c * o.positions * area + c * o.row_positions * d_out)
        only_o = c * o.row_positions * area + o.rows * (c * u.positions * area + c * u.row_positions * d_out)
        small_u = area <= _DENSE_GROWTH * c * u.mean_length * d_out
        small_o = area <= _DENSE_GROWTH * c * o.mean_length * d_out
        counts = {(False, False): gram}
        if small_u:
            counts[True, False] = only_u
        if small_o:
            counts[False, True] = only_o
        if small_u and small_o:
            counts[True, True] = both
        cheapest = min(counts.items(), key=lambda item: item[1])[0]
        for side, here in zip(chosen, cheapest, strict=True):
            if here:
                side.add(name)
    return frozenset(chosen[0]), frozenset(chosen[1])


class _Totals:
    """Sums over the responses of one side that the counts need."""

    def __init__(self, side: Sequence[ResponseRows]) -> None:
        self.rows = sum(len(s.spans) for s in side)
        self.positions = sum(len(s.ids) - 1 for s in side)
        self.row_positions = sum(len(s.spans) * (len(s.ids) - 1) for s in side)
        self.mean_length = self.positions / len(side)


def _rows(passes: Sequence[Pass]) -> int:
    return sum(one.rows for one in passes)


def _cost(passes: Sequence[Pass]) -> float:
    return sum(one.length * (one.rows + 2) for one in passes)
