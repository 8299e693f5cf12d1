r"""SFT on both responses of every pair: the remedy of Ren and Sutherland (arXiv 2407.10490, section 4.3).

DPO squeezes hardest where rejected responses are unlikely already. So SFT first makes both responses likely, the
rejected ones too; the DPO that follows is unchanged. In their evaluation by ChatGPT, the result was preferred to the
plain pipeline's in 69% of cases after four epochs of DPO.

On a CPU, in minutes (once: make models/SmolLM2-135M-Instruct), then the DPO that follows it:

    python recipes/extend_sft.py --config recipes/configs/smollm2_135m_extend.yaml
    python recipes/dpo.py --config recipes/configs/smollm2_135m_dpo.yaml \
        --model_name_or_path runs/smollm2_135m/extend --output_dir runs/smollm2_135m/extend_dpo

On several GPUs:

    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml --num_processes 8 \
        recipes/extend_sft.py --config recipes/configs/qwen2.5_0.5b_extend.yaml \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 1

Resume an interrupted run, its log included:

    python recipes/extend_sft.py --config recipes/configs/smollm2_135m_extend.yaml \
        --resume_from_checkpoint runs/smollm2_135m/extend/checkpoint-24

Flags are those of sft.py. An epoch has twice as many rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import parse_flags, run, set_model_arguments, train_and_save
from data import load_pairs, uses_chat
from datasets import Dataset, concatenate_datasets
from sft import make_parser
from trl import SFTTrainer, get_peft_config, get_quantization_config


def extend(rows: Dataset) -> Dataset:
    """Return prompt-completion rows of both responses of each pair.

    Args:
        rows: Pairs, with `prompt`, `chosen`, `rejected`.

    Returns:
        Twice as many rows of `prompt` and `completion`: first the chosen responses, then the rejected ones. The trainer
        shuffles them.
    """
    halves = [
        rows.select_columns(["prompt", name]).rename_column(name, "completion") for name in ("chosen", "rejected")
    ]
    return concatenate_datasets(halves)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    script_args, training_args, model_args, watch_args = parse_flags(make_parser(), arguments)
    set_model_arguments(model_args, training_args)
    chat = uses_chat(model_args, training_args)
    pairs = load_pairs(script_args, chat=chat)
    held_out = load_pairs(script_args, chat=chat, held_out=True) if training_args.eval_strategy != "no" else None

    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=extend(pairs),
        eval_dataset=extend(held_out) if held_out is not None else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    watch_args.attach(trainer, pairs, trainer.processing_class, held_out=held_out)
    train_and_save(trainer, script_args, training_args)


if __name__ == "__main__":
    run(main)
