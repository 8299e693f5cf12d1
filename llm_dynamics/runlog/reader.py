"""Read a run log back as pandas frames."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from llm_dynamics.runlog import schema

OnError = Literal["raise", "warn"]


class RunLogError(ValueError):
    """A file of a run log is missing, truncated, of another schema version or not a run log's at all."""


def find_run_log(path: str | Path) -> Path:
    """Return the run-log folder at `path`: the folder itself, or its `dynamics/` subfolder.

    Raises:
        RunLogError: Where neither holds a `meta.json`; the message names what was looked for.
    """
    path = Path(path)
    for folder in (path, path / schema.FOLDER):
        if (folder / schema.META_FILE).is_file():
            return folder
    raise RunLogError(
        f"no run log at {path}: neither {path / schema.META_FILE} nor {path / schema.FOLDER / schema.META_FILE} "
        f"exists. Give the trainer's output_dir or the `{schema.FOLDER}` folder in it."
    )


def read_meta(folder: Path) -> dict[str, Any]:
    """Read `meta.json` of the run log at `folder`.

    Raises:
        RunLogError: Where it is not readable JSON, or was written by another schema version.
    """
    file = folder / schema.META_FILE
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunLogError(f"cannot read {file}: {error}") from error
    version = meta.get("schema_version") if isinstance(meta, dict) else None
    if version != schema.SCHEMA_VERSION:
        raise RunLogError(
            f"{file} has schema version {version!r}; this version of llm_dynamics reads {schema.SCHEMA_VERSION}. "
            "The Parquet files can still be read with pandas.read_parquet."
        )
    return meta


def read_part(file: Path, expected: pa.Schema) -> pa.Table:
    """Read one Parquet file and check that it holds at least the columns of `expected`, with their types.

    Raises:
        RunLogError: Where the file is missing, truncated, not Parquet or of another layout; the message names it.
    """
    try:
        table = pq.ParquetFile(file).read()
    except (OSError, pa.ArrowException) as error:
        raise RunLogError(f"cannot read {file}: {error}") from error
    wrong = [
        f"{field.name} ({field.type})"
        for field in expected
        if field.name not in table.column_names or table.schema.field(field.name).type != field.type
    ]
    if wrong:
        raise RunLogError(
            f"{file} is not part of a run log: missing or of another type: {', '.join(wrong)}; "
            f"seen: {', '.join(table.column_names)}"
        )
    return table


def completed_steps(folder: Path) -> list[int]:
    """Return the steps whose observation is complete (its `steps` part, written last, exists), ascending."""
    names = (part.name for part in (folder / "steps").glob("step_*.parquet"))
    return sorted(step for step in map(schema.part_step, names) if step is not None)


