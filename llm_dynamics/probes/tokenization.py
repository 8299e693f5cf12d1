"""From probes to token ids, exactly as TRL's trainers tokenise the same row.

Plain text: the EOS token is appended unless the response already ends with it, and `prompt + response` is tokenised in
one go. Chat: the prompt is rendered with the generation prompt, prompt and response without it. Either way the response
begins where the ids of the prompt alone and of the whole part ways (their common prefix). The rules are those of
`SFTTrainer`, `DPOTrainer` and `KTOTrainer` (TRL 1.16) and are pinned by `tests/contract/test_tokenization.py`. Trainers
that generate (GRPO, RLOO) keep the prompt whole, whatever a response does to it: `keep_prompt`.

One difference is left on purpose: `DPOTrainer` starts *both* responses of a pair at the earlier of their two
boundaries, whereas a probe knows only its own. The ids are the same; the boundary can differ by the merged tokens, and
only in rows counted by `EncodedProbes.boundary_merges`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from llm_dynamics.probes.probe import Probe, Prompt, check_probes, prompt_identity

NO_RESPONSE_LEFT = "truncation leaves no token of the response"
NO_CONTEXT = "no token before the response, so its first token cannot be scored"


@dataclass(frozen=True, slots=True)
class EncodedProbe:
    """Token ids of one probe.

    Attributes:
        probe_id: The probe's id.
        prompt_ids: Ids before the response, at least one.
        response_ids: Ids whose log-probability is scored (ending included), at least one.
        n_cut: Tokens removed by truncation, prompt and response together.
    """

    probe_id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    n_cut: int = 0

    @property
    def input_ids(self) -> tuple[int, ...]:
        """Prompt and response: what the model reads."""
        return self.prompt_ids + self.response_ids


@dataclass(frozen=True)
class TruncationRule:
    """How sequences that are too long are cut: prompt and response together, as in `SFTConfig` and `DPOConfig`.

    Attributes:
        max_length: Most tokens kept of prompt + response; None keeps all.
        mode: `keep_start` cuts at the end (the response goes first), `keep_end` at the beginning.
    """

    max_length: int | None = None
    mode: Literal["keep_start", "keep_end"] = "keep_start"

    def __post_init__(self) -> None:
        if self.max_length is not None and (
            isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 2
        ):
            raise ValueError(
                f"TruncationRule.max_length is {self.max_length!r}; it must be None or an integer >= 2 "
                "(one token of context and one to score)."
            )
        if self.mode not in ("keep_start", "keep_end"):
            raise ValueError(f"TruncationRule.mode is {self.mode!r}; allowed: 'keep_start', 'keep_end'.")

    def as_slice(self) -> slice:
        """Return the slice of the sequence that is kept."""
        if self.max_length is None:
            return slice(None)
        return slice(self.max_length) if self.mode == "keep_start" else slice(-self.max_length, None)


NO_TRUNCATION = TruncationRule()


@dataclass(frozen=True)
class EncodedProbes(Sequence[EncodedProbe]):
    """The encoded probes, and the account of what truncation and the tokenizer did to them.

    Attributes:
        probes: The encoded probes, in the order given.
        dropped: `(probe_id, reason)` of the probes that cannot be scored.
        truncation: The rule applied.
        boundary_merges: How many of `probes` have a prompt whose ids, taken alone, are no prefix of the whole: tokens
            merged across the boundary or the template renders the prompt differently. As in TRL, the response then
            starts where the two diverge.
    """

    probes: tuple[EncodedProbe, ...]
    dropped: tuple[tuple[str, str], ...] = ()
    truncation: TruncationRule = NO_TRUNCATION
    boundary_merges: int = 0

    @property
    def n_truncated(self) -> int:
        """How many of `probes` lost at least one token."""
        return sum(probe.n_cut > 0 for probe in self.probes)

    @overload
    def __getitem__(self, index: int) -> EncodedProbe: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[EncodedProbe, ...]: ...
    def __getitem__(self, index: int | slice) -> EncodedProbe | tuple[EncodedProbe, ...]:
        return self.probes[index]

    def __len__(self) -> int:
        return len(self.probes)


def common_prefix_length(ids: Sequence[int], other: Sequence[int]) -> int:
    """Return how many leading ids two sequences share."""
    shared = 0
    for left, right in zip(ids, other, strict=False):
        if left != right:
            break
        shared += 1
    return shared


def encode_probes(
    probes: Iterable[Probe],
    processing_class: PreTrainedTokenizerBase,
    *,
    truncation: TruncationRule = NO_TRUNCATION,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    keep_prompt: bool = False,
    misfit: Callable[[Sequence[int]], str | None] | None = None,
) -> EncodedProbes:
    """Tokenise probes exactly as TRL tokenises a training row with the same prompt and response.

    Probes that leave nothing to score are dropped, counted in one warning, and listed in the result.

    Args:
        probes: The probes, e.g. a `ProbeSet`.
        processing_class: The trainer's tokenizer (`trainer.processing_class`).
        truncation: Which tokens of sequences that are too long are kept.
        chat_template: Template for chat prompts in place of the tokenizer's own.
        chat_template_kwargs: Further arguments of the template (e.g. `{"enable_thinking": False}`; `tools` among
            them), for all probes and in place of their own, as GRPO and RLOO take them. None: each probe's own
            (`Probe.template`), as SFT, DPO and KTO take them from each row.
        keep_prompt: Whether the response follows the whole prompt, as one that is generated does, even where prompt
            and response, tokenised in one go, part ways earlier.
        misfit: Says why the model cannot read a sequence of ids, such as `SplitModel.misfit`, or None where it can.

    Returns:
        The encoded probes in the order given, less the dropped ones.

    Raises:
        TypeError: If `probes` are no probes, or `processing_class` no tokenizer.
        ValueError: If there are no probes, all of them are dropped, the tokenizer lacks what they need (an EOS token
            for text, a chat template for chat), or `response_ids` come from another tokenizer.
        NotImplementedError: If `processing_class` is a multimodal processor.
    """
    encoder = _Encoder(processing_class, chat_template, chat_template_kwargs, keep_prompt)
    encoded: list[EncodedProbe] = []
    dropped: list[tuple[str, str]] = []
    merges = 0
    for probe in check_probes(probes):
        prompt_ids, response_ids, merged = encoder.encode(probe)
        kept = truncation.as_slice()
        is_response = ([False] * len(prompt_ids) + [True] * len(response_ids))[kept]
        ids = (prompt_ids + response_ids)[kept]
        start = is_response.index(True) if True in is_response else len(ids)
        if start == len(ids):
            dropped.append((probe.probe_id, NO_RESPONSE_LEFT if response_ids else "the response has no tokens"))
        elif start == 0:
            dropped.append((probe.probe_id, NO_CONTEXT))
        elif misfit is not None and (reason := misfit(ids)) is not None:
            dropped.append((probe.probe_id, reason))
        else:
            n_cut = len(prompt_ids) + len(response_ids) - len(ids)
            encoded.append(EncodedProbe(probe.probe_id, tuple(ids[:start]), tuple(ids[start:]), n_cut))
            merges += merged
    if not encoded:
        raise ValueError(_nothing_left(dropped, truncation))
    if dropped:
        counts = "; ".join(f"{n} x {reason}" for reason, n in Counter(reason for _, reason in dropped).items())
        warnings.warn(f"{len(dropped)} probes dropped while encoding: {counts} (first: {dropped[0][0]})", stacklevel=2)
    return EncodedProbes(tuple(encoded), tuple(dropped), truncation, merges)


def encode_response(
    prompt: Prompt,
    response: str,
    processing_class: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """Return `(prompt_ids, response_ids)` of one untruncated pair, by the rules of `encode_probes`."""
    prompt_ids, response_ids, _ = _Encoder(processing_class, chat_template, chat_template_kwargs).encode(
        Probe("", "", prompt, response, "")
    )
    return prompt_ids, response_ids


def decode_ids(processing_class: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of `ids`, special tokens shown and no space cleaned up: how `random_tokens` are displayed."""
    text = processing_class.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class _Encoder:
    """Tokenises prompts (remembered: many probes share one) and prompt-response pairs."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        chat_template_kwargs: Mapping[str, Any] | None,
        keep_prompt: bool = False,
    ) -> None:
        if isinstance(tokenizer, ProcessorMixin):
            raise NotImplementedError(
                f"processing_class is a multimodal processor ({type(tokenizer).__name__}); probes are text only. "
                "Pass its tokenizer (`processor.tokenizer`)."
            )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(
                f"processing_class is a {type(tokenizer).__name__}; give the tokenizer itself, such as "
                "`trainer.processing_class` or `AutoTokenizer.from_pretrained(...)`"
            )
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.template_kwargs = chat_template_kwargs
        self.keep_prompt = keep_prompt
        self.prompts: dict[tuple[bool, str], list[int]] = {}

    def encode(self, probe: Probe) -> tuple[list[int], list[int], bool]:
        """Return prompt ids, response ids, and whether the prompt alone is no prefix of the whole."""
        key = (isinstance(probe.prompt, str), prompt_identity(probe.prompt, probe.template))
        if key not in self.prompts:
            self.prompts[key] = self._prompt_ids(probe)
        prompt_ids = self.prompts[key]
        if probe.response_ids is not None:
            self._check_same_tokenizer(probe)
            return prompt_ids, list(probe.response_ids), False
        whole = self._whole_ids(probe)
        start = common_prefix_length(prompt_ids, whole)
        if not self.keep_prompt or start == len(prompt_ids):
            return whole[:start], whole[start:], start < len(prompt_ids)
        if isinstance(probe.prompt, str):  # tokens merged: none can, behind a prompt that stands
            return prompt_ids, self._whole_ids(probe, alone=True), True
        return prompt_ids, whole[start:], True

    def _prompt_ids(self, probe: Probe) -> list[int]:
        if isinstance(probe.prompt, str):
            return list(self.tokenizer(text=probe.prompt)["input_ids"])
        return self._render([dict(message) for message in probe.prompt], probe.template, add_generation_prompt=True)

    def _whole_ids(self, probe: Probe, *, alone: bool = False) -> list[int]:
        prompt, response = probe.prompt, probe.response
        if isinstance(prompt, str):
            eos = self.tokenizer.eos_token
            if eos is None:
                raise ValueError(
                    "The tokenizer has no EOS token, which ends every plain-text response. Set `tokenizer.eos_token`, "
                    "or `eos_token` in SFTConfig."
                )
            ended = response if response.endswith(eos) else response + eos
            if alone:
                return list(self.tokenizer(text=ended, add_special_tokens=False)["input_ids"])
            return list(self.tokenizer(text=prompt + ended)["input_ids"])
        return self._render([*map(dict, prompt), {"role": "assistant", "content": response}], probe.template)

    def _render(self, messages: list[dict[str, Any]], own: Mapping[str, Any] | None, **kwargs: Any) -> list[int]:
        if self.chat_template is None and self.tokenizer.chat_template is None:
            raise ValueError(
                "The probes hold chat messages and the tokenizer has no chat template. Set `tokenizer.chat_template`, "
                "pass `chat_template=...`, or use plain-text prompts."
            )
        given = (own if self.template_kwargs is None else self.template_kwargs) or {}
        template = {"chat_template": self.chat_template, **given}  # a row may name a template of its own, as in TRL
        rendered = self.tokenizer.apply_chat_template(
            messages, **{**template, **kwargs, "tokenize": True, "return_dict": True}
        )
        return list(rendered["input_ids"])  # type: ignore[call-overload, index, arg-type]

    def _check_same_tokenizer(self, probe: Probe) -> None:
        ids = probe.response_ids or ()
        if (
            ids
            and 0 <= min(ids) <= max(ids) < len(self.tokenizer)
            and decode_ids(self.tokenizer, ids) == probe.response
        ):
            return
        raise ValueError(
            f"Probe {probe.probe_id!r} (family {probe.family!r}) was encoded with another tokenizer: its response_ids "
            "do not decode to its response here. Build this family again with this tokenizer, or leave it out "
            "(`probe_set.select(families=...)`)."
        )


def _nothing_left(dropped: list[tuple[str, str]], truncation: TruncationRule) -> str:
    """Return the message for a set of which nothing can be scored."""
    if not dropped:
        return "There are no probes to encode; give at least one."
    counts = Counter(reason for _, reason in dropped)
    return (
        f"None of the {len(dropped)} probes can be scored: "
        + "; ".join(f"{n} x {reason}" for reason, n in counts.items())
        + f". Truncation is max_length={truncation.max_length}, mode={truncation.mode!r}: raise max_length, "
        "shorten the prompts, or (for empty prompts) use a tokenizer that adds a BOS token; where the tokenizer has "
        "more tokens than the model, call model.resize_token_embeddings(len(tokenizer))."
    )
