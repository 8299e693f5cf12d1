"""What the frames take: one run, several by name, and chains of runs that continue one another."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import TypeGuard

import numpy as np
import pandas as pd

from llm_dynamics.frames.matching import same_where_shared
from llm_dynamics.frames.statistics import read_sums
from llm_dynamics.runlog import RunLog, RunLogs, load_run

Log = RunLog | str | Path
"""A run log, or the folder of one."""
Runs = Log | RunLogs | Sequence[Log] | Mapping[str, Log | RunLogs | Sequence[Log]]
"""One run, or its folder; several, `["runs/sft", "runs/dpo"]` or `load_runs({"sft": ..., "dpo": ...})`; or a mapping
whose values may be chains: `{"plain": load_runs({"sft": ..., "dpo": ...}), "extended": [extend, dpo]}`. A chain is
one training in stages, each of which goes on where the one before ended; its steps are counted through."""

JOINT_TOLERANCE = 0.05
"""Nats per token by which a stage may start away from the end of the stage before, without a warning."""


@dataclass(frozen=True)
class Chain:
    """One training, in one stage or several.

    Attributes:
        stages: The runs by the name of their stage, in the order of training.
    """

    stages: Mapping[str, RunLog]

    @property
    def offsets(self) -> dict[str, int]:
        """Optimizer steps done before each stage: the last observed steps of those before it, added up."""
        done, offsets = 0, {}
        for name, run in self.stages.items():
            offsets[name] = done
            done += max(run.observed_steps, default=0)
        return offsets

    def steps(self) -> dict[str, list[int]]:
        """Return the observed steps of each stage, counted within it, ascending.

        Where a stage was observed before its first step, that observation stands for the last one of the stage before:
        both are of the same weights.
        """
        kept = {name: run.observed_steps for name, run in self.stages.items()}
        names = list(kept)
        for earlier, later in pairwise(names):
            if kept[later][:1] == [0]:
                kept[earlier] = kept[earlier][:-1]
        return kept

    def observations(self, statistics: Sequence[str]) -> pd.DataFrame:
        """Read statistics of every probe and observation, with the steps of the stages counted through.

        Args:
            statistics: Names in `STATISTICS`.

        Returns:
            `stage`, `KEYS` and the sums of `read_sums`.

        Raises:
            ValueError: Where a stage of several was never observed, or an id names different responses in two stages.
        """
        if len(self.stages) == 1:
            ((stage, run),) = self.stages.items()
            frame = read_sums(run, statistics)
            frame.insert(0, "stage", stage)
            return frame
        empty = [name for name, run in self.stages.items() if not run.observed_steps]
        if empty:
            raise ValueError(f"stage {empty[0]!r} of the chain {self} has no observation; leave it out")
        self.check_probes()
        self._check_joints()
        frames = []
        for name, steps in self.steps().items():
            frame = read_sums(self.stages[name], statistics)
            frame = frame[frame["step"].isin(steps)]
            frame = frame.assign(step=frame["step"] + self.offsets[name])
            frame.insert(0, "stage", name)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def check_probes(self) -> None:
        """Refuse stages in which one id names different responses: nothing could be subtracted.

        Raises:
            ValueError: Naming the stages and what differs.
        """
        for one, other in combinations(self.stages.items(), 2):
            same_where_shared(one, other)

    def _check_joints(self) -> None:
        """Warn where a stage does not start where the one before ended: then it is no chain."""
        names = list(self.stages)
        for earlier, later in pairwise(names):
            start = _ends(self.stages[later], 0)
            jump = (start["logp_sum"] - _ends(self.stages[earlier], -1)["logp_sum"]) / start["n_tokens"]
            size = float(jump[np.isfinite(jump)].abs().median())
            if self.stages[later].observed_steps[0] == 0 and size > JOINT_TOLERANCE:
                warnings.warn(
                    f"{later!r} does not start where {earlier!r} ended: half of the probes differ by {size:.2g} nats "
                    f"per token or more ({JOINT_TOLERANCE} are tolerated). Is it trained from that model?",
                    stacklevel=2,
                )

    def __str__(self) -> str:
        return " -> ".join(self.stages)


def is_single(runs: object) -> TypeGuard[Log]:
    """Tell whether one run was given, whose frames have no column `run`."""
    return isinstance(runs, Log)


def named_chains(runs: Runs) -> dict[str, Chain]:
    """Return what was given as chains by name; runs without a name are called by their folders.

    Raises:
        TypeError: For anything that is not `Runs`.
        ValueError: Where there is no run, a chain without a stage, or two runs of one name.
        RunLogError: Where a folder has no run log.
    """
    if is_single(runs):
        runs = [runs]
    given = runs.runs if isinstance(runs, RunLogs) else runs
    if not isinstance(given, Mapping | Sequence) or isinstance(given, bytes):
        raise TypeError(
            f"runs is {type(runs).__name__}; allowed: a run log (load_run) or its folder, a list of them, RunLogs "
            "(load_runs), {name: run}"
        )
    if not given:
        raise ValueError("no run was given")
    if isinstance(given, Mapping):
        return {name: _chain(name, value) for name, value in given.items()}
    logs = [_opened(f"run {number}", value) for number, value in enumerate(given, start=1)]
    twice = [log.name for number, log in enumerate(logs) if log.name in [other.name for other in logs[:number]]]
    if twice:
        raise ValueError(f"two runs are called {twice[0]!r}; name them: {{name: run}}")
    return {log.name: Chain({log.name: log}) for log in logs}


def stacked(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Stack frames by run, with the run's name in a leading column `run`."""
    parts = [frame.assign(run=name) for name, frame in frames.items()]
    filled = [part for part in parts if not part.empty] or parts[:1]  # an empty one would spoil the column types
    merged = pd.concat(filled, ignore_index=True)
    return merged[["run", *(column for column in merged.columns if column != "run")]]


