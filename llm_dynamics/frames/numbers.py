"""How numbers are written, wherever people read them: one rule each for nats, shares, seconds and counts."""

from __future__ import annotations

import math


def nats(value: float, *, sign: bool = False) -> str:
    """Write a number of nats: three significant digits, but at least one decimal and at most four.

    Args:
        value: Any number; what is not finite is a dash, and what four decimals cannot tell from zero has an exponent.
        sign: Write the plus of a positive number, too.

    Returns:
        The number with an ASCII minus, such as "-26.1", "+4.50" or "0.0123".
    """
    if not math.isfinite(value):
        return "–"
    size = float(f"{abs(value):.3g}")  # rounded first: 9.996 is written as 10.0
    if 0 < size < 5e-5:
        return format(value, f"{'+' if sign else ''}.1e")
    decimals = 1 if size >= 10 or not size else 2 if size >= 1 else 3 if size >= 0.1 else 4
    return format(value or 0.0, f"{'+' if sign and value else ''}.{decimals}f")


def percent(share: float) -> str:
    """Write a part of one in percent: one decimal, two below 1%, none above 100%, more where it is nearly 100%.

    Args:
        share: Such as 0.41; what is not finite is a dash.

    Returns:
        The share with an ASCII minus and without idle zeros, such as "41%", "4.2%", "193%" or "99.9997%".
    """
    if not math.isfinite(share):
        return "–"
    missing, size = abs(1 - share), abs(share)
    digits = 0 if size >= 1 else 1 if size >= 0.01 else 2
    if 0 < missing < 0.01:
        digits = min(5, math.ceil(round(-math.log10(missing), 6)) - 1)
    text = f"{100 * share:.{digits}f}"
    if share < 1 and float(text) == 100:
        return "more than 99.9999%"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"


def seconds(value: float) -> str:
    """Write a duration: tenths of a second below a minute, whole seconds from there on."""
    return f"{value:.1f} s" if value < 60 else f"{value:.0f} s"


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun, such as "6 prompts"."""
    return f"{count} {one if count == 1 else many or one + 's'}"
