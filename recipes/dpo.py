r"""DPO on preference pairs, watched.

On a CPU, in minutes (once: make models/SmolLM2-135M-Instruct), from the model of sft.py:

    python recipes/dpo.py --config recipes/configs/smollm2_135m_dpo.yaml --model_name_or_path runs/smollm2_135m/sft

The same on two CPU processes, on several GPUs, and there with the weights sharded:

    accelerate launch --config_file recipes/accelerate_configs/ddp_cpu.yaml \
        recipes/dpo.py --config recipes/configs/smollm2_135m_dpo.yaml --per_device_train_batch_size 2
    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml --num_processes 8 \
        recipes/dpo.py --config recipes/configs/qwen2.5_0.5b_dpo.yaml --gradient_accumulation_steps 1
    accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml --num_processes 8 \
        recipes/dpo.py --config recipes/configs/qwen2.5_0.5b_dpo.yaml --gradient_accumulation_steps 1

Resume an interrupted run, its log included:

    python recipes/dpo.py --config recipes/configs/smollm2_135m_dpo.yaml \
        --resume_from_checkpoint runs/smollm2_135m/dpo/checkpoint-12

Flags are TRL's (`DPOConfig`, `ModelConfig`, `ScriptArguments`) and `--watch_*`; those on the command line win over the
YAML. `--loss_type sigmoid sft` (RPO), `ipo`, `apo_zero`... and `--ld_alpha` are TRL's remedies; `--watch_influence`
explains why chosen responses fall; `trackio show` opens the dashboard.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import parse_flags, run, set_model_arguments, train_and_save
from data import PAIR, PairArguments, load_pairs, uses_chat
from trl import (
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from llm_dynamics import WatchConfig


def make_parser() -> TrlParser:
    """Return the parser of the command line and of the YAML files."""
    return TrlParser((PairArguments, DPOConfig, ModelConfig, WatchConfig))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    script_args, training_args, model_args, watch_args = parse_flags(make_parser(), arguments)
    set_model_arguments(model_args, training_args)
    chat = uses_chat(model_args, training_args)
    pairs = load_pairs(script_args, chat=chat)
    held_out = load_pairs(script_args, chat=chat, held_out=True) if training_args.eval_strategy != "no" else None

    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=pairs.select_columns(list(PAIR)),
        eval_dataset=held_out.select_columns(list(PAIR)) if held_out is not None else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    watch_args.attach(trainer, pairs, trainer.processing_class, held_out=held_out)
    train_and_save(trainer, script_args, training_args)


if __name__ == "__main__":
    run(main)
