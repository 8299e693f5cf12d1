"""Writers for the families of responses that only a language model (or a person) can write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_dynamics.probes.families import stable_hash
from llm_dynamics.probes.probe import Prompt, prompt_as_text, prompt_identity

_ONLY = "Reply with the new text alone: no heading, no quotation marks, no comment."
_SEMANTIC = (
    "Below are a prompt and a response to it. Say the response again in other words: keep its meaning, its tone and "
    f"roughly its length, and change the wording and the order of the sentence as much as you can. {_ONLY}"
)
_FORMAT = (
    "Below are a prompt and a response to it. Write a text of the same form about something else: keep the kinds of "
    "sentences, the punctuation and roughly the length, and replace what it talks about, so that it no longer answers "
    f"the prompt. {_ONLY}"
)

INSTRUCTIONS: Mapping[str, str] = MappingProxyType(
    {
        "chosen_semantic": _SEMANTIC,
        "rejected_semantic": _SEMANTIC,
        "chosen_format": _FORMAT,
        "rejected_format": _FORMAT,
        "chosen_selfr": (
            "Below are a prompt and a good response to it. Answer the prompt yourself, saying the same as the response "
            f"the way you would say it. {_ONLY}"
        ),
        "human_random": (
            "Write about {n_words} words of ordinary, correct prose, as a person would, on an everyday subject with "
            f"no relation to the text below. Do not mention or answer it. {_ONLY}"
        ),
    }
)
"""What a writer is told, by family; `chosen_initial` is the bare prompt."""


@dataclass(frozen=True, slots=True)
class RephraseRequest:
    """One text to write.

    Attributes:
        prompt: Prompt of the probe.
        response: The response to start from (rejected for `rejected_*`, else chosen), without surrounding whitespace.
        family: Family to write.
    """

    prompt: Prompt
    response: str
    family: str


class Rephraser(Protocol):
    """Writes responses. An optional text attribute `description` is recorded as the provenance of what it wrote."""

    def rephrase(self, requests: Sequence[RephraseRequest]) -> list[str | None]:
        """Return one text per request, in order; None where there is none to give."""
        ...


def writer_messages(request: RephraseRequest) -> list[dict[str, Any]]:
    """Return the chat messages that ask for one text.

    Raises:
        ValueError: If no writer makes this family.
    """
    if request.family == "chosen_initial":
        if isinstance(request.prompt, str):
            return [{"role": "user", "content": request.prompt.strip()}]
        return [dict(message) for message in request.prompt]
    if request.family not in INSTRUCTIONS:
        known = ", ".join(["chosen_initial", *INSTRUCTIONS])
        raise ValueError(f"Family {request.family!r} is not made by a writer; these are: {known}.")
    task = INSTRUCTIONS[request.family].format(n_words=max(3, len(request.response.split())))
    text = f"{task}\n\nPrompt:\n{prompt_as_text(request.prompt).strip()}"
    if request.family != "human_random":
        text += f"\n\nResponse:\n{request.response}"
    return [{"role": "user", "content": text}]


class ChatModelRephraser:
    """Writes with a local `transformers` chat model, in batches.

    The global random state, the model's train/eval flag and the tokenizer are left as they were.

    Args:
        model_or_path: The model, or where to load it from.
        tokenizer: Its tokenizer, with a chat template; loaded from the path if None.
        batch_size: Requests generated together.
        max_new_tokens: Longest text, in tokens.
        temperature: 0 for greedy decoding; above 0 for sampling.
        top_p: Nucleus for sampling.
        seed: Seed for sampling: the same requests give the same texts.
        chat_template_kwargs: Further arguments of the template (e.g. `{"enable_thinking": False}`).

    Raises:
        ValueError: If an argument is out of range, the tokenizer is missing or has no chat template.
    """

    def __init__(
        self,
        model_or_path: PreTrainedModel | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if batch_size < 1 or max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                f"ChatModelRephraser: batch_size={batch_size}, max_new_tokens={max_new_tokens}, "
                f"temperature={temperature}, top_p={top_p}; the first two must be at least 1, temperature at least 0, "
                "top_p in (0, 1]."
            )
        if isinstance(model_or_path, str | Path):
            self.name = str(model_or_path)
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(self.name)
            self.model: Any = AutoModelForCausalLM.from_pretrained(self.name)
        else:
            self.name = str(getattr(model_or_path, "name_or_path", "") or type(model_or_path).__name__)
            self.model = model_or_path
        if tokenizer is None:
            raise ValueError("ChatModelRephraser: a model without its tokenizer; pass `tokenizer=...`, or a path.")
        if tokenizer.chat_template is None:
            raise ValueError(
                f"ChatModelRephraser: the tokenizer of {self.name} has no chat template. Use a chat model, or set "
                "`tokenizer.chat_template`."
            )
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.seed = seed
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    @property
    def description(self) -> str:
        """Model and decoding, for the provenance of the texts."""
        how = "greedy" if self.temperature == 0 else f"temperature {self.temperature}, seed {self.seed}"
        return f"{self.name} ({how})"

    def rephrase(self, requests: Sequence[RephraseRequest]) -> list[str | None]:
        """Return one text per request, in order; None where the model wrote nothing."""
        texts: list[str | None] = []
        was_training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(requests), self.batch_size):
                texts += self._write_batch(requests[start : start + self.batch_size])
        finally:
            self.model.train(was_training)
        return texts

    def _write_batch(self, requests: Sequence[RephraseRequest]) -> list[str | None]:
        prompts = [
            list(
                self.tokenizer.apply_chat_template(
                    writer_messages(request),
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    **self.chat_template_kwargs,
                )["input_ids"]  # type: ignore[call-overload, index]
            )
            for request in requests
        ]
        width = max(map(len, prompts))
        pad = self._padding_id()
        device = self.model.device
        # Padded here, on the left, rather than by the tokenizer: its padding side is not ours to change.
        input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device)  # (B, T)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=self._ending_ids(),
            use_cache=True,
            **(sampling if self.temperature > 0 else {"do_sample": False}),
        )
        seed = stable_hash(self.seed, *(f"{r.family}|{prompt_identity(r.prompt)}|{r.response}" for r in requests))
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed % 2**63)
            output = self.model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
        written = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return [text.strip() or None for text in written]

    def _ending_ids(self) -> list[int]:
        """Return the ids that end a text: the model's own, and the tokenizer's."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        ids = [own] if isinstance(own, int) else list(own or [])
        if isinstance(self.tokenizer.eos_token_id, int) and self.tokenizer.eos_token_id not in ids:
            ids.append(self.tokenizer.eos_token_id)
        return ids

    def _padding_id(self) -> int:
        """Return an id for masked positions; which one cannot matter."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(candidate, int):
                return candidate
        return 0
