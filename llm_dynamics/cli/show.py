"""What commands print with: two consoles, tables, text that is not trusted, and JSON."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console()
errors = Console(stderr=True)


def print_json(value: Any) -> None:
    """Print a frame (a list of rows) or plain values as JSON, for other programs; NaN becomes null."""
    if isinstance(value, pd.DataFrame):
        print(value.to_json(orient="records", double_precision=10, force_ascii=False))
    else:
        print(json.dumps(_without_nan(value), ensure_ascii=False))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def moved_table(title: str, moved: pd.DataFrame) -> Table:
    """Return a table of `what_moved`: families, start, end and change."""
    from llm_dynamics.frames.numbers import nats

    table = Table(title=title)
    table.add_column("family", style="bold", no_wrap=True)
    for heading in ("start", "end", "change", "change per token"):
        table.add_column(heading, justify="right")
    for row in moved.to_dict("records"):
        colour = "green" if row["delta"] > 0 else "red"
        table.add_row(
            row["family"],
            nats(row["start"]),
            nats(row["end"]),
            Text(nats(row["delta"], sign=True), colour),
            Text(nats(row["delta_per_token"], sign=True), colour),
        )
    return table


def printable(text: str) -> Text:
    """Return `text` as it stands, without markup; what would drive the terminal is written as its escape."""
    return Text("".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text))


def shortened(text: str, width: int) -> str:
    """Return `text` on one line, at most `width` characters long: its end is cut, with "..." in its place."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: max(width - 3, 0)].rstrip()}..."


def one_line(error: Exception) -> str:
    """Return an error as one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


@contextmanager
def warnings_as_lines(reword: Callable[[str], str] = str) -> Iterator[None]:
    """Show warnings as one plain line each, reworded, rather than with a source line."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        errors.print(Text.assemble(("warning: ", "yellow"), reword(str(message))), soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield
