"""How likely is every response now, and where does the probability mass go? Pure functions of a model and tokens."""

from llm_dynamics.likelihood.forwards import count_forwards, idle_forwards
from llm_dynamics.likelihood.head import SplitModel, split_model
from llm_dynamics.likelihood.scoring import ResponseScores, TokenScores, score_logps, score_responses
from llm_dynamics.likelihood.sharded import is_sharded
from llm_dynamics.likelihood.squeezing import SqueezingStats, squeezing_stats
from llm_dynamics.likelihood.tables import sequence_table, token_table

__all__ = [
    "ResponseScores",
    "SplitModel",
    "SqueezingStats",
    "TokenScores",
    "count_forwards",
    "idle_forwards",
    "is_sharded",
    "score_logps",
    "score_responses",
    "sequence_table",
    "split_model",
    "squeezing_stats",
    "token_table",
]
