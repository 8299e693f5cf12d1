"""What the main process does with observations: open the run log, new or continued, and write to it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerState

from llm_dynamics.callbacks.schedule import Clock
from llm_dynamics.callbacks.token_budget import choose_token_probes
from llm_dynamics.runlog import RunLogError, RunLogWriter, schema
from llm_dynamics.runlog.parts import read_meta, read_part

logger = logging.getLogger(__name__)


class Recorder:
    """Writes one run's observations, within the token budget.

    Attributes:
        first: The sequences table of the first observation, with its step; None before it.
        last: That of the last one which this process wrote.

    Args:
        folder: The run-log folder.
        table: The probes table, columns of `schema.PROBES`.
        tokens: Keep token statistics.
        token_budget_mb: Megabytes that the token tables may take.
        seed: Seed of the sample of prompts whose tokens are kept where not all fit.
    """

    def __init__(self, folder: Path, table: pd.DataFrame, *, tokens: bool, token_budget_mb: float, seed: int) -> None:
        self.log = RunLogWriter(folder)
        self.table = table
        self.token_probes: set[str] = set()
        self.start: dict[str, float] = {}
        self.first: pd.DataFrame | None = None
        self.last: pd.DataFrame | None = None
        self._token_bytes = self._largest_part = self._rows_read = 0
        self._last_row: dict[str, Any] = {}
        self._tokens = tokens
        self._budget_mb = token_budget_mb
        self._seed = seed

    def open(self, state: TrainerState, meta: Mapping[str, Any], *, every: int) -> None:
        """Start a run log, or continue the one of a resumed run.

        Args:
            state: The trainer's state at the beginning of training.
            meta: What `meta.json` shall say.
            every: Optimizer steps between observations.

        Raises:
            RunLogError: Where a run is resumed with other probes than its log has.
        """
        self.start, self.first, self.last, self._last_row, self._rows_read = {}, None, None, {}, 0
        busy = self.log.claim()
        if busy is not None:
            logger.warning(
                "another run that has not ended writes to %s, or it holds other things: the log of this run is %s",
                busy,
                self.log.folder,
            )
        if state.global_step > 0 and self.log.exists():
            try:
                self.first = self._first_observation(state.global_step)
                dropped = self.log.resume(state.global_step, meta)
            except RunLogError:
                self.log.close()  # a log that is refused is left as it is
                raise
            if dropped:
                logger.info("run log continued at step %d; dropped steps %s", state.global_step, dropped)
            if self.first is not None:
                self.start = dict(zip(self.first["probe_id"], self.first["logp_sum"], strict=True))
        else:
            if state.global_step > 0:
                logger.warning(
                    "training resumes at step %d but there is no run log at %s: a new one starts here, and changes are "
                    "counted from this step",
                    state.global_step,
                    self.log.folder,
                )
            moved = self.log.start(self.table, meta)
            if moved is not None:
                logger.warning("an earlier run log was moved to %s", moved)
        kept = self.log.meta.get("token_probes")
        if kept is None:
            kept = self._choose_token_probes((state.max_steps - state.global_step) // every + 2)
            self.log.update_meta(token_probes=kept)
        self.token_probes = set(self.table["probe_id"]) if kept == "all" else set(kept)
        sizes = self.log.part_bytes("tokens")  # counted once: an observation's time must not grow with their number
        self._token_bytes, self._largest_part = sum(sizes), max(sizes, default=0)

    def write(
        self,
        state: TrainerState,
        sequences: pd.DataFrame,
        tokens: pd.DataFrame,
        metrics: Mapping[str, float],
        *,
        clock: Clock,
        begun: float,
        first: bool,
    ) -> None:
        """Write one observation, and count its time from `begun` (`time.monotonic()`) to the end of writing."""
        size = self._token_bytes + self._largest_part  # with one more part
        keeps_tokens = bool(len(tokens)) and size <= self._budget_mb * 1e6
        for row in state.log_history[self._rows_read :]:
            self._last_row.update({key: row[key] for key in ("loss", "learning_rate", "grad_norm") if key in row})
        self._rows_read = len(state.log_history)

        def scalars() -> dict[str, Any]:
            seconds = time.monotonic() - begun
            training = clock.record(seconds)
            return {
                "epoch": state.epoch,
                "seconds_observing": seconds,
                "seconds_training": training,
                "overhead": None if first else clock.overhead,
                "n_probes": len(sequences),
                "n_response_tokens": int(sequences["n_tokens"].sum()),
                "n_nonfinite": int(sequences["n_nonfinite"].sum()),
                **self._last_row,
                **metrics,
            }

        self.log.write(state.global_step, sequences=sequences, tokens=tokens if keeps_tokens else None, scalars=scalars)
        self.last = sequences.assign(step=state.global_step)
        if self.first is None:
            self.first = self.last
        if keeps_tokens:
            part = (self.log.folder / "tokens" / schema.part_name(state.global_step)).stat().st_size
            self._token_bytes, self._largest_part = self._token_bytes + part, max(self._largest_part, part)
        if len(tokens) and not keeps_tokens and "tokens_end_at_step" not in self.log.meta:
            logger.warning("token_budget_mb=%g is used up: no more token tables", self._budget_mb)
            self.log.update_meta(tokens_end_at_step=state.global_step)

    def skip(self, step: int, max_overhead: float) -> None:
        """Note that the observation of `step` was left out to stay within `max_overhead`."""
        logger.warning(
            "no observation at step %d: with it, watching would take more than max_overhead=%g of training",
            step,
            max_overhead,
        )
        self.log.update_meta(skipped_steps=[*self.log.meta.get("skipped_steps", []), step])

    def _first_observation(self, step: int) -> pd.DataFrame | None:
        """Return the sequences table of the first observation up to `step` that can be read."""
        meta = read_meta(self.log.folder)
        for done in self.log.steps():
            file = self.log.folder / "sequences" / schema.part_name(done)
            try:
                return read_part(file, schema.SEQUENCES, meta=meta).to_pandas() if done <= step else None
            except RunLogError as error:
                logger.warning("changes are not counted from step %d of the run log: %s", done, error)
        return None

    def _choose_token_probes(self, observations: int) -> list[str] | str:
        if not self._tokens:
            return []
        kept = choose_token_probes(self.table, observations, self._budget_mb * 1e6, seed=self._seed)
        if kept != "all":
            logger.warning(
                "token tables of all %d probes would exceed token_budget_mb=%g: %d probes keep their tokens "
                "(meta.json: token_probes)",
                len(self.table),
                self._budget_mb,
                len(kept),
            )
        return kept
