"""How a run is watched while it trains."""

from llm_dynamics.callbacks.displacement import DisplacementCallback
from llm_dynamics.callbacks.influence import InfluenceCallback
from llm_dynamics.callbacks.probe import ProbeCallback
from llm_dynamics.callbacks.squeezing_alert import SqueezingAlert
from llm_dynamics.callbacks.watch import watch
from llm_dynamics.callbacks.watch_config import WatchConfig

__all__ = ["DisplacementCallback", "InfluenceCallback", "ProbeCallback", "SqueezingAlert", "WatchConfig", "watch"]
