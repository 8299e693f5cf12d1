"""Behaviours of TRL's trainers with and without watching.

    python -m tests.contract.trl_behaviours [PART OF A NAME ...]

Each case is trained alone, and again with probes watched and steps explained. Compared: the bytes of the weights, the
trainer's own log rows, which row stands first, what a callback of the user's saw at every event, which checkpoint was
best, and the states of the three random generators. One line a case: `same`, `DIFFERS in ...`, `watching ended it`, or
`refused` with what was said; `cannot train` where the case does not run alone (a package that is missing).
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.training_args import OptimizerNames

from llm_dynamics import watch
from llm_dynamics.probes import ProbeSet
from tests.conftest import PREFERENCES
from tests.training import OURS, build_trainer, own_rows, save_tiny_model, weights_of


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(row: dict[str, str], response: str = "chosen") -> list[dict[str, Any]]:
    return [turn("user", row["prompt"]), turn("assistant", row[response])]


def rows(make: Callable[[dict[str, str]], dict[str, Any]]) -> Dataset:
    return Dataset.from_list([make(row) for row in PREFERENCES])


def own_names(row: dict[str, Any]) -> list[str]:
    """Names in a log row that are not of watching."""
    return sorted(name for name in row if not name.startswith(OURS))


class Listener(TrainerCallback):
    """A user's callback that looks at rows: what it saw must be what it sees in a run that nobody watches."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.begun = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = True
        self.seen.append(("rows when training begins", len(state.log_history)))

    def on_log(self, args, state, control, logs=None, **kwargs):
        own = own_names(logs or {})
        if {*own} - {"step", "epoch"}:  # else a row of watching alone
            self.seen.append(("log", state.global_step, own, "first row", own_names(state.log_history[0])))
        elif not self.begun:
            self.seen.append("a row before training began")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen.append(("evaluated", state.global_step, repr((metrics or {}).get("eval_loss"))))

    def on_step_end(self, args, state, control, **kwargs):
        flags = (control.should_log, control.should_evaluate, control.should_save)
        self.seen.append(("step", state.global_step, flags))

    def on_save(self, args, state, control, **kwargs):
        self.seen.append(("saved", state.global_step))


@dataclass(frozen=True)
class Case:
    """A behaviour: kind of trainer, its arguments, and what stands in place of its defaults."""

    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: Callable[[], Any] | None = None
    lora: bool = False
    evaluates: bool = False
    callbacks: Callable[[], list[TrainerCallback]] = list


EVALUATING = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "per_device_eval_batch_size": 2}
BEST = EVALUATING | {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}

