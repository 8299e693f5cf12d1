"""How a table of the run log is described: every column by name, type and what it holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pyarrow as pa


def described(columns: Mapping[str, tuple[pa.DataType, str]], *, added: Collection[str] = ()) -> pa.Schema:
    """Return a schema whose fields say in their metadata (`doc`) what they hold.

    Args:
        columns: Type and description by name, in the order of the table.
        added: Columns that logs written by an earlier version lack: they are read as nulls.

    Returns:
        The schema.
    """
    late = {name: {"added": "1"} for name in added}
    return pa.schema(
        [pa.field(name, type_, metadata={"doc": doc, **late.get(name, {})}) for name, (type_, doc) in columns.items()]
    )
