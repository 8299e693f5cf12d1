"""Tables as Markdown, for places that show no page: model cards and trackers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from llm_dynamics.report.text import visible

_ACTS = re.compile(r"[\\`*\[\]<>&|~#$]|(?<!\w)_|_(?!\w)")


def markdown_table(frame: pd.DataFrame, formats: Mapping[str, Callable[[Any], str]] | None = None) -> str:
    """Write a frame as a Markdown table; text is shown as it is and never acts.

    Args:
        frame: Its columns are the table's; numbers are aligned to the right.
        formats: How to write the values of a column; by default numbers have four significant digits. What is not
            finite or missing is a dash.

    Returns:
        The table, a line per row, without a final line break.
    """
    formats = formats or {}
    numeric = [pd.api.types.is_numeric_dtype(frame[name]) for name in frame.columns]
    lines = [[escaped(str(name)) for name in frame.columns], ["---:" if right else "---" for right in numeric]]
    for row in frame.itertuples(index=False, name=None):
        lines.append([_cell(value, formats.get(name)) for name, value in zip(frame.columns, row, strict=True)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Escape `text` so that Markdown, and the HTML in it, shows it on one line as it is."""
    line = visible(text).replace("\n", "↵").replace("\t", "⇥")
    return _ACTS.sub(lambda found: f"&#{ord(found[0])};", line)


def _cell(value: Any, form: Callable[[Any], str] | None) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if form is not None:
        return escaped(form(value))
    return f"{value:.4g}" if isinstance(value, float) else escaped(str(value))
