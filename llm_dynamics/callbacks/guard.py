"""The edge of every callback: what fails in one ends that part of the watching, never the run."""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_dynamics.callbacks.sharding import PeerFailed, agree, announce_failure
from llm_dynamics.likelihood.preserve import keeping_random
from llm_dynamics.options import Limit
from llm_dynamics.runlog.schema import ERRORS_FILE

logger = logging.getLogger(__name__)

OnError = Annotated[str, Limit(choices=("warn", "raise"))]


class LogNotOpened(RuntimeError):
    """There is no run log to write to; why was said when it could not be opened."""


class GuardedCallback(TrainerCallback):
    """A callback whose events let no error through, unless they are asked to.

    Every `on_...` method of a subclass is wrapped. An exception in one switches the callback off until the next
    `train()`: what it hung onto the trainer is taken off (`let_go`), the control flags are as before the event, one
    warning names step, part and error, the traceback goes to `errors.txt` in the run log's folder, and `meta.json`
    notes it under `failures`. The random state is always that from before the event. On several processes an event
    ends with a handshake, and one that fails joins the next exchange of the others: all switch off together.

    Attributes:
        part: What the callback does, for messages.
        collective: Whether its events exchange with other processes; then they are `due` on all or none.
        trainer: The trainer.
        watcher: The `ProbeCallback` that keeps the run log, if there is one.
        on_error: "warn", or "raise": then the exception ends the run.
        failed_at: The step at which the callback was switched off in this run; None while it works.
    """

    part = "watching"
    collective = True
    trainer: Any
    watcher: Any = None
    on_error: OnError = "warn"
    failed_at: int | None = None
    _error = ""
    _kept: Exception | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, event in list(vars(cls).items()):
            if name.startswith("on_") and callable(event):
                setattr(cls, name, _guarded(name, event))

    def due(self, event: str, state: TrainerState, control: TrainerControl) -> bool:
        """Tell whether an event has anything to do; of a `collective` callback, by what all processes know alike."""
        return True

    def let_go(self) -> None:
        """Take off the trainer what the callback hung onto it, and forget what is half done."""

    def attempt(self, state: TrainerState, work: Callable[[], None]) -> None:
        """Do some work, let no error of it through, and agree on that with the other processes."""
        try:
            with keeping_random():
                if self._kept is not None:
                    raise self._kept
                work()
                if self.collective:
                    agree()
        except Exception as error:
            self._fail(error, state)
            if self.on_error == "raise":
                raise

    def amid_training(self, work: Callable[[], None]) -> None:
        """Do some work within the trainer's own code, and keep an error of it until our next event."""
        try:
            with keeping_random():
                work()
        except Exception as error:
            self._kept = self._kept or error

    def _begin(self) -> None:
        self.failed_at, self._kept = None, None

    def _fail(self, error: Exception, state: TrainerState) -> None:
        trace = "".join(traceback.format_exception(error))
        said = f"{type(error).__name__}: {error}".strip()
        if isinstance(error, PeerFailed):
            said, trace = str(error), error.trace
        elif self.collective:
            with suppress(Exception):
                announce_failure(said, trace)
        self.failed_at, self._kept = state.global_step, None
        self._error = "" if isinstance(error, LogNotOpened) else said
        with suppress(Exception):
            self.let_go()
        if self.on_error == "raise" or not self._error or (self.collective and not state.is_world_process_zero):
            return
        kept = False
        with suppress(Exception):
            kept = self._keep_trace(trace)
        logger.warning(
            "step %d: %s failed and is off for the rest of this run; training goes on. %s%s",
            state.global_step,
            self.part,
            said,
            f" (traceback: {self.watcher.log_folder / ERRORS_FILE})" if kept else f"\n{trace}",
        )
        with suppress(Exception):
            self._note_failure(state.global_step)

    def _keep_trace(self, trace: str) -> bool:
        if self.watcher is None or not self.watcher.opened:
            return False
        with (self.watcher.log_folder / ERRORS_FILE).open("a", encoding="utf-8", errors="replace") as file:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(f"{now}, step {self.failed_at}: {self.part}\n{trace}\n")
        return True

    def _note_failure(self, step: int) -> None:
        if self.watcher is not None and self.watcher.opened:
            log = self.watcher.recorder.log
            failure = {"step": step, "part": self.part, "error": self._error[:1000]}
            log.update_meta(failures=[*log.meta.get("failures", []), failure])

    def _tell_end(self, state: TrainerState) -> None:
        if self._error and (state.is_world_process_zero or not self.collective):
            logger.warning(
                "%s was off from step %d to the end at step %d: nothing of it was recorded after step %d. %s",
                self.part,
                self.failed_at,
                state.global_step,
                self.failed_at,
                self._error,
            )


def _guarded(name: str, event: Callable[..., None]) -> Callable[..., None]:
    """Return an event that lets no error through."""

    @functools.wraps(event)
    def guarded(
        self: GuardedCallback, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if name == "on_train_begin":
            self._begin()
        if self.failed_at is not None:
            if name == "on_train_end":
                self._tell_end(state)
            return
        flags = dict(vars(control))
        try:
            due = self.due(name, state, control)
        except Exception as error:
            self._kept, due = error, True
        if due:
            try:
                self.attempt(state, lambda: event(self, args, state, control, **kwargs))
            finally:
                if self.failed_at is not None:
                    vars(control).update(flags)

    return guarded
