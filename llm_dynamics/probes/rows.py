"""Reading source data, whatever its container and form, into rows of one prompt with its texts."""

from __future__ import annotations

import codecs
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import pandas as pd
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from llm_dynamics.likelihood.preserve import keeping_random
from llm_dynamics.probes.families import TRAINED_FAMILIES, stable_hash
from llm_dynamics.probes.forms import RESPONSES, WHOLE, OddRow, RowForm, is_messages, plain, response_text
from llm_dynamics.probes.probe import DroppedProbe, Prompt, prompt_identity

logger = logging.getLogger(__name__)

Rows: TypeAlias = "Dataset | pd.DataFrame | Iterable[Mapping[str, Any]]"
Columns: TypeAlias = Mapping[str, str | Sequence[str]]
DropIf: TypeAlias = Mapping[str, str | Callable[[str], bool]]
NOT_GIVEN = "not given in this row"
REPEATED = "another response to a prompt that is watched"
STREAM_ROWS = 10_000
"""Rows read of a stream, which may have no end."""


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
        template: What the row gives to the chat template (`row_template`).
    """

    prompt_id: str
    source_row: int | None
    prompt: Prompt
    texts: dict[str, list[str | Missing]] = field(default_factory=dict)
    ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    template: Mapping[str, Any] | None = None

    def first(self, family: str) -> str | None:
        """Return the first text of `family` that is not blank, or None."""
        return next((text for text in self.texts.get(family, ()) if isinstance(text, str) and text.strip()), None)


class ReadRows(NamedTuple):
    """What was read of a data set.

    Attributes:
        rows: One per row that holds a prompt, in order.
        dropped: The others, with the reason, by family.
        form: Where the data holds prompt and responses.
    """

    rows: list[Row]
    dropped: list[DroppedProbe]
    form: RowForm


def as_records(rows: Rows, what: str = "rows") -> list[Mapping[str, Any]]:
    """Return the rows of a dataset, a data frame or an iterable as a list of mappings.

    Of a stream (what has no length) the first `STREAM_ROWS` are read, with a word if there are more. Reading leaves the
    global random state as it was: rows may be made on the fly.

    Raises:
        ValueError: If there are none, or it is not rows (a text, a `DatasetDict`...).
    """
    if isinstance(rows, DatasetDict | IterableDatasetDict):
        raise ValueError(f"{what} holds the splits {list(rows)}; choose one, e.g. dataset[{next(iter(rows))!r}].")
    if not isinstance(rows, pd.DataFrame | Dataset | IterableDataset | Iterable) or isinstance(
        rows, str | bytes | Mapping
    ):
        raise ValueError(f"{what} is a {type(rows).__name__}; give a datasets.Dataset or a list of dictionaries.")
    with keeping_random():
        given: Iterable[Any] = rows.to_dict("records") if isinstance(rows, pd.DataFrame) else rows
        records = list(given) if isinstance(given, Sized) else list(islice(given, STREAM_ROWS + 1))
    if len(records) > STREAM_ROWS and not isinstance(rows, Sized):
        records.pop()
        logger.warning("%s is a stream: probes are made of its first %d rows", what, STREAM_ROWS)
    if not records:
        raise ValueError(f"{what} is empty (zero rows); give at least one.")
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(f"{what}: row {index} is a {type(record).__name__}; each row must be a dictionary.")
    return records


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON Lines file, with or without a byte order mark; blank lines are skipped.

    Raises:
        ValueError: If a line is no JSON object, naming file and line, or the file is no UTF-8 or UTF-16 text.
    """
    content = Path(path).read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, so no JSON Lines file: {error}") from error
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error}).") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: a JSON {type(record).__name__}; each line must be an object.")
        records.append(record)
    return records


