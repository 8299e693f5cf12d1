"""Several runs on common positions and probes, so that they can be subtracted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Literal

import numpy as np
import pandas as pd

from llm_dynamics.frames.matching import Sharing, shared_probes
from llm_dynamics.frames.positions import On, positions
from llm_dynamics.frames.runs import Chain, Runs, named_chains, one_row_per_probe, stacked
from llm_dynamics.frames.statistics import sum_column

Between = Literal["drop", "interpolate"]


def align(
    runs: Runs,
    *,
    on: On = "step",
    between: Between = "drop",
    probes: Sharing = "same",
    statistic: str | Sequence[str] = "logp",
) -> pd.DataFrame:
    """Put several runs on the same positions and the same probes, so that they can be subtracted.

    Every run gets the same rows in the same order: positions ascending, at each of them all shared probes in the order
    of the first run. Runs that were observed at different intervals or for different lengths meet where they can:

    - `between="drop"` keeps the positions at which *every* run was observed; no number is made up.
    - `between="interpolate"` takes all positions observed in any run, from the latest start to the earliest end, and
      draws a straight line between a probe's two neighbouring observations where a run was not observed.

    Args:
        runs: Runs by name, `load_runs(...)`, or a mapping whose values may be chains: `{"plain": [sft, dpo],
            "extended": [extend, dpo_2]}`. The steps of a chain are counted through; a stage's observation before its
            first step stands for the last one of the stage before, and a warning says where the two differ.
        on: What counts as the same position: "step", optimizer steps; "epoch", passes over the data; "progress", share
            of the run's observed steps, 0 to 1: for runs of different length or batch size.
        between: "drop" or "interpolate", as above.
        probes: "same" refuses runs whose probes differ (another set, prompt, response or tokens of it); "common" keeps
            those that are the same in all runs and warns how many were left out.
        statistic: One or several names in `frames.STATISTICS`.

    Returns:
        One row per run, position and probe: `run`; `stage`, the run of a chain (the name itself where there is one);
        `at`, the position (int64 for steps, else float64); `observed`, False where the row is interpolated; `probe_id`,
        `prompt_id`, `family`, `n_tokens`; and each statistic's sum over tokens (`logp_sum`, ...; float64, nats for
        log-probs). A probe that is missing at an observation has NaN there, and so has what is interpolated from it.

    Raises:
        ValueError: Where runs share no position or no probe, probes differ, a run has no observation, or an option is
            not allowed.

    Example:
        >>> both = align(load_runs({"dpo": "runs/dpo", "ipo": "runs/ipo"}))  # doctest: +SKIP
        >>> wide = both.pivot(index=["at", "family", "probe_id"], columns="run", values="logp_sum")  # doctest: +SKIP
        >>> (wide["ipo"] - wide["dpo"]).groupby(["at", "family"]).mean().unstack()  # doctest: +SKIP
    """
    if between not in ("drop", "interpolate"):
        raise ValueError(f'between is {between!r}; allowed: "drop", "interpolate"')
    statistics = [statistic] if isinstance(statistic, str) else list(statistic)
    columns = list(dict.fromkeys(sum_column(name) for name in statistics))
    chains = named_chains(runs)
    shared = shared_probes(_stages(chains), probes)
    places = {name: positions(name, chain, on) for name, chain in chains.items()}
    grid = _grid(places, between, on)
    return stacked(
        {
            name: _on_grid(name, chain.observations(statistics), places[name], grid, shared, columns)
            for name, chain in chains.items()
        }
    )


def _stages(chains: Mapping[str, Chain]) -> dict:
    return {
        name if len(chain.stages) == 1 else f"{name}: {stage}": run
        for name, chain in chains.items()
        for stage, run in chain.stages.items()
    }


def _grid(places: Mapping[str, pd.Series], between: Between, on: On) -> np.ndarray:
    """Return the positions that the runs are put on, ascending (G,).

    Raises:
        ValueError: Where there is none, with those of every run.
    """
    observed = [place.to_numpy() for place in places.values()]
    if between == "drop":
        grid = reduce(np.intersect1d, observed)
        way_out = 'between="interpolate" or on="progress"' if on != "progress" else 'between="interpolate"'
    else:
        start, end = max(place[0] for place in observed), min(place[-1] for place in observed)
        grid = reduce(np.union1d, observed)
        grid = grid[(grid >= start) & (grid <= end)]
        way_out = 'on="progress"'
    if not len(grid):
        spans = "; ".join(f"{name!r}: {_listed(place)}" for name, place in places.items())
        raise ValueError(f"the runs have no {on} in common ({spans}); try {way_out}")
    return grid


def _listed(place: pd.Series) -> str:
    values = [f"{value:g}" for value in place]
    return ", ".join(values if len(values) <= 6 else [*values[:4], "...", values[-1]])


def _on_grid(
    name: str, frame: pd.DataFrame, place: pd.Series, grid: np.ndarray, shared: pd.DataFrame, columns: list[str]
) -> pd.DataFrame:
    """Return the rows of one run: G positions x P probes."""
    one_row_per_probe(name, frame)
    at = place.to_numpy()  # (S,)
    right = np.searchsorted(at, grid)  # (G,) the first observation at or after each position
    exact = at[right] == grid
    left = np.where(exact, right, right - 1)
    share = np.where(exact, 0.0, (grid - at[left]) / np.where(exact, 1, at[right] - at[left]))[:, None]  # (G, 1)
    rows = np.searchsorted(place.index, frame["step"])
    cols = pd.Index(shared["probe_id"]).get_indexer(pd.Index(frame["probe_id"]))
    kept = cols >= 0

    def on_grid(column: str) -> np.ndarray:
        values = np.full((len(at), len(shared)), np.nan)  # (S, P)
        values[rows[kept], cols[kept]] = frame[column].to_numpy(dtype=float)[kept]
        with np.errstate(invalid="ignore"):  # of an infinity minus another
            line = np.where(exact[:, None], 0.0, (values[right] - values[left]) * share)
            return (values[left] + line).ravel()  # (G * P,)

    stages = frame.drop_duplicates("step").set_index("step")["stage"].reindex(place.index[left])
    lengths = frame.drop_duplicates("probe_id").set_index("probe_id")["n_tokens"]
    n_tokens = np.tile(lengths.reindex(shared["probe_id"]).to_numpy(), len(grid))
    return pd.DataFrame(
        {
            "stage": np.repeat(stages.to_numpy(), len(shared)),
            "at": np.repeat(grid, len(shared)),
            "observed": np.repeat(exact, len(shared)),
            **{key: np.tile(shared[key].to_numpy(), len(grid)) for key in ("probe_id", "prompt_id", "family")},
            "n_tokens": n_tokens,
            **{column: on_grid(column) for column in columns},
        }
    )
