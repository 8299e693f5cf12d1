"""Find and read the files of a run log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llm_dynamics.runlog import schema


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


def read_part(
    file: Path, expected: pa.Schema, columns: Sequence[str] | None = None, *, dictionaries: Sequence[str] = ()
) -> pa.Table:
    """Read one Parquet file and check that it holds at least the columns of `expected`, with their types.

    Columns that an earlier version did not write are null.

    Args:
        file: The file.
        expected: The schema of its table.
        columns: The columns to read; all where None. The others are checked and not read.
        dictionaries: Those of the string columns to return as Arrow dictionaries: a code per row.

    Returns:
        The table, its columns in the order of `columns`.

    Raises:
        RunLogError: Where the file is missing, truncated, not Parquet or of another layout; the message names it.
    """
    try:
        with pq.ParquetFile(file, read_dictionary=list(dictionaries)) as opened:
            seen = opened.schema_arrow
            lacking = [field for field in expected if b"added" in field.metadata and field.name not in seen.names]
            wrong = [f for f in expected if f not in lacking and not _holds(seen, f, dictionaries)]
            stored = None if columns is None else [name for name in columns if name in seen.names]
            table = None if wrong else opened.read(columns=stored)
    except (OSError, pa.ArrowException) as error:
        raise RunLogError(f"cannot read {file}: {error}") from error
    if table is None:
        missing = ", ".join(f"{field.name} ({field.type})" for field in wrong)
        raise RunLogError(
            f"{file} is not part of a run log: missing or of another type: {missing}; seen: {', '.join(seen.names)}"
        )
    for field in lacking:
        table = table.append_column(field, pa.nulls(len(table), field.type))
    return table if columns is None else table.select(list(columns))


def _holds(seen: pa.Schema, field: pa.Field, dictionaries: Sequence[str]) -> bool:
    place = seen.get_field_index(field.name)
    if place < 0:
        return False
    found = seen.field(place).type
    if field.name in dictionaries and pa.types.is_dictionary(found):
        found = found.value_type
    return bool(found == field.type)


def completed_steps(folder: Path, marker: str = "steps") -> list[int]:
    """Return the steps whose observation (`marker="steps"`) or account (`marker="accounts"`) is complete, ascending.

    Complete is what has its part of the marker table, which is written last.
    """
    names = (part.name for part in (folder / marker).glob("step_*.parquet"))
    return sorted(step for step in map(schema.part_step, names) if step is not None)
