"""What the probes' log-probs are compared with: the reference of the trainer's loss, or the model at step 0."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch
from transformers import Trainer

from llm_dynamics import _trl
from llm_dynamics.likelihood import idle_forwards, score_logps, split_model
from llm_dynamics.likelihood.forwards import Autocast
from llm_dynamics.likelihood.preserve import active_adapters, evaluating
from llm_dynamics.runlog import RunLogWriter, schema
from llm_dynamics.runlog.reader import read_meta, read_part

logger = logging.getLogger(__name__)

NONE, START = "none", "step 0"
KEEPS_BASE = ("gaussian", "orthogonal", "eva")
"""Named initialisations of an adapter that leave the base model as it was."""
ROUNDING = {"float64": 1e-9, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Most that two scores of the same model differ by, per token and relative to the sum, by the weights' precision."""


class Reference:
    """The reference of a run.

    Attributes:
        source: Which it is, as `meta.json` says: one of `_trl.reference_source`, or "step 0": the scores of the first
            observation, which a resumed run takes from its log.

    Args:
        trainer: The trainer.
        wanted: "auto", or "none".
    """

    def __init__(self, trainer: Trainer, wanted: str) -> None:
        self._trainer, self._wanted = trainer, wanted
        self.source = NONE
        self.begin()

    def begin(self) -> None:
        """Forget what was scored, at the beginning of a run."""
        self.source = NONE if self._wanted == "none" else _trl.reference_source(self._trainer)
        self._logps: torch.Tensor | None = None
        self._first: tuple[pd.Series, pd.Series | None] | None = None
        self._checked = False

    def resume(self, log: RunLogWriter) -> None:
        """Go on with the reference of an earlier part of this run, before its log is continued."""
        steps = log.steps()
        if self.source != NONE and steps and read_meta(log.folder).get("reference") == START:
            self.source = START
            if steps[0] == 0:
                self._first = _scores(_part(log, "sequences", schema.SEQUENCES), _part(log, "tokens", schema.TOKENS))

    def logps(
        self, share: list[Any], forwards: int | None, *, batch_tokens: int, autocast: Autocast | None
    ) -> torch.Tensor | None:
        """Return the log-probs of some responses under it, (N,); None where it is the model at step 0, or none."""
        if self.source in (NONE, START):
            return None
        if self._logps is None or self.source == _trl.SYNCHRONISED:
            with _trl.reference(self._trainer) as model, evaluating(model):
                with (autocast or nullcontext)():
                    split = split_model(model)  # as often on every process
                if share:
                    self._logps = score_logps(
                        model, share, batch_tokens=batch_tokens, autocast=autocast, split=split, forwards=forwards
                    )
                elif forwards:
                    idle_forwards(model, split, forwards, autocast)
                    self._logps = torch.zeros(0)
        return self._logps

    def complete(self, step: int, log: RunLogWriter, sequences: pd.DataFrame, tokens: pd.DataFrame) -> None:
        """Fill in the columns of the reference where it is the model at step 0; check it at the first observation.

        Args:
            step: Of the observation.
            log: The run's log, whose `meta.json` says which reference it is.
            sequences: The observation; changed in place.
            tokens: As `sequences`.
        """
        if not self._checked:
            self._checked = True
            self._check(step, log, sequences)
            if self.source == START and step == 0:
                self._first = _scores(sequences, tokens)
            if self.source == START and self._first is None:
                logger.warning("the log has no observation of step 0, which is the reference of this run: it has none")
                self.source = NONE
            log.update_meta(reference=self.source)
        if self.source != START or self._first is None:
            return
        of_sequences, of_tokens = self._first
        sequences["ref_logp_sum"] = sequences["probe_id"].map(of_sequences)
        if len(tokens) and of_tokens is not None:
            keys = pd.MultiIndex.from_frame(tokens[["probe_id", "position"]])
            tokens["ref_logp"] = of_tokens.reindex(keys).to_numpy()

    def _check(self, step: int, log: RunLogWriter, sequences: pd.DataFrame) -> None:
        moved = self.source == _trl.ADAPTER_OFF and step == 0 and self._moves_base()
        if moved and self._differs(sequences, sequences["logp_sum"]):
            in_loss = _trl.loss_has_reference(self._trainer)
            logger.warning(
                "the adapter was initialised from the weights and took a part out of them (as PiSSA does): with the "
                "adapter off, the model is not the one that training begins with. %s",
                "The loss is compared with that model, and so are the probes: at step 0, the log ratio is not 0"
                if in_loss
                else "The reference is the model at step 0",
            )
            self.source = _trl.ADAPTER_OFF if in_loss else START
        steps = log.steps()
        if step > 0 and steps and self.source in (_trl.MODEL, _trl.ADAPTER_OFF, _trl.ADAPTER_COPY):
            before = _part(log, "sequences", schema.SEQUENCES).set_index("probe_id")["ref_logp_sum"]
            if self._differs(sequences, sequences["probe_id"].map(before)):
                logger.warning(
                    "the reference of the resumed run gives other log-probs than that of its first part: the loss is "
                    "compared with another model since step %d, and so are the probes. Build the trainer from the "
                    "model that the run began with",
                    step,
                )

    def _moves_base(self) -> bool:
        """Tell whether the adapter's initialisation may have changed the base model; one trained before has not."""
        model: Any = self._trainer.model
        kinds = [getattr(model.peft_config[name], "init_lora_weights", None) for name in active_adapters(model)]
        return any(isinstance(kind, str) and kind not in KEEPS_BASE for kind in kinds)

    def _differs(self, sequences: pd.DataFrame, expected: pd.Series) -> bool:
        precision = str(next(self._trainer.model.parameters()).dtype).removeprefix("torch.")  # type: ignore[union-attr]
        if self._trainer.accelerator.mixed_precision == "bf16":
            precision = "bfloat16"
        scale = sequences["n_tokens"] + expected.abs()
        return bool(((sequences["ref_logp_sum"] - expected).abs() > ROUNDING.get(precision, 1e-2) * scale).any())


def _scores(sequences: pd.DataFrame, tokens: pd.DataFrame) -> tuple[pd.Series, pd.Series | None]:
    of_tokens = tokens.set_index(["probe_id", "position"])["logp"] if len(tokens) else None
    return sequences.set_index("probe_id")["logp_sum"], of_tokens


def _part(log: RunLogWriter, table: str, columns: Any) -> pd.DataFrame:
    """Return a table of the first observation, empty where it has none."""
    file = log.folder / table / schema.part_name(log.steps()[0])
    return read_part(file, columns).to_pandas() if file.exists() else pd.DataFrame()
