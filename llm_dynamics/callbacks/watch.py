"""The one line that a training script adds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import Trainer

from llm_dynamics.callbacks.displacement import DisplacementCallback, DisplacementOptions
from llm_dynamics.callbacks.influence import InfluenceCallback
from llm_dynamics.callbacks.influence_settings import InfluenceSettings
from llm_dynamics.callbacks.model_card import describe_in_model_card
from llm_dynamics.callbacks.probe import ProbeCallback
from llm_dynamics.callbacks.probe_options import ProbeOptions
from llm_dynamics.callbacks.tracker_tables import TrackerTables
from llm_dynamics.options import checked, refuse_unknown
from llm_dynamics.probes import ProbeSet

EXPLAINED_PER_OBSERVATIONS = 4
"""With `influence=True`, one step is explained for so many observations: it costs more than to observe."""


def watch(
    trainer: Trainer,
    probes: ProbeSet | str | Path,
    every: int = 25,
    *,
    influence: bool | Mapping[str, Any] = False,
    displacement: bool | Mapping[str, Any] = False,
    tracker_tables: bool = True,
    model_card: bool = False,
    **options: Any,
) -> ProbeCallback:
    """Watch `probes` while `trainer` trains; nothing else about the run changes.

    Args:
        trainer: A TRL or transformers trainer, before `train()`.
        probes: The probe set, or the path of one saved with `ProbeSet.save`.
        every: Optimizer steps between observations.
        influence: Also explain optimizer steps: which cause and which training tokens moved the probes. True explains
            the first step, every `4 * every` steps and the last; a mapping gives arguments of `InfluenceCallback`, such
            as `{"every": 10, "history": "split"}`.
        displacement: Of a GRPO or RLOO trainer, also measure what steps do to the correct responses that they are taken
            on: `lld/*`. True measures one step in `every`; a mapping gives arguments of `DisplacementCallback`.
        tracker_tables: Send each observation as tables, and the curves at the end, to the trackers of `report_to`
            (wandb, trackio, mlflow, TensorBoard); scalars go there in any case. Without such a tracker nothing is sent.
        model_card: Let the model cards that the trainer writes end with what moved and where the run log lies.
        **options: Further fields of `ProbeOptions`. Its `on_error` holds for all that is attached.

    Returns:
        The callback, already added to the trainer; `load_run(callback.log_folder)` reads what it wrote.

    Raises:
        TypeError: Where `displacement` is asked of a trainer that does not roll out, or an argument has an unknown
            name; nothing is attached then.
        ValueError: As for `ProbeCallback` and `InfluenceCallback`; nothing is attached then.
        NotImplementedError: As for `ProbeCallback` and `InfluenceCallback`; nothing is attached then.

    Example:
        >>> watch(trainer, ProbeSet.from_preference_dataset(dataset, n_prompts=50))  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    _check(options, influence, displacement, {"tracker_tables": tracker_tables, "model_card": model_card})
    if isinstance(probes, str | Path):
        probes = ProbeSet.load(probes)
    callback = ProbeCallback(trainer, probes, every, **options)
    trainer.add_callback(callback)
    try:
        if displacement is not False:
            given = {} if displacement is True else dict(displacement)
            defaults = {"every": callback.every, "on_error": callback.on_error}
            measures = DisplacementCallback(trainer, **{**defaults, **given})  # type: ignore[arg-type]
        if influence is not False:
            given = {} if influence is True else dict(influence)
            settings = {"every": EXPLAINED_PER_OBSERVATIONS * callback.every, **given}
            trainer.add_callback(InfluenceCallback(trainer, probes, on_error=callback.on_error, **settings))
        if displacement is not False:
            trainer.add_callback(measures)
        if tracker_tables:
            trainer.add_callback(TrackerTables(callback))
    except Exception:
        trainer.remove_callback(callback)  # what is refused leaves the trainer as it was
        raise
    if model_card:
        describe_in_model_card(trainer)
    return callback


def _check(options: Mapping[str, Any], influence: Any, displacement: Any, flags: Mapping[str, Any]) -> None:
    """Check names and kinds of the arguments; their values are checked by the dataclasses that take them."""
    own = [*inspect.signature(watch).parameters][2:-1]  # after trainer and probes, without **options
    refuse_unknown(options, [*own, *(item.name for item in fields(ProbeOptions) if item.name not in own)], "watch()")
    for name, flag in flags.items():
        checked(name, bool, flag)
    for name, given, taken in (
        ("influence", influence, InfluenceSettings),
        ("displacement", displacement, DisplacementOptions),
    ):
        if isinstance(checked(name, bool | Mapping[str, Any], given), Mapping):
            refuse_unknown(given, [item.name for item in fields(taken)], f"watch({name}={{...}})")
