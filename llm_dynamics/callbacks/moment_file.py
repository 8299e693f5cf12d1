"""The labels of the past in the optimizer's momentum, kept beside a checkpoint's optimizer state."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from llm_dynamics.influence import MomentHistory

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
    temporary = checkpoint / f".{FILE}.{os.getpid()}.tmp"
    save_file(tensors, temporary, metadata={"entries": json.dumps(entries), "since": str(since)})
    temporary.replace(checkpoint / FILE)


def load_history(checkpoint: Path, parameters: Mapping[str, nn.Parameter]) -> tuple[MomentHistory, int] | None:
    """Read what `save_history` wrote, onto the devices of the parameters.

    Args:
        checkpoint: The checkpoint's folder.
        parameters: The trained parameters by name.

    Returns:
        The history and the step that it began at; None where the checkpoint has none, or one of other parameters.
    """
    file = checkpoint / FILE
    if not file.is_file():
        return None
    history = MomentHistory()
    with safe_open(file, framework="pt") as stored:
        about = stored.metadata()
        for i, (label, name) in enumerate(json.loads(about["entries"])):
            part = stored.get_tensor(str(i))
            if name not in parameters or part.shape != parameters[name].shape:
                return None
            history.by_label.setdefault(label, {})[name] = part.to(parameters[name].device)
    return history, int(about["since"])