def read_rows(
    rows: Rows,
    *,
    prompt: str = "prompt",
    columns: Columns = MappingProxyType({}),
    what: str = "rows",
    as_chat: bool = False,
) -> ReadRows:
    """Read rows in any container and any form that TRL's trainers take: the one reader of this package.

    Pairs with or without a prompt column, prompt and completion, with KTO's label or without, `messages`,
    `conversations`, `text`; texts or chat messages. Where a text or a conversation holds all, its last assistant turn
    (of a text without turns, its second half) is `chosen` and what stands before it the prompt: the ids are those that
    the trainer makes of the whole.

    Args:
        rows: The rows.
        prompt: Name of the prompt column.
        columns: By family, the name of its column, or of several. A cell may hold a text, a list of texts, or one
            assistant message (a list of one), or nothing (None, NaN, an empty list, or no such key in this row). The
            response that a form gives needs no entry.
        what: Name of the data, for messages.
        as_chat: Make plain prompts and responses chat messages.

    Returns:
        A `Row` per row that holds a prompt, and what was dropped; `Row.first("chosen")` is its response.

    Raises:
        ValueError: If a column is absent from every row, or no row can be read; it says why.
    """
    records = as_records(rows, what)
    named = {family: [names] if isinstance(names, str) else list(names) for family, names in columns.items()}
    single = {family: names[0] for family, names in named.items() if family in TRAINED_FAMILIES and len(names) == 1}
    form = RowForm.of(records, {"prompt": prompt, **single}, as_chat=as_chat)
    seen = set().union(*records)
    given = {
        "chosen": form.chosen in seen or not seen.isdisjoint(WHOLE),
        "rejected": bool(form.rejected or form.label),
    }
    families = dict.fromkeys([*(named or ("chosen",)), *(family for family in given if given[family])])
    found: list[Row] = []
    dropped: list[DroppedProbe] = []
    for index, record in enumerate(records):
        try:
            explicit = form.explicit(record)
            asked = _prompt(explicit["prompt"])
            template = None if isinstance(asked, str) else row_template(record)
        except OddRow as error:
            dropped += [DroppedProbe(index, family, str(error)) for family in families]
            continue
        row = Row(prompt_id(asked, template), index, asked, template=template)
        for family in families:
            several = family in named and family not in single
            cells = [record.get(name) for name in named[family]] if several else [explicit.get(family)]
            row.texts[family] = [text for cell in cells for text in read_texts(cell, asked)]
        found.append(row)
    if not found:
        reasons = Counter(item.reason for item in dropped if item.family == next(iter(families)))
        listed = "; ".join(f"{n} x {reason}" for reason, n in reasons.items())
        if prompt not in seen:
            raise ValueError(missing_column(prompt, records, what, f"without it: {listed}"))
        raise ValueError(f"{what}: no row can be read: {listed}. Seen: {', '.join(map(repr, _keys(records)))}.")
    for family in families:
        for column in named.get(family, ["chosen"]):
            if column not in seen and not (given.get(family) and (family in single or family not in named)):
                if family not in named:
                    raise ValueError(
                        f"{what}: no column with a response; seen: {', '.join(map(repr, _keys(records)))}. It is "
                        f"called one of {', '.join(RESPONSES)}; or give `messages`, `conversations` or `text`"
                    )
                raise ValueError(missing_column(column, records, what))
    if prompt not in seen and form.rejected and form.chosen in seen:
        logger.warning(
            "no column %r in %s (seen: %s): the common beginning of %r and %r is taken as the prompt, as DPOTrainer "
            "does",
            prompt, what, ", ".join(map(str, records[0])), form.chosen, form.rejected,
        )  # fmt: skip
    return ReadRows(found, dropped, form)


def prompt_id(prompt: Prompt, template: Mapping[str, Any] | None = None) -> str:
    """Return the id of a prompt: the same for the same prompt and template arguments, whatever other rows there are."""
    given = [json.dumps(template, sort_keys=True)] if template else []
    return f"p{stable_hash('prompt', prompt_identity(prompt), *given) & 0xFFFFFFFFFFFF:012x}"


