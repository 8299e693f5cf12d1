"""Curves over the tokens of a log that may outgrow memory, read one observation at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from llm_dynamics.frames.curves import check_interval
from llm_dynamics.frames.grouped import group_stats
from llm_dynamics.frames.order import in_order
from llm_dynamics.frames.runs import Chain, Runs, is_single, named_chains, stacked
from llm_dynamics.frames.statistics import LOG_RATIO
from llm_dynamics.runlog import schema

TOKEN_STATISTICS = (
    *(field.name for field in schema.TOKENS if pa.types.is_floating(field.type)), "rank", "riser_count", LOG_RATIO,
)  # fmt: skip
"""Names that `token_curves` takes: numbers of the tokens table, and log-prob minus that of the reference."""
BY = ("family", "prompt_id", "probe_id", "position", "token_id")
"""What tokens may be grouped by, alone or together."""
_VALUES = ["mean", "low", "high", "n", "n_nonfinite"]


def token_curves(
    runs: Runs,
    statistic: str = "logp",
    *,
    by: str | Sequence[str] = "family",
    delta: bool = False,
    interval: tuple[float, float] = (10, 90),
) -> pd.DataFrame:
    """Return the curves of a statistic of tokens over training, of families, positions, probes or token types.

    Parts are read one by one, of each only the columns needed, so that memory is that of one observation, however long
    the run. Every token counts the same: `family_curves` takes means over probes instead.

    Args:
        runs: One run, several, or chains (see `align`).
        statistic: A name in `frames.TOKEN_STATISTICS`: `logp`, `entropy`, `rank`, ...
        by: One or several of `family`, `prompt_id`, `probe_id`, `position` (index in the response, from 0) and
            `token_id`.
        delta: Subtract each token's own value at the first observation that has tokens.
        interval: The percentiles `low` and `high` over tokens, in percent.

    Returns:
        Columns `step`; those of `by`; `mean`, `low`, `high` over the tokens of the group (float64; nats for log-probs
        and entropies); `n`, tokens that they are taken over; `n_nonfinite`, tokens left out because their value is NaN,
        infinite or undefined, or with `delta` their start is, or is missing. What was not measured is in neither. A
        leading `run` where `runs` is not a single run log. Empty where no tokens were kept.

    Raises:
        ValueError: For an unknown statistic, key or interval, and for tokens of a probe that is not in probes.parquet.

    Example:
        >>> token_curves(load_run("runs/dpo"), "rank", by=("family", "position"))  # doctest: +SKIP
    """
    check_interval(interval)
    keys = [by] if isinstance(by, str) else list(by)
    unknown = [key for key in keys if key not in BY]
    if unknown or not keys or len(set(keys)) < len(keys):
        raise ValueError(f"by is {by!r}; allowed: one or several of {', '.join(BY)}, each once")
    if statistic not in TOKEN_STATISTICS:
        raise ValueError(f"no statistic {statistic!r} in the tokens table; allowed: {', '.join(TOKEN_STATISTICS)}")
    curves = {
        name: _curves(chain, statistic, keys, delta=delta, interval=interval)
        for name, chain in named_chains(runs).items()
    }
    return next(iter(curves.values())) if is_single(runs) else stacked(curves)


def _curves(
    chain: Chain, statistic: str, keys: list[str], *, delta: bool, interval: tuple[float, float]
) -> pd.DataFrame:
    chain.check_probes()
    probes = pd.concat(run.columns("probes", ["probe_id", "prompt_id", "family"]) for run in chain.stages.values())
    probes = probes.drop_duplicates("probe_id", ignore_index=True)
    start: _Start | None = None
    frames = []
    for step, table in _parts(chain, _columns(statistic, keys, delta)):
        owner = _probe_of(table, probes)  # (N,) place of each token's probe
        values, measured = _values(table, statistic)
        if delta:
            start = start or _Start(owner, _numbers(table["position"]), values)
            with np.errstate(invalid="ignore"):  # of an infinity minus another
                values = values - start.values(owner, _numbers(table["position"]))
        groups = [_codes(key, table, owner, probes) for key in keys]
        codes, places = _joined([codes for codes, _ in groups])
        stats = group_stats(codes[measured], values[measured], len(places[0]), interval)
        named = {key: labels[place] for key, (_, labels), place in zip(keys, groups, places, strict=True)}
        frames.append(pd.DataFrame({"step": step, **named, **{name: getattr(stats, name) for name in _VALUES}}))
    if not frames:
        return pd.DataFrame(columns=["step", *keys, *_VALUES])
    frame = pd.concat(frames, ignore_index=True)
    rest = [key for key in keys if key != "family"]
    return in_order(frame, *rest, "step") if "family" in keys else frame.sort_values([*rest, "step"], ignore_index=True)


def _columns(statistic: str, keys: list[str], delta: bool) -> list[str]:
    stored = ["logp", "ref_logp"] if statistic == LOG_RATIO else [statistic]
    own = [key for key in ("position", "token_id") if key in keys or (delta and key == "position")]
    return ["probe_id", *own, *stored]


def _parts(chain: Chain, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Yield the step (counted through) and the tokens of each observation that has some."""
    offsets = chain.offsets
    for stage, steps in chain.steps().items():
        for step in steps:
            # one at a time: a part that is unreadable is passed over with errors="warn"
            for table in chain.stages[stage].parts("tokens", [step], columns, dictionaries=["probe_id"]):
                yield offsets[stage] + step, table


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy()


