"""Several run logs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from llm_dynamics.runlog.reader import OnError, RunLog, load_run


@dataclass(frozen=True)
class RunLogs:
    """Several run logs by name; every frame has a leading `run` column."""

    runs: Mapping[str, RunLog]

    def __getitem__(self, name: str) -> RunLog:
        return self.runs[name]

    @cached_property
    def probes(self) -> pd.DataFrame:
        """Probes of all runs."""
        return self._concat("probes")

    @cached_property
    def sequences(self) -> pd.DataFrame:
        """Sequences of all runs."""
        return self._concat("sequences")

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """Tokens of all runs."""
        return self._concat("tokens")

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Steps of all runs."""
        return self._concat("steps")

    @cached_property
    def influence(self) -> pd.DataFrame:
        """Influence of all runs."""
        return self._concat("influence")

    @cached_property
    def influence_tokens(self) -> pd.DataFrame:
        """Influence per probe token of all runs."""
        return self._concat("influence_tokens")

    @cached_property
    def training_examples(self) -> pd.DataFrame:
        """Training examples of the explained steps of all runs."""
        return self._concat("training_examples")

    @cached_property
    def training_tokens(self) -> pd.DataFrame:
        """Training tokens of the explained steps of all runs."""
        return self._concat("training_tokens")

    @cached_property
    def influence_maps(self) -> pd.DataFrame:
        """Maps of probe token by training token of all runs."""
        return self._concat("influence_maps")

    @cached_property
    def accounts(self) -> pd.DataFrame:
        """Accounts of all runs."""
        return self._concat("accounts")

    @cached_property
    def rollouts(self) -> pd.DataFrame:
        """Logged completions of all runs."""
        return self._concat("rollouts")

    @cached_property
    def nthr_tokens(self) -> pd.DataFrame:
        """Tokens of logged completions of all runs."""
        return self._concat("nthr_tokens")

    @cached_property
    def displacements(self) -> pd.DataFrame:
        """Displacements of all runs."""
        return self._concat("displacements")

    @property
    def meta(self) -> dict[str, dict[str, Any]]:
        """`meta.json` of every run."""
        return {name: run.meta for name, run in self.runs.items()}

    def delta_from_start(self) -> pd.DataFrame:
        """Return `delta_from_start` of every run; each run counts from its own first observation."""
        return self._named({name: run.delta_from_start() for name, run in self.runs.items()})

    def family_influence(self) -> pd.DataFrame:
        """Return `family_influence` of every run."""
        return self._named({name: run.family_influence() for name, run in self.runs.items()})

    def _concat(self, table: str) -> pd.DataFrame:
        return self._named({name: getattr(run, table) for name, run in self.runs.items()})

    @staticmethod
    def _named(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
        named = [frame.assign(run=name) for name, frame in frames.items()]
        merged = pd.concat(named, ignore_index=True)
        return merged[["run", *(column for column in merged.columns if column != "run")]]


def load_runs(paths: Mapping[str, str | Path] | Sequence[str | Path], *, errors: OnError = "raise") -> RunLogs:
    """Open several run logs for comparison.

    Args:
        paths: Run folder by the name it shall have, such as `{"sft": "runs/sft", "dpo": "runs/dpo"}`; or the folders
            alone, each run then being called like its folder.
        errors: As for `load_run`.

    Returns:
        The runs; their frames are stacked with a `run` column.

    Raises:
        ValueError: Where `paths` is empty, is one path rather than several, or two runs would have the same name.
        RunLogError: As for `load_run`.
    """
    if isinstance(paths, str | Path):
        raise ValueError(f"load_runs takes several runs, {{name: path}} or [path, ...]; seen {paths!r}: see load_run")
    if not paths:
        raise ValueError("load_runs needs at least one run: {name: path} or [path, ...]")
    if isinstance(paths, Mapping):
        return RunLogs({name: load_run(path, errors=errors) for name, path in paths.items()})
    runs: dict[str, RunLog] = {}
    for path in paths:
        run = load_run(path, errors=errors)
        if run.name in runs:
            raise ValueError(
                f"two runs are called {run.name!r}: {runs[run.name].path} and {run.path}; name them: {{name: path}}"
            )
        runs[run.name] = run
    return RunLogs(runs)
