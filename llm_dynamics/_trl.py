"""Every touchpoint with a private part of TRL or transformers, and nothing else.

Read against TRL 1.16.0 and transformers 5.23.0; each function here has a contract test in
`tests/contract/test_trl.py`, which says what changed when an upgrade breaks it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer.utils import use_adapter

from llm_dynamics.likelihood.preserve import keeping_trainable

if TYPE_CHECKING:
    from peft import PeftModel


def add_to_next_row(trainer: Trainer, metrics: Mapping[str, float]) -> bool:
    """Put metrics into the trainer's next log row, beside the loss.

    TRL's trainers average `_metrics["train"][key]` over the values since the last row. A state is no average: the list
    is replaced, so that the row holds the latest observation.

    Args:
        trainer: Any trainer.
        metrics: Finite values by name.

    Returns:
        False where the trainer has no such store (a plain `transformers.Trainer`), and nothing was done.
    """
    store = getattr(trainer, "_metrics", None)
    if not isinstance(store, dict) or "train" not in store:
        return False
    for name, value in metrics.items():
        store["train"][name] = [value]
    return True


def log_row(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Log a row of its own at the current step, without flushing or swallowing the trainer's next one.

    TRL's `log` would flush its metrics into this row, and the callback handler resets `should_log`, which would cost
    the loss row of the same step: so the base class's `log` is called, and the flag restored.

    Args:
        trainer: Any trainer.
        metrics: Finite values by name.
    """
    should_log = trainer.control.should_log
    Trainer.log(trainer, dict(metrics))
    trainer.control.should_log = should_log


def chat_template(trainer: Trainer) -> str | None:
    """Return the chat template that an `SFTTrainer` swaps in for `assistant_only_loss`, or None for the tokenizer's."""
    return getattr(trainer, "chat_template", None)


def chat_template_kwargs(trainer: Trainer) -> dict[str, Any]:
    """Return what a GRPO or RLOO trainer passes to the chat template, such as `enable_thinking`; empty elsewhere."""
    given = getattr(trainer.args, "chat_template_kwargs", None) or {}
    return dict(json.loads(given) if isinstance(given, str) else given)


def reference_model(trainer: Trainer) -> Any:
    """Return the frozen reference model that a trainer carries (DPO, KTO, GRPO with beta > 0), or None."""
    return getattr(trainer, "ref_model", None)


@contextmanager
def reference_adapter(model: PeftModel) -> Iterator[None]:
    """Make a PEFT model its own reference, and leave no trace.

    TRL keeps a copy of a pre-trained adapter under the name "ref" and otherwise turns the adapter off.

    Args:
        model: The PEFT model.

    Yields:
        None.
    """
    with keeping_trainable(model), use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
        yield


@contextmanager
def recording_clip(trainer: Trainer) -> Iterator[list[float]]:
    """Record by what factor gradients are clipped, while the context is open.

    Every trainer clips through `trainer.accelerator.clip_grad_norm_`, which returns the norm before clipping; the
    factor follows as torch computes it, min(1, max_norm / (norm + 1e-6)).

    Args:
        trainer: Any trainer.

    Yields:
        A list that receives, at each clipping, the factor and the norm before it: [factor, norm].
    """
    accelerator = trainer.accelerator
    recorded: list[float] = []

    def clip(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        norm = original(parameters, max_norm, norm_type)
        if norm is not None:
            recorded[:] = [min(1.0, float(max_norm) / (float(norm) + 1e-6)), float(norm)]
        return norm

    original = accelerator.clip_grad_norm_
    accelerator.clip_grad_norm_ = clip
    try:
        yield recorded
    finally:
        del accelerator.clip_grad_norm_  # the class's own is seen again


def sampling_temperature(trainer: Trainer) -> float:
    """Return what the trainer's loss divides logits by: the sampling temperature of GRPO and RLOO, 1 elsewhere."""
    return float(getattr(trainer, "temperature", 1.0)) if isinstance(trainer, GRPOTrainer | RLOOTrainer) else 1.0
