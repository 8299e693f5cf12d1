"""The callback that watches probes during training and writes the run log."""

from __future__ import annotations

import logging
import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from llm_dynamics import _trl
from llm_dynamics.callbacks.doubts import warn_of_finished_training, warn_of_other_form
from llm_dynamics.callbacks.guard import GuardedCallback, LogNotOpened
from llm_dynamics.callbacks.log_rows import LogRows
from llm_dynamics.callbacks.metadata import describe_run
from llm_dynamics.callbacks.metrics import observation_metrics
from llm_dynamics.callbacks.probe_options import ProbeOptions
from llm_dynamics.callbacks.recorder import Recorder
from llm_dynamics.callbacks.reference import Reference
from llm_dynamics.callbacks.refusals import refuse_replaced_model, refuse_unscorable, refuse_unwritable
from llm_dynamics.callbacks.schedule import Clock
from llm_dynamics.callbacks.sharding import broadcast, gather_frames, share_of
from llm_dynamics.likelihood import (
    SplitModel,
    count_forwards,
    idle_forwards,
    is_sharded,
    score_responses,
    sequence_table,
    split_model,
    token_table,
)
from llm_dynamics.likelihood.preserve import evaluating, keeping_random
from llm_dynamics.likelihood.scoring import ResponseScores
from llm_dynamics.probes import ProbeSet, TruncationRule, encode_probes, probe_table
from llm_dynamics.runlog import schema
from llm_dynamics.runlog.folder import checked_folder, log_patterns

logger = logging.getLogger(__name__)


