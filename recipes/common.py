"""What every recipe does alike: how the model is loaded, and what comes after training is set up."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer
from trl import ModelConfig, ScriptArguments, TrlParser

from llm_dynamics.callbacks.probe import watcher_of

FOLDERS = ("models", "runs")


def parse_flags(parser: TrlParser, arguments: Sequence[str] | None) -> tuple[Any, ...]:
    """Return the dataclasses that the command line and its YAML fill; unknown flags end the program, with the nearest.

    Args:
        parser: The script's.
        arguments: The command line; None: that of the process.

    Raises:
        SystemExit: With status 2, for a flag or a key of the YAML that there is not.
    """
    *filled, rest = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    flags = [f"--{field.name}" for kind in parser.dataclass_types for field in dataclasses.fields(kind)]
    for flag in (text.split("=")[0] for text in rest if text.startswith("--")):
        near = difflib.get_close_matches(flag, flags, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        parser.exit(2, f"{flag} is no flag of this recipe, nor a key of its YAML; {hint}--help lists all\n")
    if rest:
        parser.exit(2, f"not understood: {' '.join(rest)}; --help lists all flags\n")
    return tuple(filled)


def set_model_arguments(model_args: ModelConfig, training_args: Any) -> None:
    """Hand the flags of `ModelConfig` to the trainer, which loads the model itself.

    Raises:
        FileNotFoundError: If the model is a folder by its name, and there is none.
    """
    check_model_folder(model_args.model_name_or_path)
    flags = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    training_args.model_init_kwargs = flags | (training_args.model_init_kwargs or {})


def check_model_folder(name: str | None) -> None:
    """Refuse a folder that is not there, rather than look for it at the hub.

    Raises:
        FileNotFoundError: For a path (with a dot, a tilde or several slashes, or within a folder that exists or that
            the recipes use) that does not exist.
    """
    if name is None or Path(name).is_dir():
        return
    first, *rest = Path(name).parts
    if name.startswith((".", "/", "~")) or len(rest) > 1 or (rest and (first in FOLDERS or Path(first).is_dir())):
        make = f"; `make {name}` saves it" if name == "models/SmolLM2-135M-Instruct" else ""
        raise FileNotFoundError(
            f"model_name_or_path: there is no folder {name} in {Path.cwd()}. Recipes are run from the root of the "
            f"project, or with full paths{make}"
        )


def train_and_save(trainer: Trainer, script_args: ScriptArguments, training_args: Any) -> None:
    """Train, from `resume_from_checkpoint` where it is given, and save the model and its card to `output_dir`."""
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card()
    trainer.accelerator.print(f"The model is in {training_args.output_dir}")
    watcher = watcher_of(trainer)
    if watcher is not None:
        log = watcher.log_folder
        trainer.accelerator.print(f"What moved is in {log}; for one page: llm-dynamics report {log} -o report.html")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()
