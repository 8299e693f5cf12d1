"""How likely is every response now, and where does the probability mass go? Pure functions of a model and tokens."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_dynamics.likelihood.forwards import count_forwards, idle_forwards
    from llm_dynamics.likelihood.head import SplitModel, split_model
    from llm_dynamics.likelihood.scoring import ResponseScores, TokenScores, score_logps, score_responses
    from llm_dynamics.likelihood.sharded import is_sharded
    from llm_dynamics.likelihood.squeezing import SqueezingStats, squeezing_stats
    from llm_dynamics.likelihood.tables import sequence_table, token_table
    from llm_dynamics.likelihood.verdicts import Verdict, judge

__all__ = [
    "ResponseScores",
    "SplitModel",
    "SqueezingStats",
    "TokenScores",
    "Verdict",
    "count_forwards",
    "idle_forwards",
    "is_sharded",
    "judge",
    "score_logps",
    "score_responses",
    "sequence_table",
    "split_model",
    "squeezing_stats",
    "token_table",
]

_FILES = {
    "forwards": ("count_forwards", "idle_forwards"),
    "head": ("SplitModel", "split_model"),
    "scoring": ("ResponseScores", "TokenScores", "score_logps", "score_responses"),
    "sharded": ("is_sharded",),
    "squeezing": ("SqueezingStats", "squeezing_stats"),
    "tables": ("sequence_table", "token_table"),
    "verdicts": ("Verdict", "judge"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `verdicts` reads a log, and that must not load torch.

    Raises:
        AttributeError: For a name that is not public.
    """
    for file, names in _FILES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
