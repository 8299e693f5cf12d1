"""What can be watched and is seldom meant: said once, when the callback is attached."""

from __future__ import annotations

import logging
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer

from llm_dynamics import _trl
from llm_dynamics.probes import ProbeSet
from llm_dynamics.probes.forms import forms, is_messages, other_form, plain

logger = logging.getLogger(__name__)

_TEXTS = ("prompt", "completion", "chosen", "rejected", "messages")
"""Columns that are chat messages or plain text. `text` is neither: it may hold a conversation, template and all."""


def warn_of_finished_training(trainer: Trainer) -> None:
    """Warn where the trainer has trained already: those steps are over, and only a further `train()` is watched."""
    done = trainer.state.global_step
    if done and trainer.is_world_process_zero():
        logger.warning(
            "this trainer has already trained %d steps, which are not observed: watch() belongs before train(). "
            "What is trained from here on is watched; saved checkpoints can be scored after the fact, with "
            "`llm-dynamics score`",
            done,
        )


def replay_causes(model: nn.Module, mixed_precision: str) -> str:
    """Name what is seen of a model that makes a replayed forward differ from the one in training.

    Args:
        model: The trained model.
        mixed_precision: The accelerator's.

    Returns:
        The causes, for a message.
    """
    config: Any = getattr(model, "config", None)
    drops = any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in model.modules())
    causes = {
        "dropout (its masks are drawn again, which fused kernels do not allow)": drops
        or (getattr(config, "attention_dropout", 0) or 0) > 0,
        f"mixed precision ({mixed_precision})": mixed_precision != "no",
        "weights of half precision": any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()),
    }
    seen = [cause for cause, holds in causes.items() if holds]
    return ", ".join(seen) or "none of dropout and low precision, so the model draws random numbers, or keeps a state"


def warn_of_other_form(trainer: Trainer, probes: ProbeSet) -> None:
    """Warn where the probes' prompts are not, or may not be, what is trained on."""
    if not trainer.is_world_process_zero():
        return
    maker = _trl.prompts_are_made_elsewhere(trainer)
    if maker is not None:
        logger.warning(
            "this run's prompts are made by %s: the probes' are rendered from their own messages alone. Give probes "
            "the prompts that the policy reads",
            maker,
        )
    elif doubt := other_form(forms(probes, trainer.processing_class, form_of_rows(trainer))):
        logger.warning("%s", doubt)


def form_of_rows(trainer: Trainer) -> str | None:
    """Tell in which form the trainer's rows are, by the first: "chat messages" or "plain text".

    Returns:
        The form; None where that cannot be told: other columns than TRL's, streams, rows made on the fly (a look
        at one would draw from the run's random numbers), and rows whose prompts an environment writes.
    """
    rows = trainer.train_dataset
    if not isinstance(rows, Dataset) or not len(rows) or rows.format["type"] == "custom":
        return None
    if getattr(trainer, "environment_factories", None):
        return None
    first = plain(rows[0])
    if not any(name in first for name in _TEXTS):
        return None
    return "chat messages" if any(is_messages(first.get(name)) for name in _TEXTS) else "plain text"