def one_row_per_probe(name: str, frame: pd.DataFrame, position: str = "step") -> None:
    """Refuse a log in which a probe has two rows at one step: nothing could be subtracted.

    Raises:
        ValueError: Naming the run, the probe and the step.
    """
    twice = frame[frame.duplicated([position, "probe_id"])]
    if not twice.empty:
        row = twice.iloc[0]
        raise ValueError(f"run {name!r} has two rows of probe {row['probe_id']!r} at {position} {row[position]}")


def _opened(name: str, value: object) -> RunLog:
    """Return a run log, opened where its folder was given.

    Raises:
        TypeError: For anything else.
    """
    if not isinstance(value, Log):
        raise TypeError(f"{name!r} is {type(value).__name__}; allowed: a RunLog (see load_run), its folder, or a chain")
    return value if isinstance(value, RunLog) else load_run(value)


def _chain(name: str, value: Log | RunLogs | Sequence[Log]) -> Chain:
    if is_single(value):
        return Chain({name: _opened(name, value)})
    if isinstance(value, RunLogs):
        return Chain(value.runs)
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name!r} is {type(value).__name__}; allowed: a RunLog (see load_run), its folder, or a chain")
    if not value:
        raise ValueError(f"the chain {name!r} has no run")
    stages: dict[str, RunLog] = {}
    for run in (_opened(name, stage) for stage in value):
        number = sum(stage.name == run.name for stage in stages.values())
        stages[f"{run.name} ({number + 1})" if number else run.name] = run
    return Chain(stages)


def _ends(run: RunLog, place: int) -> pd.DataFrame:
    """Return the summed log-probs and lengths of one observation, by probe."""
    columns = ["probe_id", "n_tokens", "logp_sum"]
    part = next(run.parts("sequences", [run.observed_steps[place]], columns), None)
    frame = pd.DataFrame(columns=columns) if part is None else part.to_pandas()
    return frame.drop_duplicates("probe_id").set_index("probe_id").astype("float64")
