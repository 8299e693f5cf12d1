"""Which statistics of a response there are: sums in the log, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from llm_dynamics.runlog import RunLog, schema

LOG_RATIO = "log_ratio"
"""log pi(response) - log pi_ref(response), nats: what DPO's implicit reward is beta times of."""
STATISTICS = (
    *(name.removesuffix("_sum") for name in schema.SEQUENCES.names if name.endswith("_sum")),
    "n_argmax",
    LOG_RATIO,
)
"""Names that `statistic=` takes; those of the sequences table may be written with their `_sum` too."""
KEYS = ("step", "probe_id", "prompt_id", "family", "n_tokens")


def sum_column(statistic: str) -> str:
    """Return the column that holds a statistic's sum over the tokens of a response, such as `logp_sum` for `logp`.

    Raises:
        ValueError: For a name that is not in `STATISTICS`, with or without `_sum`.
    """
    name = statistic.removesuffix("_sum")
    if name not in STATISTICS:
        raise ValueError(f"no statistic {statistic!r} in the sequences table; allowed: {', '.join(STATISTICS)}")
    return name if name == "n_argmax" else f"{name}_sum"


def read_sums(run: RunLog, statistics: Sequence[str]) -> pd.DataFrame:
    """Read some statistics of every probe and observation, and no other column.

    Args:
        run: The run log.
        statistics: Names in `STATISTICS`.

    Returns:
        One row per probe and observation, in the order of the log: `KEYS`, then for each statistic its `sum_column`,
        float64 (nats for log-probs and entropies); what was not measured is NaN.
    """
    wanted = list(dict.fromkeys(sum_column(name) for name in statistics))
    ratio = sum_column(LOG_RATIO)
    stored = [name for name in wanted if name != ratio]
    needed = dict.fromkeys([*stored, *(("logp_sum", "ref_logp_sum") if ratio in wanted else ())])
    frame = run.columns("sequences", [*KEYS, *needed])
    frame = frame.astype(dict.fromkeys(needed, "float64"))  # a column of nulls alone comes as objects
    if ratio in wanted:
        frame[ratio] = frame["logp_sum"] - frame["ref_logp_sum"]
    return frame[[*KEYS, *wanted]]
