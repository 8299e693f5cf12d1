"""GRPO with negative-token-hidden-reward (NTHR) down-weighting, and its relatives."""

from llm_dynamics.trainers.nthr.config import NTHRConfig
from llm_dynamics.trainers.nthr.trainer import NTHRGRPOTrainer

__all__ = ["NTHRConfig", "NTHRGRPOTrainer"]
