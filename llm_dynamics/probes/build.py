"""Turning rows of source data into probes: the work behind the constructors of `ProbeSet`."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypedDict

from transformers import PreTrainedTokenizerBase

from llm_dynamics.options import Limit, checked
from llm_dynamics.probes.builders import Source, build_family, pairs_of
from llm_dynamics.probes.families import FAMILIES, TRAINED_FAMILIES, check_families
from llm_dynamics.probes.probe import DroppedProbe, Probe
from llm_dynamics.probes.rephrase import Rephraser
from llm_dynamics.probes.rows import (
    NOT_GIVEN,
    REPEATED,
    Columns,
    DropIf,
    Missing,
    Row,
    Rows,
    as_records,
    choose_rows,
    is_unicode,
    one_row_per_prompt,
    read_rows,
)

JOIN_RULES = ("reference", "as_is")
EMPTY = "empty response"


class BuildOptions(TypedDict, total=False):
    """Options shared by the constructors of `ProbeSet`.

    Attributes:
        prompt: Name of the prompt column.
        families: Families wanted; None for those with a column.
        n_prompts: How many distinct prompts to draw (by a hash of their contents and the seed); None for all.
        seed: Seed of every draw.
        held_out: Rows that are not trained on; `other_test` and `random` draw from them.
        tokenizer: The trainer's tokenizer; `random_tokens` needs it.
        rephraser: Writes the writer's families that have no column.
        join: `reference`: chosen and rejected stay byte for byte, every other response gets the leading whitespace of
            its row's chosen response and no trailing whitespace. `as_is`: nothing is changed.
        drop_if: By family, a text that must not occur in a response, or a test that is true for those to drop.
        as_chat: Make plain prompts and responses chat messages, so that the chat template is applied.
        at_most: Draw at most `n_prompts`, from the prompts that have a text of every family, where there are any.
    """

    prompt: str
    families: Sequence[str] | None
    n_prompts: int | None
    seed: int
    held_out: Rows | None
    tokenizer: PreTrainedTokenizerBase | None
    rephraser: Rephraser | None
    join: str
    drop_if: DropIf | None
    as_chat: bool
    at_most: bool


def build_probes(
    data: Rows,
    *,
    columns: Columns,
    source: Mapping[str, Any],
    prompt: str = "prompt",
    families: Sequence[str] | None = None,
    n_prompts: int | None = None,
    seed: int = 0,
    held_out: Rows | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rephraser: Rephraser | None = None,
    join: str = "reference",
    drop_if: DropIf | None = None,
    as_chat: bool = False,
    at_most: bool = False,
) -> tuple[list[Probe], list[DroppedProbe], dict[str, Any]]:
    """Build the probes of `families` from rows of any form, one row per distinct prompt.

    Args:
        data: The rows.
        columns: By family, its column or columns.
        source: Where the records came from, for the metadata.
        prompt: This and the rest: see `BuildOptions`.
        families: Families wanted.
        n_prompts: How many prompts to draw.
        seed: Seed of every draw.
        held_out: Rows that are not trained on.
        tokenizer: The trainer's tokenizer.
        rephraser: Writer of the families that need one.
        join: `reference` or `as_is`.
        drop_if: What to drop.
        as_chat: Make plain text chat messages.
        at_most: Draw at most `n_prompts`, from the prompts that have a text of every family, where there are any.

    Returns:
        Probes, dropped probes, metadata.

    Raises:
        ValueError: For each kind of bad input, saying what was seen and what to change.
    """
    n_prompts = checked("n_prompts", Annotated[int | None, Limit(least=1)], n_prompts)
    seed = checked("seed", int, seed)
    check_families(list(columns) if families is None else families)
    check_families([*columns])
    if drop_if:
        check_families([*drop_if])
    check_join(join, columns)
    records = as_records(data)
    seen = set().union(*records)
    # A writer's family whose column bears its name needs no mapping; other names are too likely to mean something else.
    implied = {name: name for name in families or () if FAMILIES[name].needs == "writer" and name in seen}
    named = {**implied, **columns}
    all_rows, odd, form = read_rows(records, prompt=prompt, columns=named, as_chat=as_chat)
    if form.label:
        named["rejected"] = form.chosen
    wanted = check_families(list(named) if families is None else families)
    for row in all_rows:  # before anything is built from them
        for family, texts in row.texts.items():
            row.texts[family] = [_checked(text, (drop_if or {}).get(family)) for text in texts]
    rows, repeated = one_row_per_prompt(all_rows, seed)
    if at_most and n_prompts is not None:
        needed = {name if FAMILIES[name].needs != "offline" else "chosen" for name in wanted}
        complete = [row for row in rows if all(row.first(name) for name in needed)]
        rows = complete or rows
        n_prompts = min(n_prompts, len(rows))
    rows = choose_rows(rows, n_prompts, seed)
    made_by = {
        family: {"made_by": "column", "columns": [names] if isinstance(names, str) else list(names)}
        for family, names in named.items()
        if family in wanted
    }
    means = Source(
        rows,
        training=pairs_of(all_rows),
        held_out=None
        if held_out is None
        else pairs_of(read_candidates(held_out, prompt=prompt, columns=columns, what="held_out", as_chat=as_chat)),
        seed=seed,
        tokenizer=tokenizer,
        rephraser=rephraser,
    )
    for family in wanted:
        if family not in made_by:
            made_by[family] = build_family(family, means)
    watched = {row.source_row: row.prompt_id for row in all_rows}
    kept = {row.prompt_id for row in rows}
    left_out = odd + [item for item in repeated if watched[item.source_row] in kept]
    left_out = [item for item in left_out if item.family in wanted]
    probes, dropped = collect_probes(rows, wanted, join=join, drop_if=drop_if, left_out=left_out)
    metadata = {
        "seed": seed,
        "join": join,
        "source": {**source, "n_rows": len(records), **({"as_chat": True} if as_chat else {})},
        "n_prompts_asked": n_prompts,
        "families": {family: made_by[family] for family in wanted},
    }
    return probes, dropped, metadata


def check_join(join: str, families: Mapping[str, Any] | Sequence[str]) -> None:
    """Check the join rule.

    Raises:
        ValueError: If it is unknown, or needs a trained family and there is none.
    """
    if join not in JOIN_RULES:
        raise ValueError(f"join is {join!r}; allowed: {', '.join(map(repr, JOIN_RULES))}.")
    if join == "reference" and not set(families) & set(TRAINED_FAMILIES):
        raise ValueError(
            "join='reference' copies the leading whitespace of each row's chosen response, and no column is given for "
            "'chosen' or 'rejected'. Add it to `columns`, or pass join='as_is'."
        )


def read_candidates(
    rows: Rows, *, prompt: str = "prompt", columns: Columns | None = None, what: str, as_chat: bool = False
) -> list[Row]:
    """Return the rows that partners are drawn from, whatever their form.

    Raises:
        ValueError: If a column is missing.
    """
    names = {family: column for family, column in (columns or {}).items() if family == "chosen"}
    return read_rows(rows, prompt=prompt, columns=names, what=what, as_chat=as_chat).rows


def collect_probes(
    rows: Sequence[Row],
    families: Sequence[str],
    *,
    join: str,
    drop_if: DropIf | None = None,
    left_out: Sequence[DroppedProbe] = (),
) -> tuple[list[Probe], list[DroppedProbe]]:
    """Return the probes and the dropped ones; one warning counts what was dropped.

    Args:
        rows: Rows with their texts.
        families: Families to emit, in canonical order.
        join: `reference`: trained families stay byte for byte; any other gets the leading whitespace of its row's
            chosen response and no trailing whitespace. `as_is`: nothing changes.
        drop_if: By family, what to drop.
        left_out: What was dropped before.

    Returns:
        Probes (by row, then by family) and dropped probes.

    Raises:
        ValueError: If no probe is left.
    """
    probes: list[Probe] = []
    dropped = list(left_out)
    for row in rows:
        reference = row.first("chosen") or row.first("rejected") or ""
        lead = reference[: len(reference) - len(reference.lstrip())]
        for family in families:
            ids = row.ids.get(family)
            for index, unchecked in enumerate(row.texts[family]):
                text = _checked(unchecked, (drop_if or {}).get(family))
                if isinstance(text, Missing):
                    dropped.append(DroppedProbe(row.source_row, family, text.reason))
                    continue
                keep = join == "as_is" or family in TRAINED_FAMILIES or ids is not None
                probe_id = f"{row.prompt_id}/{family}" + (f"-{index + 1}" if index else "")
                response = text if keep else lead + text.strip()
                probes.append(
                    Probe(probe_id, row.prompt_id, row.prompt, response, family, row.source_row, ids, row.template)
                )
    counts = Counter((item.family, item.reason) for item in dropped if item.reason not in (NOT_GIVEN, REPEATED))
    listed = "; ".join(f"{family}: {n} x {reason}" for (family, reason), n in counts.items())
    if not probes:
        raise ValueError(f"No probe is left: {listed or 'no row gives a response'}.")
    if counts:
        message = f"{sum(counts.values())} probes dropped ({listed}); `ProbeSet.dropped` names each"
        warnings.warn(message, stacklevel=_callers_level())
    return probes, dropped


def _checked(text: str | Missing, rule: str | Callable[[str], bool] | None) -> str | Missing:
    """Return the text if it can be used, else why not."""
    if isinstance(text, Missing):
        return text
    if not text.strip():
        return Missing(EMPTY)
    if not is_unicode(text):
        return Missing("not valid Unicode (a lone surrogate)")
    if isinstance(rule, str):
        return Missing(f"contains {rule!r} (drop_if)") if rule in text else text
    if rule is not None and rule(text):
        return Missing(f"{getattr(rule, '__name__', 'a test')} is true (drop_if)")
    return text


def _callers_level() -> int:
    """Return the `stacklevel` at which a warning points to the code that called this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("llm_dynamics.probes"):
        level, frame = level + 1, frame.f_back
    return level
