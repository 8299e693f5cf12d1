"""What explains a step: -grad, or the account of the optimizer's own update? By optimizer and learning rate.

    python analysis/optimizer_matters.py                 # SmolLM2-135M-Instruct, CPU, about 25 minutes
    python analysis/optimizer_matters.py --device cuda
    python analysis/optimizer_matters.py --quick         # a tiny model, seconds: checks that the script runs

Real DPO runs (beta 0.1, batch 4, the demo's pairs) with SGD, RMSprop and AdamW, full weights and LoRA. At some steps,
the measured change of every token of 12 probe responses (chosen and rejected of 6 training prompts) is set against four
accounts of it:

- `-grad`: a multiple of the derivative along the raw gradient, at the multiple that fits the measured change best;
- `start`, `midpoint`, `gauss2`: the derivative along the optimizer's own update, by quadrature rule.

Each as explained share, 1 - |measured - accounted|^2 / |measured|^2 over all probe tokens. The last column closes the
books of the summed log-prob of the chosen responses by training token: |measured - (all training tokens + momentum +
decay + other + rounding)| / (|up| + |down|), by gauss2: chosen moves by a small difference of two large forces.
Float32, gradient clipping at 1, no dropout.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from llm_dynamics import encode_probes
from llm_dynamics._trl import recording_clip
from llm_dynamics.demo.preferences import COLUMNS, load_preferences
from llm_dynamics.demo.smollm2 import load_smollm2
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.influence import (
    BeforeStep,
    LossTape,
    accounted_change,
    by_sign,
    explained_share,
    influence_of_training_tokens,
    inner_products,
    measured_change,
    path_gradient,
    split_update,
    trainable_parameters,
)
from llm_dynamics.influence.account import RULES
from llm_dynamics.kernel.derivatives import ResponseLogps
from llm_dynamics.probes import ProbeSet

console = Console(width=130)


@dataclass(frozen=True)
class Run:
    """One training run: optimizer by TRL's name, its learning rate, LoRA or full weights."""

    optimizer: str
    learning_rate: float
    lora: bool = False


RUNS = (
    Run("adamw_torch_fused", 1e-5),
    Run("adamw_torch_fused", 2e-4, lora=True),
    Run("rmsprop", 1e-6),
    Run("sgd", 1e-2),
    Run("adamw_torch_fused", 5e-5),
    Run("sgd", 1e-1),
    Run("rmsprop", 1e-5),
    Run("adamw_torch_fused", 1e-6),
)


