"""Influence maps of a run: what each token of one training response did to each token of a probe in one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from llm_dynamics.runlog import RunLog
from llm_dynamics.runlog.parts import completed_steps

MAX_STEPS = 24
MAX_PROBES = 12
MAX_SIDE = 128
"""Tokens of a probe, and of a training response, that a map shows: the strongest, in their order."""

_CELLS = ["probe_id", "example", "m", "l", "share"]
_CAUSES = ["probe_id", "position", "cause", "share", "measured"]
_TOLD = ["target", "kind", "example", "position", "token", "logp", "c", "share"]
_NOT_TOKENS = ("other", "precision", "decay", "rounding", "step", "remainder")


@dataclass(frozen=True, eq=False)
class InfluenceMap:
    """One map: a probe, a step and the training response that moved the probe most in it; M rows, L columns are shown.

    Attributes:
        step: The explained step.
        probe_id: The probe.
        example: Index of the training response in the step's global batch.
        rows: Positions of the probe's tokens that are shown, ascending (M,).
        columns: Positions of the training tokens that are shown, ascending (L,).
        shares: What training token l did to log pi of probe token m (M, L), nats; NaN where not finite.
        row_sums: Sums over all tokens of the training response, also those not shown (M,), nats.
        column_sums: Sums over all tokens of the probe (L,), nats.
        total: Sum of the whole map, nats.
        n_rows: Tokens of the probe.
        n_columns: Tokens of the training response.
        n_nonfinite: Cells left out of all sums because they are not finite.
        told: Columns `token`, `c`, `logp` of the training tokens shown (L,); missing where they were not kept.
        others: What the other training responses of the step did to the probe, nats; None where not kept.
        n_others: How many these are.
        causes: Every cause's share in the change of the tokens shown (M,), nats; empty where not kept.
        measured: Change of these tokens in the step (M,), nats; None where not kept.
    """

    step: int
    probe_id: str
    example: int
    rows: np.ndarray
    columns: np.ndarray
    shares: np.ndarray
    row_sums: np.ndarray
    column_sums: np.ndarray
    total: float
    n_rows: int
    n_columns: int
    n_nonfinite: int
    told: pd.DataFrame
    others: float | None
    n_others: int
    causes: Mapping[str, np.ndarray]
    measured: np.ndarray | None

    @property
    def all_training_tokens(self) -> np.ndarray | None:
        """What the tokens of all training responses did to the tokens shown (M,), nats; None where not kept."""
        pushes = [share for cause, share in self.causes.items() if is_of_tokens(cause)]
        return np.sum(pushes, axis=0) if pushes else None


def is_of_tokens(cause: str) -> bool:
    """Tell whether a cause is a push by training tokens of the step itself, such as `up`, `down` or a role."""
    return cause not in _NOT_TOKENS and not cause.startswith("momentum")


def map_steps(run: RunLog) -> list[int]:
    """Return the explained steps that kept maps, ascending."""
    return sorted(set(completed_steps(run.path, "influence_maps")) & set(run.explained_steps))


def influence_maps(run: RunLog, max_cells: int) -> list[InfluenceMap]:
    """Read the maps of a run: of up to `MAX_STEPS` steps, evenly spaced, and `MAX_PROBES` probes.

    Steps are taken in an order that leaves no large gap wherever it ends: the last, the first, the middle, the quarters
    and so on. Where the next map would exceed `max_cells`, reading ends.

    Args:
        run: The run log.
        max_cells: Cells over all maps at most; one map is read whatever its size.

    Returns:
        The maps, by step and in the order logged; empty where the run kept none.
    """
    steps = map_steps(run)
    places = np.unique(np.round(np.linspace(0, len(steps) - 1, min(len(steps), MAX_STEPS))).astype(int))
    found: list[InfluenceMap] = []
    probes: dict[str, None] = {}
    n_cells = 0
    for step in (steps[places[place]] for place in _spread(len(places))):
        for one in _maps_of(run, step):
            if one.probe_id not in probes and len(probes) >= MAX_PROBES:
                continue
            n_cells += one.shares.size
            if found and n_cells > max_cells:
                return sorted(found, key=lambda one: one.step)
            probes[one.probe_id] = None
            found.append(one)
    return sorted(found, key=lambda one: one.step)


def _spread(n: int) -> Iterator[int]:
    """Yield 0 ... n - 1: the last, the first, then always the middle of the widest gap left."""
    if n:
        yield n - 1
    if n > 1:
        yield 0
    gaps = [(0, n - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            yield middle
            gaps += [(low, middle), (middle, high)]


def _maps_of(run: RunLog, step: int) -> Iterator[InfluenceMap]:
    cells = _frame(run, "influence_maps", step, _CELLS)
    told = _frame(run, "training_tokens", step, _TOLD)
    causes = _frame(run, "influence_tokens", step, _CAUSES)
    told = told[(told["kind"] == "probe") & told["target"].isin(cells["probe_id"])]
    for _, rows in cells.groupby(["probe_id", "example"], sort=False):
        probe_id, example = rows[["probe_id", "example"]].iloc[0]
        yield _map(
            step,
            str(probe_id),
            int(example),
            rows,
            told[told["target"] == probe_id],
            causes[causes["probe_id"] == probe_id],
        )


def _frame(run: RunLog, table: str, step: int, columns: Sequence[str]) -> pd.DataFrame:
    part = next(run.parts(table, [step], columns), None)
    return pd.DataFrame(columns=list(columns)) if part is None else part.to_pandas()


def _map(
    step: int, probe_id: str, example: int, cells: pd.DataFrame, told: pd.DataFrame, causes: pd.DataFrame
) -> InfluenceMap:
    rows, row = np.unique(cells["m"].to_numpy(), return_inverse=True)
    columns, column = np.unique(cells["l"].to_numpy(), return_inverse=True)
    shares = np.full((len(rows), len(columns)), np.nan)
    shares[row, column] = cells["share"].to_numpy(dtype=float)
    finite = np.isfinite(shares)
    added = np.where(finite, shares, 0.0)
    top, left = _strongest(np.abs(added).sum(axis=1)), _strongest(np.abs(added).sum(axis=0))
    by_position = causes.set_index("position")
    change = by_position["measured"][~by_position.index.duplicated()]
    other = told[(told["example"] != example) & np.isfinite(told["share"].astype(float))]
    return InfluenceMap(
        step=step,
        probe_id=probe_id,
        example=example,
        rows=rows[top],
        columns=columns[left],
        shares=np.where(finite, shares, np.nan)[np.ix_(top, left)],
        row_sums=added.sum(axis=1)[top],
        column_sums=added.sum(axis=0)[left],
        total=float(added.sum()),
        n_rows=len(rows),
        n_columns=len(columns),
        n_nonfinite=int((~finite).sum()),
        told=_of_columns(told[told["example"] == example], columns[left]),
        others=float(other["share"].sum()) if len(told) else None,
        n_others=int(told["example"].nunique() - (told["example"] == example).any()),
        causes={
            str(cause): own["share"].reindex(rows[top]).to_numpy(dtype=float)
            for cause, own in by_position.groupby("cause", sort=False)
        },
        measured=change.reindex(rows[top]).to_numpy(dtype=float) if len(change) else None,
    )


def _strongest(strength: np.ndarray) -> np.ndarray:
    """Return the places of the `MAX_SIDE` largest, ascending."""
    return np.sort(np.argsort(-strength, kind="stable")[:MAX_SIDE])


def _of_columns(told: pd.DataFrame, columns: np.ndarray) -> pd.DataFrame:
    named: dict[str, Any] = {"token": None, "c": np.nan, "logp": np.nan}
    if told.empty:
        return pd.DataFrame({name: [value] * len(columns) for name, value in named.items()}, index=columns)
    return told.drop_duplicates("position").set_index("position").reindex(columns)[list(named)]
