"""Token detail of many probes as small compressed blocks that the page unpacks when a probe is chosen.

A block is a sequence of unsigned LEB128 numbers, compressed (zlib), base64. In this order, for the M tokens of a probe
and the S steps of its run::

    M, S, place of the resolution in RESOLUTIONS, K, G
    M positions in the response, each minus the one before
    M tokens, as places in the page's dictionary of strings
    K greedy tokens of this probe, as places in that dictionary
    M log-prob codes of the first step, then M x (S - 1) of the later ones
    M rank codes of the first step, then M x (S - 1) of the later ones
    G gaps between cells of the M x S whose greedy token was not guessed, then the place among the K of each

Of M x S, all steps of the first token come first. A log-prob code is 0 where not finite or not kept, else
1 + zigzag(q - q before) with q = round(log-prob / resolution); a rank code is zigzag(level - level before), the level
being the place in LEVELS next to the rank; "before" is the step before of the same token, 0 at the first. The greedy
token is guessed to be the token itself where its rank is 1, else the last other greedy token seen ("" at first).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from llm_dynamics.report.packing import packed_numbers, zigzag
from llm_dynamics.report.token_table import MIN_STEPS, TokenTable, thinned

RESOLUTIONS = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002, 0.0001)
"""Nats between neighbouring log-probs that a block can tell apart; see `resolution_of`."""


class Fineness(NamedTuple):
    """How finely log-probs are kept.

    Attributes:
        steps: Steps of the resolution to the end of the colour scale, at least.
        coarsest: The coarsest resolution allowed, nats.
    """

    steps: int
    coarsest: float


FINE, COARSE = Fineness(200, 0.01), Fineness(40, 0.05)
"""Where the page has room, and where it has not."""
SAMPLE = 16
"""Probes from whose blocks the size of all is told."""


def _levels() -> tuple[int, ...]:
    levels = list(range(11))
    while levels[-1] < 4_000_000:
        levels.append(math.ceil(levels[-1] * 1.2))
    return tuple(levels)


LEVELS = _levels()
"""Ranks that can be told apart: 0 (undefined), 1 to 10, then steps of a fifth: the level kept is within 10 %."""
_MIDDLES = np.sqrt([low * high for low, high in pairwise(LEVELS[10:])])


@dataclass(frozen=True)
class TokenBlocks:
    """Token detail of the probes of one run, ready for the page.

    Attributes:
        steps: The steps kept (S,).
        probe_ids: The probes kept.
        blocks: Their blocks.
        n_steps: Observations that kept tokens in the run log.
        n_probes: Probes that kept tokens in the run log.
    """

    steps: list[int]
    probe_ids: list[str]
    blocks: list[str]
    n_steps: int
    n_probes: int


def token_blocks(table: TokenTable, dictionary: dict[str, int], max_chars: int) -> TokenBlocks:
    """Pack the tokens of a run into `max_chars` characters.

    Where they do not fit, log-probs are first kept to `COARSE` steps rather than `FINE`; then observations are left
    out, evenly, the first and the last kept; at `MIN_STEPS` of them probes are left out, the last of the table first.
    One probe is kept whatever its size.

    Args:
        table: The tokens.
        dictionary: Place of every string in the page's dictionary; those that it lacks are added.
        max_chars: Characters of all blocks together.

    Returns:
        The blocks.
    """
    places = np.array([dictionary.setdefault(text, len(dictionary)) for text in table.strings])
    numbers = range(len(table.probe_ids))
    rows: list[int] = []
    blocks: list[str] = []
    for fineness, rows in _attempts(table, places, max_chars):
        blocks = [_block(table, number, rows, places, fineness) for number in numbers]
        if sum(map(len, blocks)) <= max_chars:
            break
    n_fit = max(1, int(np.searchsorted(np.cumsum([len(block) for block in blocks]), max_chars, side="right")))
    return TokenBlocks(
        steps=[table.steps[row] for row in rows],
        probe_ids=table.probe_ids[:n_fit],
        blocks=blocks[:n_fit],
        n_steps=table.n_steps,
        n_probes=table.n_probes,
    )


def _attempts(table: TokenTable, places: np.ndarray, max_chars: int) -> Iterator[tuple[Fineness, list[int]]]:
    """Yield what to try, from the finest that should fit to the coarsest: fineness and rows of the table.

    The size of all blocks is told from that of a few: it grows in proportion to the observations, from what a block
    holds beside them.
    """
    n_probes, n_steps = len(table.probe_ids), len(table.steps)
    few = range(0, n_probes, max(1, n_probes // SAMPLE))

    def size(n: int, fineness: Fineness) -> float:
        rows = thinned(range(n_steps), n)
        return sum(len(_block(table, number, rows, places, fineness)) for number in few) * n_probes / len(few)

    least = min(n_steps, MIN_STEPS)
    if size(n_steps, FINE) <= max_chars:
        yield FINE, list(range(n_steps))
    low, high = size(least, COARSE), size(n_steps, COARSE)
    n = n_steps if high <= max_chars else least + int((n_steps - least) * (max_chars - low) / max(high - low, 1))
    while n > least:
        yield COARSE, thinned(range(n_steps), n)
        n -= max(1, n // 50)
    yield COARSE, thinned(range(n_steps), least)


def resolution_of(logp: np.ndarray, fineness: Fineness) -> int:
    """Return the place in `RESOLUTIONS` of the resolution of one probe's log-probs (S, M).

    The coarsest allowed of which `fineness.steps` steps reach no further than the 98th percentile of |change since the
    first observation|, the end of the colour scale: a change that can be seen is kept.
    """
    change = np.abs(logp - logp[:1])
    change = change[np.isfinite(change)]
    end = float(np.quantile(change, 0.98)) if change.size else 0.0
    return next(
        (place for place, step in enumerate(RESOLUTIONS) if step <= fineness.coarsest and step * fineness.steps <= end),
        len(RESOLUTIONS) - 1,
    )


def levels_of(rank: np.ndarray) -> np.ndarray:
    """Return the place in `LEVELS` next to each rank."""
    return np.where(rank <= 10, np.maximum(rank, 0), 10 + np.searchsorted(_MIDDLES, rank))


def _block(table: TokenTable, number: int, rows: Sequence[int], places: np.ndarray, fineness: Fineness) -> str:
    columns = table.columns(number)
    logp, rank, greedy = (matrix[rows, columns] for matrix in (table.logp, table.rank, table.greedy))
    tokens, levels = table.tokens[columns], levels_of(rank)
    unit = resolution_of(table.logp[:, columns], fineness)
    logp_codes = _logp_codes(logp, RESOLUTIONS[unit])
    rank_codes = zigzag(np.diff(levels, axis=0, prepend=0))
    own, gaps, which = _not_guessed(tokens, levels, greedy)
    head = [len(tokens), len(rows), unit, len(own), len(gaps)]
    return packed_numbers(
        np.concatenate([head, np.diff(table.positions[columns], prepend=0), places[tokens], places[own]]),
        logp_codes[0],
        logp_codes[1:].ravel(order="F"),
        rank_codes[0],
        rank_codes[1:].ravel(order="F"),
        gaps,
        which,
    )


def _logp_codes(logp: np.ndarray, resolution: float) -> np.ndarray:
    """Return the codes of log-probs (S, M); a step that is not finite leaves "before" as it was."""
    finite = np.isfinite(logp)
    values = np.where(finite, np.round(np.where(finite, logp, 0).astype(float) / resolution), 0).astype(np.int64)
    last = np.maximum.accumulate(np.where(finite, np.arange(len(logp))[:, None], -1), axis=0)
    held = np.where(last >= 0, np.take_along_axis(values, np.maximum(last, 0), axis=0), 0)
    before = np.vstack([np.zeros_like(held[:1]), held[:-1]])
    return np.where(finite, 1 + zigzag(values - before), 0)


def _not_guessed(
    tokens: np.ndarray, levels: np.ndarray, greedy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct greedy tokens that were not guessed (K,), and the gap (G,) and place among K (G,) of each."""
    last_other = np.zeros_like(tokens)  # place 0 of the table's strings is ""
    wrong = np.zeros(greedy.shape, bool)
    for step in range(len(greedy)):
        wrong[step] = greedy[step] != np.where(levels[step] == 1, tokens, last_other)
        last_other = np.where(greedy[step] != tokens, greedy[step], last_other)
    own, which = np.unique(greedy.T[wrong.T], return_inverse=True)
    return own, np.diff(np.flatnonzero(wrong.T), prepend=0), which
