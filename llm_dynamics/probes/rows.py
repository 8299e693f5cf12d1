"""Reading source data, whatever its form, into rows of one prompt with its texts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from trl import extract_prompt

from llm_dynamics.probes.families import stable_hash
from llm_dynamics.probes.probe import Prompt, prompt_identity

logger = logging.getLogger(__name__)

Rows: TypeAlias = "Dataset | pd.DataFrame | Iterable[Mapping[str, Any]]"
Columns: TypeAlias = Mapping[str, str | Sequence[str]]
DropIf: TypeAlias = Mapping[str, str | Callable[[str], bool]]
NOT_GIVEN = "not given in this row"


@dataclass(frozen=True, slots=True)
class Missing:
    """Stands where a response could be and is not, with the reason."""

    reason: str


@dataclass(slots=True)
class Row:
    """One prompt and the texts that the data holds for it.

    Attributes:
        prompt_id: Id of the prompt.
        source_row: Row of the source data.
        prompt: Plain text, or chat messages.
        texts: By family, the responses in the order given, or why there is none.
        ids: By family, the complete response ids that `texts` decode, for families defined on ids.
    """

    prompt_id: str
    source_row: int | None
    prompt: Prompt
    texts: dict[str, list[str | Missing]] = field(default_factory=dict)
    ids: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def first(self, family: str) -> str | None:
        """Return the first text of `family` that is not blank, or None."""
        return next((text for text in self.texts.get(family, ()) if isinstance(text, str) and text.strip()), None)


def as_records(rows: Rows, what: str = "rows") -> list[Mapping[str, Any]]:
    """Return the rows of a dataset, a data frame or an iterable as a list of mappings.

    Raises:
        ValueError: If there are none, or it is not rows (a text, a `DatasetDict`...).
    """
    if isinstance(rows, DatasetDict | IterableDatasetDict):
        raise ValueError(f"{what} holds the splits {list(rows)}; choose one, e.g. dataset[{next(iter(rows))!r}].")
    records: list[Any]
    if isinstance(rows, pd.DataFrame):
        records = [dict(record) for record in rows.to_dict("records")]
    elif isinstance(rows, Dataset | IterableDataset) or (
        isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping)
    ):
        records = list(rows)
    else:
        raise ValueError(f"{what} is a {type(rows).__name__}; give a datasets.Dataset or a list of dictionaries.")
    if not records:
        raise ValueError(f"{what} is empty (zero rows); give at least one.")
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(f"{what}: row {index} is a {type(record).__name__}; each row must be a dictionary.")
    return records


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file; blank lines are skipped.

    Raises:
        ValueError: If a line is no JSON object, naming file and line, or the file is not UTF-8 text.
    """
    records = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, so no JSON Lines file: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}).") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: a JSON {type(record).__name__}; each line must be an object.")
        records.append(record)
    return records


def preference_records(rows: Rows, *, prompt: str, columns: Columns, what: str = "rows") -> list[Mapping[str, Any]]:
    """Return preference rows with an explicit prompt; an implicit one is extracted as `DPOTrainer` does.

    As in `DPOTrainer`, the first row decides for all whether the prompt is implicit.

    Raises:
        ValueError: If the prompt column is absent and the responses are not two columns to extract it from.
    """
    records = as_records(rows, what)
    if prompt in records[0]:
        return records
    names = [columns.get("chosen", "chosen"), columns.get("rejected", "rejected")]
    if not all(isinstance(name, str) and name in record for name in names for record in records):
        raise ValueError(
            missing_column(prompt, records, what, f"without it, {names[0]!r} and {names[1]!r} must both be there")
        )
    logger.warning(
        "no column %r in %s (seen: %s): the common beginning of %r and %r is taken as the prompt, as DPOTrainer does",
        prompt,
        what,
        ", ".join(map(str, records[0])),
        *names,
    )
    chosen, rejected = names
    extracted: list[Mapping[str, Any]] = []
    for index, record in enumerate(records):
        if not record[chosen] or not record[rejected]:  # type: ignore[index]
            raise ValueError(
                f"{what}: row {index} has an empty {chosen!r} or {rejected!r}, so no prompt can be extracted from it. "
                f"Remove the row, or give a {prompt!r} column."
            )
        parts = extract_prompt({"chosen": record[chosen], "rejected": record[rejected]})  # type: ignore[index]
        if isinstance(parts["prompt"], str) and not parts["prompt"].strip():
            raise ValueError(
                missing_column(prompt, records, what, f"{chosen!r} and {rejected!r} of row {index} share no beginning")
            )
        extracted.append({**record, prompt: parts["prompt"], chosen: parts["chosen"], rejected: parts["rejected"]})  # type: ignore[dict-item]
    return extracted


