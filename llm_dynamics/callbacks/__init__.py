"""How a run is watched while it trains."""

from llm_dynamics.callbacks.displacement import DisplacementCallback
from llm_dynamics.callbacks.influence import InfluenceCallback
from llm_dynamics.callbacks.probe import ProbeCallback
from llm_dynamics.callbacks.watch import watch

__all__ = ["DisplacementCallback", "InfluenceCallback", "ProbeCallback", "watch"]
