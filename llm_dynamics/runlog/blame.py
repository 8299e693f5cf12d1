"""Which rows of the training data moved a family? Shares of training tokens, summed by row."""

from __future__ import annotations

import numpy as np
import pandas as pd

_TEXT = ["role", "prompt", "response"]


def blame(tokens: pd.DataFrame, examples: pd.DataFrame, target: str) -> pd.DataFrame:
    """Sum what each row of the training data did to a target over the explained steps; see `RunLog.blame`.

    Args:
        tokens: Columns `step`, `target`, `example` and `share` of `schema.TRAINING_TOKENS`.
        examples: Rows of `schema.TRAINING_EXAMPLES`.
        target: A family, or a probe id.

    Returns:
        See `RunLog.blame`.

    Raises:
        ValueError: Where no training token was told for the target.
    """
    told = tokens[tokens["target"] == target]
    if told.empty:
        known = ", ".join(map(repr, sorted(tokens["target"].unique()))) or "none"
        raise ValueError(
            f"no training token is told for {target!r}; told: {known}. Watch with "
            f"influence={{'training_tokens': [{target!r}]}} to have them in the explained steps"
        )
    finite = np.isfinite(told["share"])
    told = told.assign(share=told["share"].where(finite, 0.0), n_nonfinite=~finite)
    sums = told.groupby(["step", "example"])[["share", "n_nonfinite"]].sum().reset_index()
    seen = examples.merge(sums, on=["step", "example"], validate="one_to_one")
    seen = seen.assign(row=seen["row"].astype("Int64").fillna(-1), n_tokens=seen["n_tokens"].astype("int64"))
    by_row = seen.groupby(["row", *_TEXT], sort=False, dropna=False).agg(
        share=("share", "sum"),
        c_sum=("c_sum", "sum"),
        n_steps=("step", "nunique"),
        n_tokens=("n_tokens", "first"),
        n_nonfinite=("n_nonfinite", "sum"),
    )
    frame = by_row.reset_index().sort_values("share", kind="stable", ignore_index=True)
    return frame.assign(row=frame["row"].where(frame["row"] >= 0))
