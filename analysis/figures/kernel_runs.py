"""The runs of `appendix_c.py`: a short SFT, then DPO, measured by `kernel_snapshot` after some of their steps."""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from kernel_snapshot import Snapshot, measure
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from llm_dynamics import encode_probes
from llm_dynamics.demo.job import DemoSettings, build_demo_probes
from llm_dynamics.demo.preferences import load_preferences
from llm_dynamics.probes import EncodedProbe

TRAINED = ("chosen", "rejected")


@dataclass(frozen=True)
class Sizes:
    """How long the runs are and how they are measured.

    Attributes:
        sft: Steps of SFT after which is measured, 0 first.
        dpo: Steps of DPO after which is measured; its step 0 is the end of SFT.
        sft_rate: AdamW's learning rate in SFT.
        dpo_rate: The same in DPO.
        batch: Rows or pairs per step.
        tokens: Response tokens that are looked at, the first ones.
        families: Families observed; None: all.
        draws: Random vectors per block norm.
        step_size: eta of the plain steps aside.
    """

    sft: tuple[int, ...] = (0, 3, 12)
    dpo: tuple[int, ...] = (3, 12)
    sft_rate: float = 2e-5
    dpo_rate: float = 1e-5
    batch: int = 2
    tokens: int = 10
    families: tuple[str, ...] | None = None
    draws: int = 4
    step_size: float = 1e-5


FULL = Sizes()
QUICK = Sizes(
    sft=(0, 2), dpo=(2,), sft_rate=3e-3, dpo_rate=1e-3, families=("chosen", "rejected", "random"), step_size=1e-4
)


@dataclass(frozen=True)
class Shortened:
    """The first tokens of a response."""

    prompt_ids: list[int]
    response_ids: list[int]


class Watcher(TrainerCallback):
    """Measures after some steps of a run.

    Args:
        spare: A second model, for the steps aside.
        trains: The trained responses.
        probes: The observed ones.
        stage: Name of the run.
        steps: After which steps.
        sizes: How.
        keep: Folder of finished snapshots, which are read rather than measured again; None: keep none.
    """

    def __init__(
        self,
        spare: PreTrainedModel,
        trains: Sequence[Shortened],
        probes: Sequence[Shortened],
        stage: str,
        steps: Sequence[int],
        sizes: Sizes,
        keep: Path | None,
    ) -> None:
        self.spare, self.trains, self.probes = spare, trains, probes
        self.stage, self.steps, self.sizes, self.keep = stage, steps, sizes, keep
        self.snapshots: list[Snapshot] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start."""
        self._measure(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after a step."""
        self._measure(state.global_step, kwargs["model"])

    def _measure(self, step: int, model: Any) -> None:
        if step not in self.steps:
            return
        file = None if self.keep is None else self.keep / f"{self.stage}_{step}.pt"
        if file is not None and file.exists():
            self.snapshots.append(torch.load(file, weights_only=False))
            return
        begun = time.process_time()
        how = {"step_size": self.sizes.step_size, "draws": self.sizes.draws}
        snapshot = measure(model, self.spare, self.trains, self.probes, stage=self.stage, step=step, **how)
        self.snapshots.append(snapshot)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(snapshot, file)
        print(f"{self.stage} step {step}: measured in {time.process_time() - begun:.0f} CPU seconds", flush=True)


def train_and_measure(
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]], sizes: Sizes, seed: int, keep: Path | None
) -> tuple[list[Snapshot], list[str]]:
    """Run SFT, then DPO; return what was measured, in order, and the families observed."""
    model, tokenizer = load()
    rows = load_preferences("train")
    probes = build_demo_probes(tokenizer, DemoSettings(prompts=1, seed=seed))
    wanted = [probe for probe in probes if sizes.families is None or probe.family in sizes.families]
    shortened = [shorten(encoded, sizes.tokens) for encoded in encode_probes(wanted, tokenizer)]
    families = [probe.family for probe in wanted]
    trains = [shortened[families.index(family)] for family in TRAINED]
    spare = copy.deepcopy(model).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        watcher = Watcher(spare, trains, shortened, "sft", sizes.sft, sizes, keep)
        sft = SFTTrainer(
            model,
            args=SFTConfig(**arguments(f"{folder}/sft", sizes.sft[-1], sizes.sft_rate, sizes.batch, seed)),
            train_dataset=Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]),
            processing_class=tokenizer,
            callbacks=[watcher],
        )
        sft.remove_callback(PrinterCallback)
        sft.train()
        snapshots = watcher.snapshots
        # DPO reloads its reference from the model's path
        sft.model.save_pretrained(f"{folder}/model")
        tokenizer.save_pretrained(f"{folder}/model")
        del model, sft, watcher  # with the optimizer's state, four times the model
        gc.collect()
        watcher = Watcher(spare, trains, shortened, "dpo", sizes.dpo, sizes, keep)
        dpo = DPOTrainer(
            f"{folder}/model",
            args=DPOConfig(beta=0.1, **arguments(f"{folder}/dpo", sizes.dpo[-1], sizes.dpo_rate, sizes.batch, seed)),
            train_dataset=Dataset.from_list([{n: r[n] for n in ("prompt", "chosen", "rejected")} for r in rows]),
            processing_class=tokenizer,
            callbacks=[watcher],
        )
        dpo.remove_callback(PrinterCallback)
        dpo.train()
    return snapshots + watcher.snapshots, families


def shorten(response: EncodedProbe, tokens: int) -> Shortened:
    """Keep the first tokens of a response."""
    return Shortened(list(response.prompt_ids), list(response.response_ids[:tokens]))


def arguments(folder: str, steps: int, learning_rate: float, batch: int, seed: int) -> dict[str, Any]:
    """Return what both trainers share."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": seed,
    }
