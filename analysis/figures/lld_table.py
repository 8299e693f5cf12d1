"""The change Delta(x) of the correct answers of each question: from the file of `analysis/lld.py`, or from run logs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from log_runs import Seeds

CSV = Path(__file__).parents[1] / "results" / "lld.csv"
"""What `analysis/lld.py --out analysis/results/lld` leaves."""
NEEDED = ("seed", "question", "arm", "delta")


def read_lld(path: Path, *, columns: tuple[str, ...] = ()) -> pd.DataFrame:
    """Read the table that `analysis/lld.py` wrote.

    Args:
        path: Of the CSV.
        columns: Needed beside `seed`, `question`, `arm` and `delta`.

    Returns:
        One row per seed, question and arm.

    Raises:
        ValueError: Where there is no such file, columns are missing, or a question has no or several rows of the arm
            `grpo`.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; `python analysis/lld.py --out analysis/results/lld` writes one")
    table = pd.read_csv(path)
    if missing := [name for name in (*NEEDED, *columns) if name not in table]:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}; seen: {', '.join(table.columns)}")
    if table.duplicated(["seed", "question", "arm"]).any():
        raise ValueError(f"{path} has two rows of one seed, question and arm")
    if not (table["arm"] == "grpo").any():
        raise ValueError(f"{path} has no arm 'grpo' to compare with; arms: {', '.join(sorted(set(table['arm'])))}")
    return table


def displacements(runs: Mapping[str, Seeds]) -> pd.DataFrame:
    """Return Delta(x) of the questions whose step was measured during training.

    `Delta = mean over the correct completions of the question of logp_after - logp_before`, sums over tokens, nats.

    Args:
        runs: Run logs by name, of GRPO trainers watched with `displacement=True`.

    Returns:
        One row per run, seed (place among the run's logs), step and question: `run`, `seed`, `step`, `question`,
        `prompt`, `delta`, `n_correct`. Completions whose numbers are not finite are left out.

    Raises:
        ValueError: For a run without displacements.
    """
    frames = []
    for name, logs in runs.items():
        for seed, log in enumerate(logs):
            rows = log.displacements
            if rows.empty:
                raise ValueError(
                    f"{log.path} has no displacements: watch a GRPO or RLOO trainer with displacement=True. Runs that "
                    "have some: those of `llm-dynamics demo --grpo`"
                )
            rows = rows.assign(delta=rows["logp_after"] - rows["logp_before"])
            rows = rows[np.isfinite(rows["delta"])]
            grouped = rows.groupby(["step", "question"])
            table = grouped.agg(prompt=("prompt", "first"), delta=("delta", "mean"), n_correct=("delta", "size"))
            frames.append(table.reset_index().assign(run=name, seed=seed))
    columns = ["run", "seed", "step", "question", "prompt", "delta", "n_correct"]
    return pd.concat(frames, ignore_index=True)[columns]
