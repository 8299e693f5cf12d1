"""Trainers that change what a step does, built on TRL's by overriding as little as possible; one folder per method."""

from llm_dynamics.trainers.displacement import measure_lld
from llm_dynamics.trainers.nthr import NTHRConfig, NTHRGRPOTrainer

__all__ = ["NTHRConfig", "NTHRGRPOTrainer", "measure_lld"]
