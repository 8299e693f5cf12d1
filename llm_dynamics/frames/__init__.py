"""Which numbers does a log give? Typed pandas frames that the page, scripts and users share.

Reads only what `runlog` wrote; never loads a model. Non-finite values are never averaged in and never hidden: each
frame says how many probes it had to leave out.
"""

from llm_dynamics.frames.curves import family_curves
from llm_dynamics.frames.moved import margin_path, what_moved
from llm_dynamics.frames.order import ARGMAX, argmax_of, ordered
from llm_dynamics.frames.squeezing import SQUEEZING, squeezing_curves

__all__ = [
    "ARGMAX",
    "SQUEEZING",
    "argmax_of",
    "family_curves",
    "margin_path",
    "ordered",
    "squeezing_curves",
    "what_moved",
]
