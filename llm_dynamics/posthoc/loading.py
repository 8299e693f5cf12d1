"""Load a checkpoint: a folder or a hub id, full weights or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_checkpoint(name: str, *, dtype: str = "float32", device: str | None = None) -> Any:
    """Load a causal LM in evaluation mode.

    Args:
        name: A folder or a hub id; a folder with an adapter loads its base model, too.
        dtype: Precision of the weights, one of `DTYPES`.
        device: Where to; None: a GPU where there is one.

    Returns:
        The model.

    Raises:
        ValueError: For an unknown dtype, a device that is not there, or where there is no such checkpoint.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype])
    except (OSError, ValueError) as error:
        raise ValueError(f"no model at {name!r} (a folder, or a model id on the hub): {error}") from error
    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise ValueError(f"device is {device!r}: {error}") from error


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a checkpoint, or of any other folder or hub id.

    Args:
        name: A folder or a hub id; for a checkpoint without a tokenizer, its parent folder is tried.

    Returns:
        The tokenizer.

    Raises:
        ValueError: Where there is none.
    """
    from transformers import AutoTokenizer

    folder = Path(name)
    for place in (name, str(folder.parent)) if folder.is_dir() else (name,):
        try:
            return AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError) as error:
            last = error
    raise ValueError(f"no tokenizer at {name!r} (a folder, or a model id on the hub): {last}") from last
