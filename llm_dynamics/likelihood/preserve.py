"""Leave a model and the random state as they were found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def keeping_random() -> Iterator[None]:
    """Restore the random state of Python, NumPy and torch (CPU and every CUDA device) at the end.

    Yields:
        None.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def has_adapter(model: nn.Module) -> bool:
    """Tell whether a model has adapters: those of a PEFT model, or those that transformers itself put in."""
    return hasattr(model, "disable_adapter") or hasattr(model, "peft_config")


def active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters that take part in a forward of a model that has some."""
    active: Any = model.active_adapters
    return list(active() if callable(active) else active)  # of transformers a method, of PEFT a property


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Turn the adapters of a model off, whoever put them in, and leave no trace.

    Args:
        model: A model that `has_adapter`.

    Yields:
        None.
    """
    with keeping_trainable(model):
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():  # type: ignore[operator]
                yield
            return
        model.disable_adapters()  # type: ignore[operator]
        try:
            yield
        finally:
            model.enable_adapters()  # type: ignore[operator]


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
def keeping_rope(model: nn.Module) -> Iterator[None]:
    """Restore what rotary embeddings remember of the longest sequence seen.

    Dynamic-NTK and longrope embeddings keep frequencies between forwards, and a long sequence changes them for all that
    follow: a probe must not reach the training batches in this way, nor the probes after it.

    Args:
        model: The model.

    Yields:
        None.
    """
    kept = []
    for module in model.modules():
        if any("max_seq_len_cached" in name for name in vars(module)):
            plain = {
                name: value for name, value in vars(module).items() if isinstance(value, int | float | torch.Tensor)
            }
            buffers = {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers(recurse=False)}
            kept.append((module, plain, buffers))
    try:
        yield
    finally:
        for module, plain, buffers in kept:
            for name, value in plain.items():
                setattr(module, name, value)
            for name, (buffer, content) in buffers.items():
                setattr(module, name, buffer.copy_(content))  # some are written in place, some are replaced


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

    Raises:
        TypeError: Where `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give the loaded model (AutoModelForCausalLM)")
    flags = [(module, module.training) for module in model.modules()]
    with keeping_random(), torch.no_grad(), keeping_rope(model):
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training
