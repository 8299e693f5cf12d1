"""Leave a model and the random state as they were found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def keeping_trainable(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` of every parameter of `model` at the end.

    Turning adapters on again, PEFT makes all their weights trainable, also those frozen by intent (LoRA-FA).

    Args:
        model: The model, usually a PEFT model around `disable_adapter`.

    Yields:
        None.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode under `no_grad`, and leave no trace.

    Every module's own flag and the random state are restored, also after an error. Flags are restored one module at a
    time: some modules may be in evaluation mode by intent (frozen parts), which `model.train()` would undo. Gradients
    are not touched.

    Args:
        model: The model to evaluate.

    Yields:
        None.
    """
    flags = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training
