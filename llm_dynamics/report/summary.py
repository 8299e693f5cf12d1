"""The frames of `llm_dynamics.frames` under the names by which the report knew them."""

from llm_dynamics.frames import SQUEEZING, family_curves, margin_path, squeezing_curves, what_moved

__all__ = ["SQUEEZING", "family_curves", "margin_path", "squeezing_curves", "what_moved"]
