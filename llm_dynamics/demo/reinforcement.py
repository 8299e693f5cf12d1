"""The job on reinforcement: GRPO and NTHR from the same seed on products of digits, watched by the same probes."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback

from llm_dynamics.callbacks import watch
from llm_dynamics.demo.job import BarOnly, DemoResult, Notify
from llm_dynamics.demo.products import letter_reward, product_pairs, product_questions, product_reward
from llm_dynamics.demo.smollm2 import load_smollm2
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.probes import ProbeSet
from llm_dynamics.report import write_report
from llm_dynamics.runlog import load_runs
from llm_dynamics.trainers import NTHRConfig, NTHRGRPOTrainer

ARMS = {"grpo": "none", "nthr": "nthr"}
"""Names of the runs and their `nthr_method`."""


@dataclass(frozen=True)
class ReinforcementSettings:
    """How the job trains and watches.

    Attributes:
        quick: Use the tiny built-in model, and a reward that an untrained model earns now and then.
        steps: Optimizer steps of each run.
        questions: Questions per step.
        generations: G, completions of each.
        max_completion_length: Tokens.
        learning_rate: AdamW's, constant.
        every: Steps between observations, and between measurements of displacement.
        watched: Training questions that are watched.
        lora: Train LoRA adapters (r=16, all projections), else all weights.
        seed: Seed of questions, sampling and adapters.
    """

    quick: bool = False
    steps: int = 12
    questions: int = 3
    generations: int = 8
    max_completion_length: int = 20
    learning_rate: float = 5e-5
    every: int = 2
    watched: int = 6
    lora: bool = True
    seed: int = 0


FULL = ReinforcementSettings()
QUICK = ReinforcementSettings(
    quick=True, steps=8, questions=4, generations=4, max_completion_length=16, learning_rate=3e-3, watched=4, lora=False
)


def run_reinforcement(settings: ReinforcementSettings, folder: Path, notify: Notify) -> DemoResult:
    """Train both arms, watch them, and write the report.

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
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if settings.quick:
        torch.set_num_threads(1)  # so small a model loses more to waiting for the second thread than it gains
    rows = product_questions(settings.seed)
    for name, method in ARMS.items():
        model, tokenizer = _load(settings)
        probes = product_probes(rows, tokenizer, settings)
        notify(
            f"{name.upper()}: {settings.steps} steps of {settings.questions} questions x {settings.generations} "
            f"answers, {len(probes)} probes observed every {settings.every}"
        )
        trainer = NTHRGRPOTrainer(
            model,
            letter_reward if settings.quick else product_reward,
            NTHRConfig(**_arguments(settings, folder / name), nthr_method=method),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=_adapter(settings),
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(BarOnly)
        watch(trainer, probes, settings.every, displacement=True)
        trainer.train()
    runs = load_runs({name: folder / name for name in ARMS})
    page = write_report(runs, folder / "report.html", title="GRPO and NTHR: did correct answers rise?")
    return DemoResult(runs, page, time.monotonic() - begun)


def product_probes(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, settings: ReinforcementSettings
) -> ProbeSet:
    """Return probes on training questions: a right and a wrong answer, another question's, and what is no language."""
    pairs = product_pairs(rows)
    probes = ProbeSet.from_preference_dataset(
        pairs, families=["chosen", "rejected"], n_prompts=settings.watched, seed=settings.seed
    )
    for family in ("other_train", "ungrammatical", "random_tokens"):
        probes = probes.add_family(family, training_rows=pairs, tokenizer=tokenizer, seed=settings.seed)
    return probes


def _load(settings: ReinforcementSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not settings.quick:
        return load_smollm2()
    tokenizer = build_tiny_tokenizer([row["prompt"][0]["content"] for row in product_questions()])
    return build_tiny_model(len(tokenizer), seed=settings.seed), tokenizer


def _arguments(settings: ReinforcementSettings, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.questions * settings.generations,
        "num_generations": settings.generations,
        "max_completion_length": settings.max_completion_length,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": settings.every,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": False,
        "gradient_checkpointing": False,
        "seed": settings.seed,
        "bf16": torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def _adapter(settings: ReinforcementSettings) -> LoraConfig | None:
    if not settings.lora:
        return None
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
