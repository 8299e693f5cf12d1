"""What explaining a step costs: by family, by probe token, by training token, and in a whole run.

    python analysis/cost_of_explaining.py                 # SmolLM2-135M-Instruct, CPU, about 10 minutes
    python analysis/cost_of_explaining.py --device cuda
    python analysis/cost_of_explaining.py --quick         # a tiny model, seconds: checks that the script runs

One DPO step is taken with the tap open; its account is then computed by every route, repetitions interleaved, medians
reported as ratios to the physical floor: one forward and backward (`model(ids)`, log-softmax, `backward()`) of the same
sequences, every response with its own prompt, in the same batches.

1. By family, reverse mode: one gradient per family at the midpoint, dotted with every cause. Floor: the probes.
2. By probe token, forward mode: one directional derivative, all probe tokens at once, per cause. Floor: the probes.
3. By training token: one gradient of a family and one directional derivative of the training batch. Floor: the batch
   and the family's probes.
4. A DPO run explained at the default interval (`watch(trainer, probes, influence=True)`): what an explained step takes
   beyond a plain one, over the steps of the interval.

`analysis/peers.py` measures the sequence-level job of other packages.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import torch
from cost_of_watching import padded
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from timing import timed
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from llm_dynamics import encode_probes, load_run, watch
from llm_dynamics._trl import recording_clip
from llm_dynamics.callbacks.watch import EXPLAINED_PER_OBSERVATIONS
from llm_dynamics.demo.job import FULL, build_demo_probes
from llm_dynamics.demo.preferences import load_preferences
from llm_dynamics.demo.smollm2 import load_smollm2
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.influence import (
    BeforeStep,
    LossTape,
    account_for_change,
    by_sign,
    influence_of_training_tokens,
    measured_change,
    path_gradient,
    split_update,
)
from llm_dynamics.kernel.derivatives import ResponseLogps
from llm_dynamics.likelihood.scoring import DEFAULT_BATCH_TOKENS
from llm_dynamics.probes import EncodedProbe

console = Console(width=120)


class OneStep(TrainerCallback):
    """Keeps all that is needed to explain the first step of a run."""

    trainer: DPOTrainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Tap the loss."""
        self.tape = LossTape(self.trainer.model, by_sign).__enter__()
        self._context = recording_clip(self.trainer)
        self._clip = self._context.__enter__()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keep what the step overwrites."""
        self._context.__exit__(None, None, None)
        self.tape.__exit__(None, None, None)
        self.before = BeforeStep.of(self.trainer.optimizer, self.tape.parameters)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Split the update."""
        self.update = split_update(
            self.trainer.optimizer, self.tape.parameters, self.before, self.tape.parts, clip_factor=self._clip[0]
        )
        self.after = {name: parameter.detach().clone() for name, parameter in self.tape.parameters.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of the one step's routes; 0: none")
    parser.add_argument("--steps", type=int, default=6, help="DPO steps of the last table, at least 4; 0: none")
    parser.add_argument("--weights", choices=["all", "lora"], help="one kind of run alone")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if 0 < options.steps < 4:
        parser.error("--steps must be 0 or at least 4: some explained, some not")
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    rows = load_preferences("train")
    if options.quick:
        options.rounds, options.steps = 1, min(options.steps, 4)
        torch.set_num_threads(1)
        tokenizer = build_tiny_tokenizer([row["chosen"][0]["content"] for row in rows])
        model = build_tiny_model(len(tokenizer))
    else:
        model, tokenizer = load_smollm2()
    probes = build_demo_probes(tokenizer, FULL)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        kinds = {None: (False, True), "all": (False,), "lora": (True,)}[options.weights]
        for lora in kinds if options.rounds else ():
            callback = OneStep()
            callback.trainer = trainer(folder, tokenizer, rows, options, steps=1, lora=lora, callbacks=[callback])
            callback.trainer.train()
            encoded = list(encode_probes(probes, tokenizer))
            families = [probe.family for probe in probes]
            console.print(
                f"\n{'LoRA' if lora else 'All weights'}: {sum(p.numel() for p in callback.after.values()):,} trained "
                f"parameters, {len(encoded)} probes in {len(set(families))} families, "
                f"{sum(len(e.input_ids) for e in encoded):,} tokens, {sum(len(e.response_ids) for e in encoded):,} of "
                f"them response tokens; causes: {', '.join(callback.update.parts)}; {options.rounds} rounds"
            )
            one_step(callback, encoded, families, options)
            del callback
        if options.steps:
            for lora in kinds:
                whole_run(folder, tokenizer, rows, probes, options, lora=lora)


def one_step(step: OneStep, encoded: Sequence[EncodedProbe], families: Sequence[str], options: Any) -> None:
    """Time every route to the account of one step, and its floor."""
    model, before, after = step.trainer.model, step.before.weights, step.after
    logps = ResponseLogps(model, encoded)
    measured = measured_change(logps, before, after)
    names = sorted(set(families))
    groups = torch.stack([torch.tensor([float(f == name) for f in families])[logps.owner] for name in names])
    first = [e for e, family in zip(encoded, families, strict=True) if family == "chosen"]
    chosen = ResponseLogps(model, first, split=logps.split)
    weights = torch.ones(chosen.n_tokens)
    batch = step.tape.batches[0].inputs
    parts, cause = step.update.parts, next(iter(step.update.parts))

    def by_training_token() -> None:
        gradient = path_gradient(chosen, before, after, weights)
        influence_of_training_tokens(model, logps.split, step.tape.batches, before, step.update.per_gradient, gradient)

    ways: dict[str, Callable[[], object]] = {
        "floor: forward + backward of the probes": lambda: forward_backward(model, encoded),
        "by family": lambda: account_for_change(logps, before, after, parts, groups=groups, measured=measured),
        "by probe token, one cause": lambda: account_for_change(
            logps, before, after, {cause: parts[cause]}, measured=measured
        ),
        "floor: forward + backward of the batch and one family": lambda: (
            forward_backward(model, first),
            forward_backward_of_batch(model, batch),
        ),
        "by training token, one family": by_training_token,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # warm up
    for _ in range(options.rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way, options.device))
    table = Table("what", "seconds", "/ floor")
    floor = 1.0
    for name in ways:
        median = statistics.median(seconds[name])
        floor = median if name.startswith("floor") else floor
        table.add_row(name, f"{median:.2f}", f"{median / floor:.2f}")
    console.print(table)


def forward_backward(model: Any, encoded: Sequence[EncodedProbe]) -> None:
    """Run the model's own forward and backward on every response with its prompt, in length-sorted batches."""
    rows = sorted((e.input_ids for e in encoded), key=len, reverse=True)
    while rows:
        count = max(1, DEFAULT_BATCH_TOKENS // len(rows[0]))
        ids, mask, _ = padded(rows[:count], model)
        forward_backward_of_batch(model, {"input_ids": ids, "attention_mask": mask})
        rows = rows[count:]


def forward_backward_of_batch(model: Any, inputs: dict[str, Any]) -> None:
    """One plain forward and backward of the mean log-prob of the next tokens."""
    model.zero_grad()
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    logits = model(**given, use_cache=False).logits
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, given["input_ids"][:, 1:, None])
    logp.mean().backward()
    model.zero_grad()


class StepTimer(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop it: this callback comes after those that explain, and before those that observe the next step."""
        self.seconds.append(time.perf_counter() - self._begun)


def whole_run(folder: str, tokenizer: Any, rows: Any, probes: Any, options: Any, *, lora: bool) -> None:
    """Run DPO with every second step explained, and print what the default interval would cost."""
    every = 25 * EXPLAINED_PER_OBSERVATIONS
    with tempfile.TemporaryDirectory() as log:
        timer = StepTimer()
        run = trainer(folder, tokenizer, rows, options, steps=options.steps, lora=lora)
        watch(run, probes, every=10**6, influence={"every": 2}, log_folder=log)
        run.add_callback(timer)
        run.train()
        explained = load_run(log).explained_steps
    extra = [s for k, s in enumerate(timer.seconds, 1) if k in explained and 1 < k < options.steps]
    plain = [s for k, s in enumerate(timer.seconds, 1) if k not in explained]
    more = statistics.median(extra) - statistics.median(plain)
    console.print(
        f"DPO, {'LoRA' if lora else 'all weights'}, {len(probes)} probes: {statistics.median(plain):.2f} s a step, "
        f"{more:.2f} s more when explained with the training tokens of chosen and rejected: "
        f"{100 * more / (every * statistics.median(plain)):.1f}% at the default interval of {every} steps"
    )


def trainer(
    folder: str, tokenizer: Any, rows: Any, options: Any, *, steps: int, lora: bool, callbacks: Sequence[Any] = ()
) -> DPOTrainer:
    """Return a DPO trainer on the demo's pairs."""
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    return DPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=DPOConfig(
            output_dir=tempfile.mkdtemp(),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=2e-4 if lora else 1e-5,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=options.device == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        if lora
        else None,
        callbacks=list(callbacks),
    )


if __name__ == "__main__":
    main()
