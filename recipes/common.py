"""What every recipe does alike: how the model is loaded, and what comes after training is set up."""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from trl import ModelConfig, ScriptArguments


def set_model_arguments(model_args: ModelConfig, training_args: Any) -> None:
    """Hand the flags of `ModelConfig` to the trainer, which loads the model itself."""
    flags = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    training_args.model_init_kwargs = flags | (training_args.model_init_kwargs or {})


def train_and_save(trainer: Trainer, script_args: ScriptArguments, training_args: Any) -> None:
    """Train, from `resume_from_checkpoint` where it is given, and save the model and its card to `output_dir`."""
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card()
    trainer.accelerator.print(f"The model is in {training_args.output_dir}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()
