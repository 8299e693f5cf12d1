"""What the examples of a trainer's batches are to its loss."""

from __future__ import annotations

from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer

from llm_dynamics.influence import as_one, by_halves, by_push
from llm_dynamics.influence.tape import Labelling


def role_labelling(trainer: Trainer) -> Labelling:
    """Return the labelling of training tokens by the role of their example.

    DPO: chosen, rejected (the halves of its batches). KTO: desirable, undesirable. GRPO, RLOO: correct, wrong, by the
    sign of the advantage, which is that of the example's summed coefficients. All others: trained.
    """
    if isinstance(trainer, DPOTrainer):
        return by_halves("chosen", "rejected")
    if isinstance(trainer, KTOTrainer):
        return by_push("desirable", "undesirable")
    if isinstance(trainer, GRPOTrainer | RLOOTrainer):
        return by_push("correct", "wrong")
    return as_one("trained")
