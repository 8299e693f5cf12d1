r"""GRPO, or GRPO with NTHR, on questions whose answers can be checked; watched.

On a CPU, in minutes (once: make models/SmolLM2-135M-Instruct), plain GRPO and NTHR from the same seed:

    python recipes/grpo.py --config recipes/configs/smollm2_135m_grpo.yaml
    python recipes/grpo.py --config recipes/configs/smollm2_135m_nthr.yaml

On several GPUs (`pip install "llm-dynamics[grpo]"` for math and reasoning-gym; add `--use_vllm` where vLLM is there):

    accelerate launch --config_file recipes/accelerate_configs/zero2.yaml --num_processes 8 \
        recipes/grpo.py --config recipes/configs/qwen2.5_1.5b_nthr.yaml
    python recipes/grpo.py --config recipes/configs/qwen2.5_0.5b_nthr.yaml --task leg_counting

Resume an interrupted run, its log included:

    python recipes/grpo.py --config recipes/configs/smollm2_135m_nthr.yaml \
        --resume_from_checkpoint runs/smollm2_135m/nthr/checkpoint-8

`--task` is products (of digits), math (`--dataset_name` for another source with `problem` and `solution`), or the name
of a reasoning-gym dataset. Flags are TRL's (`GRPOConfig`, `ModelConfig`, `ScriptArguments`), those of `NTHRConfig`
(`--nthr_method none` is TRL's GRPO, bit for bit) and `--watch_*`; those on the command line win over the YAML.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import parse_flags, run, set_model_arguments, train_and_save
from tasks import TaskArguments, load_task
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from llm_dynamics import NTHRConfig, NTHRGRPOTrainer, WatchConfig


def make_parser() -> TrlParser:
    """Return the parser of the command line and of the YAML files."""
    return TrlParser((TaskArguments, NTHRConfig, ModelConfig, WatchConfig))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says.

    Raises:
        ValueError: Where evaluation is asked for.
    """
    script_args, training_args, model_args, watch_args = parse_flags(make_parser(), arguments)
    set_model_arguments(model_args, training_args)
    if training_args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy is {training_args.eval_strategy!r}; allowed: 'no', no task holds questions out"
        )
    task = load_task(script_args, training_args.seed)

    trainer = NTHRGRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=task.rewards,
        args=training_args,
        train_dataset=task.questions,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    watch_args.attach(trainer, task.answers, trainer.processing_class)
    train_and_save(trainer, script_args, training_args)


if __name__ == "__main__":
    run(main)
