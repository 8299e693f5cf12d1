"""Filling rows with the responses of one family: the offline families, and those of a writer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_dynamics.probes.families import FAMILIES, TRAINED_FAMILIES, PartnerPool, RandomTokens, shuffle_words
from llm_dynamics.probes.probe import Prompt, prompt_as_text, prompt_identity
from llm_dynamics.probes.rephrase import Rephraser, RephraseRequest
from llm_dynamics.probes.rows import Missing, Row
from llm_dynamics.probes.tokenization import decode_ids

NO_CHOSEN = "no chosen response to build from"
ONE_WORD = "chosen has fewer than two distinct words"
NO_CONTENT = "chosen has no token but its ending"
NO_WRITING = "the writer returned nothing"


@dataclass(slots=True)
class Source:
    """What families are built from: the rows and the means.

    Attributes:
        rows: Rows that become probes.
        training: `(prompt, chosen)` of every training row, for `other_train`.
        held_out: The same of the held-out rows, for `other_test`; None if there are none.
        seed: Seed of every draw.
        tokenizer: Needed by `random_tokens`.
        rephraser: Writes the families that need a writer and have no column.
    """

    rows: list[Row]
    training: list[tuple[Prompt, str]]
    held_out: list[tuple[Prompt, str]] | None = None
    seed: int = 0
    tokenizer: PreTrainedTokenizerBase | None = None
    rephraser: Rephraser | None = None


def pairs_of(rows: Sequence[Row]) -> list[tuple[Prompt, str]]:
    """Return `(prompt, chosen)` of the rows that have a chosen response."""
    return [(row.prompt, chosen) for row in rows if (chosen := row.first("chosen")) is not None]


def build_family(family: str, source: Source) -> dict[str, Any]:
    """Write the responses of an offline or a writer's family into `source.rows`.

    Args:
        family: The family.
        source: Rows and means.

    Returns:
        How it was made, for the metadata.

    Raises:
        ValueError: If what the family needs is missing.
    """
    if FAMILIES[family].needs == "column":
        raise ValueError(f"Family {family!r} must come from the data: map it to its column in `columns`.")
    if not any(row.first("chosen") for row in source.rows) and family != "chosen_initial":
        raise ValueError(f"Family {family!r} is built from each row's chosen response, and no row has one.")
    if FAMILIES[family].needs == "writer":
        return _write(family, source)
    return _OFFLINE[family](source)


def _other_train(source: Source) -> dict[str, Any]:
    pool = PartnerPool(source.training)
    if len({prompt_identity(prompt) for prompt, _ in source.training}) < 2:
        raise ValueError("other_train draws from another training prompt, and there is only one. Give more rows.")
    _fill(source, "other_train", lambda row, _: _partner(row, pool, source.seed, "other_train"))
    return {"made_by": "offline", "pool": "chosen of the training rows", "pool_size": len(pool)}


def _other_test(source: Source) -> dict[str, Any]:
    pool = _held_out_pool(source, "other_test")
    _fill(source, "other_test", lambda row, _: _partner(row, pool, source.seed, "other_test"))
    return {"made_by": "offline", "pool": "chosen of the held-out rows", "pool_size": len(pool)}


def _ungrammatical(source: Source) -> dict[str, Any]:
    def shuffle(row: Row, chosen: str) -> str | Missing:
        words = shuffle_words(chosen, seed=source.seed, family="ungrammatical", prompt=row.prompt)
        return Missing(ONE_WORD) if words is None else words

    _fill(source, "ungrammatical", shuffle)
    return {"made_by": "offline", "words_of": "chosen"}


def _random(source: Source) -> dict[str, Any]:
    """Shuffle the words of each row's other_test; without a held-out split, of its other_train."""
    held_out = source.held_out is not None or any(row.first("other_test") for row in source.rows)
    family = "other_test" if held_out else "other_train"
    pool = None
    if source.held_out is not None:
        pool = _held_out_pool(source, "random")
    elif not held_out:
        pool = PartnerPool(source.training)

    def shuffle(row: Row, _: str) -> str | Missing:
        text: str | Missing | None = row.first(family)
        if text is None and pool is not None:
            text = _partner(row, pool, source.seed, family)
        if not isinstance(text, str):
            return text or Missing(f"no {family} response to take words from")
        return shuffle_words(text, seed=source.seed, family="random", prompt=row.prompt) or " ".join(text.split())

    _fill(source, "random", shuffle)
    return {"made_by": "offline", "words_of": family}


