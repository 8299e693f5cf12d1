"""Make untrusted text safe to show.

Prompts, responses and tokens come from data sets and models. They may hold markup, control characters or bidirectional
overrides; none of that may take effect in the page.
"""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

_JSON_ESCAPES = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}
_BIDIRECTIONAL = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
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
    """Replace what would act instead of being seen: control characters and bidirectional overrides.

    Line breaks and tabs stay.
    """
    return "".join(char if char in "\n\t" or not _acts(char) else f"\\u{ord(char):04x}" for char in text)


def token_label(token: str, longest: int = 14) -> str:
    """Return a short, visible name of a token: spaces and line breaks are drawn, long tokens are cut."""
    shown = visible("".join(_PICTURES.get(char, char) for char in token))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}…"


def nats(value: float, sign: bool = False, digits: int = 1) -> str:
    """Write a number of nats with a true minus sign; a dash where it is not finite."""
    if not math.isfinite(value):
        return "–"
    return format(value, f"{'+' if sign else ''}.{digits}f").replace("-", "−")


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


def _content(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _acts(char: str) -> bool:
    # Cc: controls; Cf holds the bidirectional marks and overrides, but also the joiners that many scripts need
    return unicodedata.category(char) == "Cc" or char in _BIDIRECTIONAL