class Study(TrainerCallback):
    """Explains some steps of a run by every account.

    Args:
        probes: Encoded probe responses.
        chosen: Which of them are chosen responses.
        steps: Optimizer steps done before the explained ones.
    """

    def __init__(self, probes: Sequence[Any], chosen: Sequence[bool], steps: Sequence[int]) -> None:
        self.probes, self.chosen, self.steps = probes, torch.tensor(chosen), steps
        self.trainer: DPOTrainer | None = None
        self.rows: list[dict[str, Any]] = []
        self._context: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tap the loss."""
        if state.global_step in self.steps:
            self._tape = LossTape(self.trainer.model, by_sign).__enter__()
            self._context = recording_clip(self.trainer)
            self._clip = self._context.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what the step overwrites."""
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._tape.__exit__(None, None, None)
            self._before = BeforeStep.of(self.trainer.optimizer, self._tape.parameters)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set every account against the measured change."""
        if self._context is None:
            return
        self._context, tape, before = None, self._tape, self._before
        after = {name: parameter.detach() for name, parameter in tape.parameters.items()}
        gradient = {name: parameter.grad.clone() for name, parameter in tape.parameters.items()}
        update = split_update(self.trainer.optimizer, tape.parameters, before, tape.parts, clip_factor=self._clip[0])
        logps = ResponseLogps(self.trainer.model, self.probes)
        measured = measured_change(logps, before.weights, after)
        along = logps.jvp(before.weights, gradient)[1].double()
        row = {"step": state.global_step, "|change|": float(measured.norm())}
        row["-grad"] = explained_share(measured, along * (along @ measured) / (along @ along))
        for rule in RULES:
            row[rule] = explained_share(measured, accounted_change(logps, before.weights, after, rule=rule))
        target = self.chosen[logps.owner].double()
        path = path_gradient(logps, before.weights, after, target, rule="gauss2")
        tokens = influence_of_training_tokens(
            self.trainer.model, logps.split, tape.batches, before.weights, update.per_gradient, path
        )
        rest = {cause: part for cause, part in update.parts.items() if cause not in tape.parts}
        others = inner_products(path, rest)
        whole = float(measured @ target)
        row |= {"chosen moved": whole, "tokens": float(tokens.shares.sum()), "momentum": others.get("momentum", 0.0)}
        c = torch.cat([batch.c[batch.has_loss] for batch in tape.batches])
        row |= {"up": float(tokens.shares[c.cpu() < 0].sum()), "down": float(tokens.shares[c.cpu() > 0].sum())}
        forces = abs(row["up"]) + abs(row["down"])
        row["books off by"] = abs(whole - row["tokens"] - sum(others.values())) / forces
        self.rows.append(row)


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="also write all rows to this file")
    parser.add_argument("--runs", type=int, nargs="+", help="which of RUNS, by number from 0; default: all")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    rows = load_preferences("train")
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            torch.set_num_threads(1)
            tokenizer = build_tiny_tokenizer([row["chosen"][0]["content"] for row in rows])
            model = build_tiny_model(len(tokenizer))
        else:
            model, tokenizer = load_smollm2()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        frames = []
        for run in RUNS if options.runs is None else [RUNS[number] for number in options.runs]:
            begun = time.monotonic()
            frame = study(run, folder, rows, options)
            named = frame.assign(optimizer=run.optimizer, weights="LoRA" if run.lora else "full", lr=run.learning_rate)
            frames.append(named)
            console.print(f"{run}: {time.monotonic() - begun:.0f} s")
            console.print(frame.to_string(index=False, float_format=lambda value: f"{value:.7g}"))
            table = pd.concat(frames, ignore_index=True)
            leading = ["optimizer", "weights", "lr"]
            table = table[[*leading, *(column for column in table.columns if column not in leading)]]
            if options.csv:  # after every run: a long study that is cut short keeps what it has
                options.csv.parent.mkdir(parents=True, exist_ok=True)
                table.to_csv(options.csv, index=False)
            gc.collect()
    console.print(markdown(table))


def study(run: Run, folder: str, rows: list[dict[str, Any]], options: argparse.Namespace) -> pd.DataFrame:
    """Train one run and return a row per explained step."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    probes = ProbeSet.from_preference_dataset(
        rows, families=["chosen", "rejected"], columns=COLUMNS, n_prompts=6, seed=options.seed
    )
    callback = Study(
        list(encode_probes(probes, tokenizer)), [probe.family == "chosen" for probe in probes], steps=(0, 2, 4, 6)
    )
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    with tempfile.TemporaryDirectory() as scratch:
        callback.trainer = trainer = DPOTrainer(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=DPOConfig(
                output_dir=scratch,
                beta=0.1,
                max_steps=7,
                per_device_train_batch_size=4,
                learning_rate=run.learning_rate,
                lr_scheduler_type="constant",
                optim=run.optimizer,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=options.device == "cpu",
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                logging_strategy="no",
                seed=options.seed,
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            if run.lora
            else None,
            callbacks=[callback],
        )
        assert trainable_parameters(trainer.model)
        trainer.train()
    return pd.DataFrame(callback.rows)


def markdown(table: pd.DataFrame) -> str:
    """Return the table as Markdown; explained shares with the digits that tell them from 1."""
    shown = table.copy()
    for column in ("-grad", *RULES):
        shown[column] = [f"{value:.7f}" if value > 0.99 else f"{value:.4f}" for value in table[column]]
    for column in ("|change|", "chosen moved", "tokens", "momentum", "up", "down"):
        shown[column] = [f"{value:+.4f}" for value in table[column]]
    shown["books off by"] = [f"{value:.1e}" for value in table["books off by"]]
    shown["lr"] = [f"{value:.0e}" for value in table["lr"]]
    lines = ["| " + " | ".join(shown.columns) + " |", "|" + "---|" * len(shown.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in shown.itertuples(index=False)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