@dataclass(frozen=True)
class RunLog:
    """A run log, read table by table when first asked for.

    Attributes:
        path: The run-log folder.
        errors: "raise" (a bad file raises `RunLogError`) or "warn" (it is named in a warning and left out).
    """

    path: Path
    errors: OnError = "raise"

    @property
    def name(self) -> str:
        """Name of the run: the output folder's."""
        return self.path.resolve().parent.name if self.path.name == schema.FOLDER else self.path.resolve().name

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The contents of `meta.json`."""
        return read_meta(self.path)

    @cached_property
    def probes(self) -> pd.DataFrame:
        """One row per probe; columns of `schema.PROBES`."""
        return read_part(self.path / schema.PROBES_FILE, schema.PROBES).to_pandas()

    @cached_property
    def sequences(self) -> pd.DataFrame:
        """One row per probe and observation; columns of `schema.SEQUENCES`."""
        return self._read("sequences")

    @cached_property
    def tokens(self) -> pd.DataFrame:
        """One row per probe token and observation; columns of `schema.TOKENS`."""
        return self._read("tokens")

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row per observation; columns of `schema.STEPS` and the run's metrics."""
        return self._read("steps")

    @property
    def observed_steps(self) -> list[int]:
        """Optimizer steps at which a complete observation exists, ascending."""
        return completed_steps(self.path)

    def delta_from_start(self) -> pd.DataFrame:
        """Return `sequences` with the change of each probe since the first observation.

        Returns:
            The sequences table with `delta_logp_sum` (nats, sum over tokens) and `delta_logp_mean` (nats per token):
            the value at a step minus the value of the same probe at its first observation.
        """
        frame = self.sequences.sort_values("step", kind="stable").reset_index(drop=True)
        start = frame.groupby("probe_id", sort=False)["logp_sum"].transform("first", skipna=False)
        delta = frame["logp_sum"] - start
        return frame.assign(delta_logp_sum=delta, delta_logp_mean=delta / frame["n_tokens"])

    def _read(self, name: str) -> pd.DataFrame:
        tables = []
        for step in completed_steps(self.path):
            file = self.path / name / schema.part_name(step)
            if name == "tokens" and not file.exists():
                continue  # an observation keeps no tokens once the token budget is spent; meta.json says so
            try:
                tables.append(read_part(file, schema.OBSERVED_TABLES[name]))
            except RunLogError as error:
                if self.errors == "raise":
                    hint = 'load_run(path, errors="warn") reads the rest.'
                    raise RunLogError(f"{str(error).rstrip('.')}. {hint}") from error
                warnings.warn(f"left out of {name}: {error}", stacklevel=3)
        if not tables:
            return schema.OBSERVED_TABLES[name].empty_table().to_pandas()
        return pa.concat_tables(tables, promote_options="default").to_pandas()


def load_run(path: str | Path, *, errors: OnError = "raise") -> RunLog:
    """Open the run log at `path`.

    Args:
        path: A trainer's output_dir, or the `dynamics` folder in it.
        errors: What to do with a truncated or foreign file among the observations: "raise" names it in a
            `RunLogError`; "warn" names it in a warning and reads the rest. An observation that was cut short by a
            crash is no error: it is left out, since its `steps` part was never written.

    Returns:
        The run log; `.sequences`, `.tokens`, `.steps` and `.probes` are pandas frames, `.meta` a dict.

    Raises:
        RunLogError: Where there is no run log, or its `meta.json` is unreadable or of another schema version.
        ValueError: Where `errors` is neither "raise" nor "warn".

    Example:
        >>> run = load_run("runs/dpo")  # doctest: +SKIP
        >>> run.delta_from_start().groupby(["step", "family"])["delta_logp_sum"].mean()  # doctest: +SKIP
    """
    if errors not in ("raise", "warn"):
        raise ValueError(f'errors is {errors!r}; allowed: "raise", "warn"')
    run = RunLog(find_run_log(path), errors)
    _ = run.meta  # a foreign folder is refused here rather than at first use
    return run


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

    @property
    def meta(self) -> dict[str, dict[str, Any]]:
        """`meta.json` of every run."""
        return {name: run.meta for name, run in self.runs.items()}

    def delta_from_start(self) -> pd.DataFrame:
        """Return `delta_from_start` of every run; each run counts from its own first observation."""
        return self._named({name: run.delta_from_start() for name, run in self.runs.items()})

    def _concat(self, table: str) -> pd.DataFrame:
        return self._named({name: getattr(run, table) for name, run in self.runs.items()})

    @staticmethod
    def _named(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
        named = [frame.assign(run=name) for name, frame in frames.items()]
        merged = pd.concat(named, ignore_index=True)
        return merged[["run", *(column for column in merged.columns if column != "run")]]


def load_runs(paths: Mapping[str, str | Path], *, errors: OnError = "raise") -> RunLogs:
    """Open several run logs for comparison.

    Args:
        paths: Run folder by the name it shall have, such as `{"sft": "runs/sft", "dpo": "runs/dpo"}`.
        errors: As for `load_run`.

    Returns:
        The runs; their frames are stacked with a `run` column.

    Raises:
        ValueError: Where `paths` is empty.
        RunLogError: As for `load_run`.
    """
    if not paths:
        raise ValueError("load_runs needs at least one run: {name: path}")
    return RunLogs({name: load_run(path, errors=errors) for name, path in paths.items()})
