"""What commands print with: two consoles, tables, text that is not trusted, and JSON."""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text


class PlainConsole(Console):
    """A console on which text is text: it has no markup, and cannot drive the terminal, whatever prints it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text with what would drive the terminal written out before it is laid out."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield segments whose control characters, bidirectional overrides and lone surrogates are written out."""
        for segment in super().render(renderable, options):
            text = segment.text
            if segment.control or (text.isascii() and text.isprintable()):
                yield segment
            else:
                yield Segment(printable(text), segment.style)


console = PlainConsole()
errors = PlainConsole(stderr=True)


def print_json(value: Any) -> None:
    """Print a frame (a list of rows) or plain values as JSON, for other programs; NaN becomes null."""
    if isinstance(value, pd.DataFrame):
        text = value.to_json(orient="records", double_precision=10, force_ascii=True)
        value = json.loads(text)
    print(_DRIVING.sub(lambda found: json.dumps(found[0])[1:-1], json.dumps(_without_nan(value), ensure_ascii=False)))


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
            name_text(row["family"]),
            nats(row["start"]),
            nats(row["end"]),
            Text(nats(row["delta"], sign=True), colour),
            Text(nats(row["delta_per_token"], sign=True), colour),
        )
    return table


_DRIVING = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e0fff]"
)
"""What moves the cursor, turns the direction of text, hides, or cannot be encoded; a newline is a newline."""


def printable(text: str) -> str:
    """Return `text` with what would drive the terminal written as its escape."""
    return _DRIVING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def name_text(name: object, style: str = "") -> Text:
    """Return a name (of a run, a family, a file) as text on one line."""
    return Text(printable(str(name)).replace("\n", "\\n"), style)


def shortened(text: str, width: int) -> str:
    """Return `text` on one line, at most `width` characters long: its end is cut, with "..." in its place."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: max(width - 3, 0)].rstrip()}..."


def one_line(error: Exception) -> str:
    """Return an error as one line."""
    if isinstance(error, OSError) and error.filename is not None:
        return " ".join(f"{error.filename}: {error.strerror}".split())
    return " ".join(str(error).split())


def warn(message: str) -> None:
    """Print a warning as one plain line on stderr."""
    errors.print(Text.assemble(("warning: ", "yellow"), " ".join(message.split())), soft_wrap=True)


@contextmanager
def warnings_as_lines(reword: Callable[[str], str] = str) -> Iterator[None]:
    """Show warnings, and what this package logs, as one plain line each, reworded, rather than with a source line."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warn(reword(record.getMessage()))

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        warn(reword(str(message)))

    package, lines = logging.getLogger("llm_dynamics"), Lines(logging.WARNING)
    package.addHandler(lines)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = show
            yield
    finally:
        package.removeHandler(lines)
