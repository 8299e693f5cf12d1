"""Watching as a configuration: the flags of a training script, beside TRL's own."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase, Trainer

from llm_dynamics.callbacks.probe import ProbeCallback
from llm_dynamics.callbacks.watch import watch
from llm_dynamics.probes import FAMILIES, ProbeSet
from llm_dynamics.probes.families import check_families
from llm_dynamics.probes.forms import RowForm
from llm_dynamics.probes.rows import Rows, as_records

logger = logging.getLogger(__name__)

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
    watch_prompts: int = field(
        default=20,
        metadata={"help": "Most training prompts to watch, each with a response of every family."},
    )
    watch_every: int = field(
        default=25,
        metadata={"help": "Optimizer steps between observations; 0 turns watching off."},
    )
    watch_influence: bool = field(
        default=False,
        metadata={"help": "Also explain optimizer steps: which causes and which training tokens moved the probes."},
    )
    watch_influence_every: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps between explained ones; by default four times watch_every."},
    )
    watch_displacement: bool = field(
        default=False,
        metadata={"help": "GRPO and RLOO: also measure what steps do to the correct responses they are taken on."},
    )
    watch_tokens: bool = field(
        default=True,
        metadata={"help": "Keep the statistics of single response tokens in the run log."},
    )
    watch_token_budget_mb: float = field(
        default=200.0,
        metadata={"help": "Megabytes that the token tables of the run may take."},
    )
    watch_max_overhead: float | None = field(
        default=None,
        metadata={"help": "Most seconds of watching per second of training, such as 0.1; no limit by default."},
    )
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
    watch_log_folder: str | None = field(
        default=None,
        metadata={"help": "Folder of the run log; by default the folder 'dynamics' in output_dir."},
    )
    watch_seed: int = field(
        default=0,
        metadata={"help": "Seed of the probes, and of the prompts whose token tables are kept."},
    )

    def __post_init__(self) -> None:
        try:
            check_families(self.watch_families)
        except ValueError as error:
            raise ValueError(f"watch_families: {error}") from error
        self._whole("watch_prompts", 1, "1, 2, ...")
        self._whole("watch_every", 0, "0 (off), 1, 2, ...")
        if self.watch_influence_every is not None:
            self._whole("watch_influence_every", 1, "1, 2, ..., or None for four times watch_every")
            if not self.watch_influence:
                raise ValueError(
                    f"watch_influence_every is {self.watch_influence_every} and watch_influence is False; set "
                    "watch_influence to explain steps, or leave watch_influence_every out"
                )
        if not self.watch_token_budget_mb >= 0:
            raise ValueError(f"watch_token_budget_mb is {self.watch_token_budget_mb!r}; allowed: megabytes from 0")
        if self.watch_max_overhead is not None and not self.watch_max_overhead > 0:
            raise ValueError(
                f"watch_max_overhead is {self.watch_max_overhead!r}; allowed: a positive share such as 0.1, or None"
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
            tokens=self.watch_tokens,
            token_budget_mb=self.watch_token_budget_mb,
            max_overhead=self.watch_max_overhead,
            tracker_tables=self.watch_tracker_tables,
            model_card=self.watch_model_card,
            log_folder=self.watch_log_folder,
            seed=self.watch_seed,
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

    def _whole(self, name: str, least: int, allowed: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; allowed: {allowed}")
