"""Lazy likelihood displacement: one update on one question from the same weights, by GRPO, NTHR, Random and Pos-Only.

    python analysis/lld.py --out analysis/results/lld      # SmolLM2-135M-Instruct, 3 x 20 questions, 1 h on 2 cores
    python analysis/lld.py --device cuda --questions 100
    python analysis/lld.py --quick                         # a tiny model, seconds: checks that the script runs

The protocol is that of `llm_dynamics.measure_lld`: for each mixed question, 8 responses at temperature 1, then from the
same weights one AdamW step (learning rate 1e-6, clipping at 1, TRL's default GRPO loss, no KL) on that question alone,
for each arm on the same responses. Delta is the change of the mean summed log-prob of the correct responses. NTHR has
beta 1, eta 0, the full vocabulary and anchors that count themselves; Random spares as many wrong tokens as NTHR, drawn
at random. Questions are products of two digits ("What is 7 x 8? Answer in one short sentence."), correct if the last
number is right.

Printed, and with `--out` written as Markdown and CSV: the mean of Delta by arm with a 95% bootstrap interval over
questions (2,000 draws), the paired difference to GRPO, how many questions lie above GRPO, and above Random; how GWHES,
computed before the step, ranks questions by their Delta under GRPO.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from llm_dynamics import measure_lld
from llm_dynamics.demo.products import letter_reward, product_questions, product_reward
from llm_dynamics.demo.smollm2 import load_smollm2
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.trainers.displacement import ARMS

DRAWS = 2000
TIE = 1e-5
"""Nats up to which two arms count as equal: the rounding of float32 log-probs."""
LOWEST = 0.25
"""Share of the questions with the lowest Delta that GWHES is asked to find."""


def main() -> None:
    """Run all seeds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=20, help="mixed questions per seed")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--max-completion-length", type=int, default=20)
    parser.add_argument("--out", type=Path, help="path without suffix: .md and .csv are written")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore")
    if options.quick:
        torch.set_num_threads(1)
        options.seeds, options.questions, options.learning_rate = [0], 4, 1e-3
        tokenizer = build_tiny_tokenizer([row["prompt"][0]["content"] for row in product_questions()])
        model, reward = build_tiny_model(len(tokenizer)), letter_reward
    else:
        (model, tokenizer), reward = load_smollm2(), product_reward
    model = model.to(options.device)
    frames, begun = [], time.monotonic()
    for seed in options.seeds:
        frame = measure_lld(
            model,
            product_questions(seed),
            reward_funcs=reward,
            processing_class=tokenizer,
            n_questions=options.questions,
            seed=seed,
            learning_rate=options.learning_rate,
            max_completion_length=options.max_completion_length,
            on_progress=lambda arm, done, of, seed=seed: print(f"seed {seed}: {arm} {done}/{of}", flush=True),
        )
        frames.append(frame.assign(seed=seed))
        if options.out:  # what is done stays, whatever comes
            pd.concat(frames).to_csv(options.out.with_suffix(".csv"), index=False, float_format="%.8g")
    results = pd.concat(frames, ignore_index=True)
    text = report(results, options, time.monotonic() - begun)
    print(text)
    if options.out:
        options.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def report(results: pd.DataFrame, options: argparse.Namespace, seconds: float) -> str:
    """Return the tables as Markdown."""
    wide = results.pivot(index=["seed", "question"], columns="arm", values="delta")
    facts = results[results["arm"] == "grpo"]
    chosen = results[results["arm"] == "nthr"].set_index(["seed", "question"])["frac_selected"]
    arms = [arm for arm in ARMS if arm in wide]
    lines = [
        "# Lazy likelihood displacement, one update on one question",
        "",
        f"`python analysis/lld.py --seeds {' '.join(map(str, options.seeds))} --questions {options.questions} "
        f"--learning-rate {options.learning_rate:g}`; {'a tiny model' if options.quick else 'SmolLM2-135M-Instruct'}, "
        f"float32, {torch.cuda.get_device_name() if options.device == 'cuda' else '2 CPU cores'}, torch "
        f"{torch.__version__}, {seconds / 60:.0f} min. {len(wide)} mixed questions; success rate "
        f"{facts['success_rate'].mean():.2f} on average; Delta in nats, summed over the tokens of a correct response "
        f"(mean length {facts['n_tokens'].sum() / facts['n_correct'].sum():.1f} tokens).",
        "",
        "| arm | mean Delta [95%] | minus GRPO [95%] | above GRPO | below GRPO | above Random | below 0 |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        gain = wide[arm] - wide["grpo"]
        against = "" if arm == "grpo" else f"{interval(gain)} | {(gain > TIE).sum()} | {(gain < -TIE).sum()}"
        random = "" if arm in ("grpo", "random") else f"{(wide[arm] - wide['random'] > TIE).sum()}"
        lines.append(f"| {arm} | {interval(wide[arm])} | {against or ' | | '} | {random} | {(wide[arm] < 0).sum()} |")
    lines += [
        "",
        f"NTHR selected {100 * chosen.mean():.1f}% of the wrong tokens on average, none in "
        f"{(chosen == 0).sum()} of {len(chosen)} questions (there, NTHR, Random and GRPO take the same step).",
    ]
    some = chosen[chosen > 0].index
    if len(some):
        mine, other = wide.loc[some, "nthr"] - wide.loc[some, "grpo"], wide.loc[some, "random"] - wide.loc[some, "grpo"]
        lines[-1] += (
            f" Where it selected some ({len(some)} questions): NTHR - GRPO {interval(mine)}, Random - GRPO "
            f"{interval(other)}, NTHR - Random {interval(mine - other)}."
        )
    score = facts.set_index(["seed", "question"])["gwhes"]
    low = max(1, round(LOWEST * len(wide)))
    found = set(score.nlargest(low).index) & set(wide["grpo"].nsmallest(low).index)
    lines += [
        "",
        "GWHES before the step against Delta under GRPO: rank correlation "
        f"{score.rank().corr(wide['grpo'].rank()):+.2f} (a perfect predictor: -1); the {low} questions with the "
        f"highest GWHES hold {len(found)} of the {low} with the lowest Delta (chance: {low * low / len(wide):.1f}).",
        "",
        "By seed, mean Delta: "
        + "; ".join(
            f"seed {seed}: " + ", ".join(f"{arm} {group[arm].mean():.4f}" for arm in arms)
            for seed, group in wide.groupby("seed")
        )
        + ".",
    ]
    return "\n".join(lines)


def interval(values: pd.Series) -> str:
    """Return the mean and its 95% bootstrap interval."""
    draws = np.random.default_rng(0).choice(values.to_numpy(), (DRAWS, len(values))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{values.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


if __name__ == "__main__":
    main()
