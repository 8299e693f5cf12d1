"""What a watched run adds to the model card that its trainer writes."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from transformers import Trainer

from llm_dynamics.callbacks.probe import watcher_of
from llm_dynamics.files import write_whole
from llm_dynamics.runlog import load_run, schema

logger = logging.getLogger(__name__)


def describe_in_model_card(trainer: Trainer) -> None:
    """Let every card that `trainer.create_model_card` writes from now on end with `append_dynamics`."""
    write = trainer.create_model_card

    @functools.wraps(write)
    def create_model_card(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        append_dynamics(trainer)

    trainer.create_model_card = create_model_card  # type: ignore[method-assign]


def append_dynamics(trainer: Trainer) -> None:
    """Put `model_card_section` at the end of the run's model card, where the run is watched and its log can be read.

    A section that stands there already is replaced. Only the first process writes. Whatever fails is a warning: the
    trainer's own card stays as it is.

    Args:
        trainer: The trainer, whose card is `<output_dir>/README.md`.
    """
    try:
        _append(trainer)
    except Exception as error:
        logger.warning("the model card says nothing of the learning dynamics (%s: %s)", type(error).__name__, error)


def _append(trainer: Trainer) -> None:
    from llm_dynamics.report.model_card import HEADING, model_card_section  # loads plotly, which training need not

    watcher = watcher_of(trainer)
    card = Path(trainer.args.output_dir or ".") / "README.md"
    if not trainer.is_world_process_zero() or watcher is None or not card.is_file():
        return
    if not (watcher.log_folder / schema.META_FILE).is_file():
        return
    section = model_card_section(load_run(watcher.log_folder))
    text = card.read_text(encoding="utf-8").split(f"\n{HEADING}\n")[0].rstrip("\n")
    write_whole(card, f"{text}\n\n{section}".encode(errors="backslashreplace"))
