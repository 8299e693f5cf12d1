"""The families of responses, and the deterministic builders of those that need neither a column nor a writer.

After Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (ICLR 2025, arXiv 2407.10490), Figure 10.

Every draw is a function of `(seed, family, identity of the source)` alone, never of the row order or of how many rows
there are, so a probe set can grow without its old probes changing. Partners (`other_train`, `other_test`) are drawn by
rendezvous hashing: each candidate gets a score from a hash of itself and the prompt, the highest wins, and one more
candidate among N changes a given draw with probability 1/N.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm_dynamics.probes.probe import Prompt, prompt_identity
from llm_dynamics.probes.tokenization import common_prefix_length, encode_response

Needs = Literal["column", "writer", "offline"]


@dataclass(frozen=True, slots=True)
class Family:
    """What one family of responses is.

    Attributes:
        name: Name used in tables, metrics and figures.
        description: What the response is, in a few words.
        how: How it is made.
        needs: `column`: it must be in the data. `writer`: a column or a `Rephraser`. `offline`: built here.
    """

    name: str
    description: str
    how: str
    needs: Needs


_FAMILIES = (
    Family("chosen", "the preferred or target response y+", "a column", "column"),
    Family("rejected", "the dispreferred response y-", "a column", "column"),
    Family("chosen_initial", "the untrained model's own answer", "sampled from the model before training", "writer"),
    Family("chosen_semantic", "chosen: same meaning, other words", "a rephrasing model", "writer"),
    Family("rejected_semantic", "rejected: same meaning, other words", "a rephrasing model", "writer"),
    Family("chosen_format", "chosen: same form, other meaning", "a rephrasing model", "writer"),
    Family("rejected_format", "rejected: same form, other meaning", "a rephrasing model", "writer"),
    Family("chosen_selfr", "chosen, rephrased by the model itself", "the model that is trained", "writer"),
    Family("other_train", "chosen of another training prompt", "drawn, never its own", "offline"),
    Family("other_test", "chosen of a held-out prompt", "drawn from a split not trained on", "offline"),
    Family("human_random", "natural sentences on anything else, same length", "a corpus or a model", "writer"),
    Family("ungrammatical", "the words of chosen, shuffled", "seeded shuffle", "offline"),
    Family("random", "the words of another response, shuffled", "seeded shuffle of other_test", "offline"),
    Family("random_tokens", "uniform tokens of the vocabulary, same length", "seeded draw", "offline"),
)

FAMILIES = MappingProxyType({family.name: family for family in _FAMILIES})
FAMILY_ORDER: tuple[str, ...] = tuple(FAMILIES)
"""Canonical order of the families, in tables and figures."""

TRAINED_FAMILIES = ("chosen", "rejected")
"""Families that a trainer sees: their text is kept byte for byte."""


def check_families(names: Sequence[str]) -> tuple[str, ...]:
    """Return `names` in canonical order.

    Raises:
        ValueError: If a name is unknown or occurs twice, or there is none.
    """
    if isinstance(names, str):
        raise ValueError(f"families is the text {names!r}; give a sequence, such as ({names!r},).")
    if any(str(name).startswith("argmax") for name in names):
        raise ValueError(
            "'argmax' is not a probe family: it is the greedy token at each prefix of a probe's own response, and is "
            "measured for every probe when it is scored. Leave it out of `families`."
        )
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise ValueError(f"Unknown family {', '.join(map(repr, unknown))}; known: {', '.join(FAMILY_ORDER)}.")
    if len(set(names)) < len(names):
        raise ValueError(f"A family is listed twice: {list(names)}.")
    if not names:
        raise ValueError(f"No family was asked for; known: {', '.join(FAMILY_ORDER)}.")
    return tuple(sorted(names, key=FAMILY_ORDER.index))


def stable_hash(*parts: object) -> int:
    """Return 64 bits that depend on `parts` alone: the same in every process and on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little")


