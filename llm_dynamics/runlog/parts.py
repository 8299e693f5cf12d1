"""Find and read the files of a run log."""

from __future__ import annotations

import json
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


def completed_steps(folder: Path, marker: str = "steps") -> list[int]:
    """Return the steps whose observation (`marker="steps"`) or account (`marker="accounts"`) is complete, ascending.

    Complete is what has its part of the marker table, which is written last.
    """
    names = (part.name for part in (folder / marker).glob("step_*.parquet"))
    return sorted(step for step in map(schema.part_step, names) if step is not None)
