"""Why did it move in this step? The tap on the loss, the split of the update, and the account of the change."""

from llm_dynamics.influence.account import (
    RULES,
    StepAccount,
    account_for_change,
    accounted_change,
    explained_share,
    inner_products,
    measured_change,
    path_gradient,
)
from llm_dynamics.influence.distribution import DistributionAccount, account_for_distribution
from llm_dynamics.influence.labelling import as_one, by_example, by_halves, by_push, by_sign
from llm_dynamics.influence.tape import LossTape, MicroBatch, trainable_parameters
from llm_dynamics.influence.training_tokens import TokenInfluence, influence_of_training_tokens
from llm_dynamics.influence.update import BeforeStep, MomentHistory, UpdateSplit, split_update

__all__ = [
    "RULES",
    "BeforeStep",
    "DistributionAccount",
    "LossTape",
    "MicroBatch",
    "MomentHistory",
    "StepAccount",
    "TokenInfluence",
    "UpdateSplit",
    "account_for_change",
    "account_for_distribution",
    "accounted_change",
    "as_one",
    "by_example",
    "by_halves",
    "by_push",
    "by_sign",
    "explained_share",
    "influence_of_training_tokens",
    "inner_products",
    "measured_change",
    "path_gradient",
    "split_update",
    "trainable_parameters",
]