class PartnerPool:
    """Prompts and responses that partners are drawn from.

    Args:
        pairs: `(prompt, response)` of each candidate; repeated pairs count once, blank responses not at all.
    """

    def __init__(self, pairs: Sequence[tuple[Prompt, str]]) -> None:
        unique = {(prompt_identity(prompt), response): None for prompt, response in pairs if response.strip()}
        self.responses = [response for _, response in unique]
        self._keys = np.array([stable_hash(*pair) for pair in unique], dtype=np.uint64)  # (N,)
        self._prompts = np.array([stable_hash(prompt) for prompt, _ in unique], dtype=np.uint64)
        self._texts = np.array([stable_hash(response.strip()) for response in self.responses], dtype=np.uint64)

    def __len__(self) -> int:
        return len(self.responses)

    def draw(self, prompt: Prompt, *, avoid: Sequence[str], seed: int, family: str) -> str | None:
        """Return the response of another prompt, or None if the pool holds none.

        Args:
            prompt: The prompt that the partner is for; its own responses are never drawn.
            avoid: Responses never drawn, compared without surrounding whitespace (this prompt's own).
            seed: Seed of the probe set.
            family: Family that the partner is for.

        Returns:
            The candidate with the highest rendezvous score.
        """
        own = np.array([stable_hash(text.strip()) for text in avoid], dtype=np.uint64)
        allowed = (self._prompts != np.uint64(stable_hash(prompt_identity(prompt)))) & ~np.isin(self._texts, own)
        if not allowed.any():
            return None
        scores = _mix(self._keys ^ np.uint64(stable_hash(seed, family, prompt_identity(prompt))))
        return self.responses[int(np.flatnonzero(allowed)[np.argmax(scores[allowed])])]


def _mix(values: np.ndarray) -> np.ndarray:
    """Return splitmix64 of each of `values` (N,), uint64: independent-looking scores for related inputs."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shuffle_words(text: str, *, seed: int, family: str, prompt: Prompt) -> str | None:
    """Return the whitespace-separated words of `text` in another order, joined by single spaces.

    Args:
        text: The source text.
        seed: Seed of the probe set.
        family: Family that the shuffle is for.
        prompt: Prompt of the probe; with seed, family and text it decides the order.

    Returns:
        The shuffled words, never in their own order; None if there are fewer than two distinct words.
    """
    words = text.split()
    if len(set(words)) < 2:
        return None
    generator = random.Random(stable_hash(seed, family, prompt_identity(prompt), text))
    shuffled = list(words)
    while shuffled == words:
        generator.shuffle(shuffled)
    return " ".join(shuffled)


class RandomTokens:
    """Draws responses of uniform ordinary tokens, as long as a given response and with its template around them.

    Args:
        tokenizer: The trainer's tokenizer.

    Raises:
        ValueError: If the vocabulary has no token that is not special.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
        self.tokenizer = tokenizer
        self.vocabulary = sorted(set(tokenizer.get_vocab().values()) - special)
        if not self.vocabulary:
            raise ValueError("The tokenizer has no token that is not special, so random_tokens cannot be drawn.")

    def draw(
        self, prompt: Prompt, response: str, *, seed: int, template: Mapping[str, Any] | None = None
    ) -> tuple[int, ...] | None:
        """Return ids as many as those of `response` after `prompt`, with the same template and EOS ids around them.

        Args:
            prompt: Prompt of the probe.
            response: The response whose length, opening and ending are copied.
            seed: Seed of the probe set.
            template: What the row gives to the chat template.

        Returns:
            The complete response ids; None if the response has no token of its own.
        """
        _, ids = encode_response(prompt, response, self.tokenizer, chat_template_kwargs=template)
        # What the ids share with two unlike stand-ins, at either end, is not the response's own.
        stand_ins = [
            encode_response(prompt, text, self.tokenizer, chat_template_kwargs=template)[1] for text in ("x", "7")
        ]
        opening = min(common_prefix_length(ids, other) for other in stand_ins)
        ending = min(common_prefix_length(ids[::-1], other[::-1]) for other in stand_ins)
        n_content = len(ids) - opening - ending
        if n_content < 1:
            return None
        generator = random.Random(stable_hash(seed, "random_tokens", prompt_identity(prompt), response))
        return (*ids[:opening], *generator.choices(self.vocabulary, k=n_content), *ids[len(ids) - ending :])