CASES: dict[str, Case] = {
    # when rows are written, evaluated, saved
    "evaluation by steps": Case("sft", EVALUATING | {"logging_steps": 3}, evaluates=True),
    "evaluation before the first row": Case("sft", EVALUATING | {"logging_steps": 50}, evaluates=True),
    "evaluation by epochs": Case(
        "sft", {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, evaluates=True
    ),
    "evaluation on start": Case("sft", EVALUATING | {"eval_on_start": True}, evaluates=True),
    "evaluation delayed": Case("sft", EVALUATING | {"eval_delay": 3}, evaluates=True),
    "evaluation of DPO": Case("dpo", EVALUATING | {"logging_steps": 50}, evaluates=True),
    "evaluation of KTO": Case("kto", EVALUATING, evaluates=True),
    "evaluation of GRPO": Case("grpo", EVALUATING, evaluates=True),
    "evaluation of a plain Trainer": Case("plain", EVALUATING | {"logging_steps": 50}, evaluates=True),
    "best model at end": Case("sft", BEST, evaluates=True),
    "best model at end, DPO with an adapter": Case("dpo", BEST, lora=True, evaluates=True),
    "early stopping": Case(
        "sft",
        BEST | {"learning_rate": 1.0, "max_steps": 12},
        evaluates=True,
        callbacks=lambda: [EarlyStoppingCallback(1)],
    ),
    "rows by epochs": Case("sft", {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}),
    "no rows": Case("dpo", {"logging_strategy": "no"}),
    "first step logged": Case("dpo", {"logging_first_step": True, "logging_steps": 3}),
    "rows every two steps": Case("grpo", {"logging_steps": 2, "max_steps": 5}),
    "checkpoints": Case("sft", {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}),
    # optimizers and schedules
    **{f"optimizer {name.value}": Case("sft", {"optim": name.value}) for name in OptimizerNames},
    "schedule cosine with warm-up": Case("dpo", {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_steps": 5}),
    "schedule reduce on plateau": Case(
        "sft", EVALUATING | {"lr_scheduler_type": "reduce_lr_on_plateau"}, evaluates=True
    ),
    "accumulation, clipped": Case("dpo", {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05}),
    "noise in embeddings": Case("sft", {"neftune_noise_alpha": 5.0}),
    "checkpointed activations off": Case("dpo", {"gradient_checkpointing": False}),
    # forms of data
    "SFT text": Case("sft", rows=lambda: rows(lambda r: {"text": f"{r['prompt']} {r['chosen']}"})),
    "SFT messages": Case("sft", rows=lambda: rows(lambda r: {"messages": chat(r)})),
    "SFT conversations": Case(
        "sft",
        rows=lambda: rows(
            lambda r: {
                "conversations": [{"from": "human", "value": r["prompt"]}, {"from": "gpt", "value": r["chosen"]}]
            }
        ),
    ),
    "SFT chat prompt and completion": Case(
        "sft", rows=lambda: rows(lambda r: {"prompt": chat(r)[:1], "completion": chat(r)[1:]})
    ),
    "SFT tokens": Case(
        "sft", rows=lambda: Dataset.from_list([{"input_ids": list(range(5, 12 + i))} for i in range(6)])
    ),
    "SFT stream": Case("sft", rows=lambda: rows(lambda r: {"text": r["chosen"]}).to_iterable_dataset()),
    "SFT packed": Case("sft", {"packing": True, "max_length": 32}),
    "SFT loss on all tokens": Case("sft", {"completion_only_loss": False}),
    "SFT cut": Case("sft", {"max_length": 12}),
    "DPO chat": Case(
        "dpo",
        rows=lambda: rows(
            lambda r: {"prompt": chat(r)[:1], "chosen": chat(r)[1:], "rejected": chat(r, "rejected")[1:]}
        ),
    ),
    "DPO implicit prompt": Case(
        "dpo", rows=lambda: rows(lambda r: {"chosen": chat(r), "rejected": chat(r, "rejected")})
    ),
    "DPO implicit prompt as text": Case(
        "dpo", rows=lambda: rows(lambda r: {n: f"{r['prompt']} {r[n]}" for n in ("chosen", "rejected")})
    ),
    "DPO cut": Case("dpo", {"max_length": 12}),
    "KTO pairs": Case("kto", rows=lambda: rows(dict)),
    "KTO chat": Case(
        "kto",
        rows=lambda: rows(
            lambda r: {"prompt": chat(r)[:1], "completion": chat(r)[1:], "label": len(r["prompt"]) % 2 == 0}
        ),
    ),
    "GRPO chat": Case("grpo", rows=lambda: rows(lambda r: {"prompt": chat(r)[:1]})),
    "shuffled by a seed": Case("dpo", {"seed": 7, "data_seed": 11, "dataloader_num_workers": 0}),
    "workers load rows": Case("sft", {"dataloader_num_workers": 1}),
    # losses and references
    **{
        f"DPO {loss}": Case("dpo", {"loss_type": [loss]})
        for loss in ("ipo", "hinge", "sppo_hard", "robust", "apo_zero", "sigmoid_norm")
    },
    "DPO reference computed before": Case("dpo", {"precompute_ref_log_probs": True}),
    "DPO reference follows": Case("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 2, "max_steps": 5}),
    "DPO adapter": Case("dpo", lora=True),
    "KTO adapter": Case("kto", lora=True),
    "SFT of negative log-prob with dft": Case("sft", {"loss_type": "dft"}),
    **{f"GRPO {loss}": Case("grpo", {"loss_type": loss}) for loss in ("dapo", "dr_grpo", "bnpo", "cispo")},
    "GRPO with a reference": Case("grpo", {"beta": 0.1}),
    "GRPO iterations": Case("grpo", {"num_iterations": 2, "max_steps": 4}),
    "GRPO generations over several steps": Case("grpo", {"steps_per_generation": 2, "max_steps": 4}),
    "GRPO by sequences": Case("grpo", {"importance_sampling_level": "sequence"}),
    "GRPO truncated completions masked": Case("grpo", {"mask_truncated_completions": True}),
    "RLOO": Case("rloo", {"max_steps": 4}),
    "bfloat16": Case("dpo", {"bf16": True}),
}
QUICK = (
    "evaluation before the first row",
    "best model at end",
    "early stopping",
    "rows by epochs",
    "optimizer adafactor",
    "SFT messages",
    "SFT packed",
    "DPO reference follows",
    "GRPO generations over several steps",
)
"""Cases that the test suite runs; no other test of it trains such a run."""


def train(case: Case, model_folder: str, *, watched: bool) -> tuple[Any, dict[str, Any]]:
    """Train a case and return the trainer with what is compared of it."""
    listener = Listener()
    with tempfile.TemporaryDirectory() as folder:
        data = case.rows() if case.rows is not None else None
        trainer = build_trainer(
            case.kind,
            model_folder,
            folder,
            lora=case.lora,
            rows=data,
            evaluates=case.evaluates,
            callbacks=[*case.callbacks(), listener],
            **case.arguments,
        )
        if watched:
            probes = ProbeSet.from_preference_dataset(PREFERENCES, families=["chosen", "rejected"], n_prompts=3)
            watch(trainer, probes, every=2, influence={"every": 2})
        trainer.train()
        best = trainer.state.best_model_checkpoint
        return trainer, {
            "weights": weights_of(trainer),
            "rows": own_rows(trainer),
            "first row": own_names(trainer.state.log_history[0]) if own_rows(trainer) else None,
            "events": listener.seen,
            "best": None if best is None else os.path.basename(best),
            "random state": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        }


def compare(name: str, model_folder: str) -> str:
    """Run one case with and without watching; return the line that tells what came of it."""
    case = CASES[name]
    try:
        _, alone = train(case, model_folder, watched=False)
    except Exception as error:
        return f"cannot train: {type(error).__name__}: {str(error)[:120]}"
    try:
        _, watched = train(case, model_folder, watched=True)
    except (NotImplementedError, ValueError) as error:
        return f"refused: {str(error)[:200]}"
    except Exception as error:
        return f"watching ended it: {type(error).__name__}: {str(error)[:200]}"
    different = [part for part in alone if alone[part] != watched[part]]
    return f"DIFFERS in {', '.join(different)}" if different else "same"


def main(parts: list[str]) -> int:
    """Run the cases whose name has one of `parts`, all where there are none; 1 where any differs or was ended."""
    model_folder = str(save_tiny_model(tempfile.mkdtemp(), dropout=0.1))
    bad = 0
    for name in CASES:
        if not parts or any(part in name for part in parts):
            line = compare(name, model_folder)
            bad += line.startswith(("DIFFERS", "watching ended"))
            print(f"{name:45s} {line}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
