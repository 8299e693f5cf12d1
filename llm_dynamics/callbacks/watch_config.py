"""Watching as a configuration: the flags of a training script, beside TRL's own."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Annotated

from transformers import PreTrainedTokenizerBase, Trainer

from llm_dynamics.callbacks.guard import OnError
from llm_dynamics.callbacks.probe import ProbeCallback
from llm_dynamics.callbacks.probe_options import ProbeOptions
from llm_dynamics.callbacks.watch import watch
from llm_dynamics.options import Amount, Count, Limit, Seed, Share, check_options, like
from llm_dynamics.probes import FAMILIES, ProbeSet
from llm_dynamics.probes.families import check_families
from llm_dynamics.probes.forms import RowForm
from llm_dynamics.probes.rows import Rows, as_records

logger = logging.getLogger(__name__)

PASSED_ON = ("tokens", "token_budget_mb", "max_overhead", "log_folder", "push_log", "on_error", "seed")
"""Fields of `ProbeOptions` that are flags under their name."""
DEFAULT_FAMILIES = ("chosen", "rejected", "other_train", "ungrammatical")


@dataclass(frozen=True)
class WatchConfig:
    """What to watch in a run and how often, as flags for `TrlParser`.

    Attributes:
        watch_probes: A saved `ProbeSet`; None: built from the training rows.
        watch_families: Families built from the training rows. "rejected" is left out, with a word, where the rows have
            none; every other family that cannot be had is an error. Unused with `watch_probes`.
        watch_prompts: Most training prompts to draw. Unused with `watch_probes`.
        watch_every: Optimizer steps between observations; 0 turns watching off.
        watch_influence: Also explain optimizer steps.
        watch_influence_every: Steps between explained ones; None: `4 * watch_every`.
        watch_displacement: Also measure lazy likelihood displacement; for trainers that roll out.
        watch_tokens: Keep token tables in the run log.
        watch_token_budget_mb: Megabytes that they may take.
        watch_max_overhead: Most seconds of watching per second of training; None: no limit.
        watch_tracker_tables: Send tables and curves to trackers that take them.
        watch_model_card: Add what moved to the model cards that the trainer writes.
        watch_log_folder: Run-log folder; None: `<output_dir>/dynamics`.
        watch_push_log: Upload the run log with the model where the trainer pushes to the hub.
        watch_on_error: "warn": an error in watching ends the part that it came up in, and training goes on. "raise": it
            ends the run.
        watch_seed: Seed of the probes and of the sample of token tables.

    Raises:
        ValueError: For a value that is not allowed; the message names the field and what is.

    Example:
        >>> parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, WatchConfig))  # doctest: +SKIP
        >>> script_args, training_args, model_args, watch_args = parser.parse_args_and_config()  # doctest: +SKIP
        >>> watch_args.attach(trainer, pairs, trainer.processing_class)  # doctest: +SKIP
    """

    watch_probes: str | None = field(
        default=None,
        metadata={"help": "Path of a saved probe set; by default one is built from the training data."},
    )
    watch_families: list[str] = field(
        default_factory=lambda: list(DEFAULT_FAMILIES),
        metadata={"help": f"Families of responses to build and watch: {', '.join(FAMILIES)}."},
    )
    watch_prompts: Count = field(
        default=20,
        metadata={"help": "Most training prompts to watch, each with a response of every family."},
    )
    watch_every: Annotated[int, Limit(least=0)] = field(
        default=25,
        metadata={"help": "Optimizer steps between observations; 0 turns watching off."},
    )
    watch_influence: bool = field(
        default=False,
        metadata={"help": "Also explain optimizer steps: which causes and which training tokens moved the probes."},
    )
    watch_influence_every: Annotated[int | None, Limit(least=1)] = field(
        default=None,
        metadata={"help": "Optimizer steps between explained ones; by default four times watch_every."},
    )
    watch_displacement: bool = field(
        default=False,
        metadata={"help": "GRPO and RLOO: also measure what steps do to the correct responses they are taken on."},
    )
    watch_tokens: bool = like(ProbeOptions, "tokens")
    watch_token_budget_mb: Amount = like(ProbeOptions, "token_budget_mb")
    watch_max_overhead: Share = like(ProbeOptions, "max_overhead")
    watch_tracker_tables: bool = field(
        default=True,
        metadata={"help": "Send tables and curves to trackers that take them (trackio, wandb, mlflow, tensorboard)."},
    )
    watch_model_card: bool = field(
        default=True,
        metadata={
            "help": "Add what moved to the model card that the trainer writes at each checkpoint and at its end."
        },
    )
    watch_log_folder: str | None = like(ProbeOptions, "log_folder")
    watch_push_log: bool = like(ProbeOptions, "push_log")
    watch_on_error: OnError = like(ProbeOptions, "on_error")
    watch_seed: Seed = field(
        default=0,
        metadata={"help": "Seed of the probes, and of the prompts whose token tables are kept."},
    )

    def __post_init__(self) -> None:
        check_options(self)
        try:
            check_families(self.watch_families)
        except ValueError as error:
            raise ValueError(f"watch_families: {error}") from error
        if self.watch_influence_every is not None and not self.watch_influence:
            raise ValueError(
                f"watch_influence_every is {self.watch_influence_every} and watch_influence is False; set "
                "watch_influence to explain steps, or leave watch_influence_every out"
            )

    def attach(
        self,
        trainer: Trainer,
        rows: Rows,
        tokenizer: PreTrainedTokenizerBase,
        *,
        held_out: Rows | None = None,
    ) -> ProbeCallback | None:
        """Watch `trainer` as configured.

        Args:
            trainer: A TRL or transformers trainer, before `train()`.
            rows: The training rows, in any form that TRL's trainers take (see `ProbeSet.from_preference_dataset` and
                `from_prompt_completion`). A column that bears the name of a family holds its responses.
            tokenizer: The trainer's; `random_tokens` needs it.
            held_out: Rows not trained on, for `other_test` and `random`.

        Returns:
            The callback, added to the trainer; None where `watch_every` is 0.

        Raises:
            FileNotFoundError: If there is no file `watch_probes`.
            ValueError: If a family cannot be built from the rows, and as for `watch`.
            TypeError: As for `watch`.
            NotImplementedError: As for `watch`.
        """
        if self.watch_every == 0:
            return None
        if self.watch_probes is not None:
            probes = ProbeSet.load(self.watch_probes)
        else:
            probes = self.build_probes(rows, tokenizer, held_out=held_out)
        every = self.watch_influence_every
        return watch(
            trainer,
            probes,
            self.watch_every,
            influence={"every": every} if every is not None else self.watch_influence,
            displacement=self.watch_displacement,
            tracker_tables=self.watch_tracker_tables,
            model_card=self.watch_model_card,
            **{name: getattr(self, f"watch_{name}") for name in PASSED_ON},
        )

    def build_probes(self, rows: Rows, tokenizer: PreTrainedTokenizerBase, *, held_out: Rows | None = None) -> ProbeSet:
        """Build the probe set from training rows.

        Prompts are drawn from those that have all families that need a text of their own (if none has, from all); other
        responses are drawn from all rows.

        Args:
            rows: As in `attach`.
            tokenizer: As in `attach`.
            held_out: As in `attach`.

        Returns:
            Probes of `watch_families`.

        Raises:
            ValueError: If no row has a text of a family that needs one, naming it, or a family cannot be built.
        """
        records = as_records(rows, "the training rows")
        form = RowForm.of(records)
        families = list(self.watch_families)
        if "rejected" in families and not (form.rejected or form.label):
            families.remove("rejected")
            if not families:
                raise ValueError("watch_families is ['rejected'], and the training rows have no 'rejected' column")
            logger.warning("the training rows have no 'rejected' column, so that family is not watched")
        written = {name: name for name in families if FAMILIES[name].needs in ("column", "writer")}
        absent = [
            name for name in written if name not in ("chosen", "rejected") and not any(r.get(name) for r in records)
        ]
        if absent:
            raise ValueError(
                f"watch_families is {self.watch_families}: no training row has any of {absent}; seen: "
                f"{list(records[0])}. Leave out what the data lacks, or build a probe set with `llm-dynamics probes "
                "build` and give its path as watch_probes"
            )
        return ProbeSet.from_records(
            records,
            columns={"chosen": "chosen", **written},
            families=families,
            n_prompts=self.watch_prompts,
            at_most=True,
            seed=self.watch_seed,
            held_out=held_out,
            tokenizer=tokenizer,
            source={"kind": "training rows"},
        )
