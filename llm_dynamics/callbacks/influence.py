"""The callback that explains optimizer steps during training and writes their accounts to the run log."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm_dynamics import _trl
from llm_dynamics.callbacks.doubts import replay_causes
from llm_dynamics.callbacks.finished_step import FinishedStep, StepWeights
from llm_dynamics.callbacks.guard import GuardedCallback, OnError
from llm_dynamics.callbacks.influence_maps import account_of_tokens
from llm_dynamics.callbacks.influence_settings import InfluenceSettings
from llm_dynamics.callbacks.log_rows import LogRows
from llm_dynamics.callbacks.moment_file import FILE as HISTORY_FILE
from llm_dynamics.callbacks.moment_file import load_history, save_history
from llm_dynamics.callbacks.probe import ProbeCallback, require_open_log
from llm_dynamics.callbacks.probe_account import ProbeAccount, account_of_probes, explained_by_gradient
from llm_dynamics.callbacks.refusals import refuse_underivable, refuse_unexplainable
from llm_dynamics.callbacks.roles import role_labelling
from llm_dynamics.callbacks.sharding import average_weights, on_every_process, sum_over_processes
from llm_dynamics.callbacks.token_account import TokenAccount, TokenAccountant, with_tokens
from llm_dynamics.callbacks.training_rows import DatasetRows
from llm_dynamics.influence import (
    BeforeStep,
    LossTape,
    MomentHistory,
    UpdateSplit,
    by_sign,
    split_update,
    trainable_parameters,
)
from llm_dynamics.influence.tape import Labelling
from llm_dynamics.influence.update import innermost
from llm_dynamics.kernel.weights import Weights
from llm_dynamics.likelihood.preserve import keeping_rope
from llm_dynamics.options import checked
from llm_dynamics.probes import ProbeSet

logger = logging.getLogger(__name__)

DEFAULT_EVERY = 100
REPLAY_TOLERANCE = {"no": 1e-3, "bf16": 0.3}
"""Nats by which a replayed log-prob may differ from the one in training before a warning, by mixed precision."""


class InfluenceCallback(GuardedCallback):
    """Explains what optimizer steps did to the probes: at the first step, every `every` steps, and at the last.

    At an explained step, the tap on the loss splits the gradient by the labels of training tokens (`LossTape`), the
    optimizer's update is split into additive causes (`split_update`), and each cause's share in the measured change of
    the probes is found along the path between the weights (`account_for_change`):

        measured change = sum over causes of their shares + remainder

    with the causes `up` (tokens whose log-prob the loss raises), `down` (those it lowers), `other` (what the loss sends
    past the label log-probs), `momentum`, `decay` and `rounding`. The tables `influence`, `training_examples`,
    `training_tokens`, `accounts` go to the run log of the trainer's `ProbeCallback`; `influence/<family>_<cause>` and
    `influence/explained` into the trainer's log rows. Training is not changed by one bit.

    Works with every TRL trainer whose loss goes through label log-probs and a plain `Trainer`; full and PEFT weights;
    gradient accumulation; non-reentrant checkpointing; on data-parallel processes the account is that of the global
    step. Memory: about six copies of the trained parameters in float32 while a step is explained, and one of every
    frozen weight of lower precision.

    Args:
        trainer: The trainer to watch.
        probes: What to explain; where the trainer has no `ProbeCallback` for them, one is added, since it keeps the
            run log.
        every: Optimizer steps between explained ones.
        on_error: As for `ProbeCallback`; watching goes on where explaining ended.
        **options: Further fields of `InfluenceSettings`: rule, detail, families, training_tokens, tokens_every,
            map_probes, split_by, history, compare_gradient.

    Raises:
        TypeError: As for `ProbeCallback`.
        ValueError: For arguments out of range.
        NotImplementedError: For runs whose steps cannot be explained: sharded or quantised weights, DeepSpeed,
            float16 loss scaling, `torch_compile`, Liger kernels, reentrant checkpointing.

    Example:
        >>> trainer.add_callback(InfluenceCallback(trainer, probes, every=100))  # doctest: +SKIP
    """

    part = "explaining steps"

    def __init__(
        self,
        trainer: Trainer,
        probes: ProbeSet,
        every: int = DEFAULT_EVERY,
        *,
        on_error: OnError = "warn",
        **options: Any,
    ) -> None:
        self.on_error = checked("on_error", OnError, on_error)
        settings = InfluenceSettings(every=every, **options)
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer must be a transformers or TRL trainer; seen {type(trainer).__name__}")
        refuse_unexplainable(trainer)
        if any(isinstance(other, InfluenceCallback) for other in trainer.callback_handler.callbacks):
            raise ValueError("the trainer has an InfluenceCallback, and two would tap each other: give one all probes")
        self.trainer = trainer
        self.watcher = _watcher(trainer, probes, every, on_error)
        refuse_underivable(trainer, self.watcher.encoded, self.watcher.split)
        self.rows = LogRows(trainer, self.watcher.rows.suffix)
        self.settings = settings.of_probes(self.watcher.table)
        self.roles, self.row_of = role_labelling(trainer), DatasetRows(trainer)
        split_by = settings.split_by
        self.labelling: Labelling = (
            {"sign": by_sign, "role": self.roles}[split_by] if isinstance(split_by, str) else split_by
        )
        self.history = MomentHistory() if settings.history == "split" else None
        self._history_since = 0
        self._resumed_from = _trl.noting_checkpoint(trainer) if self.history is not None else []
        self._open = ExitStack()
        self._tape: LossTape | None = None
        self._seen_a_loss = False
        self._weights = StepWeights()
        self._clip: list[float] = []
        self._before: BeforeStep | None = None
        self._pending: dict[str, Any] | None = None
        if self.watcher not in trainer.callback_handler.callbacks:
            trainer.add_callback(self.watcher)  # when nothing can be refused any more

    # ---- events -------------------------------------------------------------------------------------------------

    def due(self, event: str, state: TrainerState, control: TrainerControl) -> bool:
        """Tell whether an event has anything to do."""
        taps = self._tape is not None
        return {
            "on_step_begin": taps
            or self._due(state)
            or self.history is not None
            or self._weights.waits
            or self.rows.holds,
            "on_pre_optimizer_step": taps,
            "on_optimizer_step": taps and self._before is not None,
            "on_step_end": taps or self._pending is not None,
            "on_save": self.history is not None,
        }.get(event, True)

    def let_go(self) -> None:
        """Take the tap off the model."""
        tape = self._tape
        try:
            self._close()
        finally:
            self._tape = self._before = self._pending = None
            self._weights = StepWeights()
            if tape is not None:
                tape.__exit__(None, None, None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note in the run log what will be explained."""
        self._close()
        self._pending, self._seen_a_loss = None, False
        self.rows.forget()
        require_open_log(self.watcher)
        if self.history is not None:
            self._begin_history(state)
        if self.watcher.split.backbone is None and (self.settings.training_tokens or self.settings.mapped):
            logger.warning(
                "the training batches of %s cannot be replayed: training_tokens and own_share will not be recorded",
                type(self.watcher.split.model).__name__,
            )
        if state.is_world_process_zero:
            self.watcher.recorder.log.update_meta(influence=self.settings.describe())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tap the loss of a step that will be explained."""
        self._close()
        self.rows.release()
        model = self.trainer.model
        assert model is not None
        parameters = trainable_parameters(model)
        self._weights.between_steps(parameters, state.global_step)
        if not self._due(state) and self.history is None:
            return
        self._tape = LossTape(model, self.labelling, parameters=parameters, attempt=self.amid_training)
        self._open.enter_context(self._tape)
        self._clip = self._open.enter_context(_trl.recording_clip(self.trainer))
        self._weights.begin(self._tape.parameters)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy what the step is about to overwrite."""
        assert self._tape is not None  # see `due`
        begun = time.monotonic()
        self._open.close()
        if not self._seen_a_loss:
            self._tape.raise_if_empty()  # a step without a loss later on, such as one that is skipped, is none of ours
        self._seen_a_loss = True
        self._before = BeforeStep.of(self.trainer.optimizer, self._tape.parameters, self._weights.begun_at)
        self.watcher.clock.add(time.monotonic() - begun)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Explain the step that was just taken."""
        begun = time.monotonic()
        tape, before = self._tape, self._before
        assert tape is not None
        assert before is not None  # see `due`
        self._tape = self._before = None
        average_weights(self.trainer.accelerator, tape.parts, before.weights)
        factor, norm = self._clip or (1.0, float("nan"))
        update = split_update(
            self.trainer.optimizer,
            tape.parameters,
            before,
            tape.parts,
            clip_factor=factor,
            history=self.history,
        )
        self._weights.stepped(tape.parameters)
        if self._due(state):
            self._pending = self._explain(tape, before.weights, update, state.global_step + 1)
            self._pending["account"] |= {
                "clip_factor": factor,
                "grad_norm": norm,
                "seconds": time.monotonic() - begun,
                "learning_rate": float(innermost(self.trainer.optimizer).param_groups[0]["lr"]),
            }
        self.watcher.clock.add(time.monotonic() - begun)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write and log the account of the step."""
        self._close()
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if state.is_world_process_zero:
            self.watcher.recorder.log.write_account(state.global_step, pending["tables"], pending["account"])
        self.rows.add(pending["metrics"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the labels of momentum with the checkpoint, which has the optimizer's state without them."""
        checkpoint = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.history is not None and args.should_save and checkpoint.is_dir() and not args.save_only_model:
            save_history(self.history, self._history_since, checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove every hook."""
        self._close()
        self.rows.release(at_end=True)

    # ---- explaining -----------------------------------------------------------------------------------------------

    def _due(self, state: TrainerState) -> bool:
        """Tell whether the step under way, counted from 1, is explained."""
        return self.settings.explains(state.global_step + 1, state.max_steps)

    def _begin_history(self, state: TrainerState) -> None:
        """Begin with no momentum, or with what the checkpoint knows of its own."""
        assert self.trainer.model is not None
        loaded = None
        if state.global_step > 0 and self._resumed_from:
            try:
                loaded = load_history(self._resumed_from[0], trainable_parameters(self.trainer.model))
            except Exception as error:  # whatever a damaged file gives rise to
                logger.warning("%s cannot be read: %s", self._resumed_from[0] / HISTORY_FILE, error)
        if not all(on_every_process(loaded is not None)):
            loaded = None
            if state.global_step > 0:
                logger.warning(
                    "the checkpoint does not say which tokens filled its momentum: what is older than step %d stays "
                    "in the cause `momentum`",
                    state.global_step,
                )
        self.history, self._history_since = loaded or (MomentHistory(), state.global_step)

    def _note(self, *known: str | None) -> str | None:
        """Return what a reader of the account must know."""
        notes = [note for note in known if note is not None]
        if self.history is not None and self._history_since > 0:
            notes.append(
                f"the labels of momentum are known from step {self._history_since} on, where the run was resumed "
                "without its history: what is older is in `momentum`"
            )
        return "; ".join(notes) or None

    def _close(self) -> None:
        self._open.close()
        self._tape = self._before = None

    def _explain(self, tape: LossTape, before: Weights, update: UpdateSplit, number: int) -> dict[str, Any]:
        watcher, model = self.watcher, self.trainer.model
        assert model is not None
        prompts = self._prompts()
        own = [prompts[probe.prompt_ids] for probe in watcher.encoded]  # one id where prompts are the same tokens
        table = watcher.table[["probe_id", "family"]].assign(prompt_id=own)
        families = list(self.settings.families or ())
        mine = [i for i in watcher.share if table["family"].iloc[i] in families]
        counts = table["family"].value_counts()
        step = FinishedStep(
            model=model,
            split=watcher.split,
            accelerator=self.trainer.accelerator,
            tape=tape,
            before=before,
            update=update,
            rule=self.settings.rule,
            table=table.iloc[mine].reset_index(drop=True),
            order=mine,
            encoded=[watcher.encoded[i] for i in mine],
            counts={family: int(counts[family]) for family in families if family in counts},
            batch_tokens=watcher.options.batch_tokens,
        )
        with keeping_rope(model), _trl.outside_autocast(model):
            probes = account_of_probes(step, self.settings.detail)
            tokens, told = self._training_tokens(step, number), probes.tokens
            if told is None and tokens is not None and tokens.maps is not None:
                told = account_of_tokens(step, self.settings.mapped)
        influence, by_family = probes.influence, self.settings.detail == "family"
        if tokens is not None and by_family:
            influence = with_tokens(influence, tokens, coarse=step.coarse)
        tables = {"influence": influence, "influence_tokens": told} | (tokens.tables if tokens is not None else {})
        notes = [tokens.note(carried=step.coarse and by_family)] if tokens is not None else []
        return {
            "tables": {name: frame for name, frame in tables.items() if frame is not None},
            "account": {
                "rule": self.settings.rule,
                "explained": probes.explained,
                "explained_by_gradient": explained_by_gradient(step) if self.settings.compare_gradient else None,
                "measured_norm": probes.measured_norm,
                "remainder_norm": probes.remainder_norm,
                "optimizer": type(innermost(self.trainer.optimizer)).__name__,
                "note": self._note(update.note, self._weights.note, *notes),
            },
            "metrics": _shares(probes),
        }

    def _training_tokens(self, step: FinishedStep, number: int) -> TokenAccount | None:
        settings = self.settings
        targets = list(settings.training_tokens or ())
        if not (targets or settings.mapped) or step.split.backbone is None:  # no replay: see `on_train_begin`
            return None
        n_batches, n_unknown = sum_over_processes(np.array([len(step.tape.batches), not step.update.per_gradient]))
        if n_batches == 0 or n_unknown > 0:
            return None  # a step without a loss, or one that is no known function of its gradient
        accountant = TokenAccountant(
            step, self.roles, self._prompts(), self.watcher.decode, _trl.sampling_temperature(self.trainer), self.row_of
        )
        families = [target for target in targets if target in step.counts]
        probes = [target for target in targets if target not in (settings.families or ())]
        tokens = accountant.account(families, probes, settings.mapped, tables=settings.tells_tokens(number))
        if tokens.replay_error > REPLAY_TOLERANCE["bf16" if step.coarse else "no"]:
            logger.warning(
                "replaying the training batch gave log-probs up to %.2g nats from those in training: the shares of "
                "training tokens are off by as much. Seen here: %s",
                tokens.replay_error,
                replay_causes(step.model, self.trainer.accelerator.mixed_precision),
            )
        return tokens

    def _prompts(self) -> dict[tuple[int, ...], str]:
        """Return the prompt id of every probe prompt, the first where several have the same tokens."""
        prompts: dict[tuple[int, ...], str] = {}
        for probe, prompt_id in zip(self.watcher.encoded, self.watcher.table["prompt_id"], strict=True):
            prompts.setdefault(probe.prompt_ids, prompt_id)
        return prompts


def _shares(probes: ProbeAccount) -> dict[str, float]:
    """Return what goes into the trainer's row: mean share by family and cause, and the explained share."""
    means = probes.influence.groupby(["family", "cause"], as_index=False)["share"].mean()
    rows = zip(means["family"], means["cause"], means["share"], strict=True)
    metrics = {f"influence/{family}_{cause}": float(share) for family, cause, share in rows}
    return metrics | {"influence/explained": probes.explained}


def _watcher(trainer: Trainer, probes: ProbeSet, every: int, on_error: OnError) -> ProbeCallback:
    """Return the trainer's callback that watches `probes`, or a new one where there is none."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProbeCallback) and callback.probes.fingerprint() == probes.fingerprint():
            return callback
    return ProbeCallback(trainer, probes, every, on_error=on_error)
