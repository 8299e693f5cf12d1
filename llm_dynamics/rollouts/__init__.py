"""Rollouts of reinforcement: responses in groups by question, with rewards."""

from llm_dynamics.rollouts.groups import Groups
from llm_dynamics.rollouts.rows import LossRow, loss_rows

__all__ = ["Groups", "LossRow", "loss_rows"]
