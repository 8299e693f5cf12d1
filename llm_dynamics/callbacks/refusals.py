"""What cannot be watched is refused when the callback is attached, by name, with the way out."""

from __future__ import annotations

from transformers import Trainer
from trl import RewardTrainer

from llm_dynamics import _trl


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
    options = args.gradient_checkpointing_kwargs
    checkpointing = args.gradient_checkpointing and isinstance(options, dict) and options.get("use_reentrant")
    reasons = {
        "FSDP shards weights and gradients over processes, and the account needs whole ones": trainer.is_fsdp_enabled,
        "DeepSpeed partitions optimizer state and gradients": trainer.is_deepspeed_enabled,
        "the model is quantised: its weights have no gradient path in full precision": getattr(
            model, "is_quantized", False
        ),
        "float16 mixed precision scales the loss and may skip steps (use bf16)": args.fp16,
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
