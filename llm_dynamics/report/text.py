"""Make untrusted text safe to show.

Prompts, responses and tokens come from data sets and models. They may hold markup, control characters or bidirectional
overrides; none of that may take effect in the page.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from llm_dynamics.frames import numbers

_JSON_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
# controls, bidirectional marks and overrides, lone surrogates; the joiners that many scripts need are not among them
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PICTURES = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}


def json_for_script(value: Any) -> str:
    r"""Return `value` as JSON that can stand inside a `<script>` element.

    `<`, `>`, `&` and the line separators U+2028 and U+2029 are written as `\uXXXX`: the text can neither end the
    element nor open a comment. NaN and infinities are refused, as JSON has none.

    Raises:
        ValueError: Where `value` holds a number that is not finite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_JSON_ESCAPES)


def for_plotly(text: str) -> str:
    """Escape `text` for labels and hover boxes, where plotly reads a subset of HTML."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def visible(text: str) -> str:
    """Replace what would act instead of being seen: control characters, bidirectional overrides, halves of surrogates.

    Line breaks and tabs stay.
    """
    return _ACTING.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def token_label(token: str, longest: int = 14) -> str:
    """Return a short, visible name of a token: spaces and line breaks are drawn, long tokens are cut."""
    shown = visible("".join(_PICTURES.get(char, char) for char in token))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def nats(value: float, sign: bool = False) -> str:
    """Write a number of nats as `frames.numbers` does, with a true minus sign."""
    return numbers.nats(value, sign=sign).replace("-", "−")


def percent(share: float) -> str:
    """Write a share in percent as `frames.numbers` does, with a true minus sign."""
    return numbers.percent(share).replace("-", "−")


def rounded(value: float | None, digits: int = 5) -> float | None:
    """Round to `digits` significant digits; None for what is not finite: JSON knows neither NaN nor infinity."""
    return float(f"{value:.{digits}g}") if value is not None and math.isfinite(value) else None


def prompt_text(prompt: str) -> str:
    """Return a prompt as people read it: chat messages, kept as JSON in the run log, become `role: content` lines."""
    try:
        messages = json.loads(prompt)
    except (ValueError, RecursionError):
        return prompt
    if not (isinstance(messages, list) and messages):
        return prompt
    if not all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages):
        return prompt
    return "\n".join(f"{message['role']}: {_content(message['content'])}" for message in messages)


def prompt_line(prompt: str, longest: int = 90) -> str:
    """Return a prompt as one short line: of a chat, the last thing that the user said."""
    text = prompt_text(prompt)
    if text != prompt:
        text = f"\n{text}".rsplit("\nuser: ", 1)[-1]
    return shortened(text, longest)


def shortened(text: str, longest: int) -> str:
    """Return `text` on one line, visible and cut to `longest` characters."""
    text = text.lstrip()
    line = " ".join(visible(text[: 16 * longest]).split())  # a text may have 50 MB
    return line if len(line) <= longest and len(text) <= 16 * longest else f"{line[: longest - 1]}…"


def _content(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
