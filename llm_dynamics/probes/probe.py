"""One probe: a prompt with a response whose log-probability is watched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Prompt = str | tuple[Mapping[str, Any], ...]
"""Plain text, or chat messages (`{"role": ..., "content": ...}`)."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt and one response to it, of a named family.

    Attributes:
        probe_id: Unique within a set, `"<prompt_id>/<family>"`.
        prompt_id: Groups the probes of one prompt.
        prompt: Plain text, or chat messages.
        response: The response, joined to the prompt as it stands (leading whitespace included).
        family: One of `FAMILY_ORDER`.
        source_row: Row of the source data, or None if the probe came from elsewhere.
        response_ids: Only for families defined on token ids (`random_tokens`): the complete response as fed to the
            model, ending included. `response` is then their decoded text, for display.
        template: What its row gives to the chat template: `tools`, and the entries of its `chat_template_kwargs`.
    """

    probe_id: str
    prompt_id: str
    prompt: Prompt
    response: str
    family: str
    source_row: int | None = None
    response_ids: tuple[int, ...] | None = None
    template: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class DroppedProbe:
    """A probe that was asked for and is not in the set, with the reason.

    Attributes:
        source_row: Row of the source data.
        family: Family it would have had.
        reason: Why it is not there.
    """

    source_row: int | None
    family: str
    reason: str


def check_probes(probes: Iterable[Probe], name: str = "probes") -> Iterator[Probe]:
    """Yield probes.

    Raises:
        TypeError: If they are something else, naming the argument.
    """
    if isinstance(probes, str | bytes | Mapping) or not isinstance(probes, Iterable):
        raise TypeError(f"{name} is a {type(probes).__name__}; give a ProbeSet, or a list of Probe")
    for index, probe in enumerate(probes):
        if not isinstance(probe, Probe):
            raise TypeError(f"{name}[{index}] is a {type(probe).__name__}; give a ProbeSet, or a list of Probe")
        yield probe


def prompt_identity(prompt: Prompt, template: Mapping[str, Any] | None = None) -> str:
    """Return a text that is equal for equal prompts: what draws are seeded with and prompts are compared by."""
    if isinstance(prompt, str):
        return prompt
    rendered = [dict(message) for message in prompt] + ([{"template": dict(template)}] if template else [])
    return json.dumps(rendered, sort_keys=True, ensure_ascii=True)


def prompt_as_text(prompt: Prompt) -> str:
    """Return the prompt for a human reader: the text itself, or one `role: content` line per message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in prompt)