def read_rows(records: Sequence[Mapping[str, Any]], *, prompt: str, columns: Columns, what: str = "rows") -> list[Row]:
    """Return one `Row` per record, in order.

    Args:
        records: The records.
        prompt: Name of the prompt column.
        columns: By family, the name of its column, or of several. A cell may hold a text, a list of texts, or one
            assistant message (a list of one), or nothing (None, NaN, an empty list, or no such key in this row).
        what: Name of the data, for messages.

    Returns:
        The rows; `prompt_id` is `p` and the zero-padded row number.

    Raises:
        ValueError: If a column is absent from every row, or a cell is not one of the above.
    """
    seen = set().union(*(record.keys() for record in records))
    named = {family: [names] if isinstance(names, str) else list(names) for family, names in columns.items()}
    for column in [prompt, *(column for names in named.values() for column in names)]:
        if column not in seen:
            raise ValueError(missing_column(column, records, what))
    rows = []
    for index, record in enumerate(records):
        row = Row(f"p{index:05d}", index, _read_prompt(record.get(prompt), f"{what}: row {index}, column {prompt!r}"))
        if not isinstance(row.prompt, str):
            _refuse_row_templates(record, index, what)
        for family, names in named.items():
            row.texts[family] = [
                text
                for name in names
                for text in read_responses(
                    record.get(name), f"{what}: row {index}, column {name!r}", chat=not isinstance(row.prompt, str)
                )
            ]
        rows.append(row)
    return rows


def choose_rows(rows: Sequence[Row], n_prompts: int | None, seed: int) -> list[Row]:
    """Return `n_prompts` of `rows`, in their order; which ones depends on their contents and the seed only.

    Raises:
        ValueError: If there are fewer, or `n_prompts` is not positive.
    """
    if n_prompts is None:
        return list(rows)
    if n_prompts < 1:
        raise ValueError(f"n_prompts is {n_prompts}; it must be at least 1, or None for all.")
    if n_prompts > len(rows):
        raise ValueError(f"n_prompts is {n_prompts} and there are {len(rows)} prompts; ask for fewer, or None for all.")
    ranks = [stable_hash(seed, "choose", prompt_identity(row.prompt), row.first("chosen")) for row in rows]
    kept = set(sorted(range(len(rows)), key=lambda index: (ranks[index], index))[:n_prompts])
    return [row for index, row in enumerate(rows) if index in kept]


def missing_column(column: str, records: Sequence[Mapping[str, Any]], what: str, hint: str = "") -> str:
    """Return the message for a column that is not there."""
    seen = list(dict.fromkeys(key for record in records for key in record))
    return (
        f"{what}: no column {column!r}; seen: {', '.join(map(repr, seen))}. "
        f"Name the right one{' in `columns`' if column != 'prompt' else ' with `prompt=...`'}"
        + (f" ({hint})." if hint else ".")
    )


def is_messages(value: object) -> bool:
    """Return whether `value` is a non-empty sequence of chat messages."""
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


def _read_prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str):
        if not is_unicode(value):
            raise ValueError(f"{where}: the prompt is not valid Unicode (a lone surrogate); clean this row.")
        return value
    if is_messages(value):
        return tuple(dict(message) for message in value)
    seen = "an empty list" if value in ([], ()) else f"a {type(value).__name__}"
    raise ValueError(
        f"{where}: the prompt is {seen}; it must be a text or a list of messages with 'role' and 'content'."
    )


def read_responses(value: Any, where: str, *, chat: bool) -> list[str | Missing]:
    """Return the texts in one cell: none, one, or several.

    Raises:
        ValueError: If the cell holds something else, saying where.
    """
    if value is None or (isinstance(value, float) and value != value):  # NaN: how data frames say "none"
        return [Missing(NOT_GIVEN)]
    if isinstance(value, str):
        return [value]
    if is_messages(value):
        if not chat:
            raise ValueError(
                f"{where}: the response is chat messages and the prompt is plain text. Give the prompt as messages "
                "too, or leave the prompt column out if the messages contain it."
            )
        return [_read_completion(value, where)]
    if isinstance(value, list | tuple) and value and all(isinstance(text, str) for text in value):
        return list(value)
    if isinstance(value, list | tuple) and not value:
        return [Missing(NOT_GIVEN)]
    raise ValueError(f"{where}: a {type(value).__name__}; a response must be a text, or one assistant message.")


def _read_completion(messages: Sequence[Mapping[str, Any]], where: str) -> str:
    if len(messages) != 1:
        raise ValueError(
            f"{where}: {len(messages)} messages (roles {[message['role'] for message in messages]}); a response must "
            "be exactly one assistant message. Move the earlier turns into the prompt."
        )
    message = messages[0]
    if message["role"] != "assistant":
        raise ValueError(f"{where}: the message's role is {message['role']!r}; a response must come from 'assistant'.")
    extra = [key for key, value in message.items() if key not in ("role", "content") and value]
    if not isinstance(message.get("content"), str) or extra:
        raise ValueError(
            f"{where}: only a plain text `content` can be watched; this message has content of type "
            f"{type(message.get('content')).__name__}" + (f" and also {', '.join(extra)}." if extra else ".")
        )
    return message["content"]


def _refuse_row_templates(record: Mapping[str, Any], index: int, what: str) -> None:
    """Refuse what would make the trainer tokenise single rows differently.

    Raises:
        ValueError: If the row has tools or template arguments of its own.
    """
    for column in ("tools", "chat_template_kwargs"):
        if record.get(column):
            raise ValueError(
                f"{what}: row {index} has {column!r}, which changes how the trainer tokenises this row alone; probes "
                "take one template for all. Remove the column, or pass `chat_template_kwargs` when encoding."
            )


def is_unicode(text: str) -> bool:
    """Return whether `text` can be stored and tokenised (JSON can smuggle in lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
