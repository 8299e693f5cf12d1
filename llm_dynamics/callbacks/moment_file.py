"""The labels of the past in the optimizer's momentum, kept beside a checkpoint's optimizer state."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_dynamics.influence import MomentHistory

logger = logging.getLogger(__name__)

FILE = "moment_history.safetensors"


def save_history(history: MomentHistory, since: int, checkpoint: Path) -> None:
    """Write the first moment's parts by label into a checkpoint; it is there whole or not at all.

    Args:
        history: The parts, at the checkpoint's step.
        since: Optimizer steps that were done when the history began.
        checkpoint: The checkpoint's folder.
    """
    entries = [(label, name) for label, by_name in history.by_label.items() for name in by_name]
    tensors = {str(i): history.by_label[label][name].contiguous() for i, (label, name) in enumerate(entries)}
    about = {"entries": json.dumps(entries), "since": str(since)}
    temporary = checkpoint / f".{FILE}.{os.getpid()}.tmp"
    save_file(tensors, temporary, metadata={**about, "digest": _digest(tensors, about)})
    temporary.replace(checkpoint / FILE)


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Return a number that differs where a bit of the file does: a flipped one reads as another momentum."""
    digest = hashlib.blake2b(f"{about['entries']} {about['since']}".encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_history(checkpoint: Path, parameters: Mapping[str, nn.Parameter]) -> tuple[MomentHistory, int] | None:
    """Read what `save_history` wrote, onto the devices of the parameters.

    Args:
        checkpoint: The checkpoint's folder.
        parameters: The trained parameters by name.

    Returns:
        The history and the step that it began at; None where the checkpoint has none, one of other parameters, or one
        that is damaged, which a warning names.
    """
    file = checkpoint / FILE
    if not file.is_file():
        return None
    history = MomentHistory()
    try:
        with safe_open(file, framework="pt") as stored:
            about = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
        if "digest" in about and about["digest"] != _digest(tensors, about):
            logger.warning("%s is damaged and is not used: it is not what was written", file)
            return None
        for i, (label, name) in enumerate(json.loads(about["entries"])):
            part = tensors[str(i)]
            if name not in parameters or part.shape != parameters[name].shape:
                return None
            history.by_label.setdefault(label, {})[name] = part.to(parameters[name].device)
        return history, int(about["since"])
    # safetensors raises its own error, OSError or a plain Exception by what is broken
    except Exception as error:
        logger.warning("%s is damaged and is not used: %s: %s", file, type(error).__name__, error)
        return None
