"""The one line that a training script adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from llm_dynamics.callbacks.probe import ProbeCallback
from llm_dynamics.probes import ProbeSet


def watch(trainer: Trainer, probes: ProbeSet | str | Path, every: int = 25, **options: Any) -> ProbeCallback:
    """Watch `probes` while `trainer` trains; nothing else about the run changes.

    Args:
        trainer: A TRL or transformers trainer, before `train()`.
        probes: The probe set, or the path of one saved with `ProbeSet.save`.
        every: Optimizer steps between observations.
        **options: Further arguments of `ProbeCallback`.

    Returns:
        The callback, already added to the trainer; `load_run(callback.log_folder)` reads what it wrote.

    Raises:
        ValueError: As for `ProbeCallback`.
        NotImplementedError: As for `ProbeCallback`.

    Example:
        >>> watch(trainer, ProbeSet.from_preference_dataset(dataset, n_prompts=50))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    if isinstance(probes, str | Path):
        probes = ProbeSet.load(probes)
    callback = ProbeCallback(trainer, probes, every, **options)
    trainer.add_callback(callback)
    return callback
