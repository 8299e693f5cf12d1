"""Which probes do several runs share? Only the same response after the same prompt can be subtracted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd

from llm_dynamics.runlog import RunLog

Sharing = Literal["same", "common"]

IDENTITY = {
    "prompt_id": "prompt id",
    "family": "family",
    "prompt": "prompt",
    "response": "response",
    "prompt_ids": "prompt tokens",
    "response_ids": "response tokens",
}
"""Columns of the probes table that make two probes of one name the same, and what people call them."""


def shared_probes(runs: Mapping[str, RunLog], probes: Sharing = "same") -> pd.DataFrame:
    """Return the probes that all runs watch.

    Args:
        runs: Runs by name.
        probes: "same" refuses runs whose probes differ; "common" keeps those that are the same in all, and says in a
            warning how many were left out.

    Returns:
        `probe_id`, `prompt_id` and `family` of the shared probes, in the order of the first run.

    Raises:
        ValueError: Where probes differ and "same" is asked for, naming what differs; where nothing is shared; where
            `probes` is neither.
    """
    if probes not in ("same", "common"):
        raise ValueError(f'probes is {probes!r}; allowed: "same", "common"')
    first, *others = runs
    tables = {name: _identities(run) for name, run in runs.items()}
    kept = tables[first].index
    told = []
    for name in others:
        same, differences = _compare(tables[first], tables[name])
        kept = kept[kept.isin(same)]
        if differences:
            told.append(f"{name!r} against {first!r}: {differences}")
    if told:
        total = len(set().union(*(table.index for table in tables.values())))
        said = f"the runs do not watch the same probes ({'; '.join(told)})"
        if probes == "same":
            raise ValueError(f'{said}. probes="common" keeps the {len(kept)} of {total} that are the same in all.')
        if kept.empty:
            raise ValueError(f"{said}: none is the same in all")
        warnings.warn(f"{said}: {total - len(kept)} of {total} left out", stacklevel=3)
    return tables[first].loc[kept, ["prompt_id", "family"]].rename_axis("probe_id").reset_index()


def same_where_shared(earlier: tuple[str, RunLog], later: tuple[str, RunLog]) -> None:
    """Refuse two stages of one training in which an id names two different responses.

    Args:
        earlier: Name and log of a stage.
        later: Those of one after it; it may watch probes of its own, and lack others.

    Raises:
        ValueError: Naming what differs of which probes.
    """
    tables = [_identities(run) for _, run in (earlier, later)]
    both = tables[0].index.intersection(tables[1].index, sort=False)
    _, differences = _compare(tables[0].loc[both], tables[1].loc[both])
    if differences:
        raise ValueError(
            f"{later[0]!r} cannot go on where {earlier[0]!r} ended: of the probes that both watch it has {differences}"
            ". Give all stages one probe set and one truncation, or look at them as runs of their own"
        )


def common_ids(one: RunLog, other: RunLog) -> pd.Index:
    """Return the ids of the probes that are the same in two runs."""
    return _compare(_identities(one), _identities(other))[0]


def _compare(one: pd.DataFrame, other: pd.DataFrame) -> tuple[pd.Index, str]:
    """Return the ids of the probes that are the same in both, and what differs, in words; empty where nothing does."""
    both = one.index.intersection(other.index, sort=False)
    left, right = one.loc[both], other.loc[both]
    told = []
    for lacks, missing in (("it lacks", one.index.difference(both)), ("it alone has", other.index.difference(both))):
        if len(missing):
            told.append(f"{lacks} {_some(missing)}")
    differs = pd.Series(False, index=both)
    for column, words in IDENTITY.items():
        wrong = left[column] != right[column]
        if wrong.any():
            told.append(f"other {words} of {_some(both[wrong])}")
        differs |= wrong
    return both[~differs], ", ".join(told)


def _some(names: pd.Index) -> str:
    shown = ", ".join(repr(name) for name in names[:2])
    return f"{len(names)} ({shown}{', ...' if len(names) > 2 else ''})"


def _identities(run: RunLog) -> pd.DataFrame:
    """Return what makes each probe itself, by `probe_id`, in values that can be compared."""
    table = run.columns("probes", ["probe_id", *IDENTITY]).set_index("probe_id")
    return pd.DataFrame({name: [_plain(value) for value in table[name]] for name in IDENTITY}, index=table.index)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.astype(np.int64).tobytes()
    return "" if value is None or value != value else value
