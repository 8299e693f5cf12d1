"""What cannot be watched is refused when the callback is attached, by name, with the way out."""

from __future__ import annotations

from transformers import Trainer
from trl import RewardTrainer


def refuse_unscorable(trainer: Trainer) -> None:
    """Check that response log-probs can be measured in this trainer.

    Args:
        trainer: The trainer that a callback is attached to.

    Raises:
        NotImplementedError: For reward models and sharded parameters; the message says what was seen and what to do.
        ValueError: Where the trainer has no model or no tokenizer.
    """
    if isinstance(trainer, RewardTrainer):
        raise NotImplementedError(
            "RewardTrainer trains a scalar score head: a reward model gives responses no log-probability, so there is "
            "nothing to watch. Watch the policy that is trained with it."
        )
    if trainer.is_fsdp_enabled:
        raise NotImplementedError(
            "FSDP shards the parameters over processes, and probes are scored with whole ones. Train with DDP "
            "(distributed_type: MULTI_GPU), or score saved checkpoints."
        )
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise NotImplementedError(
            "DeepSpeed ZeRO-3 shards the parameters over processes, and probes are scored with whole ones. Use ZeRO-1 "
            "or ZeRO-2, or score saved checkpoints."
        )
    if trainer.model is None:
        raise ValueError("the trainer has no model yet (model_init is not supported): build it with `model=`")
    if trainer.processing_class is None:
        raise ValueError("the trainer has no tokenizer: pass `processing_class=` when building it")
