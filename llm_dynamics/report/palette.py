"""Colours of the causes: hue tells the cause, the paler tone of a hue the part that came from other prompts."""

from __future__ import annotations

from zlib import crc32

from llm_dynamics.report.causes import OTHERS, REST, UNACCOUNTED

_COLOURS: dict[tuple[str, str], tuple[str, str]] = {
    ("up", ""): ("#0b5cad", "#6db3f2"),
    ("up", OTHERS): ("#5b95d2", "#3f7cb8"),
    ("down", ""): ("#b93a06", "#ff8a5b"),
    ("down", OTHERS): ("#dd8050", "#b95c33"),
    ("momentum", ""): ("#6d4c95", "#bda3e6"),
    ("momentum_up", ""): ("#4c5fae", "#9fadf0"),
    ("momentum_down", ""): ("#96487c", "#e09ac6"),
    ("decay", ""): ("#00714f", "#3fc998"),
    ("other", ""): ("#8f620b", "#ddbe55"),
    ("precision", ""): ("#75757c", "#a9a9b3"),
    ("rounding", ""): ("#75757c", "#a9a9b3"),
    ("step", ""): ("#55585f", "#bdbcb8"),
    ("remainder", ""): ("#8a3f4f", "#e6a0ae"),
    (UNACCOUNTED, ""): ("#8a3f4f", "#e6a0ae"),
    (REST, ""): ("#8f8f94", "#85868b"),
}
_LIKE = {"chosen": "up", "desirable": "up", "rejected": "down", "undesirable": "down"}
_FURTHER = (("#7a5a3a", "#d0b090"), ("#4d6b6b", "#9fc4c4"), ("#5b67b0", "#a9b0f0"), ("#a8407a", "#f095c4"))


def cause_colours(cause: str, part: str = "") -> tuple[str, str]:
    """Return the colours of a cause on light and on dark ground; those of an unknown cause depend on its name alone."""
    prefix = "momentum_" if cause.startswith("momentum_") else ""
    name = prefix + _LIKE.get(cause.removeprefix(prefix), cause.removeprefix(prefix))
    further = _FURTHER[crc32(cause.encode()) % len(_FURTHER)]  # not hash(): that differs between processes
    return _COLOURS.get((name, part)) or _COLOURS.get((name, "")) or further