def one_row_per_prompt(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[DroppedProbe]]:
    """Return one of the rows of every prompt, by contents and seed; what it lacks is taken from the others.

    Prompts that differ in the whitespace around them count as one.

    Args:
        rows: The rows.
        seed: Seed of the choice.

    Returns:
        Rows of distinct prompts, in the order of the rows, and the responses that are left out.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_without_margins(row.prompt) + json.dumps(row.template, sort_keys=True), []).append(row)
    chosen: list[Row] = []
    dropped: list[DroppedProbe] = []
    for group in groups.values():
        first, *others = sorted(group, key=lambda row: (_rank(row, seed), prompt_identity(row.prompt), str(row.texts)))
        kept = replace(first, texts=dict(first.texts))
        for row in others:
            for family, texts in row.texts.items():
                if kept.first(family) is None and row.first(family) is not None:
                    kept.texts[family] = texts
                elif row.first(family) is not None and row.first(family) != kept.first(family):
                    dropped.append(DroppedProbe(row.source_row, family, REPEATED))
        chosen.append(kept)
    return sorted(chosen, key=lambda row: row.source_row or 0), dropped


def choose_rows(rows: Sequence[Row], n_prompts: int | None, seed: int) -> list[Row]:
    """Return `n_prompts` of `rows`, in their order; which ones depends on their contents and the seed only.

    Raises:
        ValueError: If there are fewer, or `n_prompts` is not positive.
    """
    if n_prompts is None:
        return list(rows)
    if n_prompts > len(rows):
        raise ValueError(f"n_prompts is {n_prompts} and there are {len(rows)} prompts; ask for fewer, or None for all.")
    ranks = [_rank(row, seed) for row in rows]
    kept = set(sorted(range(len(rows)), key=lambda index: (ranks[index], index))[:n_prompts])
    return [row for index, row in enumerate(rows) if index in kept]


def _without_margins(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt.strip()
    return json.dumps([plain(m) | {"content": str(m.get("content")).strip()} for m in prompt], sort_keys=True)


def _rank(row: Row, seed: int) -> int:
    return stable_hash(seed, "choose", prompt_identity(row.prompt), row.first("chosen"))


def missing_column(column: str, records: Sequence[Mapping[str, Any]], what: str, hint: str = "") -> str:
    """Return the message for a column that is not there."""
    return (
        f"{what}: no column {column!r}; seen: {', '.join(map(repr, _keys(records)))}. "
        f"Name the right one{' in `columns`' if column != 'prompt' else ' with `prompt=...`'}"
        + (f" ({hint})." if hint else ".")
    )


def read_texts(value: Any, prompt: Prompt) -> list[str | Missing]:
    """Return the texts in one cell beside `prompt`: none, one or several, or why there is none."""
    value = plain(value)
    if value is None or value == []:
        return [Missing(NOT_GIVEN)]
    if isinstance(value, str):
        return [value]
    if is_messages(value) and isinstance(prompt, str):
        return [Missing("the response is chat messages and the prompt is plain text")]
    if is_messages(value):
        try:
            return [response_text(value)]
        except OddRow as error:
            return [Missing(str(error))]
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return list(value)
    return [Missing(f"a {type(value).__name__}; a response must be a text, or one assistant message")]


def _prompt(value: Any) -> Prompt:
    if not is_unicode(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)):
        raise OddRow("the prompt is not valid Unicode (a lone surrogate)")
    return value if isinstance(value, str) else tuple(value)


def row_template(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a row gives to the chat template, as SFT, DPO and KTO trainers read it; None for nothing.

    Raises:
        OddRow: If its `tools` or `chat_template_kwargs` are not what the trainers take.
    """
    tools, arguments = plain(record.get("tools")), plain(record.get("chat_template_kwargs"))
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise OddRow("column 'tools': not valid JSON") from error
    template: dict[str, Any] = {}
    for column, value, kind in (("tools", tools, list), ("chat_template_kwargs", arguments, Mapping)):
        if value is None:
            continue
        if not isinstance(value, kind):
            wanted = "a list of tool schemas, or its JSON" if kind is list else "a dictionary"
            raise OddRow(f"column {column!r}: a {type(value).__name__}; give {wanted}")
        template |= {column: value} if kind is list else value
    try:
        return json.loads(json.dumps(template)) or None
    except TypeError as error:
        raise OddRow("'tools' and 'chat_template_kwargs' must be JSON values") from error


def _keys(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record))


def is_unicode(text: str) -> bool:
    """Return whether `text` can be stored and tokenised (JSON can smuggle in lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