class ProbeCallback(GuardedCallback):
    """Observes how likely every probe response is: at the start, every `every` steps, and at the end.

    Watching changes nothing: weights, losses, random state and module modes are those of the run without it, bit for
    bit. Each observation goes to the run log, `<output_dir>/dynamics`, and its family means into the trainer's own log
    rows (`probe/<family>_logp`, `probe/<family>_delta`, `probe/argmax_logp`, `probe/margin`,
    `squeeze/<family>_<statistic>`, `dynamics/overhead`): next to the loss where the trainer logs the observed step,
    else in a row of their own at that step, never before the trainer's own first row. Further callbacks of one trainer
    put `.<name>` after the names of their metrics.

    Works with `SFTTrainer`, `DPOTrainer`, `KTOTrainer`, `GRPOTrainer`, `RLOOTrainer` and a plain `Trainer` with a
    causal LM; on several data-parallel processes (DDP, FSDP2, ZeRO), each scores a share of the probes.

    Args:
        trainer: The trainer to watch; its model, `processing_class`, truncation and `output_dir` are used.
        probes: What to watch.
        every: Optimizer steps between observations.
        **options: Further fields of `ProbeOptions`: tokens, max_overhead, token_budget_mb, squeeze_strength, reference,
            batch_tokens, log_folder, push_log, seed, name, on_error.

    Raises:
        TypeError: Where `trainer` is not a trainer or `probes` not a `ProbeSet`.
        ValueError: For arguments out of range, or probes that cannot be tokenised.
        NotImplementedError: For what cannot be watched: reward models, FSDP1, models without an LM head.
        OSError: Where no run log can be written to the folder.

    Example:
        >>> trainer.add_callback(ProbeCallback(trainer, probes, every=25))  # doctest: +SKIP
    """

    part = "observing probes"

    def __init__(self, trainer: Trainer, probes: ProbeSet, every: int = 25, **options: Any) -> None:
        self.options = ProbeOptions(every, **options)
        self.on_error = self.options.on_error
        if not isinstance(trainer, Trainer):
            raise TypeError(f"trainer must be a transformers or TRL trainer; seen {type(trainer).__name__}")
        if not isinstance(probes, ProbeSet):
            raise TypeError(f"probes must be a ProbeSet (see ProbeSet.from_preference_dataset); seen {type(probes)}")
        refuse_unscorable(trainer)
        self.trainer = trainer
        self.every = self.options.every
        self.clock = Clock()
        self._autocast = trainer.accelerator.autocast if trainer.accelerator.mixed_precision != "no" else None
        self.split = self._split_model()  # what cannot be scored is refused now, not hours into the run
        limits = [getattr(trainer.args, "max_length", None), self.split.max_positions]
        self.truncation = TruncationRule(
            min((limit for limit in limits if limit is not None), default=None),
            getattr(trainer.args, "truncation_mode", "keep_start"),
        )
        tokenizer: Any = trainer.processing_class  # a processor, as of a vision model, is refused by encode_probes
        self._tokenizer = tokenizer
        with keeping_random():  # a tokenizer may draw (BPE dropout), and so may what gives rows and tools
            self.rendering = _trl.rendering(trainer)
            self.encoded = encode_probes(
                probes,
                self._tokenizer,
                truncation=self.truncation,
                misfit=self.split.misfit,
                **self.rendering,
            )
            warn_of_other_form(trainer, probes)
        self.reference = Reference(trainer, self.options.reference)
        self.probes = probes
        self.table = probe_table(probes, self.encoded)
        self.share = share_of(self.encoded, trainer.args.process_index, trainer.args.world_size)
        default = Path(trainer.args.output_dir or ".") / schema.FOLDER
        folder = checked_folder(default if self.options.log_folder is None else self.options.log_folder)
        self.name = re.sub(r"[^A-Za-z0-9_-]+", "_", self.options.name or folder.name)
        others = [other for other in trainer.callback_handler.callbacks if isinstance(other, ProbeCallback)]
        for other in others:
            if other.log_folder.resolve() == folder.resolve():
                raise ValueError(f"another ProbeCallback writes to {folder}: give this one its own log_folder=")
            if other.name == self.name:
                raise ValueError(f"another ProbeCallback is named {self.name!r}: give this one a name= for its metrics")
        if trainer.is_world_process_zero():
            refuse_unwritable(folder)
        self.rows = LogRows(trainer, f".{self.name}" if others else "")
        self.recorder = Recorder(
            folder,
            self.table,
            tokens=self.options.tokens,
            token_budget_mb=self.options.token_budget_mb,
            seed=self.options.seed,
        )
        if not self.options.push_log:
            output_dir = Path(trainer.args.output_dir or ".")
            _trl.leave_out_of_pushes(trainer, lambda: log_patterns(self.log_folder, output_dir))
        warn_of_finished_training(trainer)
        self._token_probes: set[str] = set()
        self._start: dict[str, float] = {}
        self._observed: int | None = None
        self.opened = False

    @property
    def watcher(self) -> ProbeCallback:
        """Itself: it keeps the run log."""
        return self

    @property
    def log_folder(self) -> Path:
        """Where the run log is written."""
        return self.recorder.log.folder

    @property
    def observed_step(self) -> int | None:
        """The step that was observed last."""
        return self._observed

    @property
    def _model(self) -> Any:
        return self.trainer.model

    def _split_model(self) -> SplitModel:
        with evaluating(self._model), (self._autocast or nullcontext)():
            return split_model(self._model)

    # ---- events -------------------------------------------------------------------------------------------------

    def due(self, event: str, state: TrainerState, control: TrainerControl) -> bool:
        """Tell whether an event has anything to do."""
        step = state.global_step
        if event == "on_step_begin":
            return self.rows.holds
        if event == "on_step_end":
            return step >= state.max_steps > 0 or step % self.every == 0
        return event != "on_epoch_end" or (control.should_training_stop and self._observed != step)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the run log, new or continued, and observe."""
        self.clock, self.opened = Clock(), False
        self._observed = None
        self.reference.begin()
        self.rows.forget()
        self.split = self._split_model()  # the trainer may have wrapped or changed the model since
        if state.is_world_process_zero:
            if state.global_step > 0 and self.recorder.log.exists():
                self.reference.resume(self.recorder.log)
            with keeping_random():  # it looks at the rows
                meta = describe_run(self, state)
            self.recorder.open(state, meta, every=self.every)
        opened = (self.recorder.token_probes, self.recorder.start, self.recorder.log.steps()[-1:])
        self._token_probes, self._start, observed = broadcast(opened)
        self.reference.source = broadcast(self.reference.source)
        self.opened = True
        if observed:
            self._observed = observed[0]  # a resumed run goes on where its log ends
        else:
            self._observe(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the rows that were held back into the trainer's log, if it has one of its own."""
        self.rows.release()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Observe every `every` steps, and after the last."""
        if state.global_step >= state.max_steps > 0 or self._affordable(state):
            self._observe(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe the end of a run that was stopped within an epoch, while its trackers are still open."""
        self._observe(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe the end of a run that stopped early, and close the log."""
        self.rows.release(at_end=True)
        if self._observed != state.global_step:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                logger.warning(
                    "training stopped early and the best checkpoint was loaded: these are not the weights of step %d, "
                    "so they are not observed",
                    state.global_step,
                )
            else:
                self._observe(state)
        if state.is_world_process_zero:
            self.recorder.log.update_meta(finished_at_step=state.global_step)
            self.recorder.log.close()

    # ---- observing ----------------------------------------------------------------------------------------------

    def _affordable(self, state: TrainerState) -> bool:
        if self.options.max_overhead is None:
            return True
        affordable = bool(
            broadcast(self.clock.fits(self.options.max_overhead))
        )  # clocks differ: the main process decides
        if not affordable and state.is_world_process_zero:
            self.recorder.skip(state.global_step, self.options.max_overhead)
        return affordable

    def _observe(self, state: TrainerState) -> None:
        refuse_replaced_model(self.trainer)
        begun = time.monotonic()
        first = self._observed is None
        sequences, tokens = self._score(state)
        if state.is_world_process_zero:
            self.reference.complete(state.global_step, self.recorder.log, sequences, tokens)
        if not self._start:
            self._start = dict(zip(sequences["probe_id"], sequences["logp_sum"], strict=True))
        metrics = observation_metrics(sequences, self._start)
        if metrics["probe/n_nonfinite"] and state.is_world_process_zero:
            logger.warning(
                "step %d: %d response tokens have NaN or infinite log-probs; their families have no finite mean",
                state.global_step,
                metrics["probe/n_nonfinite"],
            )
        if state.is_world_process_zero:
            self.recorder.write(state, sequences, tokens, metrics, clock=self.clock, begun=begun, first=first)
        else:
            self.clock.record(time.monotonic() - begun)
        if not first:
            metrics["dynamics/overhead"] = self.clock.overhead
        self._observed = state.global_step
        self.rows.add(broadcast(metrics), at_start=first)

    def _score(self, state: TrainerState) -> tuple[pd.DataFrame, pd.DataFrame]:
        share = [self.encoded[i] for i in self.share]
        table = self.table.iloc[self.share]
        sequences, tokens = pd.DataFrame(), pd.DataFrame()
        forwards = self._forwards()
        if not share and forwards:
            idle_forwards(self._model, self.split, forwards, self._autocast)
            self._reference_logps(share, forwards)
        if share:
            with self._progress(len(share), state) as bar:
                scores = score_responses(
                    self._model,
                    share,
                    batch_tokens=self.options.batch_tokens,
                    squeeze_strength=self.options.squeeze_strength,
                    autocast=self._autocast,
                    split=self.split,
                    forwards=forwards,
                    on_progress=bar.update,
                )
            scores = ResponseScores(scores.lengths, scores.tokens, self._reference_logps(share, forwards))
            sequences = sequence_table(scores, table).assign(order=self.share)
            tokens = token_table(scores, table["probe_id"].tolist(), self._decode_token)
            tokens["order"] = tokens["probe_id"].map(dict(zip(table["probe_id"], self.share, strict=True)))
            tokens = tokens[tokens["probe_id"].isin(self._token_probes)]
        return gather_frames(sequences, "order"), gather_frames(tokens, "order") if self._token_probes else tokens

    def _forwards(self) -> int | None:
        """Return the forwards that every process runs, where the parameters are sharded; None elsewhere."""
        if not is_sharded(self._model):
            return None
        world = range(self.trainer.args.world_size)
        shares = [share_of(self.encoded, rank, len(world)) for rank in world]
        return max(
            count_forwards(self.split, [self.encoded[i] for i in share], self.options.batch_tokens) for share in shares
        )

    def _reference_logps(self, share: list[Any], forwards: int | None) -> torch.Tensor | None:
        return self.reference.logps(share, forwards, batch_tokens=self.options.batch_tokens, autocast=self._autocast)

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return str(self._tokenizer.decode(tokens))

    def _decode_token(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def _progress(self, total: int, state: TrainerState) -> tqdm:
        hidden = self.trainer.args.disable_tqdm or not state.is_world_process_zero
        # `delay`: a short observation shows no bar
        return tqdm(
            total=total, desc=f"Observing probes at step {state.global_step}", leave=False, disable=hidden, delay=2
        )


def require_open_log(watcher: ProbeCallback) -> None:
    """Check that a callback which adds to another's run log finds it open.

    Args:
        watcher: The callback that keeps the run log.

    Raises:
        RuntimeError: Where it was removed from the trainer.
        LogNotOpened: Where it failed to open the log.
    """
    if watcher not in watcher.trainer.callback_handler.callbacks:
        raise RuntimeError(
            "the ProbeCallback that keeps the run log was removed from the trainer: remove the callbacks that add to "
            "its log as well, or add it again"
        )
    if not watcher.opened:
        raise LogNotOpened("the run log was not opened")


def watcher_of(trainer: Trainer) -> ProbeCallback | None:
    """Return the callback that keeps the trainer's run log, the first where there are several; None without one."""
    callbacks = trainer.callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, ProbeCallback)), None)
