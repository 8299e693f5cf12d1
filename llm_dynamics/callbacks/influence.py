"""The callback that explains optimizer steps during training and writes their accounts to the run log."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pandas as pd
from transformers import IntervalStrategy, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_dynamics import _trl
from llm_dynamics.callbacks.finished_step import FinishedStep
from llm_dynamics.callbacks.metrics import finite_only
from llm_dynamics.callbacks.probe import ProbeCallback
from llm_dynamics.callbacks.probe_account import DETAILS, ProbeAccount, account_of_probes
from llm_dynamics.callbacks.refusals import refuse_unexplainable
from llm_dynamics.callbacks.roles import role_labelling
from llm_dynamics.callbacks.sharding import average_weights
from llm_dynamics.callbacks.token_account import TokenAccount, TokenAccountant
from llm_dynamics.influence import (
    RULES,
    BeforeStep,
    LossTape,
    MomentHistory,
    UpdateSplit,
    by_sign,
    split_update,
    trainable_parameters,
)
from llm_dynamics.influence.optimizers import rule_for
from llm_dynamics.influence.tape import Labelling
from llm_dynamics.influence.update import innermost
from llm_dynamics.kernel.derivatives import Weights
from llm_dynamics.likelihood.preserve import keeping_rope
from llm_dynamics.probes import ProbeSet

logger = logging.getLogger(__name__)

DEFAULT_EVERY = 100
DEFAULT_TARGETS = ("chosen", "rejected")
REPLAY_TOLERANCE = {"no": 1e-3, "bf16": 0.3}
"""Nats by which a replayed log-prob may differ from the one in training before a warning, by mixed precision."""


class InfluenceCallback(TrainerCallback):
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
    step. Memory: about six copies of the trained parameters in float32 while a step is explained.

    Args:
        trainer: The trainer to watch.
        probes: What to explain; where the trainer has no `ProbeCallback` for them, one is added, since it keeps the
            run log.
        every: Optimizer steps between explained ones.
        rule: "midpoint", "start" (the classical first-order account) or "gauss2", see `account_for_change`.
        detail: "family" (means over families, cheapest), "probe" or "token" (rows for each, one directional derivative
            per cause).
        families: Families to account for; None: all.
        training_tokens: Families whose training tokens are told apart, at one gradient and one pass over the training
            batch each; None: "chosen" and "rejected" where they are watched, else the first family. () for none.
        map_probes: Probe ids for which the M x L influence between probe tokens and the tokens of the training example
            that moved it most is kept; one gradient and one pass over that example per probe token.
        split_by: "sign" of c_l (causes `up`, `down`), "role" (chosen/rejected, correct/wrong, ...) or a labelling.
        history: "total", or "split": momentum is itself split by the labels of the past tokens that filled it, which
            takes the tap at every step.

    Raises:
        TypeError: As for `ProbeCallback`.
        ValueError: For arguments out of range.
        NotImplementedError: For runs whose steps cannot be explained: sharded or quantised weights, DeepSpeed,
            float16 loss scaling, `torch_compile`, Liger kernels, reentrant checkpointing.

    Example:
        >>> trainer.add_callback(InfluenceCallback(trainer, probes, every=100))  # doctest: +SKIP
    """

    def __init__(
        self,
        trainer: Trainer,
        probes: ProbeSet,
        every: int = DEFAULT_EVERY,
        *,
        rule: str = "midpoint",
        detail: str = "family",
        families: Sequence[str] | None = None,
        training_tokens: Sequence[str] | None = None,
        map_probes: Sequence[str] = (),
        split_by: str | Labelling = "sign",
        history: str = "total",
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}; explain every 1, 2, ... optimizer steps")
        _check_choice("rule", rule, RULES)
        _check_choice("detail", detail, DETAILS)
        _check_choice("history", history, ("total", "split"))
        if isinstance(split_by, str):
            _check_choice("split_by", split_by, ("sign", "role"))
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer must be a transformers or TRL trainer; seen {type(trainer).__name__}")
        refuse_unexplainable(trainer)
        self.trainer = trainer
        self.watcher = _watcher(trainer, probes, every)
        self.every = every
        self.rule = rule
        self.detail = detail
        watched = list(probes.families)
        self.families = watched if families is None else list(families)
        if training_tokens is None:
            training_tokens = [family for family in DEFAULT_TARGETS if family in watched] or watched[:1]
        self.targets = list(training_tokens)
        self.map_probes = list(map_probes)
        known = set(self.watcher.table["probe_id"])
        for name, given, allowed in (
            ("families", self.families, set(watched)),
            ("training_tokens", self.targets, set(watched)),
            ("map_probes", self.map_probes, known),
        ):
            if missing := [item for item in given if item not in allowed]:
                raise ValueError(f"{name}: {missing} are not watched; watched: {sorted(allowed)[:20]}")
        self.roles = role_labelling(trainer)
        self.labelling: Labelling = (
            {"sign": by_sign, "role": self.roles}[split_by] if isinstance(split_by, str) else split_by
        )
        self.history = MomentHistory() if history == "split" else None
        self._open = ExitStack()
        self._tape: LossTape | None = None
        self._clip: list[float] = []
        self._before: BeforeStep | None = None
        self._pending: dict[str, Any] | None = None

    # ---- events -------------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note in the run log what will be explained."""
        if self.history is not None:
            self.history.by_label.clear()
        if state.is_world_process_zero:
            self.watcher.recorder.log.update_meta(
                influence={
                    "every": self.every,
                    "rule": self.rule,
                    "detail": self.detail,
                    "families": self.families,
                    "training_tokens": self.targets,
                    "history": "total" if self.history is None else "split",
                }
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tap the loss of a step that will be explained."""
        self._close()
        if not self._due(state) and self.history is None:
            return
        model = self.trainer.model
        assert model is not None
        self._tape = LossTape(model, self.labelling, parameters=trainable_parameters(model))
        self._open.enter_context(self._tape)
        self._clip = self._open.enter_context(_trl.recording_clip(self.trainer))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy what the step is about to overwrite."""
        if self._tape is None:
            return
        begun = time.monotonic()
        self._open.close()
        self._tape.raise_if_empty()
        self._before = BeforeStep.of(self.trainer.optimizer, self._tape.parameters)
        self.watcher.clock.add(time.monotonic() - begun)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Explain the step that was just taken."""
        if self._tape is None or self._before is None:
            return
        begun = time.monotonic()
        tape, before = self._tape, self._before
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
        if self._due(state):
            self._pending = self._explain(tape, before.weights, update)
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
        if args.logging_strategy == IntervalStrategy.NO:
            return
        metrics = finite_only(pending["metrics"])
        if not (control.should_log and _trl.add_to_next_row(self.trainer, metrics)):
            _trl.log_row(self.trainer, metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove every hook."""
        self._close()

    # ---- explaining -----------------------------------------------------------------------------------------------

    def _due(self, state: TrainerState) -> bool:
        """Tell whether the step under way, counted from 1, is explained."""
        step = state.global_step + 1
        return step == 1 or step % self.every == 0 or step >= state.max_steps > 0

    def _close(self) -> None:
        self._open.close()
        self._tape = self._before = None

    def _explain(self, tape: LossTape, before: Weights, update: UpdateSplit) -> dict[str, Any]:
        watcher, model = self.watcher, self.trainer.model
        assert model is not None
        table = watcher.table[["probe_id", "prompt_id", "family"]]
        mine = [i for i in watcher.share if table["family"].iloc[i] in self.families]
        counts = table["family"].value_counts()
        step = FinishedStep(
            model=model,
            split=watcher.split,
            accelerator=self.trainer.accelerator,
            tape=tape,
            before=before,
            update=update,
            rule=self.rule,
            table=table.iloc[mine].reset_index(drop=True),
            order=mine,
            encoded=[watcher.encoded[i] for i in mine],
            counts={family: int(counts[family]) for family in self.families if family in counts},
            batch_tokens=watcher.batch_tokens,
        )
        with keeping_rope(model):
            probes = account_of_probes(step, self.detail)
            tokens = self._training_tokens(step)
        return {
            "tables": self._tables(probes, tokens),
            "account": {
                "rule": self.rule,
                "explained": probes.explained,
                "measured_norm": probes.measured_norm,
                "remainder_norm": probes.remainder_norm,
                "optimizer": type(innermost(self.trainer.optimizer)).__name__,
                "note": update.note,
            },
            "metrics": _metrics(probes),
        }

    def _training_tokens(self, step: FinishedStep) -> TokenAccount | None:
        targets = [family for family in self.targets if family in step.counts]
        if not (targets or self.map_probes) or rule_for(innermost(self.trainer.optimizer)) is None:
            return None
        prompts = dict(
            zip((probe.prompt_ids for probe in self.watcher.encoded), self.watcher.table["prompt_id"], strict=True)
        )
        accountant = TokenAccountant(
            step, self.roles, prompts, self.watcher.decode, _trl.sampling_temperature(self.trainer)
        )
        tokens = accountant.account(targets, self.map_probes)
        allowed = REPLAY_TOLERANCE.get(self.trainer.accelerator.mixed_precision, 0.3)
        if tokens.replay_error > allowed:
            logger.warning(
                "replaying the training batch gave log-probs up to %.2g nats from those in training: the shares of "
                "training tokens are off by as much (attention dropout in a fused kernel, or a model that is random)",
                tokens.replay_error,
            )
        return tokens

    def _tables(self, probes: ProbeAccount, tokens: TokenAccount | None) -> dict[str, pd.DataFrame]:
        influence = probes.influence
        tables = {"influence": influence}
        if probes.tokens is not None:
            tables["influence_tokens"] = probes.tokens
        if tokens is not None:
            if self.detail == "family":
                keys = zip(influence["family"], influence["cause"], strict=True)
                own = pd.Series([tokens.own.get(key) for key in keys], dtype=object)  # None: not measured
                tables["influence"] = influence.assign(own_share=own)
            tables |= {"training_examples": tokens.examples, "training_tokens": tokens.tokens}
            if tokens.maps is not None:
                tables["influence_maps"] = tokens.maps
        return tables


def _metrics(probes: ProbeAccount) -> dict[str, float]:
    """Return what goes into the trainer's row: mean share by family and cause, and the explained share."""
    means = probes.influence.groupby(["family", "cause"], as_index=False)["share"].mean()
    rows = zip(means["family"], means["cause"], means["share"], strict=True)
    metrics = {f"influence/{family}_{cause}": float(share) for family, cause, share in rows}
    return metrics | {"influence/explained": probes.explained}


def _watcher(trainer: Trainer, probes: ProbeSet, every: int) -> ProbeCallback:
    """Return the trainer's callback that watches `probes`; one is added where there is none."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProbeCallback) and callback.probes.fingerprint() == probes.fingerprint():
            return callback
    watcher = ProbeCallback(trainer, probes, every)
    trainer.add_callback(watcher)
    return watcher


def _check_choice(name: str, value: str, allowed: Mapping[str, Any] | Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
