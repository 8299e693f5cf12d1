"""The main job: SFT on the chosen answers, then DPO on the pairs, both watched by the same probes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, Trainer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llm_dynamics.callbacks import watch
from llm_dynamics.demo.preferences import COLUMNS, REPHRASED, load_preferences
from llm_dynamics.demo.smollm2 import load_smollm2
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.probes import ProbeSet
from llm_dynamics.report import write_report
from llm_dynamics.runlog import RunLog, RunLogs, load_runs

OFFLINE_FAMILIES = ("other_train", "other_test", "ungrammatical", "random", "random_tokens")
Notify = Callable[[str], None]


@dataclass(frozen=True)
class DemoSettings:
    """How the demo trains and watches.

    Attributes:
        quick: Use the tiny built-in model rather than SmolLM2-135M-Instruct.
        prompts: Training prompts that are watched, each with all families.
        sft_steps: Optimizer steps of SFT.
        dpo_steps: Optimizer steps of DPO.
        sft_every: Steps between observations in SFT.
        dpo_every: Steps between observations in DPO.
        dpo_tokens_every: Steps between tables of training tokens, and influence maps, in DPO.
        dpo_maps: Probes of which influence maps are kept in DPO.
        sft_batch: Rows per SFT step.
        dpo_batch: Pairs per DPO step.
        sft_learning_rate: AdamW's, constant.
        dpo_learning_rate: AdamW's, constant.
        lora: Train LoRA adapters (r=16, all projections), else all weights.
        seed: Seed of data order, adapters and probes.
    """

    quick: bool = False
    prompts: int = 6
    sft_steps: int = 24
    dpo_steps: int = 24
    sft_every: int = 2
    dpo_every: int = 2
    dpo_tokens_every: int = 6
    dpo_maps: int = 2
    sft_batch: int = 8
    dpo_batch: int = 4
    sft_learning_rate: float = 2e-4
    dpo_learning_rate: float = 2e-4
    lora: bool = True
    seed: int = 0


FULL = DemoSettings()
QUICK = DemoSettings(
    quick=True,
    sft_steps=36,
    dpo_steps=36,
    sft_every=3,
    dpo_every=3,
    sft_learning_rate=3e-3,
    dpo_learning_rate=1e-3,
    lora=False,
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo leaves.

    Attributes:
        runs: The run logs by name, "sft" and "dpo".
        page: The HTML report.
        seconds: Wall time of the whole job.
    """

    runs: RunLogs
    page: Path
    seconds: float

    @property
    def stages(self) -> list[tuple[str, RunLog]]:
        """The runs in order of training."""
        return list(self.runs.runs.items())


def run_demo(settings: DemoSettings, folder: Path, notify: Notify) -> DemoResult:
    """Train, watch, and write the report.

    Args:
        settings: Sizes and rates, `FULL` or `QUICK`.
        folder: Where runs and report go; earlier run logs there are moved aside.
        notify: Told in a sentence what happens next.

    Returns:
        Runs, report and wall time.

    Raises:
        ModuleNotFoundError: Where the real model's packages are missing, see `load_smollm2`.
    """
    begun = time.monotonic()
    if settings.quick:
        torch.set_num_threads(1)  # so small a model loses more to waiting for the second thread than it gains
    train = load_preferences("train")
    notify("Loading the tiny built-in model" if settings.quick else "Loading SmolLM2-135M-Instruct (about 30 s)")
    model, tokenizer = _load(settings, train)
    probes = build_demo_probes(tokenizer, settings)
    notify(f"Watching {len(probes)} probes: {len(probes.prompt_ids)} prompts x {len(probes.families)} families")

    notify(f"SFT on the chosen answers: {settings.sft_steps} steps, observed every {settings.sft_every}")
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in train]
    sft = SFTTrainer(
        model,
        args=SFTConfig(
            **_arguments(settings, folder / "sft", settings.sft_steps, settings.sft_batch, settings.sft_learning_rate)
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=_adapter(settings),
    )
    _train(sft, probes, settings.sft_every)

    notify(f"DPO on the pairs: {settings.dpo_steps} steps, observed every {settings.dpo_every}, each explained")
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in train]
    with tempfile.TemporaryDirectory() as scratch:
        dpo = DPOTrainer(
            _finished(sft, tokenizer, scratch),
            args=DPOConfig(
                beta=0.1,
                **_arguments(
                    settings, folder / "dpo", settings.dpo_steps, settings.dpo_batch, settings.dpo_learning_rate
                ),
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=_adapter(settings),
        )
        _train(dpo, probes, settings.dpo_every, influence=influence_settings(settings))

    runs = load_runs({"sft": folder / "sft", "dpo": folder / "dpo"})
    page = write_report(runs, folder / "report.html", title="SFT, then DPO: what moved")
    return DemoResult(runs, page, time.monotonic() - begun)


def build_demo_probes(tokenizer: PreTrainedTokenizerBase, settings: DemoSettings) -> ProbeSet:
    """Return twelve families of responses to training prompts that have rephrases, and to no others."""
    train = load_preferences("train")
    rephrased = [row for row in train if row["chosen_semantic"] is not None]
    probes = ProbeSet.from_preference_dataset(
        rephrased,
        families=["chosen", "rejected", "human_random", *REPHRASED],
        columns=COLUMNS,
        n_prompts=settings.prompts,
        seed=settings.seed,
    )
    for family in OFFLINE_FAMILIES:
        probes = probes.add_family(
            family,
            training_rows=train,
            held_out=load_preferences("test"),
            tokenizer=tokenizer,
            seed=settings.seed,
        )
    return probes


class BarOnly(ProgressCallback):
    """The trainer's progress bar without its log rows: the table at the end says more."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Print nothing."""


def influence_settings(settings: DemoSettings) -> dict[str, Any]:
    """Return how DPO is explained: every step, the pair's families, and token by token a chosen and a rejected one."""
    return {
        "every": 1,
        "families": ["chosen", "rejected"],
        "tokens_every": settings.dpo_tokens_every,
        "map_probes": settings.dpo_maps,
        "history": "split",
    }


def _train(trainer: Trainer, probes: ProbeSet, every: int, influence: bool | dict[str, Any] = False) -> None:
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(BarOnly)
    watch(trainer, probes, every, influence=influence)
    trainer.train()


def _load(settings: DemoSettings, rows: list[dict[str, Any]]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not settings.quick:
        return load_smollm2()
    texts = [row[name][-1]["content"] for row in rows for name in ("prompt", "chosen", "rejected")]
    tokenizer = build_tiny_tokenizer(texts)
    return build_tiny_model(len(tokenizer), seed=settings.seed), tokenizer


def _arguments(settings: DemoSettings, folder: Path, steps: int, batch: int, learning_rate: float) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": False,
        "gradient_checkpointing": False,  # so small a model fits; the account takes more backward passes
        "seed": settings.seed,
        "bf16": torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _adapter(settings: DemoSettings) -> LoraConfig | None:
    if not settings.lora:
        return None
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def _finished(trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase, scratch: str) -> Any:
    """Return the SFT model for DPO to start from."""
    model: Any = trainer.model
    if hasattr(model, "merge_and_unload"):
        return model.merge_and_unload()
    # DPO without an adapter reloads its reference from the model's path
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    return scratch
