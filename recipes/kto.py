r"""KTO on the responses of preference pairs, each alone with its label, watched.

On a CPU, in minutes (once: make models/SmolLM2-135M-Instruct):

    python recipes/kto.py --config recipes/configs/smollm2_135m_kto.yaml

On several GPUs, without a YAML:

    accelerate launch --config_file recipes/accelerate_configs/ddp.yaml --num_processes 8 recipes/kto.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name ultrafeedback --output_dir runs/qwen_kto \
        --learning_rate 1e-6 --per_device_train_batch_size 4 --max_steps 500

Resume an interrupted run, its log included:

    python recipes/kto.py --config recipes/configs/smollm2_135m_kto.yaml \
        --resume_from_checkpoint runs/smollm2_135m/kto/checkpoint-12

Flags are TRL's (`KTOConfig`, `ModelConfig`, `ScriptArguments`) and `--watch_*`; those on the command line win over the
YAML. The data are pairs, as for dpo.py, of which each becomes two rows, labelled desirable and undesirable; or rows of
prompt, completion and label.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import parse_flags, run, set_model_arguments, train_and_save
from data import PAIR, PairArguments, load_pairs, uses_chat
from datasets import Dataset
from trl import (
    KTOConfig,
    KTOTrainer,
    ModelConfig,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from llm_dynamics import WatchConfig


def make_parser() -> TrlParser:
    """Return the parser of the command line and of the YAML files."""
    return TrlParser((PairArguments, KTOConfig, ModelConfig, WatchConfig))


def labelled(rows: Dataset) -> Dataset:
    """Return a row for each response, labelled desirable (first, the chosen ones) or undesirable."""
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for name in PAIR[1:]
            for row in rows
            if row.get(name)
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    script_args, training_args, model_args, watch_args = parse_flags(make_parser(), arguments)
    set_model_arguments(model_args, training_args)
    chat = uses_chat(model_args, training_args)
    pairs = load_pairs(script_args, chat=chat, needs=())
    held_out = None
    if training_args.eval_strategy != "no":
        held_out = load_pairs(script_args, chat=chat, held_out=True, needs=())

    trainer = KTOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=labelled(pairs),
        eval_dataset=labelled(held_out) if held_out is not None else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    watch_args.attach(trainer, pairs, trainer.processing_class, held_out=held_out)
    train_and_save(trainer, script_args, training_args)


if __name__ == "__main__":
    run(main)
