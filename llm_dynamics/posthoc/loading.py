"""Load a checkpoint: a folder or a hub id, full weights or an adapter; and tell how its run encodes rows."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from llm_dynamics.probes import TruncationRule
from llm_dynamics.runlog import RunLog, load_run, schema

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRAINER = "llm-dynamics score"
"""What `meta.json` names as trainer of a log that was written after the fact."""
_ADAPTER = "adapter_config.json"
_TRUST = "add --trust_remote_code (in Python: `trust_remote_code=True`)"


def load_checkpoint(
    name: str, *, dtype: str = "float32", device: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load a causal LM in evaluation mode; what training would change can be differentiated.

    Args:
        name: A folder or a hub id; a folder with an adapter loads its base model, too, and only the adapter is
            trainable.
        dtype: Precision of the weights, one of `DTYPES`.
        device: Where to; None: a GPU where there is one.
        trust_remote_code: Let a model that brings Python code run it.

    Returns:
        The model.

    Raises:
        ValueError: For an unknown dtype, a device that is not there, or a checkpoint that is not there, damaged, lacks
            weights, or needs code of its own.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import find_adapter_config_file

    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    base = name
    try:
        _check_adapters(Path(name))
        is_adapter = find_adapter_config_file(name) is not None
        if is_adapter:
            base = PeftConfig.from_pretrained(name).base_model_name_or_path or ""
            if not base:
                raise ValueError("its adapter names no base model (`base_model_name_or_path` in its configuration)")
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "output_loading_info": True}
        found: Any = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype], **options)
        model, loaded = found
        missing = sorted(loaded["missing_keys"])
        if missing:  # transformers would fill them with random numbers
            raise ValueError(f"it lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
        if is_adapter:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Found missing adapter keys")
                model = PeftModel.from_pretrained(model, name, is_trainable=True)
    except Exception as error:  # the files are not ours: transformers, PEFT and safetensors raise many kinds
        raise ValueError(_not_loaded(name, base, error)) from error
    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise ValueError(f"device is {device!r}: {error}") from error


def _check_adapters(folder: Path) -> None:
    """Say which of a folder's adapters is not loaded.

    Raises:
        ValueError: Where it has several, and none of its own.
    """
    others = sorted(path.parent.name for path in folder.glob(f"*/{_ADAPTER}")) if folder.is_dir() else []
    if (folder / _ADAPTER).is_file():
        others = [other for other in others if other != "ref"]  # DPO's copy of where the adapter began
        if others:
            logger.warning("%s: its default adapter is loaded; %s are others, folders of their own", folder, others)
    elif others and not any(folder.glob("*.safetensors")):
        raise ValueError(f"it holds adapters in folders of their own: give one of them, such as {folder / others[0]}")


def _not_loaded(name: str, base: str, error: Exception) -> str:
    """Return the message for a checkpoint that does not load: what it is, which file, what to do."""
    said = f"no model at {name!r} (a folder, or a model id on the hub): "
    if base != name:
        said += f"an adapter on the base model {base!r}: "
    for file in sorted(file for place in {name, base} for file in Path(place).glob("*.safetensors")):
        problem = _damage(file)
        if problem:
            return f"{said}{file} is truncated or damaged: {problem}"
    if "trust_remote_code" in str(error):
        return f"{said}it brings Python code of its own. Where you trust it, {_TRUST}"
    return f"{said}{error}"


def _damage(file: Path) -> Exception | None:
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt"):
            return None
    except Exception as error:  # safetensors' own kind has no public name
        return error


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a checkpoint, or of any other folder or hub id.

    Args:
        name: A folder or a hub id; for a checkpoint without a tokenizer, its parent folder is tried, and an adapter's
            base model.
        trust_remote_code: As for `load_checkpoint`.

    Returns:
        The tokenizer.

    Raises:
        ValueError: Where there is none.
    """
    from peft import PeftConfig
    from transformers import AutoTokenizer

    folder = Path(name)
    places = [name, str(folder.parent)] if folder.is_dir() else [name]
    if (folder / _ADAPTER).is_file():
        places.append(PeftConfig.from_pretrained(name).base_model_name_or_path or name)
    errors = []
    for place in places:
        try:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        except Exception as error:  # as many kinds as there are ways to be no tokenizer
            errors.append(error)
    code = f" Where you trust its Python code, {_TRUST}." if "trust_remote_code" in str(errors[0]) else ""
    raise ValueError(
        f"no tokenizer at {name!r} (a folder, or a model id on the hub): {errors[0]}.{code} Name another: --tokenizer"
    ) from errors[0]


def training_run(checkpoint: str) -> RunLog | None:
    """Return the log of the run that a checkpoint lies in: of its folder or of the two above it; None: no such log."""
    folder = Path(checkpoint)
    for place in (folder, *folder.resolve().parents[:2]) if folder.is_dir() else ():
        if (place / schema.FOLDER / schema.META_FILE).is_file():
            run = load_run(place)
            return None if run.meta.get("trainer") == TRAINER else run
    return None


def encoding_of(run: RunLog) -> dict[str, Any]:
    """Return how a run encodes its rows: keyword arguments of `encode_probes`.

    Raises:
        ValueError: Where its `meta.json` says something that cannot be.
    """
    try:
        rendering = run.meta.get("rendering") or {"chat_template_kwargs": run.meta.get("chat_template_kwargs")}
        return {"truncation": TruncationRule(**run.meta.get("truncation") or {}), **rendering}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{run.path / schema.META_FILE}: truncation or rendering are damaged: {error}") from error
