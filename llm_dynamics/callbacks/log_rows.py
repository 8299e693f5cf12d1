"""Rows of ours in the trainer's log, never before the trainer's own first row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import IntervalStrategy, Trainer

from llm_dynamics import _trl
from llm_dynamics.callbacks.metrics import finite_only


@dataclass
class _Row:
    """A row that is held back, and whether the trackers have it."""

    metrics: dict[str, float]
    step: int
    epoch: float | None
    tracked: bool


class LogRows:
    """Brings metrics into the trainer's log: beside the loss where the trainer logs that step, else in an own row.

    What comes before the trainer's own first row goes to the trackers of `report_to` at once, and into
    `state.log_history` and to all other callbacks when that row is there: code that reads `log_history[0]` finds what
    it would find without watching. A held row stands under its true step, after a row of a later one.

    Args:
        trainer: The trainer.
        suffix: Put after every name.
    """

    def __init__(self, trainer: Trainer, suffix: str = "") -> None:
        self.trainer = trainer
        self.suffix = suffix
        self._held: list[_Row] = []

    @property
    def holds(self) -> bool:
        """Whether rows wait."""
        return bool(self._held)

    def forget(self) -> None:
        """Drop rows that an earlier run left."""
        self._held.clear()

    def add(self, metrics: Mapping[str, float], *, at_start: bool = False) -> None:
        """Bring metrics of the current step into the log, those that are finite.

        Args:
            metrics: By name.
            at_start: Other callbacks had no `on_train_begin` yet: nobody is told before the next `release`.
        """
        trainer, state = self.trainer, self.trainer.state
        if trainer.args.logging_strategy == IntervalStrategy.NO:
            return
        named = {f"{name}{self.suffix}": value for name, value in finite_only(metrics).items()}
        if at_start:
            self._held.append(_Row(named, state.global_step, state.epoch, tracked=False))
        elif trainer.control.should_log and _trl.add_to_next_row(trainer, named):
            return
        elif state.log_history:
            self.release()
            _trl.log_row(trainer, named)
        else:
            self._held.append(_Row(named, state.global_step, state.epoch, tracked=False))
            self.release()

    def release(self, *, at_end: bool = False) -> None:
        """Tell the trackers what they were not told, and once the trainer has a row of its own, everybody.

        Args:
            at_end: Callbacks are past their `on_train_end`: held rows go into `log_history` alone.
        """
        own_first = bool(self.trainer.state.log_history)
        for row in self._held:
            logs = row.metrics | ({} if row.epoch is None else {"epoch": row.epoch})
            with self._at(row):
                if not row.tracked and not at_end:
                    row.tracked = True
                    _trl.tell_row(self.trainer, logs, trackers=True)
                if own_first:
                    self.trainer.state.log_history.append({**logs, "step": row.step})
                    if not at_end:
                        _trl.tell_row(self.trainer, logs, trackers=False)
        if own_first:
            self._held.clear()

    @contextmanager
    def _at(self, row: _Row) -> Iterator[None]:
        """Let the trainer's state be that of the row's step."""
        state: Any = self.trainer.state
        now = state.global_step, state.epoch
        state.global_step, state.epoch = row.step, row.epoch
        try:
            yield
        finally:
            state.global_step, state.epoch = now
