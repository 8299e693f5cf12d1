"""Write a run log: Parquet parts that appear whole or not at all."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from llm_dynamics.files import write_parquet, write_whole
from llm_dynamics.runlog import schema
from llm_dynamics.runlog.folder import FolderLock, beside, may_be_used, move_aside
from llm_dynamics.runlog.parts import RunLogError, completed_steps, read_meta

_IDENTITY = ("schema_version", "probes_fingerprint")
"""Keys of meta.json that a resumed run must share with the run it continues."""


class RunLogWriter:
    """Appends observations to the run log of one run.

    A part is written under a temporary name, flushed to disk and renamed, `steps` last: a killed run is readable up to
    its last completed observation.

    Args:
        folder: The run-log folder, usually `<output_dir>/dynamics`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.meta: dict[str, Any] = {}
        self._lock = FolderLock()

    def claim(self) -> Path | None:
        """Lock the folder for this run, until `close`; where a live run writes to it, take a new one beside it.

        The same where the folder holds other things and no run log. `folder` is then the new one, such as `dynamics-2`.

        Returns:
            The folder that was not to be had, or None where it was.
        """
        asked = self.folder
        while not (may_be_used(self.folder) and self._lock.take(self.folder)):
            self.folder = beside(asked, "-{}", 2)
        return None if self.folder == asked else asked

    def close(self) -> None:
        """Let other runs write to the folder."""
        self._lock.release()

    def start(self, probes: pd.DataFrame, meta: Mapping[str, Any]) -> Path | None:
        """Begin a new run log; one that is there already is moved aside, never overwritten. What is not ours stays.

        Args:
            probes: The probes table, columns of `schema.PROBES`.
            meta: What `meta.json` shall say; `schema_version` and `run_id` are added.

        Returns:
            Where the earlier run log now lies, or None where there was none.
        """
        locked = self._lock.held
        moved = move_aside(self.folder)
        if moved is not None and locked:  # the lock went with what was moved
            self._lock.release()
            self.claim()
        for table in schema.TABLES:
            (self.folder / table).mkdir(parents=True, exist_ok=True)
        self.meta = {"schema_version": schema.SCHEMA_VERSION, "run_id": uuid.uuid4().hex, **meta}
        columns = _to_arrow(probes, schema.PROBES)
        write_parquet(self.folder / schema.PROBES_FILE, columns, schema.stamp(self.meta, "probes", None))
        self.update_meta()
        return moved

    def resume(self, step: int, meta: Mapping[str, Any]) -> list[int]:
        """Continue the run log from a checkpoint: drop what was observed and explained after it.

        Args:
            step: Optimizer step of the checkpoint; observations and accounts up to and including it are kept.
            meta: What `meta.json` shall say; keys that only the first run set stay.

        Returns:
            The steps whose observations were dropped, ascending.

        Raises:
            RunLogError: Where the run log there is unreadable or watches other probes; both are shown.
        """
        old = read_meta(self.folder)
        new = {"schema_version": schema.SCHEMA_VERSION, **meta}
        changed = [key for key in _IDENTITY if old.get(key) != new.get(key)]
        if changed:
            shown = "; ".join(f"{key}: run log {old.get(key)!r}, now {new.get(key)!r}" for key in changed)
            raise RunLogError(
                f"cannot continue the run log at {self.folder}: {shown}. Resume with the probes of the first run, "
                "or move the run log elsewhere and start a new one."
            )
        dropped = self._drop_after(step, schema.OBSERVED_TABLES)
        self._drop_after(step, schema.ACCOUNT_TABLES)
        for name, columns in schema.ROLLOUT_TABLES.items():
            self._drop_after(step, {name: columns})
        for left_by_a_killed_writer in self.folder.rglob(".*.tmp"):
            left_by_a_killed_writer.unlink()
        # What the first run decided stays: its id, and which probes keep their tokens.
        self.meta = {**_before(old, step), **new}
        self.update_meta(created=old.get("created"), resumed_at=[*old.get("resumed_at", []), step])
        return sorted(dropped)

    def write(
        self,
        step: int,
        *,
        sequences: pd.DataFrame,
        tokens: pd.DataFrame | None,
        scalars: Callable[[], Mapping[str, Any]],
    ) -> None:
        """Write one observation.

        Args:
            step: Optimizer steps done; an observation of the same step is replaced.
            sequences: Columns of `schema.SEQUENCES` (`step` is filled in; a missing column becomes null).
            tokens: Columns of `schema.TOKENS`, or None to keep no tokens of this observation.
            scalars: Gives the row of `schema.STEPS` and the run's metrics by name; called when the other tables are on
                disk, so that it can count the time that writing them took.
        """
        part = schema.part_name(step)
        (self.folder / "steps" / part).unlink(missing_ok=True)  # not complete while it is replaced
        for name, frame, columns in (("sequences", sequences, schema.SEQUENCES), ("tokens", tokens, schema.TOKENS)):
            if frame is None:
                (self.folder / name / part).unlink(missing_ok=True)
            else:
                self._write(name, step, frame, columns)
        row = pd.DataFrame([scalars()])
        metrics = [name for name in row.columns if name not in schema.STEPS.names]
        extended = pa.schema([*schema.STEPS, *(pa.field(name, pa.float64()) for name in metrics)])
        self._write("steps", step, row, extended)

    def write_account(self, step: int, tables: Mapping[str, pd.DataFrame], account: Mapping[str, Any]) -> None:
        """Write the account of one optimizer step.

        Args:
            step: Optimizer steps done after the explained update; an account of the same step is replaced.
            tables: Frames by table name, with columns of `schema.ACCOUNT_TABLES` (`step` is filled in; a missing column
                becomes null). `influence` is needed; of the others, those that were measured. A NaN stays a NaN: what
                was not measured is None or `pd.NA`.
            account: The row of `schema.ACCOUNTS`, without `step`; written last.

        Raises:
            ValueError: Where `influence` is missing or a table or column is not in the schema; nothing is written then.
        """
        written = {name: columns for name, columns in schema.ACCOUNT_TABLES.items() if name != "accounts"}
        row = pd.DataFrame([account])
        if "influence" not in tables or not tables.keys() <= written.keys():
            raise ValueError(
                f"tables of an account are {', '.join(written)}, and `influence` is needed; seen: {', '.join(tables)}"
            )
        for name, frame in {**tables, "accounts": row}.items():
            names = schema.ACCOUNT_TABLES[name].names
            unknown = [str(column) for column in frame.columns if column not in names]
            if unknown:
                raise ValueError(f"{name} has no column {', '.join(unknown)}; allowed: {', '.join(names)}")
        part = schema.part_name(step)
        (self.folder / "accounts" / part).unlink(missing_ok=True)  # not complete while it is replaced
        for name, columns in written.items():
            if name in tables:
                self._write(name, step, tables[name], columns)
            else:
                (self.folder / name / part).unlink(missing_ok=True)
        self._write("accounts", step, row, schema.ACCOUNTS)

    def write_rollouts(self, step: int, tables: Mapping[str, pd.DataFrame]) -> None:
        """Write tables of `schema.ROLLOUT_TABLES` for one optimizer step; those of the same step are replaced.

        Args:
            step: Optimizer steps done.
            tables: Frames by table name (`step` is filled in; a missing column becomes null).

        Raises:
            KeyError: For a table that is not in the schema; nothing is written then.
        """
        schemas = {name: schema.ROLLOUT_TABLES[name] for name in tables}
        for name, columns in schemas.items():
            self._write(name, step, tables[name], columns)

    def exists(self) -> bool:
        """Tell whether there is a run log in the folder."""
        return (self.folder / schema.META_FILE).is_file()

    def steps(self, marker: str = "steps") -> list[int]:
        """Return the steps whose observation, or the part of another table `marker`, is complete, ascending."""
        return completed_steps(self.folder, marker)

    def has(self, step: int) -> bool:
        """Tell whether a complete observation of optimizer step `step` is on disk."""
        return (self.folder / "steps" / schema.part_name(step)).exists()

    def table_bytes(self, table: str) -> int:
        """Return the size on disk of all parts of `table`."""
        return sum(self.part_bytes(table))

    def part_bytes(self, table: str) -> list[int]:
        """Return the sizes on disk of the parts of `table`."""
        return [part.stat().st_size for part in (self.folder / table).glob("step_*.parquet")]

    def _drop_after(self, step: int, tables: Mapping[str, pa.Schema]) -> set[int]:
        """Delete the parts of `tables` after `step`, and those that were never completed; return their steps."""
        *_, marker = tables
        kept = {done for done in completed_steps(self.folder, marker) if done <= step}
        dropped: set[int] = set()
        for table in list(tables)[::-1]:  # the marker first: a part without it counts as never written
            (self.folder / table).mkdir(exist_ok=True)  # copies by git or object stores lose empty folders
            for part in (self.folder / table).iterdir():
                done = schema.part_step(part.name)
                if done is not None and done not in kept:
                    part.unlink()
                    dropped.add(done)
        return dropped

    def update_meta(self, **changes: Any) -> None:
        """Set keys of `meta.json` and write it, atomically."""
        self.meta.update(changes)
        text = json.dumps(self.meta, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"
        # a lone surrogate, as of a folder whose name is no UTF-8, is written as the JSON escape that it is read from
        write_whole(self.folder / schema.META_FILE, text.encode(errors="backslashreplace"))

    def _write(self, table: str, step: int, frame: pd.DataFrame, columns: pa.Schema) -> None:
        if not self.meta and self.exists():  # neither begun nor resumed here
            self.meta = read_meta(self.folder)
        file = self.folder / table / schema.part_name(step)
        write_parquet(file, _to_arrow(frame.assign(step=step), columns), schema.stamp(self.meta, table, step))


def _before(meta: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Return what `meta.json` says of a run up to `step`: what was noted later is about to happen again."""
    kept = {key: value for key, value in meta.items() if key != "finished_at_step"}
    if kept.get("tokens_end_at_step", 0) > step:
        del kept["tokens_end_at_step"]
    if "skipped_steps" in kept:
        kept["skipped_steps"] = [skipped for skipped in kept["skipped_steps"] if skipped <= step]
    if "failures" in kept:
        kept["failures"] = [failure for failure in kept["failures"] if failure["step"] <= step]
    return kept


def _to_arrow(frame: pd.DataFrame, columns: pa.Schema) -> pa.Table:
    arrays = []
    for field in columns:
        if field.name not in frame.columns:
            arrays.append(pa.nulls(len(frame), field.type))
            continue
        # pandas' reading of NaN as "missing" must not reach floats: a NaN that was measured stays a NaN on disk
        from_pandas = not pa.types.is_floating(field.type)
        values = [None if value is pd.NA else value for value in frame[field.name].to_list()]
        try:
            arrays.append(pa.array(values, type=field.type, from_pandas=from_pandas))
        except UnicodeEncodeError:  # a lone surrogate, which UTF-8 has not
            texts = [text if text is None else text.encode(errors="backslashreplace").decode() for text in values]
            arrays.append(pa.array(texts, type=field.type))
    return pa.Table.from_arrays(arrays, schema=columns)
