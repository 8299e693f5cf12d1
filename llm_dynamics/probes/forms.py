"""One row of data, in any form that TRL's trainers take, as one prompt with its responses."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeGuard

import numpy as np
import pandas as pd
from trl import extract_prompt, maybe_convert_to_chatml

logger = logging.getLogger(__name__)

RESPONSES = ("chosen", "completion", "response")
WHOLE = ("messages", "conversations", "text")
"""Columns that hold a prompt and its response in one."""
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
RENDERED = (
    "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "name", "channel", "recipient",
    "images", "documents", "citations", "prefix",
)  # fmt: skip
"""Keys of a message that chat templates render beside its content; other keys (language, score...) are of no effect."""


class OddRow(ValueError):
    """A row that holds no prompt with a response; the message is the reason, the same for all rows of its kind."""


@dataclass(frozen=True)
class RowForm:
    r"""Where the rows of a data set hold prompt and responses. `RowForm.of` finds it, `explicit` reads a row by it.

    Attributes:
        prompt: Column of the prompt.
        chosen: Column of the response, or of the preferred one.
        rejected: Column of the other response; None where the rows have none.
        label: Column that tells which of both `chosen` is (KTO); None where the rows have none.
        as_chat: Make plain prompts and responses chat messages.
        transcripts: Split transcripts ("\n\nHuman: ... \n\nAssistant: ...") after their last "Assistant:", rather
            than where the responses part, which is what `DPOTrainer` does.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str | None = "rejected"
    label: str | None = None
    as_chat: bool = False
    transcripts: bool = False

    @classmethod
    def of(
        cls,
        records: Sequence[Mapping[str, Any]],
        columns: Mapping[str, str] = MappingProxyType({}),
        *,
        as_chat: bool = False,
        transcripts: bool = False,
    ) -> RowForm:
        """Return the form of `records`, judged by all of them.

        Args:
            records: The rows.
            columns: Where `prompt`, `chosen` and `rejected` are not called so, their columns. A name of `RESPONSES`
                that no row has stands for any that is there.
            as_chat: See the attributes, as `transcripts`.
            transcripts: Likewise.

        Returns:
            The form.
        """
        prompt, chosen, rejected = (columns.get(name, name) for name in ("prompt", "chosen", "rejected"))
        seen = set().union(*records)
        if chosen in RESPONSES and chosen not in seen:
            chosen = next((name for name in RESPONSES if name in seen), chosen)
        label = "label" if "label" in seen and chosen != "chosen" and rejected not in seen else None
        if label:
            values = {plain(record.get(label)) for record in records if np.isscalar(record.get(label))} - {None}
            if not values or not values <= {0, 1}:
                logger.warning(
                    "the column 'label' holds %s, not KTO's True and False: every completion is taken as chosen",
                    ", ".join(sorted(map(repr, values))[:4]) or "nothing",
                )
                label = None
        turns = [turn for name in WHOLE[:2] for turn in plain(records[0].get(name)) or () if _is_dict(turn)]
        roles = {turn.get("from", turn.get("role")) for turn in turns}
        if roles & set(SHAREGPT_ROLES):
            logger.warning(
                "the conversations name their speakers 'human' and 'gpt': probes have the roles 'user' and 'assistant' "
                "instead, and SFTTrainer renders the names as they stand. Rename them in the rows that you train on"
            )
        return cls(prompt, chosen, rejected if rejected in seen else None, label, as_chat, transcripts)

    def explicit(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return one row as `prompt`, `chosen` and `rejected`, TRL's explicit form.

        Args:
            record: The row.

        Returns:
            The prompt is a text or a list of messages; a response is a text or, after messages, a list of one message
            (what else the cell held stays as it is); None where the row has no such response.

        Raises:
            OddRow: If there is no prompt, with the reason.
        """
        asked, good = _cell(record.get(self.prompt)), _cell(record.get(self.chosen))
        bad = _cell(record.get(self.rejected)) if self.rejected else None
        if self.prompt == self.chosen or (self.prompt in WHOLE and good is None and bad is None):
            asked, good = _last_turn(asked)
        elif asked is None:
            asked, good, bad = self._implicit(record, good, bad)
        elif isinstance(asked, str) and (is_messages(good) or is_messages(bad)):
            if all(not is_messages(response) or len(response) == 1 for response in (good, bad)):
                asked = [{"role": "user", "content": asked}]
            else:  # the prompt is inside the conversations, too
                asked, good, bad = self._implicit(record, good, bad)
        if not isinstance(asked, str) and not is_messages(asked):
            seen = "an empty list" if asked == [] else f"a {type(asked).__name__}"
            raise OddRow(f"the prompt is {seen}; it must be a text or a list of messages with 'role' and 'content'")
        if self.label:
            label = plain(record.get(self.label))
            if label not in (0, 1):
                raise OddRow(f"the label is {label!r}; it must be True or False")
            good, bad = (good, bad) if label else (None, good)
        row = {"prompt": asked, "chosen": good, "rejected": bad}
        return to_chat(row) if self.as_chat or not isinstance(asked, str) else row

    def _implicit(self, record: Mapping[str, Any], good: Any, bad: Any) -> tuple[Any, Any, Any]:
        """Return prompt and responses of a row whose prompt is inside its responses, or in a column of `WHOLE`.

        Raises:
            OddRow: If there is no prompt.
        """
        if good is None and bad is None:
            whole = next((cell for name in WHOLE if (cell := _cell(record.get(name))) is not None), None)
            if whole is None:
                raise OddRow("no prompt")
            return *_last_turn(whole), None
        if bad is None and self.rejected is None:
            if isinstance(good, str) and ASSISTANT not in good:
                raise OddRow("no prompt")
            return *_last_turn(good), None
        if not good or not bad or isinstance(good, str) != isinstance(bad, str):
            raise OddRow(f"an empty {self.chosen!r} or {self.rejected!r}, so no prompt can be extracted from the two")
        if isinstance(good, str) and (self.as_chat or self.transcripts) and HUMAN in good:
            return split_transcripts(good, bad)
        parts: dict[str, Any] = extract_prompt({"chosen": good, "rejected": bad})
        if not parts["prompt"] or (isinstance(good, str) and not parts["prompt"].strip()):
            raise OddRow(f"{self.chosen!r} and {self.rejected!r} share no beginning")
        return parts["prompt"], parts["chosen"], parts["rejected"]


def to_chat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an explicit row as chat messages: texts lose the whitespace around them, transcripts become turns."""
    asked = row["prompt"]
    if isinstance(asked, str):
        transcript = asked.startswith(HUMAN) and asked.endswith(ASSISTANT)
        asked = read_transcript(asked) if transcript else [{"role": "user", "content": asked.strip()}]
    says = {
        name: [{"role": "assistant", "content": text.strip()}] if isinstance(text, str) else text
        for name, text in row.items()
        if name != "prompt"
    }
    return {"prompt": asked, **says}


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return the common prompt and both answers of two transcripts, split after their last "Assistant:".

    Raises:
        OddRow: If they differ before it.
    """
    end = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    prompt = chosen[:end]
    if end < len(ASSISTANT) or rejected[: rejected.rfind(ASSISTANT) + len(ASSISTANT)] != prompt:
        raise OddRow("the transcripts part before their last answer")
    return prompt, chosen[end:], rejected[end:]


def read_transcript(prompt: str) -> list[dict[str, str]]:
    """Return the turns of a transcript that ends in "Assistant:" as chat messages."""
    parts = re.split(f"({HUMAN}|{ASSISTANT})", prompt)[1:-2]  # marker, text, marker, text ...
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": "user" if mark == HUMAN else "assistant", "content": text.strip()} for mark, text in turns]


def is_messages(value: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Return whether `value` is a non-empty sequence of chat messages."""
    return isinstance(value, list | tuple) and bool(value) and all(_is_dict(turn) and "role" in turn for turn in value)


def response_text(value: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of a response that is one assistant message.

    Raises:
        OddRow: If it is something else, with the reason.
    """
    if len(value) != 1:
        raise OddRow(f"{len(value)} messages; a response must be exactly one assistant message")
    (message,) = value
    if message["role"] != "assistant":
        raise OddRow(f"the message's role is {message['role']!r}; a response must come from 'assistant'")
    extra = [key for key in RENDERED if message.get(key)]
    if extra or not isinstance(message.get("content"), str):
        raise OddRow(
            f"only plain text can be watched; the message's content is a {type(message.get('content')).__name__}"
            + (f", and it has {', '.join(extra)}" if extra else "")
        )
    return str(message["content"])


def plain(value: Any) -> Any:
    """Return a cell without the types of numpy and pandas: arrays as lists, missing values as None."""
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    return None if value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value) else value


def _cell(value: Any) -> Any:
    """Return a cell, plain; messages have `role` and `content`, and no key that is empty (Arrow adds such keys)."""
    value = plain(value)
    if not isinstance(value, list) or not value or not all(map(_is_dict, value)):
        return value
    messages = maybe_convert_to_chatml({"messages": value})["messages"]
    return [
        {key: SHAREGPT_ROLES.get(item, item) if key == "role" else item for key, item in message.items()
         if item is not None or key == "content"}
        for message in messages
    ]  # fmt: skip


def _is_dict(value: object) -> bool:
    return isinstance(value, Mapping)


def _last_turn(whole: Any) -> tuple[Any, Any]:
    """Split a conversation before its last assistant turn; a text after its last "Assistant:", or half-way by words.

    Raises:
        OddRow: If nothing stands before the response.
    """
    if is_messages(whole):
        ends = [index for index, message in enumerate(whole) if message["role"] == "assistant"]
        if not ends or not ends[-1]:
            raise OddRow("no assistant turn after another turn")
        return whole[: ends[-1]], whole[ends[-1] : ends[-1] + 1]
    if not isinstance(whole, str):
        raise OddRow(f"a {type(whole).__name__}, where a text or a conversation is needed")
    end = whole.rfind(ASSISTANT) + len(ASSISTANT)
    if end < len(ASSISTANT):
        words = list(re.finditer(r"\S+", whole))
        if len(words) < 2:
            raise OddRow("a text of fewer than two words: nothing stands before a response")
        end = words[(len(words) - 1) // 2].end()
    return whole[:end], whole[end:]


def forms(probes: Iterable[Any], processing_class: Any, rows: str | None = None) -> dict[str, str | bool | None]:
    """Tell in which form training rows and the probes' prompts are, for `meta.json`.

    Args:
        probes: The probes.
        processing_class: The tokenizer.
        rows: "chat messages" or "plain text"; None where that cannot be told.

    Returns:
        `rows`; `prompts`: the same of the probes, "both" where they differ; `chat_template`: whether the tokenizer has
        one.
    """
    kinds = {"plain text" if isinstance(probe.prompt, str) else "chat messages" for probe in probes}
    template = getattr(processing_class, "chat_template", None) is not None
    return {"rows": rows, "prompts": "both" if len(kinds) > 1 else kinds.pop(), "chat_template": template}


def other_form(form: Mapping[str, str | bool | None]) -> str | None:
    """Say that training rows are chat messages and all probes plain text, or the other way round; None where not.

    The tokens around a response then differ from those that training sees, and the probes say little about it.

    Args:
        form: What `forms` returned.

    Returns:
        A sentence, or None.
    """
    if None in form.values() or form["prompts"] in ("both", form["rows"]):
        return None
    templated = "rows" if form["rows"] == "chat messages" else "probes"
    return (
        f"the trainer's rows are {form['rows']}, and the prompts of the probes are {form['prompts']}: the chat "
        f"template is put around the {templated} alone, so the probes are "
        "scored in another form than the one trained on. Build them from rows like the trainer's"
    )