def _probe_of(table: pa.Table, probes: pd.DataFrame) -> np.ndarray:
    """Return the row of `probes` that each token belongs to.

    Raises:
        ValueError: For a probe that is not there.
    """
    column = table.unify_dictionaries()["probe_id"].combine_chunks()
    names = column.dictionary.to_pandas()
    places = pd.Index(probes["probe_id"]).get_indexer(pd.Index(names))
    owner = places[column.indices.to_numpy()]
    if (owner < 0).any():
        unknown = names[column.indices.to_numpy()[owner < 0][0]]
        raise ValueError(f"the tokens table has a probe that probes.parquet lacks: {unknown!r}")
    return owner


def _values(table: pa.Table, statistic: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the value of each token, and whether it was measured; undefined integers become NaN."""
    if statistic == LOG_RATIO:
        (logp, has), (reference, has_too) = _values(table, "logp"), _values(table, "ref_logp")
        with np.errstate(invalid="ignore"):
            return logp.astype(np.float64) - reference, has & has_too
    column = table[statistic]
    measured = column.is_valid().to_numpy()
    values = column.to_numpy()
    if pa.types.is_integer(column.type):
        values = np.where(values < 0, np.nan, values.astype(np.float64))  # -1 stands for "undefined"
    return values, measured


def _codes(key: str, table: pa.Table, owner: np.ndarray, probes: pd.DataFrame) -> tuple[np.ndarray, Any]:
    """Return a code per token and the label of each code."""
    if key in ("position", "token_id"):
        labels, codes = np.unique(_numbers(table[key]), return_inverse=True)
        return codes, labels
    of_probe, names = pd.factorize(probes[key])
    return of_probe[owner], names


def _joined(codes: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return one code per token for what occurs together, and the code under each key that it stands for."""
    joined = codes[0].astype(np.int64)
    for other in codes[1:]:
        joined = joined * (int(other.max(initial=0)) + 1) + other
    size = int(joined.max(initial=0)) + 1
    if size <= len(joined):  # counting is faster than sorting
        found = np.flatnonzero(np.bincount(joined, minlength=size))
        place = np.zeros(size, dtype=np.int64)
        place[found] = np.arange(len(found))
        joined = place[joined]
    else:
        found, joined = np.unique(joined, return_inverse=True)
    places = []
    for other in reversed(codes[1:]):
        size = int(other.max(initial=0)) + 1
        places.append(found % size)
        found = found // size
    return joined, [found, *reversed(places)]


class _Start:
    """The values of all tokens at the first observation, to be subtracted from later ones."""

    def __init__(self, owner: np.ndarray, position: np.ndarray, values: np.ndarray) -> None:
        self._owner, self._position = owner, position
        self._values = values.astype(np.float64)
        self._table: pd.Series | None = None

    def values(self, owner: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Return the start of each token; NaN where there is none."""
        if np.array_equal(owner, self._owner) and np.array_equal(position, self._position):
            return self._values  # every part of a run lists its tokens in the same order
        if self._table is None:
            self._table = pd.Series(self._values, index=_key(self._owner, self._position))
        return self._table.reindex(_key(owner, position)).to_numpy()


def _key(owner: np.ndarray, position: np.ndarray) -> np.ndarray:
    return owner.astype(np.int64) << 32 | position.astype(np.int64)
