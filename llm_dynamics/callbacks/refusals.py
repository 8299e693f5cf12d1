"""What cannot be watched is refused when the callback is attached, by name, with the way out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from trl import RewardTrainer

from llm_dynamics import _trl
from llm_dynamics.kernel.derivatives import ResponseLogps
from llm_dynamics.likelihood import SplitModel
from llm_dynamics.likelihood.head import unwrap_model
from llm_dynamics.likelihood.packing import TokenizedResponse
from llm_dynamics.likelihood.preserve import evaluating


def refuse_unscorable(trainer: Trainer) -> None:
    """Check that response log-probs can be measured in this trainer.

    Args:
        trainer: The trainer that a callback is attached to.

    Raises:
        NotImplementedError: For reward models and FSDP1; the message says what was seen and what to do.
        ValueError: Where the trainer has no model or no tokenizer.
    """
    if isinstance(trainer, RewardTrainer):
        raise NotImplementedError(
            "RewardTrainer trains a scalar score head: a reward model gives responses no log-probability, so there is "
            "nothing to watch. Watch the policy that is trained with it."
        )
    if trainer.is_fsdp_enabled and not _trl.is_fsdp2(trainer):
        raise NotImplementedError(
            "FSDP version 1 flattens the parameters, and probes are scored with the model's own modules. Set "
            "fsdp_version: 2 in the accelerate config, train with DDP, or score saved checkpoints."
        )
    if trainer.model is None:
        raise ValueError("the trainer has no model yet (model_init is not supported): build it with `model=`")
    if trainer.processing_class is None:
        raise ValueError("the trainer has no tokenizer: pass `processing_class=` when building it")


def refuse_unexplainable(trainer: Trainer) -> None:
    """Check that optimizer steps can be explained in this trainer: more than `refuse_unscorable` asks for.

    Args:
        trainer: The trainer that a callback is attached to.

    Raises:
        NotImplementedError: For what the step account cannot see through; the message says what was seen, and that
            probes can be watched without it.
        ValueError: As for `refuse_unscorable`.
    """
    refuse_unscorable(trainer)
    args, model = trainer.args, trainer.model
    mixed = trainer.accelerator.mixed_precision
    assert model is not None, "refused above"
    formats = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    unknown = sorted(formats - {"float64", "float32", "bfloat16"})
    named = getattr(args.optim, "value", str(args.optim))
    optimizer = named if trainer.optimizer is None else type(trainer.optimizer).__name__
    options = args.gradient_checkpointing_kwargs
    checkpointing = args.gradient_checkpointing and isinstance(options, dict) and options.get("use_reentrant")
    reasons = {
        "FSDP shards weights and gradients over processes, and the account needs whole ones": trainer.is_fsdp_enabled,
        "DeepSpeed partitions optimizer state and gradients": trainer.is_deepspeed_enabled,
        "the model is quantised: its weights have no gradient path in full precision": getattr(
            model, "is_quantized", False
        ),
        "float16 mixed precision scales the loss and may skip steps (use bf16)": args.fp16 or mixed == "fp16",
        f"{mixed} mixed precision computes in a format that the account does not know (use bf16)": mixed
        not in ("no", "bf16", "fp16"),
        f"the trained weights are {', '.join(unknown)}: gradients and the optimizer's second moment underflow in it, "
        "so that most weights get no step or an infinite one (train in bfloat16 or float32)": bool(unknown),
        f"{optimizer} steps layer by layer inside backward, before the gradient of the step is whole": any(
            part in optimizer.lower() for part in ("layerwise", "lomo")
        ),
        "torch_compile traces the forward that the account taps (turn it off)": args.torch_compile,
        "Liger kernels return neither log-probs nor logits (turn use_liger_kernel off)": args.use_liger_kernel,
        "reentrant gradient checkpointing has no second backward (gradient_checkpointing_kwargs="
        '{"use_reentrant": False})': bool(checkpointing),
        "offloaded activations are given back once, and the account needs a second backward (turn "
        "activation_offloading off)": getattr(args, "activation_offloading", False),
        "nn.DataParallel trains replicas of the model in one process (start one process per GPU, with `accelerate "
        "launch`)": args.n_gpu > 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise NotImplementedError(
                f"steps of this run cannot be explained: {reason}. Watch the probes alone: watch(trainer, probes)."
            )


def refuse_underivable(trainer: Trainer, responses: Sequence[TokenizedResponse], split: SplitModel) -> None:
    """Check, on a few tokens, that the model has the derivatives that the account takes; it is left as it was.

    Args:
        trainer: The trainer.
        responses: The probes.
        split: The model's halves.

    Raises:
        NotImplementedError: Where some layer has none; the message names the layer.
        RuntimeError: For lack of memory.
    """
    model = trainer.model
    assert model is not None, "refused before"
    shortest = min(responses, key=lambda response: len(response.prompt_ids) + len(response.response_ids))
    few = SimpleNamespace(prompt_ids=shortest.prompt_ids[-2:], response_ids=shortest.response_ids[:2])
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with _trl.outside_autocast(model), evaluating(model), _noting_layers(model) as entered:
        logps = ResponseLogps(model, [few], split=split)
        try:
            logps.jvp(weights, weights)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise NotImplementedError(
                f"steps of this run cannot be explained: {entered[-1][1] if entered else 'the model'} has no "
                f"forward-mode derivative ({str(error).splitlines()[0][:200]}). Use a layer or adapter made of torch's "
                "own operations, such as LoRA, or watch the probes alone: watch(trainer, probes)."
            ) from error


@contextmanager
def _noting_layers(model: nn.Module) -> Iterator[list[tuple[nn.Module, str]]]:
    """Yield the layers whose forward has begun and not ended, with their names: where it fails, the last is the one."""
    entered: list[tuple[nn.Module, str]] = []

    def describe(kind: type) -> str:
        return f"{kind.__module__}.{kind.__qualname__}"

    def enter(name: str) -> Any:
        return lambda module, args: entered.append((module, f"{name or 'the model'} ({describe(type(module))})"))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        while entered and entered.pop()[0] is not module:
            pass

    handles = [module.register_forward_pre_hook(enter(name)) for name, module in model.named_modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def refuse_unwritable(folder: Path) -> None:
    """Check that a run log can be written to a folder, by writing to it or to the nearest folder above that exists.

    Args:
        folder: The run-log folder; it need not exist.

    Raises:
        NotADirectoryError: Where a file stands in its place, or in that of a folder above.
        OSError: Where nothing can be written there; the message names the folder.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"the run log cannot be written to {folder}: {there} is a file. Choose a log_folder=")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0")
    except OSError as error:
        raise type(error)(
            error.errno, f"the run log cannot be written to {folder} ({error.strerror}). Choose a log_folder="
        ) from error


def refuse_replaced_model(trainer: Trainer) -> None:
    """Check that the model that is watched is the one that is trained.

    Args:
        trainer: The trainer, once training has begun.

    Raises:
        RuntimeError: Where `trainer.model` was replaced and the trainer goes on with the old one.
    """
    trained: Any
    watched: Any
    trained, watched = trainer.accelerator.unwrap_model(trainer.model_wrapped), trainer.model
    if unwrap_model(trained) is not unwrap_model(watched):
        raise RuntimeError(
            "trainer.model was replaced, and the trainer trains the model that it was built with (its model_wrapped): "
            "build a trainer with the model that is to be trained"
        )
