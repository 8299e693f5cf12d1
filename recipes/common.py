"""What every recipe does alike: how the model is loaded, and what comes after training is set up."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from trl import ModelConfig, ScriptArguments, TrlParser

import llm_dynamics
from llm_dynamics.callbacks.probe import watcher_of
from llm_dynamics.runlog import schema

FOLDERS = ("models", "runs")


def run(main: Callable[[], None]) -> None:
    """Run a recipe. What is refused of its input ends it in one line, as `llm-dynamics` does; the rest is raised.

    Args:
        main: The recipe's.

    Raises:
        SystemExit: With status 1, where a check of the recipes or of `llm_dynamics` refused something
            (LLM_DYNAMICS_TRACEBACK=1 in the environment shows where).
        ValueError: As others raise it; so are the following.
        TypeError: Likewise.
        NotImplementedError: Likewise.
        ModuleNotFoundError: Likewise.
        OSError: Likewise.
    """
    try:
        main()
    except (ValueError, TypeError, NotImplementedError, ModuleNotFoundError, OSError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        checks = (Path(__file__).resolve().parent, Path(llm_dynamics.__file__).resolve().parent)
        if os.environ.get("LLM_DYNAMICS_TRACEBACK") or not any(map(raised_in.is_relative_to, checks)):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def parse_flags(parser: TrlParser, arguments: Sequence[str] | None) -> tuple[Any, ...]:
    """Return the dataclasses that the command line and its YAML fill; unknown flags end the program, with the nearest.

    Args:
        parser: The script's.
        arguments: The command line; None: that of the process.

    Raises:
        SystemExit: With status 2, for a flag or a key of the YAML that there is not.
    """
    *filled, keys, flags = parser.parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    known = [field.name for kind in parser.dataclass_types for field in dataclasses.fields(kind)]
    unknown = [(f"the YAML's key {text[2:]}", text[2:], "") for text in keys if text.startswith("--")]
    unknown += [(text, text[2:].split("=")[0], "--") for text in flags if text.startswith("--")]
    for shown, name, dashes in unknown:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        hint = f"did you mean {dashes}{near[0]}? " if near else ""
        parser.exit(2, f"{shown} is unknown to this recipe; {hint}--help lists all\n")
    if flags:
        parser.exit(2, f"not understood: {' '.join(flags)}; --help lists all flags\n")
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


def check_checkpoint(name: str | None) -> None:
    """Refuse a checkpoint that is not there, naming those that are.

    Raises:
        FileNotFoundError: If `name` is a path, and there is no such folder.
    """
    if name is None or name.lower() in ("true", "false") or Path(name).is_dir():
        return
    there = sorted(str(folder) for folder in Path(name).parent.glob("checkpoint-*"))
    raise FileNotFoundError(
        f"resume_from_checkpoint: there is no folder {name}; there are: {', '.join(there) or 'none'}"
    )


def train_and_save(trainer: Trainer, script_args: ScriptArguments, training_args: Any) -> None:
    """Train, from `resume_from_checkpoint` where it is given, and save the model and its card to `output_dir`."""
    check_checkpoint(training_args.resume_from_checkpoint)
    if script_args.ignore_bias_buffers:  # as TRL's own scripts do it
        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card()
    trainer.accelerator.print(f"The model is in {training_args.output_dir}")
    watcher = watcher_of(trainer)
    if watcher is not None:
        log = watcher.log_folder
        run = log.parent if log == Path(training_args.output_dir) / schema.FOLDER else log
        trainer.accelerator.print(f"What moved is in {log}; for one page: llm-dynamics report {run} -o report.html")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()
