"""Files that are there whole or not at all, and Parquet in which a flipped bit is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

_STAMP, _DIGEST = b"llm_dynamics.stamp", b"llm_dynamics.digest"
_SEAL = b"llm_dynamics.blake2b:"  # the value under _DIGEST begins with it: it is found without parsing
_BLANK = b"0" * 32


class DamagedFileError(ValueError):
    """A Parquet file that is not what was written, or no Parquet file; the message names it."""


class Parquet(NamedTuple):
    """What a Parquet file holds.

    Attributes:
        table: The columns asked for.
        schema: Names and types of all columns.
        metadata: Key-values of the file.
        stamp: What `write_parquet` was told to write beside the table; None where nothing was.
    """

    table: pa.Table
    schema: pa.Schema
    metadata: Mapping[bytes, bytes]
    stamp: Mapping[str, Any] | None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it: a reader never sees half of it.

    A link is followed, the mode of a file that is replaced stays, and a pipe or device is written to as it is.

    Raises:
        ValueError: Where a folder has this name.
        OSError: Where the file cannot be written; one that was there is as it was.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the file to write")
    exists = path.exists()
    if exists and not path.is_file():
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        if exists:
            shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_parquet(path: Path, table: pa.Table, stamp: Mapping[str, Any] | None = None) -> None:
    """Write a table with page checksums and a digest of the whole file, footer included; raises as `write_whole`."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write_table(table)
        stamped = {} if stamp is None else {_STAMP: json.dumps(dict(stamp)).encode()}
        writer.add_key_value_metadata({**stamped, _DIGEST: _SEAL + _BLANK})
    content = sink.getvalue().to_pybytes()
    place = content.rindex(_SEAL) + len(_SEAL)
    write_whole(path, content[:place] + _digest(content, place) + content[place + len(_BLANK) :])


def read_parquet(path: Path, columns: Sequence[str] | None = None, *, dictionaries: Sequence[str] = ()) -> Parquet:
    """Read a Parquet file; one that `write_parquet` wrote is compared with its digest first.

    Args:
        path: The file.
        columns: Columns to read, those that the file lacks excepted; all where None.
        dictionaries: String columns to return as Arrow dictionaries.

    Raises:
        DamagedFileError: Where the file is missing, is no Parquet file, or was changed by one bit or more.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DamagedFileError(f"cannot read {path}: {error}") from error
    try:
        place = content.rfind(_SEAL) + len(_SEAL)
        sealed = place >= len(_SEAL)
        if content[place : place + len(_BLANK)] != _digest(content, place) if sealed else _DIGEST in content:
            raise DamagedFileError(f"{path} is damaged: it is not what was written (its digest differs)")
        with pq.ParquetFile(
            pa.BufferReader(content), read_dictionary=list(dictionaries), page_checksum_verification=True
        ) as opened:
            schema = opened.schema_arrow
            found = None if columns is None else [name for name in columns if name in schema.names]
            table = opened.read(columns=found).replace_schema_metadata(None)
            metadata = opened.metadata.metadata or {}
        stamp = json.loads(metadata[_STAMP]) if sealed and _STAMP in metadata else None
    # Arrow turns a damaged footer of an unsealed file into errors of several kinds
    except DamagedFileError:
        raise
    except (OSError, pa.ArrowException, ValueError, KeyError, MemoryError, OverflowError) as error:
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise DamagedFileError(f"cannot read {path} as Parquet, it is damaged or something else: {what}") from error
    return Parquet(table, schema, metadata, stamp)


def _digest(content: bytes, place: int) -> bytes:
    """Return the digest of a file in which that at `place` is blank."""
    view = memoryview(content)
    digest = hashlib.blake2b(view[:place], digest_size=len(_BLANK) // 2)
    digest.update(_BLANK)
    digest.update(view[place + len(_BLANK) :])
    return digest.hexdigest().encode()
