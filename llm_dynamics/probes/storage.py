"""A probe set in one Parquet file: a row per probe, the rest as JSON in the schema's metadata. Never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from llm_dynamics.files import DamagedFileError, read_parquet, write_parquet
from llm_dynamics.probes.probe import DroppedProbe, Probe, Prompt

FORMAT_KEY = b"llm_dynamics.probe_set"
FORMAT_VERSION = 2
"""2 added `template`; a set without one is written as 1, which earlier versions of this package read."""
SCHEMA = pa.schema(
    [
        ("probe_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),  # a text, or the messages as JSON
        ("prompt_is_chat", pa.bool_()),
        ("response", pa.string()),
        ("family", pa.string()),
        ("source_row", pa.int64()),
        ("response_ids", pa.list_(pa.int64())),
        ("template", pa.string()),  # JSON
    ]
)


def probe_record(probe: Probe) -> dict[str, Any]:
    """Return one probe as a row of the file; `template` only where it has one, so that fingerprints stay."""
    chat = not isinstance(probe.prompt, str)
    template = {"template": json.dumps(dict(probe.template), ensure_ascii=False)} if probe.template else {}
    return {
        **template,
        "probe_id": probe.probe_id,
        "prompt_id": probe.prompt_id,
        "prompt": json.dumps([dict(m) for m in probe.prompt], ensure_ascii=False) if chat else probe.prompt,  # type: ignore[arg-type]
        "prompt_is_chat": chat,
        "response": probe.response,
        "family": probe.family,
        "source_row": probe.source_row,
        "response_ids": None if probe.response_ids is None else list(probe.response_ids),
    }


def write_probes(
    path: Path, probes: Sequence[Probe], dropped: Sequence[DroppedProbe], metadata: Mapping[str, Any]
) -> None:
    """Write the file under a temporary name, then rename it: a reader never sees half of it.

    Raises:
        ValueError: If there is a folder of that name.
    """
    version = FORMAT_VERSION if any(probe.template for probe in probes) else 1
    header = {"version": version, "metadata": dict(metadata), "dropped": [asdict(item) for item in dropped]}
    schema = SCHEMA.with_metadata({FORMAT_KEY: json.dumps(header).encode()})
    table = pa.Table.from_pylist([probe_record(probe) for probe in probes], schema=schema)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the file to write, such as {path / 'probes.parquet'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, table)


HOW_TO_BUILD = "A probe set is built from preference pairs by `llm-dynamics probes build pairs.jsonl probes.parquet`."


def read_probes(path: Path) -> tuple[list[Probe], list[DroppedProbe], dict[str, Any]]:
    """Return what `write_probes` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is no probe set, or was written by a later version; it names the file.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the file that a probe set was saved to")
    if not path.is_file():
        raise FileNotFoundError(f"No probe set at {path} (in {Path.cwd()}). {HOW_TO_BUILD}")
    try:
        found = read_parquet(path)
    except DamagedFileError as error:
        raise ValueError(
            f"{path} is not a readable Parquet file (truncated, damaged, or something else): {error}. {HOW_TO_BUILD}"
        ) from error
    raw = found.metadata.get(FORMAT_KEY)
    if raw is None:
        raise ValueError(
            f"{path} is a Parquet file but no probe set; its columns are {found.schema.names}. Read it with pandas and "
            "pass the rows to ProbeSet.from_records."
        )
    wrong = [
        f"{field.name} ({field.type})"
        for field in SCHEMA
        if field.name not in found.schema.names or found.schema.field(field.name).type != field.type
        if field.name in found.schema.names or field.name != "template"  # version 1 has none
    ]
    try:
        header = json.loads(raw)
        if header["version"] > FORMAT_VERSION:
            raise ValueError(
                f"it has format {header['version']}; this version reads up to {FORMAT_VERSION}. Update llm-dynamics."
            )
        if wrong:
            raise ValueError(f"missing or of another type: {', '.join(wrong)}")
        probes = [_probe(row) for row in found.table.to_pylist()]
        return probes, [DroppedProbe(**item) for item in header["dropped"]], dict(header["metadata"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
        raise ValueError(f"the probe set {path} cannot be read: {what}") from error


def _probe(row: Mapping[str, Any]) -> Probe:
    """Return the probe of a row of the file.

    Raises:
        ValueError: Where the row lacks what every probe has, or its chat is none.
    """
    missing = [name for name in ("probe_id", "prompt_id", "prompt", "response", "family") if row[name] is None]
    if missing:
        raise ValueError(f"probe {row['probe_id']!r} has no {', '.join(missing)}")
    prompt: Prompt = row["prompt"]
    if row["prompt_is_chat"]:
        prompt = tuple(json.loads(row["prompt"]))
        if not prompt or not all(isinstance(message, dict) and "role" in message for message in prompt):
            raise ValueError(f"the prompt of probe {row['probe_id']!r} is no list of chat messages")
    ids = row["response_ids"]
    if ids is not None and (None in ids or min(ids, default=0) < 0):
        raise ValueError(f"the response_ids of probe {row['probe_id']!r} are no token ids: {ids[:8]}")
    return Probe(
        row["probe_id"],
        row["prompt_id"],
        prompt,
        row["response"],
        row["family"],
        row["source_row"],
        None if ids is None else tuple(ids),
        json.loads(row["template"]) if row.get("template") else None,
    )
