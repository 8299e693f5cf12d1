"""What a rule reads of a run and what it says: the run's tables, the thresholds, a finding and its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from llm_dynamics.frames.numbers import percent
from llm_dynamics.frames.resampling import Resamples, agreement

THRESHOLDS: Mapping[str, float] = {
    "least_nats": 0.01,  # a response's log-prob that moves less counts as one that stays: 1% of its probability
    "most": 0.5,  # of probes, prompts or families: more than this part of them is "most"
    "general_share": 0.8,  # of families that move the same way: nearly all that is watched
    "valley_p": 0.1,  # exp of rejected's mean log-prob per token before preference training
    "valley_tau0": 0.01,  # probability below which tokens fall with rejected; in a model that is sure of nothing, ~ 0
    "transfer_share": 0.25,  # of chosen's rise per token that other_train shows, beyond that of held-out answers
    "lazy_share": 0.25,  # of mixed questions whose correct answers did not rise
    "explained": 0.9,  # share of a step's change that the account must explain
    "measurable_nats": 1e-5,  # root mean square change of a probe token, below which float32 measures its own rounding
    "fewest_prompts": 6,  # of a family: resamples of fewer say little
    "truncated_share": 0.1,  # of probes that lost tokens
    "sure": 0.95,  # share of resamples that must decide as the run does, or the verdict says that it is unsure
}
LEAST = THRESHOLDS["least_nats"]


class RunTables(Protocol):
    """What a rule reads of a run: `runlog.RunLog` has it."""

    @property
    def meta(self) -> Mapping[str, Any]:
        """`meta.json`."""

    @property
    def probes(self) -> pd.DataFrame:
        """One row per probe."""

    @property
    def sequences(self) -> pd.DataFrame:
        """One row per probe and observation."""

    @property
    def accounts(self) -> pd.DataFrame:
        """One row per explained step."""

    @property
    def influence(self) -> pd.DataFrame:
        """One row per explained step, family or probe, and cause."""

    @property
    def displacements(self) -> pd.DataFrame:
        """One row per correct completion that a step was taken on."""


@dataclass(frozen=True)
class Finding:
    """What a rule says where the run tells.

    Attributes:
        found: (1 + R,) for the run itself and for each resample of its prompts or questions; (1,) where there are none.
        numbers: The numbers that decide, with units.
        drawn: What was resampled, such as "6 prompts"; empty where nothing is.
    """

    found: np.ndarray
    numbers: str
    drawn: str = ""

    @property
    def agreement(self) -> float | None:
        """Share of the resamples that decide as the run does; None where there are none."""
        return agreement(self.found)

    @property
    def doubt(self) -> str:
        """Why the decision is unsure; empty where it is not. A single prompt is one: it has no spread to resample."""
        if self.agreement is None:
            return f"unsure: it rests on {self.drawn} alone" if self.drawn else ""
        if self.agreement >= THRESHOLDS["sure"]:
            return ""
        return f"unsure: {percent(self.agreement)} of resamples of its {self.drawn} decide so"


Outcome = Finding | str
"""What a rule finds; or what is missing."""


def changes_of(sequences: pd.DataFrame) -> pd.DataFrame:
    """Return every probe with its change from the first to the last observation.

    Args:
        sequences: The sequences table.

    Returns:
        One row per probe with `prompt_id`, `family`, `n_tokens`; `delta` and `argmax_delta` (nats, of sums over the
        response), `collision_start` and `collision_end` (means over tokens). NaN where an end is missing or not finite.
        Empty where there are fewer than two observations.
    """
    names, values = ["prompt_id", "family", "n_tokens"], ["logp_sum", "argmax_logp_sum", "collision_sum"]
    steps = sequences["step"]
    compared = steps.nunique() > 1
    frame = sequences[sequences["step"].notna() & compared].drop_duplicates("probe_id").set_index("probe_id")[names]
    ends = []
    for step in (steps.min(), steps.max()):
        end = sequences[steps == step].drop_duplicates("probe_id").set_index("probe_id")[values]
        ends.append(end.apply(finite_values).reindex(frame.index))
    start, last = ends
    frame["delta"] = last["logp_sum"] - start["logp_sum"]
    frame["argmax_delta"] = last["argmax_logp_sum"] - start["argmax_logp_sum"]
    frame["collision_start"] = divided(start["collision_sum"], frame["n_tokens"])
    frame["collision_end"] = divided(last["collision_sum"], frame["n_tokens"])
    return frame


def family_changes(moved: pd.DataFrame) -> tuple[Resamples, dict[str, np.ndarray]]:
    """Return resamples of the prompts and, by family with a finite change, its mean change in each, (1 + R,), nats."""
    seen = moved[moved["delta"].notna()]
    prompts = Resamples(seen["prompt_id"])
    families = seen.groupby("family", sort=False)
    return prompts, {str(name): prompts.mean(rows["delta"], rows["prompt_id"]) for name, rows in families}


def finite_values(values: pd.Series) -> pd.Series:
    """Return values as floats, NaN where they are not finite."""
    numbers = values.astype(float)
    return numbers.where(np.isfinite(numbers))


def divided(values: pd.Series, by: pd.Series) -> pd.Series:
    """Return quotients, NaN where they are not finite."""
    return finite_values(finite_values(values) / finite_values(by))


def say_left_out(rows: pd.DataFrame, missing: pd.Series, why: str = "not finite, or not seen at both ends") -> str:
    """Say how many probes of which family a rule had to leave out; nothing where it had all of them."""
    if not missing.any():
        return ""
    totals = rows["family"].value_counts()
    counts = rows.loc[missing, "family"].value_counts(sort=False)
    named = ", ".join(f"{count} of {totals[family]} {family}" for family, count in counts.items())
    return f"; left out: {named} ({why})"
