"""Find and read the files of a run log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from llm_dynamics.files import DamagedFileError, read_parquet
from llm_dynamics.runlog import schema


class RunLogError(ValueError):
    """A file of a run log is missing, truncated, of another schema version or not a run log's at all."""


_META_BYTES = 2**26
_META_TYPES: Mapping[str, type] = {
    "run_id": str,
    "probes_fingerprint": str,
    "trainer": str,
    "forms": dict,
    "finished_at_step": int,
    "tokens_end_at_step": int,
    "skipped_steps": list,
    "resumed_at": list,
}
"""Keys of meta.json that are computed with, where they are there; all others are only shown."""


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
        RunLogError: Where it is not readable JSON, is larger than 64 MiB, was written by another schema version, or a
            key holds what it cannot; the message names the file.
    """
    file = folder / schema.META_FILE
    try:
        if file.stat().st_size > _META_BYTES:
            raise RunLogError(
                f"{file} has {file.stat().st_size:,} bytes; that of a run log has {_META_BYTES:,} at most"
            )
        meta = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise RunLogError(f"cannot read {file}: it is nested too deeply for the meta.json of a run log") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RunLogError(f"cannot read {file}: {error}") from error
    version = meta.get("schema_version") if isinstance(meta, dict) else None
    if version != schema.SCHEMA_VERSION:
        raise RunLogError(
            f"{file} has schema version {version!r}; this version of llm_dynamics reads {schema.SCHEMA_VERSION}. "
            "The Parquet files can still be read with pandas.read_parquet."
        )
    for key, kinds in _META_TYPES.items():
        if meta.get(key) is not None and (not isinstance(meta[key], kinds) or isinstance(meta[key], bool)):
            raise RunLogError(f"{file}: {key} is {str(meta[key])[:80]!r}, which is no {kinds.__name__}")
    return meta


def read_part(
    file: Path,
    expected: pa.Schema,
    columns: Sequence[str] | None = None,
    *,
    dictionaries: Sequence[str] = (),
    meta: Mapping[str, Any] | None = None,
) -> pa.Table:
    """Read one Parquet file of a run log and check that it is what was written there.

    Columns that an earlier version did not write are null.

    Args:
        file: The file, `<table>/step_<step>.parquet` or `probes.parquet`.
        expected: The schema of its table: the columns that it has at least, with their types.
        columns: The columns to read; all where None. The others are checked and not read.
        dictionaries: Those of the string columns to return as Arrow dictionaries: a code per row.
        meta: `meta.json` of the run that the file must belong to; None: any. Where it has a `run_id`, so must the file.

    Returns:
        The table, its columns in the order of `columns`.

    Raises:
        RunLogError: Where the file is missing, damaged, not Parquet, of another layout, another run or another step;
            the message names it.
    """
    step = schema.part_step(file.name)
    checked = columns if columns is None or step is None else [*dict.fromkeys([*columns, "step"])]
    try:
        seen = read_parquet(file, checked, dictionaries=dictionaries)
    except DamagedFileError as error:
        raise RunLogError(str(error)) from error
    lacking = [field for field in expected if b"added" in field.metadata and field.name not in seen.schema.names]
    wrong = [f for f in expected if f not in lacking and not _holds(seen.schema, f, dictionaries)]
    if wrong:
        missing = ", ".join(f"{field.name} ({field.type})" for field in wrong)
        raise RunLogError(
            f"{file} is not part of a run log: missing or of another type: {missing}; seen: "
            f"{', '.join(seen.schema.names)}"
        )
    if meta is not None and (seen.stamp is not None or meta.get("run_id") is not None):
        told = seen.stamp or {}
        due = schema.stamp(meta, file.stem if step is None else file.parent.name, step)
        strange = [f"{key} {told.get(key)!r}, not {value!r}" for key, value in due.items() if told.get(key) != value]
        if strange:
            raise RunLogError(
                f"{file} belongs elsewhere: it says {'; '.join(strange)}. Put back the file of this run, or remove it."
            )
    if step is not None and not pc.all(pc.equal(seen.table["step"], step), skip_nulls=False, min_count=0).as_py():
        steps = pc.unique(seen.table["step"]).to_pylist()[:3]
        raise RunLogError(f"{file} belongs elsewhere: its column `step` holds {', '.join(map(str, steps))}")
    table = seen.table
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
