"""What can be watched and is seldom meant: said once, when the callback is attached."""

from __future__ import annotations

import logging

from datasets import Dataset
from transformers import Trainer
from trl import is_conversational

from llm_dynamics.probes import ProbeSet

logger = logging.getLogger(__name__)

_TEXTS = ("prompt", "completion", "chosen", "rejected", "messages")
"""Columns that are chat messages or plain text. `text` is neither: it may hold a conversation, template and all."""


def warn_of_finished_training(trainer: Trainer) -> None:
    """Warn where the trainer has trained already: those steps are over, and only a further `train()` is watched."""
    done = trainer.state.global_step
    if done and trainer.is_world_process_zero():
        logger.warning(
            "this trainer has already trained %d steps, and nothing was watching: watch() belongs before train(). "
            "What is trained from here on is watched; saved checkpoints can be scored after the fact, with "
            "`llm-dynamics score`",
            done,
        )


def warn_of_other_form(trainer: Trainer, probes: ProbeSet) -> None:
    """Warn where training rows are chat messages and all probes plain text, or the other way round.

    The tokens around a response then differ from those that training sees, and the probes say little about it. What the
    trainer's rows are is told from the first; rows of other columns than TRL's are left alone.
    """
    rows = trainer.train_dataset
    if not isinstance(rows, Dataset) or not len(rows) or not trainer.is_world_process_zero():
        return
    first = rows[0]
    if not any(name in first for name in _TEXTS):
        return
    trained_on_chat = is_conversational(first)
    if all(isinstance(probe.prompt, str) == trained_on_chat for probe in probes):
        rows_are, probes_are, around = (
            ("chat messages", "plain text", "rows") if trained_on_chat else ("plain text", "chat messages", "probes")
        )
        logger.warning(
            "the trainer's rows are %s, and the prompts of the probes are %s: the chat template is put around the %s "
            "alone, so the probes are scored in another form than the one trained on. Build them from rows like the "
            "trainer's",
            rows_are,
            probes_are,
            around,
        )
