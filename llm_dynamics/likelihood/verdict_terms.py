"""What a rule reads of a run and what it says: the run's tables, the thresholds, a finding and its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from llm_dynamics.likelihood.resampling import agreement

THRESHOLDS: Mapping[str, float] = {
    "least_nats": 0.01,  # a response's log-prob that moves less counts as one that stays: 1% of its probability
    "displaced_share": 0.5,  # of chosen probes that lie below their start
    "falling_share": 0.8,  # of families that fall while the greedy tokens rise
    "valley_p": 0.1,  # exp of rejected's mean log-prob per token before preference training
    "valley_tau0": 0.01,  # probability below which tokens fall with rejected; in a model that is sure of nothing, ~ 0
    "transfer_share": 0.25,  # of chosen's rise per token that other_train shows, beyond that of held-out answers
    "lazy_share": 0.25,  # of mixed questions whose correct answers did not rise
    "explained": 0.9,  # share of a step's change that the account must explain
    "measurable_nats": 1e-5,  # root mean square change of a probe token, below which float32 measures its own rounding
    "fewest_probes": 10,  # of a family
    "truncated_share": 0.1,  # of probes that lost tokens
    "sure": 0.95,  # share of resamples that must decide as the run does, or the verdict says that it is unsure
}


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
        drawn: What was resampled, such as "6 prompts".
    """

    found: np.ndarray
    numbers: str
    drawn: str = ""

    @property
    def agreement(self) -> float | None:
        """Share of the resamples that decide as the run does; None where there are none."""
        return agreement(self.found)

    @property
    def evidence(self) -> str:
        """The numbers, and how sure the decision is where it is not."""
        if self.agreement is None or self.agreement >= THRESHOLDS["sure"]:
            return self.numbers
        return f"{self.numbers}; unsure: {self.agreement:.0%} of resamples of its {self.drawn} decide so"


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


def finite_values(values: pd.Series) -> pd.Series:
    """Return values as floats, NaN where they are not finite."""
    numbers = values.astype(float)
    return numbers.where(np.isfinite(numbers))


def divided(values: pd.Series, by: pd.Series) -> pd.Series:
    """Return quotients, NaN where they are not finite."""
    return finite_values(finite_values(values) / finite_values(by))


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun, such as "6 prompts"."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def say_left_out(rows: pd.DataFrame, missing: pd.Series, why: str = "not finite, or not seen at both ends") -> str:
    """Say how many probes of which family a rule had to leave out; nothing where it had all of them."""
    if not missing.any():
        return ""
    totals = rows["family"].value_counts()
    counts = rows.loc[missing, "family"].value_counts(sort=False)
    named = ", ".join(f"{count} of {totals[family]} {family}" for family, count in counts.items())
    return f"; left out: {named} ({why})"
