"""What the probe callback observes, how often and within which budget: its options, checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from llm_dynamics.callbacks.guard import OnError
from llm_dynamics.likelihood.scoring import DEFAULT_BATCH_TOKENS
from llm_dynamics.options import LARGEST, Amount, Count, Limit, Seed, Share, check_options


@dataclass(frozen=True)
class ProbeOptions:
    """Options of `ProbeCallback`; `WatchConfig` has them as flags, and their help.

    Attributes:
        every: Optimizer steps between observations.
        tokens: Keep token statistics in the run log, within `token_budget_mb`.
        max_overhead: Most seconds of watching per second of training, such as 0.1; an observation that would exceed it
            is left out, with a word in the log. The first and the last always take place. None: no limit.
        token_budget_mb: Megabytes that the token tables of the run may take. Where all probes do not fit, those of a
            seeded sample of prompts keep their tokens (`meta.json`: `token_probes`).
        squeeze_strength: e of the negative step in the squeezing statistics.
        reference: "auto" adds log-probs under the reference that the loss takes: the trainer's `ref_model`, a PEFT
            model with its adapter off (or its copy "ref"), or where the trainer computed them beforehand the model at
            step 0. An adapter whose initialisation took a part out of the weights (PiSSA, OLoRA...) and that no loss
            is compared with has the model at step 0. "none" leaves them out. `meta.json` (`reference`) says which.
        batch_tokens: Most tokens in one forward.
        log_folder: Run-log folder; None: `<output_dir>/dynamics`.
        push_log: Let `push_to_hub` upload the run log, which holds prompts, responses and local paths, with the model.
        seed: Seed of the sample of `token_budget_mb`.
        name: Name of this probe set among several of the trainer; None: that of the log folder.
        on_error: "warn": an error in watching, once training has begun, ends the part of the watching that it came up
            in, with a warning, and training goes on. "raise": it ends the run.

    Raises:
        ValueError: For a value that is not allowed; the message names the field and what is.
    """

    every: Count = field(default=25, metadata={"help": "Optimizer steps between observations."})
    tokens: bool = field(
        default=True, metadata={"help": "Keep the statistics of single response tokens in the run log."}
    )
    max_overhead: Share = field(
        default=None,
        metadata={"help": "Most seconds of watching per second of training, such as 0.1; no limit by default."},
    )
    token_budget_mb: Amount = field(
        default=200.0, metadata={"help": "Megabytes that the token tables of the run may take."}
    )
    squeeze_strength: Annotated[float, Limit(above=0, most=LARGEST)] = 1.0
    reference: Annotated[str, Limit(choices=("auto", "none"))] = "auto"
    batch_tokens: Count = DEFAULT_BATCH_TOKENS
    log_folder: str | Path | None = field(
        default=None, metadata={"help": "Folder of the run log; by default the folder 'dynamics' in output_dir."}
    )
    push_log: bool = field(
        default=False,
        metadata={"help": "With push_to_hub, also upload the run log: prompts, responses and local paths."},
    )
    seed: Seed = field(default=0, metadata={"help": "Seed of the prompts whose token tables are kept."})

    name: str | None = None
    on_error: OnError = field(
        default="warn",
        metadata={
            "help": "What an error in watching ends: the part that it came up in ('warn'), or the run ('raise')."
        },
    )

    def __post_init__(self) -> None:
        check_options(self)
