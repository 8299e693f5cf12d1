"""How a table of the run log is described: every column by name, type and what it holds."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa


def described(columns: Mapping[str, tuple[pa.DataType, str]]) -> pa.Schema:
    """Return a schema whose fields say in their metadata (`doc`) what they hold.

    Args:
        columns: Type and description by name, in the order of the table.

    Returns:
        The schema.
    """
    return pa.schema([pa.field(name, type_, metadata={"doc": doc}) for name, (type_, doc) in columns.items()])
