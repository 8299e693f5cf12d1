"""What `NTHRGRPOTrainer` cannot score is refused when it is built, by name, with the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_dynamics import _trl
from llm_dynamics.trainers.nthr.config import SCORED_METHODS

if TYPE_CHECKING:
    from llm_dynamics.trainers.nthr.trainer import NTHRGRPOTrainer


def refuse_what_cannot_be_scored(trainer: NTHRGRPOTrainer, *, evaluates: bool) -> None:
    """Check that the tokens of this trainer's rollouts can be scored; methods without scores pass.

    Args:
        trainer: The trainer, as TRL has built it.
        evaluates: Whether it has a data set for evaluation.

    Raises:
        NotImplementedError: For vision-language models, and for the exact kernel where parameters are sharded.
        ValueError: For the exact kernel where a group may lie on several processes.
    """
    args = trainer.config
    if args.nthr_method not in SCORED_METHODS:
        return
    if _trl.takes_images(trainer):
        raise NotImplementedError(
            f"nthr_method={args.nthr_method!r} scores text completions; {type(trainer.model).__name__} takes images"
        )
    if args.nthr_kernel != "exact":
        return
    if _trl.is_fsdp2(trainer) or _trl.is_zero3(trainer):
        raise NotImplementedError(
            "nthr_kernel='exact' needs whole gradients, and the parameters are sharded: set 'last_layer'"
        )
    local = args.per_device_train_batch_size * (args.steps_per_generation or 1)
    size = _trl.group_size(trainer, training=True)
    if local % size:
        raise ValueError(
            f"nthr_kernel='exact' needs whole groups on every process; seen {local} responses a process "
            f"(per_device_train_batch_size x steps_per_generation) in groups of {size}"
        )
    local, size = args.per_device_eval_batch_size, _trl.group_size(trainer, training=False)
    if evaluates and local % size:
        raise ValueError(
            f"nthr_kernel='exact' needs whole groups on every process, also in evaluation; seen {local} responses "
            f"a process (per_device_eval_batch_size) in groups of {size}"
        )
