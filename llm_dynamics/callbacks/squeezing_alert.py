"""Warn, or stop, when the mass goes into the greedy tokens while what is watched falls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import pandas as pd
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from llm_dynamics import _trl
from llm_dynamics.callbacks.guard import GuardedCallback
from llm_dynamics.callbacks.probe import ProbeCallback, require_open_log, watcher_of
from llm_dynamics.callbacks.sharding import broadcast
from llm_dynamics.options import Count, Limit, checked
from llm_dynamics.rules import is_squeezing

logger = logging.getLogger(__name__)

_ALERTS: Mapping[str, Callable[[Any, str, str], None]] = {
    "wandb": lambda wandb, title, text: wandb.run.alert(title=title, text=text, level="WARN"),
    "trackio": lambda trackio, title, text: trackio.alert(title=title, text=text, level=trackio.AlertLevel.WARN),
}
"""Trackers that have alerts, and how one is sent to the run that is open."""


class SqueezingAlert(GuardedCallback):
    """Judges each observation of the trainer's `ProbeCallback` by the rule `squeezing` (`llm_dynamics.rules`).

    When it is found first, one warning with the numbers that decide goes to the log, and to the alerts of wandb or
    trackio where the run reports there (`report_to`). With `stop_on="squeezing"` training stops at the end of that
    step. A tracker that fails stops nothing. `on_error` is that of the `ProbeCallback`.

    Attributes:
        found_at: The step at which it was found first; None before.

    Args:
        trainer: A trainer that is watched: `watch(trainer, probes)` comes first.
        stop_on: "squeezing" stops the run when it is found; None only warns.
        patience: Consecutive observations that must find it.
        watcher: Whose observations are judged, where several watch the trainer; None: the first.

    Raises:
        ValueError: Where the trainer is not watched, or for arguments out of range.

    Example:
        >>> trainer.add_callback(SqueezingAlert(trainer, stop_on="squeezing"))  # doctest: +SKIP
    """

    part = "judging observations"

    def __init__(
        self,
        trainer: Trainer,
        *,
        stop_on: Literal["squeezing"] | None = None,
        patience: int = 1,
        watcher: ProbeCallback | None = None,
    ) -> None:
        watcher = watcher or watcher_of(trainer)
        if watcher is None:
            raise ValueError("the trainer is not watched: call watch(trainer, probes) before adding SqueezingAlert")
        self.trainer, self.watcher, self.on_error = trainer, watcher, watcher.on_error
        self.stop_on = checked("stop_on", Annotated[str | None, Limit(choices=("squeezing",))], stop_on)
        self.patience = checked("patience", Count, patience)
        self.found_at: int | None = None
        self._row = 0
        self._judged: int | None = None

    def due(self, event: str, state: TrainerState, control: TrainerControl) -> bool:
        """Tell whether an event has anything to do: an observation that was made at this very step."""
        return event == "on_train_begin" or (
            self.watcher.observed_step == state.global_step != self._judged
            and (event != "on_epoch_end" or control.should_training_stop)
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier run."""
        require_open_log(self.watcher)
        self.found_at, self._row, self._judged = None, 0, None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Judge an observation that was made at this step, and stop where that is asked for."""
        if self._judge(state) and self.stop_on == "squeezing":
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the observation of a run that was stopped between two others, while its trackers are still open."""
        self._judge(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge an observation that was made only now."""
        self._judge(state)

    def _judge(self, state: TrainerState) -> bool:
        """Tell whether the last `patience` observations found it, the last of them at this very step."""
        self._judged = state.global_step
        # the main process alone has the log; what it finds must stop all
        found, evidence = broadcast(self._finding() if state.is_world_process_zero else None) or (False, "")
        self._row = self._row + 1 if found else 0
        if self._row < self.patience:
            return False
        if self.found_at is None:
            self.found_at = state.global_step
            if state.is_world_process_zero:
                self._tell(state.global_step, evidence)
        return True

    def _tell(self, step: int, evidence: str) -> None:
        suffix = self.watcher.rows.suffix
        title = f"step {step}: squeezing" + (f" ({suffix[1:]})" if suffix else "")
        text = (
            f"{evidence}. Negative gradients on unlikely responses do this: extend first (SFT on both responses), "
            "lower the learning rate, or stop"
        )
        logger.warning("%s: %s", title, text)
        for name, tracker in _trl.open_trackers(self.watcher.trainer).items():
            if name in _ALERTS:
                try:
                    _ALERTS[name](tracker, title, text)
                except Exception as error:  # a service that is down must not end the run
                    logger.warning("%s did not take the alert (%s: %s)", name, type(error).__name__, error)

    def _finding(self) -> tuple[bool, str] | None:
        """Compare the first observation with the last."""
        first, last = self.watcher.recorder.first, self.watcher.recorder.last
        if first is None or last is None or first is last:
            return None
        return is_squeezing(pd.concat([first, last], ignore_index=True))
