"""Watches lazy likelihood displacement: what a GRPO step does to the correct responses that it was taken on."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer, RLOOTrainer

from llm_dynamics import _trl
from llm_dynamics.callbacks.guard import GuardedCallback, OnError
from llm_dynamics.callbacks.log_rows import LogRows
from llm_dynamics.callbacks.probe import ProbeCallback, watcher_of
from llm_dynamics.callbacks.refusals import refuse_unscorable
from llm_dynamics.callbacks.sharding import gather_frames, on_every_process
from llm_dynamics.likelihood import (
    SplitModel,
    count_forwards,
    idle_forwards,
    is_sharded,
    score_logps,
    split_model,
)
from llm_dynamics.likelihood.preserve import evaluating
from llm_dynamics.options import Amount, Count, check_options
from llm_dynamics.rollouts import Groups, loss_rows

DEFAULT_EVERY = 10
CORRECT_FROM = 0.5
_COLUMNS = [
    *("order", "example", "question", "prompt", "completion"),
    *("n_tokens", "success_rate", "counted", "logp_before"),
]


@dataclass(frozen=True)
class DisplacementOptions:
    """Options of `DisplacementCallback`.

    Attributes:
        every: Optimizer steps between measured ones.
        correct_from: Reward, weighted and summed over the reward functions, from which on a response is correct.
        eps: Nats below which a question's Delta counts as lazy.
        on_error: As for `ProbeCallback`.

    Raises:
        ValueError: For a value that is not allowed; the message names the field and what is.
    """

    every: Count = DEFAULT_EVERY
    correct_from: float = CORRECT_FROM
    eps: Amount = 0.0
    on_error: OnError = "warn"

    def __post_init__(self) -> None:
        check_options(self)


class DisplacementCallback(GuardedCallback):
    """Measures by how much a step raises the likelihood of the correct responses in its own batch.

    At measured steps, the correct responses that the step is taken on, of mixed questions (some correct, some wrong),
    are scored before and after the optimizer step, in evaluation mode at temperature 1, and for each question

        Delta(x) = mean over these correct responses of [log pi'(y+|x) - log pi(y+|x)],   nats, summed over tokens

    ([NTHR], Deng et al., arXiv 2505.18830, eq. 2). Where a generation lasts several steps, each measured step counts
    its own micro-batches; where a step takes several generations, all of them. Whether a question is mixed is told by
    all its responses. Into the trainer's rows go `lld/delta` (mean of Delta over questions), `lld/delta_per_token`,
    `lld/lazy_share` (questions with Delta <= eps), `lld/fell_share` (correct responses whose log-prob fell) and
    `lld/questions`; into the run log, where a `ProbeCallback` keeps one, the table `displacements`. Training is not
    changed by one bit.

    Args:
        trainer: A `GRPOTrainer` or `RLOOTrainer`, or any built on them.
        every: Optimizer steps between measured ones.
        **options: Further fields of `DisplacementOptions`: correct_from, eps, on_error.

    Raises:
        TypeError: For other trainers.
        ValueError: For arguments out of range.
        NotImplementedError: For models whose log-probs cannot be scored.

    Example:
        >>> trainer.add_callback(DisplacementCallback(trainer, every=10))  # doctest: +SKIP
    """

    part = "measuring displacement"

    def __init__(
        self,
        trainer: GRPOTrainer | RLOOTrainer,
        every: int = DEFAULT_EVERY,
        **options: Any,
    ) -> None:
        if not isinstance(trainer, GRPOTrainer | RLOOTrainer):
            raise TypeError(
                f"trainer must be a GRPOTrainer or RLOOTrainer, which roll out; seen {type(trainer).__name__}"
            )
        chosen = DisplacementOptions(every, **options)
        if any(isinstance(other, DisplacementCallback) for other in trainer.callback_handler.callbacks):
            raise ValueError(
                "the trainer has a DisplacementCallback already, whose metrics and table these would replace"
            )
        refuse_unscorable(trainer)
        self.trainer = trainer
        self.every, self.correct_from, self.eps = chosen.every, chosen.correct_from, chosen.eps
        self.on_error = chosen.on_error
        self.rows = LogRows(trainer)
        self._open = ExitStack()
        self._rollouts: list[_trl.Rollout] = []
        self._taken: list[tuple[_trl.Rollout, Tensor]] = []  # the micro-batches of the step, not yet scored
        self._numbered: list[_trl.Rollout] = []  # the generations that the step takes
        self._split: SplitModel | None = None
        self._pending: list[dict[str, Any]] | None = None
        self._responses: list[Any] = []

    def due(self, event: str, state: TrainerState, control: TrainerControl) -> bool:
        """Tell whether an event has anything to do."""
        return {
            "on_step_begin": self.rows.holds,
            "on_pre_optimizer_step": bool(self._taken) or self._kept is not None,
            "on_step_end": self._pending is not None,
        }.get(event, True)

    def let_go(self) -> None:
        """Stop recording."""
        self._forget()
        self._open.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to record generations."""
        self._open.close()
        self._forget()
        self.rows.forget()
        recording = _trl.recording_rollouts(self.trainer, then=self._take, attempt=self.amid_training)
        self._rollouts = self._open.enter_context(recording)
        with evaluating(self._model), self.trainer.accelerator.autocast():
            self._split = split_model(self._model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop recording."""
        self._open.close()
        self.rows.release(at_end=True)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the rows that were held back into the trainer's log, if it has one of its own."""
        self.rows.release()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score the correct responses that the step is about to be taken on."""
        self._score_before()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Score them again after the step, write and log."""
        rows, responses = self._pending, self._responses
        self._forget()
        assert rows is not None  # see `due`
        begun = time.monotonic()
        mine = pd.DataFrame(rows, columns=_COLUMNS).assign(logp_after=self._sums(responses, rows))
        frame = gather_frames(mine.drop(columns="counted"), "order")
        watcher = self.watcher
        if watcher is not None and watcher.opened and state.is_world_process_zero:
            watcher.recorder.log.write_rollouts(state.global_step, {"displacements": frame})
        self._count(begun)
        self.rows.add(displacement_metrics(frame, self.eps))

    # ---- measuring --------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Begin a step with nothing."""
        self._pending, self._responses = None, []
        self._taken.clear()
        self._numbered.clear()

    def _take(self, rollout: _trl.Rollout, rows: Tensor) -> None:
        """Note a micro-batch that the step is taken on; called within the trainer's own code."""
        self._rollouts.clear()
        if self.trainer.state.global_step % self.every or self.failed_at is not None:
            return
        self._taken.append((rollout, rows))
        if self.trainer.is_deepspeed_enabled:  # which takes the step in the backward pass, before any callback is told
            self.attempt(self.trainer.state, self._score_before)

    def _score_before(self) -> None:
        if not self._taken:
            return
        begun = time.monotonic()
        rows: list[dict[str, Any]] = []
        responses: list[Any] = []
        for rollout, taken in self._taken:
            self._add_correct(rollout, taken, rows, responses)
        self._taken.clear()
        for row, logp in zip(rows, self._sums(responses, rows), strict=True):
            row["logp_before"] = logp
        self._pending = (self._pending or []) + rows
        self._responses += responses
        self._count(begun)

    @property
    def _model(self) -> Any:
        return self.trainer.model

    @property
    def watcher(self) -> ProbeCallback | None:
        """The callback that keeps the run log, if there is one."""
        return watcher_of(self.trainer)

    def _count(self, begun: float) -> None:
        watcher = self.watcher
        if watcher is not None:
            watcher.clock.add(time.monotonic() - begun)

    def _add_correct(
        self, rollout: _trl.Rollout, taken: Tensor, rows: list[dict[str, Any]], responses: list[Any]
    ) -> None:
        """Add the correct responses of mixed questions among those `taken` of a generation."""
        batch, trainer = rollout.batch, self.trainer
        mask = batch["completion_mask"].bool()
        if "tool_mask" in batch:
            mask &= batch["tool_mask"].bool()
        groups = Groups(
            size=_trl.group_size(trainer, rollout.training),
            first=trainer.accelerator.process_index * len(mask),
            count=len(mask),
            rewards=_trl.summed_rewards(trainer, rollout.rewards_per_func).cpu(),
            lengths=torch.cat(on_every_process(mask.sum(dim=1).cpu())),
            correct_from=self.correct_from,
        )
        if not any(rollout is other for other in self._numbered):
            self._numbered.append(rollout)
        place = next(i for i, other in enumerate(self._numbered) if other is rollout)
        offset = sum(len(other.rewards_per_func) for other in self._numbered[:place])
        here = {name: batch[name][taken] for name in ("prompt_ids", "prompt_mask", "completion_ids")}
        tokenizer: Any = trainer.processing_class
        for i, row in zip(taken.tolist(), loss_rows(here, mask[taken]), strict=True):
            number = groups.first + i
            group = range(number // groups.size * groups.size, (number // groups.size + 1) * groups.size)
            if not (groups.correct[number] and groups.is_mixed(group) and row.spans):
                continue
            responses.append(row.response)
            rows.append(
                {
                    "order": offset + number,
                    "example": offset + number,
                    "question": (offset + number) // groups.size,
                    "prompt": tokenizer.decode(list(row.response.prompt_ids)),
                    "completion": tokenizer.decode(list(row.response.response_ids)),
                    "n_tokens": int(row.counted.sum()),
                    "success_rate": groups.success_rate(group),
                    "counted": row.counted,
                }
            )

    def _sums(self, responses: list[Any], rows: list[dict[str, Any]]) -> list[float]:
        autocast = self.trainer.accelerator.autocast if self.trainer.accelerator.mixed_precision != "no" else None
        assert self._split is not None, "a run begins with on_train_begin"
        forwards = None
        if is_sharded(self._model):  # all processes run as many forwards as the one with most
            forwards = max(on_every_process(count_forwards(self._split, responses)))
        if not responses:
            idle_forwards(self._model, self._split, forwards or 0, autocast)
            return []
        logps = score_logps(self._model, responses, autocast=autocast, split=self._split, forwards=forwards)
        parts = logps.double().split([len(response.response_ids) for response in responses])
        return [float(part[row["counted"]].sum()) for part, row in zip(parts, rows, strict=True)]


def displacement_metrics(frame: pd.DataFrame, eps: float = 0.0) -> dict[str, float]:
    """Reduce a table of displacements to scalars.

    Args:
        frame: Columns `question`, `n_tokens`, `logp_before`, `logp_after` (nats), as in the run log.
        eps: Nats up to which a question's Delta counts as lazy.

    Returns:
        `lld/questions`, and where there are any `lld/delta`, `lld/delta_per_token`, `lld/lazy_share`,
        `lld/fell_share`.
    """
    if frame.empty:
        return {"lld/questions": 0.0}
    change = frame["logp_after"] - frame["logp_before"]
    delta = change.groupby(frame["question"]).mean()
    return {
        "lld/questions": float(len(delta)),
        "lld/delta": float(delta.mean()),
        "lld/delta_per_token": float(change.sum() / frame["n_tokens"].sum()),
        "lld/lazy_share": float((delta <= eps).mean()),
        "lld/fell_share": float((change < 0).mean()),
    }
