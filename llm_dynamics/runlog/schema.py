"""The tables of a run log: names, columns, types and units. The single description of what lies on disk.

Layout under `<output_dir>/dynamics/`::

    meta.json                          one JSON object, see `runlog.writer.RunLogWriter`
    probes.parquet                     one row per probe, written once
    sequences/step_000000025.parquet   one row per probe
    tokens/step_000000025.parquet      one row per probe token (of the probes that keep tokens)
    steps/step_000000025.parquet       one row: the scalars of the observation; written last, so that its presence
                                       marks the observation as complete

The tables of the step account and of reinforcement lie beside them, see `influence_schema` and `rollout_schema`; the
mappings `ACCOUNT_TABLES` and `ROLLOUT_TABLES` are here as well.

Log-probabilities are natural logarithms (nats). A column that ends in `_sum` is a sum over the M response tokens of a
probe; divide by `n_tokens` for a mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from llm_dynamics.runlog.columns import described
from llm_dynamics.runlog.influence_schema import ACCOUNT_TABLES as ACCOUNT_TABLES
from llm_dynamics.runlog.influence_schema import ACCOUNTS as ACCOUNTS
from llm_dynamics.runlog.influence_schema import INFLUENCE as INFLUENCE
from llm_dynamics.runlog.rollout_schema import ROLLOUT_TABLES as ROLLOUT_TABLES

SCHEMA_VERSION = 1
FOLDER = "dynamics"
META_FILE = "meta.json"
PROBES_FILE = "probes.parquet"
ERRORS_FILE = "errors.txt"

PROBES = described(
    {
        "probe_id": (pa.string(), "unique name of the probe"),
        "prompt_id": (pa.string(), "probes of one prompt share it"),
        "family": (pa.string(), "family of the response, such as chosen or ungrammatical"),
        "prompt": (pa.string(), "prompt text; chat messages as JSON"),
        "response": (pa.string(), "response text"),
        "source_row": (pa.int64(), "row of the source data set, null where there is none"),
        "prompt_ids": (pa.list_(pa.int32()), "token ids of the prompt as fed to the model"),
        "response_ids": (pa.list_(pa.int32()), "token ids of the response as fed to the model, its ending included"),
        "n_cut": (pa.int32(), "tokens removed by truncation"),
    }
)

SEQUENCES = described(
    {
        "step": (pa.int64(), "optimizer steps done when observed"),
        "probe_id": (pa.string(), "see probes.parquet"),
        "prompt_id": (pa.string(), "see probes.parquet"),
        "family": (pa.string(), "see probes.parquet"),
        "n_tokens": (pa.int32(), "M, response tokens scored"),
        "n_nonfinite": (pa.int32(), "response tokens whose statistics are NaN or infinite"),
        "logp_sum": (pa.float64(), "sum_m log pi(y_m | own prefix), nats"),
        "ref_logp_sum": (pa.float64(), "the same under the reference model, null where there is none"),
        "entropy_sum": (pa.float64(), "sum_m H(pi_m), nats"),
        "argmax_logp_sum": (pa.float64(), "sum_m max_v log pi(v | own prefix): the greedy token at every own prefix"),
        "n_argmax": (pa.int32(), "tokens that are the greedy token at their prefix"),
        "rank_sum": (pa.float64(), "sum_m rank of y_m in the vocabulary, 1 = most likely"),
        "p_label_sum": (pa.float64(), "sum_m pi(y_m)"),
        "p_other_sum": (pa.float64(), "sum_m pi(y*_m), y* = the most likely token other than y_m"),
        "log1m_p_other_sum": (pa.float64(), "sum_m log(1 - pi(y*_m)), nats, by log1p"),
        "collision_sum": (pa.float64(), "sum_m sum_v pi_v^2, the collision probability"),
        "tau0_sum": (pa.float64(), "sum_m tau0, the riser threshold of an infinitesimal negative step on y_m"),
        "tau_sum": (pa.float64(), "sum_m tau(e), the riser threshold of a negative step of strength e"),
        "riser_count_sum": (pa.float64(), "sum_m number of tokens that rise under that step"),
        "riser_mass_sum": (pa.float64(), "sum_m probability mass of the tokens that rise"),
        "moved_to_other_sum": (pa.float64(), "sum_m probability that the step moves into y*"),
    }
)

TOKENS = described(
    {
        "step": (pa.int64(), "optimizer steps done when observed"),
        "probe_id": (pa.string(), "see probes.parquet"),
        "position": (pa.int32(), "m, index in the response, from 0"),
        "token_id": (pa.int32(), "y_m"),
        "token": (pa.string(), "decoded y_m"),
        "logp": (pa.float32(), "log pi(y_m | own prefix), nats"),
        "ref_logp": (pa.float32(), "the same under the reference model, null where there is none"),
        "entropy": (pa.float32(), "H(pi_m), nats"),
        "greedy_id": (pa.int32(), "most likely token at this prefix"),
        "greedy_token": (pa.string(), "decoded greedy_id"),
        "greedy_logp": (pa.float32(), "its log-prob, nats"),
        "other_id": (pa.int32(), "y*, most likely token other than y_m"),
        "other_logp": (pa.float32(), "its log-prob, nats"),
        "rank": (pa.int32(), "rank of y_m in the vocabulary, 1 = most likely"),
        "collision": (pa.float32(), "sum_v pi_v^2"),
        "tau0": (pa.float32(), "riser threshold of an infinitesimal negative step on y_m"),
        "tau": (pa.float32(), "riser threshold of a negative step of strength e (meta.json: squeeze_strength)"),
        "riser_count": (pa.int32(), "tokens that rise under that step"),
        "riser_mass": (pa.float32(), "their probability mass"),
    }
)

STEPS = described(
    {
        "step": (pa.int64(), "optimizer steps done when observed"),
        "epoch": (pa.float64(), "epoch of the trainer, fractional"),
        "seconds_observing": (pa.float64(), "wall time of this observation, scoring and writing"),
        "seconds_training": (pa.float64(), "wall time of training since the previous observation, watching excluded"),
        "overhead": (pa.float64(), "seconds watching / seconds training since training was (re)started, null at first"),
        "n_probes": (pa.int64(), "probes scored"),
        "n_response_tokens": (pa.int64(), "response tokens scored"),
        "n_nonfinite": (pa.int64(), "response tokens whose statistics are NaN or infinite"),
        "loss": (pa.float64(), "training loss of the trainer's last row, null before the first"),
        "learning_rate": (pa.float64(), "learning rate of the trainer's last row, null before the first"),
        "grad_norm": (pa.float64(), "gradient norm of the trainer's last row, null before the first"),
    }
)
"""Fixed columns of the steps table; the metrics of the run (`probe/...`, `squeeze/...`) follow as float64 columns."""

OBSERVED_TABLES: Mapping[str, pa.Schema] = {"sequences": SEQUENCES, "tokens": TOKENS, "steps": STEPS}
"""Tables with one part per observation, in the order they are written: `steps` is last and marks completeness."""

TABLES: Mapping[str, pa.Schema] = {**OBSERVED_TABLES, **ACCOUNT_TABLES, **ROLLOUT_TABLES}
"""All tables that are written in parts."""


def part_name(step: int) -> str:
    """Return the file name of the part of an observation at optimizer step `step`."""
    return f"step_{step:09d}.parquet"


def part_step(name: str) -> int | None:
    """Return the step of a part by its file name, or None where `name` is not a part's name."""
    match = re.fullmatch(r"step_([0-9]{9,})\.parquet", name)
    return int(match[1]) if match else None


def stamp(meta: Mapping[str, Any], table: str, step: int | None) -> dict[str, Any]:
    """Return what a part says of where it belongs: run, probes, table and step (None for the probes table)."""
    return {**{key: meta.get(key) for key in ("run_id", "probes_fingerprint")}, "table": table, "step": step}
