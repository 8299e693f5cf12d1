"""A tiny model and tokenizer, built in code: what `demo --quick` and the tests run on, offline and in seconds.

python -m llm_dynamics.demo.tiny models/tiny    # as a folder that from_pretrained loads
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_dynamics.demo.preferences import load_preferences

CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def build_tiny_tokenizer(texts: list[str], vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a ChatML template on `texts`.

    Args:
        texts: Corpus; every byte is covered whatever the corpus, so any string can be encoded.
        vocab_size: Upper bound of the vocabulary; at least 259 (256 bytes and three special tokens).

    Returns:
        A fast tokenizer with `<|im_end|>` as end of sequence and `<|endoftext|>` as padding.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None
    )
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


def build_tiny_model(vocab_size: int, *, seed: int = 0, hidden_size: int = 48, layers: int = 2) -> LlamaForCausalLM:
    """Build a randomly initialised Llama of about 10^5 parameters, with tied embeddings.

    Args:
        vocab_size: V, the tokenizer's length.
        seed: Seed of the initial weights; the global random state is left as it was.
        hidden_size: d.
        layers: Number of decoder layers.

    Returns:
        The model, in float32 and evaluation mode.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Save model and tokenizer to a folder, as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_dynamics.demo.tiny",
        description="Save an untrained Llama of about 10^5 parameters and its tokenizer for `from_pretrained`.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to; made if missing")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights (default: 0)")
    options = parser.parse_args(arguments)
    texts = [row[name][-1]["content"] for row in load_preferences("train") for name in ("prompt", "chosen", "rejected")]
    tokenizer = build_tiny_tokenizer(texts)
    build_tiny_model(len(tokenizer), seed=options.seed).save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    print(f"A tiny model is in {options.folder}")


if __name__ == "__main__":
    main()
