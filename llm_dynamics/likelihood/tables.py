"""Scores as tables: one row per probe, one row per probe token, with the columns of the run log."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from llm_dynamics.likelihood.scoring import ResponseScores

SQUEEZE_COLUMNS = ("p_label", "p_other", "log1m_p_other", "collision", "tau0", "tau", "riser_mass", "moved_to_other")


def sequence_table(scores: ResponseScores, probes: pd.DataFrame) -> pd.DataFrame:
    """Sum the token statistics over each response.

    Args:
        scores: Scores of P responses.
        probes: P rows in the same order, with `probe_id`, `prompt_id` and `family`.

    Returns:
        One row per probe with the columns of `runlog.schema.SEQUENCES`, `step` excepted: sums over the response's
        tokens in float64, nats where they are log-probs. A NaN or infinity of one token makes its response's sum one;
        `n_nonfinite` counts such tokens.
    """
    tokens, squeezing = scores.tokens, scores.tokens.squeezing

    def total(values: Tensor) -> np.ndarray:
        return scores.sum_by_response(values).numpy()

    def total_of_ids(values: Tensor) -> np.ndarray:  # -1 stands for "undefined" in integer statistics
        return total(torch.where(values < 0, torch.nan, values.double()))

    frame = probes[["probe_id", "prompt_id", "family"]].reset_index(drop=True).copy()
    frame["n_tokens"] = scores.lengths.numpy()
    frame["n_nonfinite"] = total(~tokens.finite).astype(np.int64)
    frame["logp_sum"] = total(tokens.logp)
    if scores.ref_logp is not None:
        frame["ref_logp_sum"] = total(scores.ref_logp)
    frame["entropy_sum"] = total(tokens.entropy)
    frame["argmax_logp_sum"] = total(tokens.greedy_logp)
    frame["n_argmax"] = total(tokens.greedy_id == tokens.token_id).astype(np.int64)
    frame["rank_sum"] = total_of_ids(tokens.rank)
    frame["riser_count_sum"] = total_of_ids(squeezing.riser_count)
    for name in SQUEEZE_COLUMNS:
        frame[f"{name}_sum"] = total(getattr(squeezing, name))
    return frame


def token_table(scores: ResponseScores, probe_ids: Sequence[str], decode: Callable[[int], str]) -> pd.DataFrame:
    """Lay the token statistics out as rows.

    Args:
        scores: Scores of P responses.
        probe_ids: Their P ids, in the same order.
        decode: Text of one token id.

    Returns:
        One row per response token with the columns of `runlog.schema.TOKENS`, `step` excepted.
    """
    tokens, squeezing = scores.tokens, scores.tokens.squeezing
    lengths = scores.lengths.numpy()
    columns = {
        "probe_id": np.repeat(np.asarray(probe_ids, dtype=object), lengths),
        "position": np.concatenate([np.arange(length) for length in lengths]),
        "token_id": tokens.token_id.numpy(),
        "logp": tokens.logp.numpy(),
        "entropy": tokens.entropy.numpy(),
        "greedy_id": tokens.greedy_id.numpy(),
        "greedy_logp": tokens.greedy_logp.numpy(),
        "other_id": squeezing.other_id.numpy(),
        "other_logp": tokens.other_logp.numpy(),
        "rank": tokens.rank.numpy(),
        "collision": squeezing.collision.numpy(),
        "tau0": squeezing.tau0.numpy(),
        "tau": squeezing.tau.numpy(),
        "riser_count": squeezing.riser_count.numpy(),
        "riser_mass": squeezing.riser_mass.numpy(),
    }
    if scores.ref_logp is not None:
        columns["ref_logp"] = scores.ref_logp.numpy()
    frame = pd.DataFrame(columns)
    texts = {token: decode(token) if token >= 0 else "" for token in {*frame["token_id"], *frame["greedy_id"]}}
    frame["token"] = frame["token_id"].map(texts)
    frame["greedy_token"] = frame["greedy_id"].map(texts)
    return frame
