"""The tables of reinforcement: rollouts, what was done to their tokens, and what the step did to correct ones.

They lie beside the observations, each part complete on its own::

    rollouts/step_000000025.parquet       one row per completion of the generation that the step was the first to use
    nthr_tokens/step_000000025.parquet    one row per token of these completions that the loss takes
    displacements/step_000000025.parquet  one row per correct completion that the step was taken on (mixed questions)
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from llm_dynamics.runlog.columns import described

_STEP = (pa.int64(), "optimizer steps done after the first update on these completions")
_EXAMPLE = (pa.int32(), "index of the completion in the global batch")
_QUESTION = (pa.int32(), "index of the question in the global batch; its completions are a group")

ROLLOUTS = described(
    {
        "step": _STEP,
        "example": _EXAMPLE,
        "question": _QUESTION,
        "prompt": (pa.string(), "prompt as fed to the model, decoded"),
        "completion": (pa.string(), "completion, decoded, special tokens included"),
        "n_tokens": (pa.int32(), "tokens that the loss takes"),
        "reward": (pa.float64(), "weighted sum of the reward functions, null where none gave one"),
        "correct": (pa.bool_(), "reward >= nthr_correct, null without a reward"),
        "advantage": (pa.float64(), "advantage of the completion before shaping"),
        "success_rate": (pa.float64(), "p, share of correct completions of the question, null without rewards"),
        "eta": (pa.float64(), "factor on selected tokens, null where the group was not scored"),
        "threshold": (pa.float64(), "tau, null where the group was not scored"),
        "anchor": (pa.float64(), "s+, mean score of a correct completion's tokens, null elsewhere"),
        "n_selected": (pa.int32(), "tokens whose penalty was multiplied with eta"),
    }
)

NTHR_TOKENS = described(
    {
        "step": _STEP,
        "example": _EXAMPLE,
        "question": _QUESTION,
        "position": (pa.int32(), "index in the completion, from 0"),
        "token_id": (pa.int32(), "token id"),
        "token": (pa.string(), "decoded token"),
        "score": (pa.float64(), "s, or the hidden reward with nthr_method='thr'; null where the token was not scored"),
        "threshold": (pa.float64(), "tau of the group, null where it was not scored"),
        "selected": (pa.bool_(), "whether the penalty was multiplied with eta"),
        "advantage_before": (pa.float64(), "advantage of the completion"),
        "advantage": (pa.float64(), "advantage of the token in the loss"),
    }
)

DISPLACEMENTS = described(
    {
        "step": (pa.int64(), "optimizer steps done after the step measured"),
        "example": (pa.int32(), "index of the completion in the generation; a second one of the step counts on"),
        "question": (pa.int32(), "index of the question, likewise; its completions are a group"),
        "prompt": (pa.string(), "prompt as fed to the model, decoded"),
        "completion": (pa.string(), "completion, decoded, special tokens included"),
        "n_tokens": (pa.int32(), "tokens of the completion that the loss takes"),
        "success_rate": (pa.float64(), "p, share of correct completions of the question"),
        "logp_before": (pa.float64(), "sum of log pi of these tokens before the step, temperature 1, nats"),
        "logp_after": (pa.float64(), "the same after the step, nats"),
    }
)

ROLLOUT_TABLES: Mapping[str, pa.Schema] = {
    "rollouts": ROLLOUTS,
    "nthr_tokens": NTHR_TOKENS,
    "displacements": DISPLACEMENTS,
}
"""Tables with one part per generation that was looked at."""