def _random_tokens(source: Source) -> dict[str, Any]:
    if source.tokenizer is None:
        raise ValueError("random_tokens draws from the vocabulary: pass the trainer's tokenizer (`tokenizer=...`).")
    vocabulary = RandomTokens(source.tokenizer)

    def draw(row: Row, chosen: str) -> str | Missing:
        ids = vocabulary.draw(row.prompt, chosen, seed=source.seed, template=row.template)
        if ids is None:
            return Missing(NO_CONTENT)
        row.ids["random_tokens"] = ids
        assert source.tokenizer is not None
        return decode_ids(source.tokenizer, ids)

    _fill(source, "random_tokens", draw)
    return {"made_by": "offline", "vocabulary_size": len(vocabulary.vocabulary)}


_OFFLINE = {
    "other_train": _other_train,
    "other_test": _other_test,
    "ungrammatical": _ungrammatical,
    "random": _random,
    "random_tokens": _random_tokens,
}


def _fill(source: Source, family: str, make: Callable[[Row, str], str | Missing]) -> None:
    """Set `family` in every row to `make(row, chosen)`; a row without chosen has none."""
    for row in source.rows:
        chosen = row.first("chosen")
        row.texts[family] = [Missing(NO_CHOSEN) if chosen is None else make(row, chosen)]


def _partner(row: Row, pool: PartnerPool, seed: int, family: str) -> str | Missing:
    own = [text for name in TRAINED_FAMILIES if (text := row.first(name)) is not None]
    partner = pool.draw(row.prompt, avoid=own, seed=seed, family=family)
    return Missing("no response of another prompt differs from this row's own") if partner is None else partner


def _held_out_pool(source: Source, family: str) -> PartnerPool:
    """Return the held-out candidates.

    Raises:
        ValueError: If there are none, or one of their prompts is trained on.
    """
    if not source.held_out:
        raise ValueError(
            f"{family} needs a split that is not trained on: pass its rows as `held_out=...` (recipes: that of "
            "`--eval_strategy steps`; its prompts must not occur in the training rows), or leave the family out."
        )
    trained = {prompt_as_text(prompt).strip() for prompt, _ in source.training}
    trained |= {prompt_as_text(row.prompt).strip() for row in source.rows}
    leaked = [text for prompt, _ in source.held_out if (text := prompt_as_text(prompt)).strip() in trained]
    if leaked:
        raise ValueError(
            f"{len(leaked)} of the {len(source.held_out)} held-out prompts are also training prompts, e.g. "
            f"{leaked[0][:80]!r}: they are not held out. Remove them from one of the two."
        )
    return PartnerPool(source.held_out)


def _write(family: str, source: Source) -> dict[str, Any]:
    """Have the rephraser write `family`.

    Raises:
        ValueError: If there is no rephraser, or it does not return one text per request.
    """
    writer = source.rephraser
    if writer is None:
        raise ValueError(
            f"Family {family!r} needs a writer: map it to a column of the data (`columns={{{family!r}: ...}}`), or "
            "pass `rephraser=...` (ChatModelRephraser, OpenAIRephraser)."
        )
    basis = "rejected" if family.startswith("rejected") else "chosen"
    requests = []
    for row in source.rows:
        text = row.first(basis)
        if text is None and family != "chosen_initial":
            row.texts[family] = [Missing(f"no {basis} response to build from")]
        else:
            row.texts[family] = []
            requests.append((row, RephraseRequest(row.prompt, (text or "").strip(), family)))
    answers = writer.rephrase([request for _, request in requests])
    if len(answers) != len(requests):
        raise ValueError(
            f"{type(writer).__name__}.rephrase returned {len(answers)} texts for {len(requests)} requests; it must "
            "return one per request, None where it has nothing."
        )
    for (row, _), answer in zip(requests, answers, strict=True):
        row.texts[family] = [Missing(NO_WRITING) if answer is None or not answer.strip() else answer]
    return {"made_by": "writer", "writer": str(getattr(writer, "description", type(writer).__name__))}
