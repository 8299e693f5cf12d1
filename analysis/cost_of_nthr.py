"""What NTHR costs: scoring against a forward and against a whole GRPO step; and how well the cheap score ranks tokens.

    python analysis/cost_of_nthr.py --out analysis/results/cost_of_nthr.md   # SmolLM2-135M-Instruct, CPU, 40 minutes
    python analysis/cost_of_nthr.py --device cuda
    python analysis/cost_of_nthr.py --quick                                  # a tiny model, seconds: does it run?

1. Scoring one mixed group of 8 (4 correct) from its hidden states, by completion length and vocabulary: the real
   trainer's path (threshold, anchors, scores of wrong tokens; full vocabulary), over one bare forward of the same batch
   with all logits of the completions; 64 prompt tokens each. Peak memory is that of torch's tensors beyond those alive
   before. The models are SmolLM2's and Qwen2.5-0.5B's shapes (V = 152k), random weights. "Pass" is the extra pass
   through the backbone that the trainer needs where TRL makes none for the old policy.
2. A GRPO step of the real trainer with and without NTHR: generation, rewards, scoring, loss, update; completions forced
   to their full length. Seconds of the parts are measured inside the NTHR run.
3. The last-layer score against the exact kernel over all trainable parameters, on the same real rollouts (products of
   digits): Spearman correlation over wrong tokens, in each group, and agreement of what the threshold selects.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from timing import peak_bytes, timed
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llm_dynamics import NTHRConfig, NTHRGRPOTrainer
from llm_dynamics.demo.products import letter_reward, product_questions, product_reward
from llm_dynamics.demo.smollm2 import load_smollm2
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.kernel.output_head import output_head
from llm_dynamics.kernel.token_states import HeadTokens
from llm_dynamics.likelihood import split_model
from llm_dynamics.trainers.nthr.scores import score_group

GROUP, PROMPT = 8, 64
lines: list[str] = []


def main() -> None:
    """Print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", type=int, default=6, help="groups of the third table")
    parser.add_argument("--only", choices=["scoring", "step", "rank"], help="one table")
    parser.add_argument("--shape", help="part of a model's name: its rows of the first table alone")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore")
    if options.quick:
        options.rounds, options.groups = 1, 2
        torch.set_num_threads(1)
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    say("# What NTHR costs, and what its score is worth", "")
    say(
        f"`python analysis/cost_of_nthr.py --device {options.device} --rounds {options.rounds}`; {hardware}, float32, "
        f"torch {torch.__version__}; medians, repetitions interleaved.",
        "",
    )
    for name, table in (("scoring", scoring), ("step", step), ("rank", rank)):
        if options.only in (None, name):
            table(options)
            if options.out:
                options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def say(*texts: str) -> None:
    """Print lines and keep them."""
    lines.extend(texts)
    print("\n".join(texts), flush=True)


def scoring(options: argparse.Namespace) -> None:
    """Time the scoring of one group."""
    cuda = options.device == "cuda"
    shapes: list[tuple[str, Callable[[], Any], list[int]]] = [
        ("SmolLM2-135M, V 49k", smollm2_shape, [128, 512, 2048]),
        ("Qwen2.5-0.5B, V 152k", qwen_shape, [128, 512, 2048] if cuda else [128, 512]),
    ]
    if options.shape:
        shapes = [shape for shape in shapes if options.shape in shape[0]]
    if options.quick:
        shapes = [("tiny", lambda: build_tiny_model(600), [16, 32])]
    say("## Scoring one group of 8", "")
    say(
        "| model | completion | forward s | pass s | scoring s | scoring / forward | (pass + scoring) / forward | "
        "scoring peak MB | forward peak MB |",
        "|---|---|---|---|---|---|---|---|---|",
    )
    for name, build, lengths in shapes:
        model = build().to(options.device).eval()
        with torch.no_grad():
            head = output_head(split_model(model))
        for length in lengths:
            ids = torch.randint(3, model.config.vocab_size, (GROUP, PROMPT + length), device=options.device)
            with torch.no_grad():
                states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, PROMPT - 1 : -1]
            right, wrong = (tokens_of(states[rows], ids[rows, PROMPT:]) for rows in (slice(0, 4), slice(4, 8)))
            ways: dict[str, Callable[[], object]] = {
                "forward": lambda ids=ids, length=length, model=model: whole(model, ids, length),
                "pass": lambda ids=ids, model=model: backbone(model, ids),
                "scoring": lambda right=right, wrong=wrong, head=head: score_group(head, right, wrong).threshold(1.0),
            }
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(options.rounds if length < 2048 or cuda else 1):
                for way, call in ways.items():
                    seconds[way].append(timed(call, options.device))
            t = {way: statistics.median(values) for way, values in seconds.items()}
            peaks = {way: peak_bytes(ways[way], options.device) / 1e6 for way in ("scoring", "forward")}
            say(
                f"| {name} | {length} | {t['forward']:.2f} | {t['pass']:.2f} | {t['scoring']:.2f} | "
                f"{t['scoring'] / t['forward']:.2f} | {(t['pass'] + t['scoring']) / t['forward']:.2f} | "
                f"{peaks['scoring']:.0f} | {peaks['forward']:.0f} |"
            )
    say("")


