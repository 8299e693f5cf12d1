"""Which numbers does a log give? Typed pandas frames that the page, scripts and users share.

Reads only what `runlog` wrote; never loads a model. Non-finite values are never averaged in and never hidden: each
frame says how many probes, or tokens, its means are taken over or had to leave out.
"""

from llm_dynamics.frames.alignment import align
from llm_dynamics.frames.bootstrap import prompt_interval
from llm_dynamics.frames.changes import delta
from llm_dynamics.frames.comparison import compare
from llm_dynamics.frames.curves import family_curves
from llm_dynamics.frames.moved import margin_path, what_moved
from llm_dynamics.frames.order import ARGMAX, GREEDY, argmax_of, ordered
from llm_dynamics.frames.squeezing import SQUEEZING, squeezing_curves
from llm_dynamics.frames.statistics import STATISTICS
from llm_dynamics.frames.tokens import TOKEN_STATISTICS, token_curves

__all__ = [
    "ARGMAX",
    "GREEDY",
    "SQUEEZING",
    "STATISTICS",
    "TOKEN_STATISTICS",
    "align",
    "argmax_of",
    "compare",
    "delta",
    "family_curves",
    "margin_path",
    "ordered",
    "prompt_interval",
    "squeezing_curves",
    "token_curves",
    "what_moved",
]
