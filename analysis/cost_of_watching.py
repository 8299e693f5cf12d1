"""What watching costs: one observation against a bare forward and against the naive way, and a whole DPO run.

    python analysis/cost_of_watching.py                    # SmolLM2-135M-Instruct, CPU, about 10 minutes
    python analysis/cost_of_watching.py --device cuda --dtype bfloat16
    python analysis/cost_of_watching.py --hh hh_helpful_probes_train.jsonl --prompts 4    # long prompts and responses
    python analysis/cost_of_watching.py --quick            # a tiny model, seconds: checks that the script runs

Three questions, each a table of ratios within one run (absolute seconds depend on the machine and its neighbours):

1. An observation (`score_responses`: all statistics of every response token) over a bare forward of the same responses,
   `model(ids)` in the same batches, each response with its own copy of the prompt. Once with prompts shared between the
   families of a prompt (the default) and once without.
2. The naive way over an observation: one pass per family, the whole (B, T, V) log-softmax in float32, a one-hot label
   and the same statistics taken on it; seconds and peak extra memory.
3. A DPO run watched at the default interval of 25 steps over the same run: seconds watching / seconds training.

Repetitions are interleaved (one of each per round) and medians reported. Peak memory is that of tensors, from torch's
own profiler on the CPU (the largest sum of live allocations) and `torch.cuda.max_memory_allocated` on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from timing import peak_bytes, timed
from torch.nn.functional import one_hot
from trl import DPOConfig, DPOTrainer

from llm_dynamics import encode_probes, load_run, score_responses, watch
from llm_dynamics.demo.job import FULL, build_demo_probes
from llm_dynamics.demo.preferences import load_preferences
from llm_dynamics.demo.smollm2 import load_smollm2
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.likelihood import split_model
from llm_dynamics.likelihood.scoring import DEFAULT_BATCH_TOKENS
from llm_dynamics.probes import HH_COLUMNS, EncodedProbe, ProbeSet

console = Console(width=110)


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=6, help="prompts watched, twelve families each")
    parser.add_argument("--steps", type=int, default=50, help="DPO steps of the third table; 0 leaves it out")
    parser.add_argument("--hh", type=Path, help="probe file released with the paper, in place of the demo's probes")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    if options.quick:
        options.rounds, options.steps = 2, min(options.steps, 4)
        tokenizer = build_tiny_tokenizer([row["chosen"][0]["content"] for row in load_preferences("train")])
        model = build_tiny_model(len(tokenizer))
    else:
        model, tokenizer = load_smollm2()
    model = model.to(options.device, getattr(torch, options.dtype))
    if options.hh:
        columns = {name: column for name, column in HH_COLUMNS.items() if name != "chosen_selfr"}  # mostly broken there
        probes = ProbeSet.from_jsonl(options.hh, columns=columns, n_prompts=options.prompts)
    else:
        probes = build_demo_probes(tokenizer, replace(FULL, prompts=options.prompts))
    encoded = encode_probes(probes, tokenizer)
    families = {
        family: [e for e, p in zip(encoded, probes, strict=True) if p.family == family] for family in probes.families
    }
    console.print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, V = {model.config.vocab_size:,}, {options.dtype}, "
        f"{_device_name(options.device)}; {len(encoded)} probes, {sum(len(e.input_ids) for e in encoded):,} tokens, "
        f"{sum(len(e.response_ids) for e in encoded):,} of them response tokens; {options.rounds} rounds"
    )

    with torch.no_grad():
        split = split_model(model)
    ways: dict[str, Callable[[], object]] = {
        "bare forward": lambda: bare_forward(model, encoded),
        "observation": lambda: score_responses(model, encoded, split=split),
        "observation, prompts not shared": lambda: score_responses(model, encoded, split=split, share_prompts=False),
        "naive, one pass per family": lambda: [naive(model, members) for members in families.values()],
    }
    show(measure(ways, options), options.rounds)
    if options.steps:
        overhead(model, tokenizer, probes, options)


def measure(ways: dict[str, Callable[[], object]], options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return (median seconds, peak bytes) of each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # warm up
    for _ in range(options.rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way, options.device))
    return {name: (statistics.median(seconds[name]), peak_bytes(way, options.device)) for name, way in ways.items()}


def bare_forward(model: torch.nn.Module, encoded: Sequence[EncodedProbe]) -> None:
    """Run the model's own forward on every response with its prompt, in length-sorted batches of the same budget."""
    rows = sorted((e.input_ids for e in encoded), key=len, reverse=True)
    with torch.no_grad():
        while rows:
            count = max(1, DEFAULT_BATCH_TOKENS // len(rows[0]))
            ids, mask, _ = padded(rows[:count], model)
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            rows = rows[count:]


def naive(model: torch.nn.Module, encoded: Sequence[EncodedProbe]) -> list[torch.Tensor]:
    """Score a family in one batch: the whole log-softmax, a one-hot label, and statistics of every position."""
    with torch.no_grad():
        ids, mask, lengths = padded([e.input_ids for e in encoded], model)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logp = logits.float().log_softmax(-1)[:, :-1]  # (B, T-1, V)
        labels = one_hot(ids[:, 1:], logp.shape[-1]).to(logp.dtype)
        p = logp.exp()
        label_logp = (logp * labels).sum(-1)
        entropy = -(p * logp).sum(-1)
        greedy = logp.max(-1)
        other = (logp - 1e9 * labels).max(-1)
        rank = 1 + (logp > label_logp[..., None]).sum(-1)
        collision = (p * p).sum(-1)
        tau = torch.log((p * torch.exp(p - labels)).sum(-1))
        rises = (p > tau[..., None]) & (labels == 0)
        columns = [
            label_logp,
            entropy,
            greedy.values,
            greedy.indices,
            other.values,
            other.indices,
            rank,
            collision,
            tau,
        ]
        columns += [rises.sum(-1), (p * rises).sum(-1)]
        return [
            torch.stack([c[i, len(e.prompt_ids) - 1 : lengths[i] - 1].double() for c in columns])
            for i, e in enumerate(encoded)
        ]


def padded(rows: Sequence[Sequence[int]], model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Pad rows on the right: ids and mask (B, T), and the lengths."""
    lengths = [len(row) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return ids.to(model.device), mask.to(model.device), lengths


def show(results: dict[str, tuple[float, float]], rounds: int) -> None:
    """Print seconds, memory and their ratios."""
    floor_seconds, _ = results["bare forward"]
    own_seconds, own_bytes = results["observation"]
    table = Table(title=f"One observation (medians of {rounds})")
    table.add_column("what")
    for heading in ("seconds", "/ bare forward", "/ observation", "peak MB", "peak / observation"):
        table.add_column(heading, justify="right")
    for name, (seconds, peak) in results.items():
        table.add_row(
            name,
            f"{seconds:.3f}",
            f"{seconds / floor_seconds:.2f}",
            f"{seconds / own_seconds:.2f}",
            f"{peak / 1e6:.0f}",
            f"{peak / own_bytes:.2f}",
        )
    console.print(table)


def overhead(model: torch.nn.Module, tokenizer: object, probes: ProbeSet, options: argparse.Namespace) -> None:
    """Train by DPO and print what share of the training time watching took, at the default interval of 25 steps."""
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in load_preferences("train")]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model,
            args=DPOConfig(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=4,
                learning_rate=1e-5,
                logging_strategy="no",
                disable_tqdm=True,
                save_strategy="no",
                report_to="none",
                bf16=False,
                use_cpu=options.device == "cpu",
                dataloader_pin_memory=options.device != "cpu",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        every = 25 if options.steps > 25 else max(1, options.steps // 2)
        watch(trainer, probes, every)
        trainer.train()
        steps = load_run(Path(folder)).steps
    training, watching = steps["seconds_training"].sum(), steps["seconds_observing"]
    per_interval = training / options.steps * every
    table = Table(title=f"A DPO run, LoRA, {options.steps} steps of 4 pairs, {len(probes)} probes, every {every} steps")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("seconds per training step", f"{training / options.steps:.2f}")
    table.add_row("seconds per observation, median", f"{watching.median():.2f}")
    table.add_row(f"one observation / {every} training steps", f"{watching.median() / per_interval:.1%}")
    table.add_row(f"watching / training, all {len(steps)} observations", f"{watching.sum() / training:.1%}")
    console.print(table)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"


if __name__ == "__main__":
    main()