def tokens_of(states: torch.Tensor, ids: torch.Tensor) -> HeadTokens:
    """Return all tokens of some responses of equal length."""
    return HeadTokens(states.flatten(0, 1), ids.flatten(), torch.full((len(ids),), ids.shape[1]))


@torch.no_grad()
def whole(model: Any, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Run one forward with the logits of all completions, as a pass for log-probs does, a response at a time."""
    return torch.stack(
        [
            model(input_ids=row[None], use_cache=False, logits_to_keep=length + 1).logits.logsumexp(-1).sum()
            for row in ids
        ]
    )


@torch.no_grad()
def backbone(model: Any, ids: torch.Tensor) -> None:
    """Run the backbone alone, a response at a time."""
    for row in ids:
        model.base_model(input_ids=row[None], use_cache=False)


def smollm2_shape() -> LlamaForCausalLM:
    """Build SmolLM2-135M's shape with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    )


def qwen_shape() -> Qwen2ForCausalLM:
    """Build Qwen2.5-0.5B's shape with random weights."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    )


def step(options: argparse.Namespace) -> None:
    """Time whole steps of the real trainer."""
    say("## A GRPO step", "")
    say(
        "| completion | responses | step s, GRPO | step s, NTHR | scoring s | pass s | scoring / step | "
        "(pass + scoring) / step |",
        "|---|---|---|---|---|---|---|---|",
    )
    for length in (16,) if options.quick else (128,) if options.device == "cpu" else (128, 512, 2048):
        plain, _ = steps_of(options, length, "none")
        total, parts = steps_of(options, length, "nthr")
        say(
            f"| {length} | {2 * GROUP} | {plain:.1f} | {total:.1f} | {parts['scoring']:.2f} | {parts['pass']:.2f} | "
            f"{parts['scoring'] / total:.1%} | {(parts['pass'] + parts['scoring']) / total:.1%} |"
        )
    say("")


def steps_of(options: argparse.Namespace, length: int, method: str) -> tuple[float, dict[str, float]]:
    """Return the median seconds of a step, and of its parts, without the first step."""
    model, tokenizer, reward = load(options)
    with tempfile.TemporaryDirectory() as folder:
        trainer = NTHRGRPOTrainer(
            model,
            mixed_reward if not options.quick else reward,
            NTHRConfig(
                folder,
                per_device_train_batch_size=2 * GROUP,
                num_generations=GROUP,
                max_completion_length=length,
                generation_kwargs={"min_new_tokens": length},
                max_steps=3,
                nthr_method=method,
                learning_rate=1e-6,
                bf16=options.device == "cuda",
                use_cpu=options.device == "cpu",
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(product_questions()),
            processing_class=tokenizer,
        )
        parts: dict[str, list[float]] = {"pass": [], "scoring": []}
        watch_part(trainer, "_completion_states", parts["pass"], options.device)
        watch_part(trainer, "_shape", parts["scoring"], options.device)
        begun: list[float] = []
        run_step = trainer.training_step

        def timed_step(*args: Any, **kwargs: Any) -> Any:
            begun.append(time.perf_counter())
            return run_step(*args, **kwargs)

        trainer.training_step = timed_step
        trainer.train()
        begun.append(time.perf_counter())
    spent = {name: statistics.median(values[1:]) if values else 0.0 for name, values in parts.items()}
    spent["scoring"] -= spent["pass"]
    return statistics.median(b - a for a, b in pairwise(begun[1:])), spent


def watch_part(trainer: Any, name: str, seconds: list[float], device: str) -> None:
    """Time every call of one method."""
    original = getattr(trainer, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        result: list[Any] = []
        seconds.append(timed(lambda: result.append(original(*args, **kwargs)), device))
        return result[0]

    setattr(trainer, name, call)


def mixed_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Call every second response correct: all groups are mixed, p = 1/2."""
    return [float(i % 2) for i in range(len(completions))]


def rank(options: argparse.Namespace) -> None:
    """Set the last-layer score against the exact kernel."""
    say("## Last layer against the exact kernel", "")
    model, tokenizer, reward = load(options)
    tables = {}
    for kernel in ("last_layer", "exact"):
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = NTHRGRPOTrainer(
                model,
                reward,
                NTHRConfig(
                    folder,
                    per_device_train_batch_size=GROUP,
                    num_generations=GROUP,
                    max_completion_length=20,
                    max_steps=options.groups,
                    nthr_kernel=kernel,
                    learning_rate=0.0,  # both runs see the same rollouts
                    bf16=False,
                    use_cpu=options.device == "cpu",
                    gradient_checkpointing=False,
                    report_to="none",
                    save_strategy="no",
                    logging_strategy="no",
                    disable_tqdm=True,
                    nthr_log_tokens=False,
                ),
                train_dataset=Dataset.from_list(product_questions()),
                processing_class=tokenizer,
            )
            rows: list[dict[str, Any]] = []
            trainer._shape = recording(trainer, rows)
            trainer.train()
        tables[kernel] = pd.DataFrame(rows)
    keys = ["group", "example", "position", "token"]
    both = tables["last_layer"].merge(tables["exact"], on=keys, suffixes=("_last", "_exact"), validate="one_to_one")
    say(
        "| group | wrong tokens | Spearman | selected by last layer | selected by exact | by both |",
        "|---|---|---|---|---|---|",
    )
    correlations = []
    for group, some in both.groupby("group"):
        correlations.append(some["score_last"].rank().corr(some["score_exact"].rank()))
        last, exact = some["selected_last"], some["selected_exact"]
        cells = (group, len(some), f"{correlations[-1]:+.3f}", last.sum(), exact.sum(), (last & exact).sum())
        say(f"| {' | '.join(map(str, cells))} |")
    last, exact = both["selected_last"], both["selected_exact"]
    say(
        "",
        f"{len(both)} wrong tokens in {len(correlations)} mixed groups (of {options.groups} questions): Spearman "
        f"median {statistics.median(correlations):+.3f}, lowest {min(correlations):+.3f}, highest "
        f"{max(correlations):+.3f}; of {last.sum()} tokens selected by the last layer the exact kernel selects "
        f"{(last & exact).sum()}, of {exact.sum()} selected by it the last layer {(last & exact).sum()}.",
        "",
    )


def recording(trainer: Any, rows: list[dict[str, Any]]) -> Callable[..., None]:
    """Return the trainer's `_shape`, which also notes the scores of wrong tokens."""
    original = trainer._shape

    def shape(batch: Any, states: Any) -> None:
        original(batch, states)
        shaped = trainer.shaped
        for i, t in (~shaped.scores.isnan()).nonzero().tolist():
            rows.append(
                {
                    "group": trainer.state.global_step,
                    "example": i,
                    "position": t,
                    "token": int(batch["completion_ids"][i, t]),
                    "score": float(shaped.scores[i, t]),
                    "selected": bool(shaped.selected[i, t]),
                }
            )

    return shape


def load(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return model, tokenizer and reward."""
    if not options.quick:
        return *load_smollm2(), product_reward
    tokenizer = build_tiny_tokenizer([row["prompt"][0]["content"] for row in product_questions()])
    return build_tiny_model(len(tokenizer)), tokenizer, letter_reward


if __name__ == "__main__":
    main()
