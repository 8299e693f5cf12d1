"""Runs the recipes one after another through their `main`, on a tiny model: `worker.py WORKSPACE`.

The folder `recipes` must be on PYTHONPATH.
"""

import sys
from pathlib import Path

import dpo
import extend_sft
import grpo
import kto
import sft
import tasks
import torch

from llm_dynamics.demo import tiny
from llm_dynamics.demo.products import letter_reward
from tests.recipes.conftest import ROOT

FAMILIES = ("chosen", "rejected", "chosen_semantic", "other_test")


def main(workspace):
    torch.set_num_threads(1)
    tiny.main([str(workspace / "tiny")])
    tasks.product_reward = letter_reward  # one that an untrained model earns now and then

    def run(recipe, name, config, *flags, start="tiny"):
        recipe.main(
            [
                *("--config", str(ROOT / f"recipes/configs/smollm2_135m_{config}.yaml")),
                *("--model_name_or_path", str(workspace / start), "--output_dir", str(workspace / name)),
                *("--max_steps", "2", "--watch_every", "1", "--watch_prompts", "3"),
                *("--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true", *flags),
            ]
        )

    run(sft, "sft", "sft", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2")
    run(extend_sft, "extend", "extend", "--eval_strategy", "steps", "--eval_steps", "2", "--watch_families", *FAMILIES)
    run(dpo, "dpo", "dpo", "--watch_influence", "--watch_influence_every", "1", start="sft")
    run(dpo, "extend_dpo", "dpo", "--loss_type", "sigmoid", "sft", "--loss_weights", "1.0", "0.5", start="extend")
    run(sft, "sft", "sft", "--max_steps", "3", "--resume_from_checkpoint", str(workspace / "sft" / "checkpoint-2"))
    run(kto, "kto", "kto", "--watch_every", "0")
    short = ("--max_completion_length", "8", "--num_generations", "4", "--per_device_train_batch_size", "8")
    run(grpo, "grpo", "grpo", *short)
    run(grpo, "nthr", "nthr", *short)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
