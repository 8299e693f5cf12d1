r"""SFT on the chosen responses of preference pairs, or on prompts and completions; watched by probes of the responses.

On a CPU, in minutes (once: make models/SmolLM2-135M-Instruct):

    python recipes/sft.py --config recipes/configs/smollm2_135m_sft.yaml

On several GPUs:

    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml --num_processes 8 \
        recipes/sft.py --config recipes/configs/qwen2.5_0.5b_sft.yaml \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 1

Resume an interrupted run, its log included (a checkpoint is written every `save_steps`):

    python recipes/sft.py --config recipes/configs/smollm2_135m_sft.yaml \
        --resume_from_checkpoint runs/smollm2_135m/sft/checkpoint-12

Flags are TRL's (`SFTConfig`, `ModelConfig`, `ScriptArguments`) and `--watch_*`; those on the command line win over the
YAML. `--help` lists all, `--watch_every 0` turns watching off, `trackio show` opens the dashboard.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import parse_flags, run, set_model_arguments, train_and_save
from data import PairArguments, load_pairs, uses_chat
from datasets import Dataset
from trl import (
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from llm_dynamics import WatchConfig


def make_parser() -> TrlParser:
    """Return the parser of the command line and of the YAML files."""
    return TrlParser((PairArguments, SFTConfig, ModelConfig, WatchConfig))


def chosen_only(pairs: Dataset) -> Dataset:
    """Return the rows that SFT takes: conversations or texts where the data are such, else prompt and completion."""
    for whole in ("messages", "text"):
        if whole in pairs.column_names and all(pairs[whole]):
            return pairs.select_columns([whole])
    return pairs.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    script_args, training_args, model_args, watch_args = parse_flags(make_parser(), arguments)
    set_model_arguments(model_args, training_args)
    chat = uses_chat(model_args, training_args)
    pairs = load_pairs(script_args, chat=chat, needs=("chosen",))
    held_out = None
    if training_args.eval_strategy != "no":
        held_out = load_pairs(script_args, chat=chat, held_out=True, needs=("chosen",))

    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=chosen_only(pairs),
        eval_dataset=chosen_only(held_out) if held_out is not None else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    watch_args.attach(trainer, pairs, trainer.processing_class, held_out=held_out)
    train_and_save(trainer, script_args, training_args)


if __name__ == "__main__":
    run(main)
