"""What the examples of a trainer's batches are to its loss."""

from __future__ import annotations

from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer

from llm_dynamics.influence import as_one, by_halves, by_push
from llm_dynamics.influence.tape import Labelling


def trained_on(trainer: Trainer) -> str | None:
    """Tell what a trainer's loss is given: by its kind, else by the columns of its rows, never by its name.

    Returns:
        "pairs" (chosen and rejected), "unpaired" (completions with a label: wanted or not), "rollouts" (completions
        that the model samples and that are rewarded), "plain" (texts), or None where the rows do not say.
    """
    for kind, given in ((SFTTrainer, "plain"), (DPOTrainer, "pairs"), (KTOTrainer, "unpaired")):
        if isinstance(trainer, kind):
            return given
    if hasattr(trainer, "reward_funcs"):
        return "rollouts"
    columns = list(getattr(trainer.train_dataset, "column_names", None) or ())
    begins = {start: any(name.startswith(start) for name in columns) for start in ("chosen", "rejected", "completion")}
    if begins["chosen"] and begins["rejected"]:
        return "pairs"
    if begins["completion"] and "label" in columns:
        return "unpaired"
    return "plain" if columns else None


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
