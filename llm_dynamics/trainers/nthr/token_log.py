"""Writes rollouts and their tokens to the run log, so that one can read which tokens were spared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from llm_dynamics.callbacks.guard import GuardedCallback, OnError
from llm_dynamics.callbacks.probe import ProbeCallback, watcher_of
from llm_dynamics.callbacks.sharding import broadcast, gather_frames
from llm_dynamics.trainers.nthr.shaping import ShapedBatch

if TYPE_CHECKING:
    from llm_dynamics.trainers.nthr.trainer import NTHRGRPOTrainer


class TokenLog(GuardedCallback):
    """Keeps the tokens of a generation until its first step is done, then writes them.

    The tables `rollouts` and `nthr_tokens` go to the run log that a `ProbeCallback` of the trainer opened, as often as
    it observes: at the first generation, and at the first in each of its intervals. Without one nothing is kept.

    Args:
        trainer: The trainer whose rollouts are logged.
    """

    part = "writing rollouts"

    def __init__(self, trainer: NTHRGRPOTrainer) -> None:
        self.trainer = trainer
        self._pending: dict[str, pd.DataFrame] | None = None
        self._last: int | None = None

    @property
    def watcher(self) -> ProbeCallback | None:
        """The callback that keeps the run log, if there is one."""
        return watcher_of(self.trainer)

    @property
    def on_error(self) -> OnError:  # type: ignore[override]
        """That of the callback that keeps the run log."""
        return "warn" if self.watcher is None else self.watcher.on_error

    def due(self, event: str, state: TrainerState, control: TrainerControl) -> bool:
        """Tell whether an event has anything to do."""
        return event == "on_train_begin" or self._pending is not None

    def let_go(self) -> None:
        """Forget what was kept."""
        self._pending = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier run, or go on where a resumed one was."""
        watcher = self.watcher
        written = [] if watcher is None else watcher.recorder.log.steps("rollouts")
        last = max((step - 1 for step in written if step <= state.global_step), default=None)
        self._pending, self._last = None, broadcast(last)

    def keep(self, batch: dict[str, Any], shaped: ShapedBatch) -> None:
        """Keep a generation of the training batch, if it is due; every process must call."""
        watcher, step = self.watcher, self.trainer.state.global_step
        if watcher is None or not watcher.opened or self.failed_at is not None:
            return
        if self._last is not None and step // watcher.every == self._last // watcher.every:
            return
        self._last = step

        def gather() -> None:
            rollouts, tokens = rollout_tables(batch, shaped, watcher.decode)
            tables = {"rollouts": rollouts, "nthr_tokens": tokens}
            self._pending = {name: gather_frames(table, "order") for name, table in tables.items()}

        self.attempt(self.trainer.state, gather)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write what was kept."""
        pending, self._pending = self._pending, None
        if pending is not None and self.watcher is not None and state.is_world_process_zero:
            self.watcher.recorder.log.write_rollouts(state.global_step, pending)


def rollout_tables(batch: dict[str, Any], shaped: ShapedBatch, decode: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the tables of this process's rollouts, with their place among all as column `order`.

    Args:
        batch: What the trainer scored: `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask`.
        shaped: What was made of it.
        decode: Turns token ids into text.

    Returns:
        Columns of `rollout_schema.ROLLOUTS` and `NTHR_TOKENS`.
    """
    groups = shaped.groups
    rows, tokens = [], []
    prompts = zip(batch["prompt_ids"].cpu(), batch["prompt_mask"].cpu().bool(), strict=True)
    completions = zip(batch["completion_ids"].cpu(), batch["completion_mask"].cpu().bool(), strict=True)
    host = {name: value.cpu() for name, value in vars(shaped).items() if isinstance(value, torch.Tensor)}
    for i, ((prompt, seen), (ids, real)) in enumerate(zip(prompts, completions, strict=True)):
        number = groups.first + i
        shared = {"order": number, "example": number, "question": number // groups.size}
        known = bool(groups.known[number])
        rows.append(
            {
                **shared,
                "prompt": decode(prompt[seen].tolist()),
                "completion": decode(ids[real].tolist()),
                "n_tokens": int(host["mask"][i].sum()),
                "reward": float(groups.rewards[number]) if known else None,
                "correct": bool(groups.correct[number]) if known else None,
                "advantage": float(host["before"][i]),
                "success_rate": _or_null(host["success"][i]),
                "eta": _or_null(host["etas"][i]),
                "threshold": _or_null(host["thresholds"][i]),
                "anchor": _or_null(host["anchors"][i]),
                "n_selected": int(host["selected"][i].sum()),
            }
        )
        for t in host["mask"][i].nonzero()[:, 0].tolist():
            tokens.append(
                {
                    **shared,
                    "position": t,
                    "token_id": int(ids[t]),
                    "token": decode([int(ids[t])]),
                    "score": _or_null(host["scores"][i, t]),
                    "threshold": _or_null(host["thresholds"][i]),
                    "selected": bool(host["selected"][i, t]),
                    "advantage_before": float(host["before"][i]),
                    "advantage": float(host["advantages"][i, t]),
                }
            )
    names = ["order", "example", "question", "position", "token_id", "token", "score", "threshold", "selected"]
    empty = pd.DataFrame(columns=[*names, "advantage_before", "advantage"])
    return pd.DataFrame(rows), pd.DataFrame(tokens) if tokens else empty


def _or_null(value: torch.Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)
