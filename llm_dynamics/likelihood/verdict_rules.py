"""The rules behind the verdicts: each reads a run's tables and says what it finds there, or what is missing.

A rule decides for the run as it is and for resamples of its prompts (of its questions, in reinforcement), so that a
verdict can say whether it hangs on a few of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from llm_dynamics.likelihood.resampling import Resamples, agreement

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


def find_displacement(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find chosen responses that fall although their margin over rejected grows."""
    pair = moved[moved["family"].isin(["chosen", "rejected"])]
    finite = pair[pair["delta"].notna()]
    chosen, rejected = (finite[finite["family"] == family] for family in ("chosen", "rejected"))
    if chosen.empty or rejected.empty:
        return "needs the families chosen and rejected, finite at two observations"
    margins = chosen.groupby("prompt_id")["delta"].mean() - rejected.groupby("prompt_id")["delta"].mean()
    margins = margins.dropna()
    if margins.empty:
        return "no prompt has both chosen and rejected"
    fell = chosen["delta"] < -THRESHOLDS["least_nats"]
    prompts = Resamples(chosen["prompt_id"])
    share = prompts.mean(fell, chosen["prompt_id"])
    change = prompts.mean(chosen["delta"], chosen["prompt_id"])
    margin = prompts.mean(margins, margins.index.to_series())
    found = (share > THRESHOLDS["displaced_share"]) & (change < -THRESHOLDS["least_nats"])
    found &= margin > THRESHOLDS["least_nats"]
    return Finding(
        found,
        f"chosen {change[0]:+.2f} nats on average, {fell.sum()} of its {_counted(len(chosen), 'probe')} below their "
        f"start; margin over rejected {margin[0]:+.2f} nats{_left_out(pair, pair['delta'].isna())}",
        _counted(prompts.size, "prompt"),
    )


def find_squeezing(run: RunTables | None, moved: pd.DataFrame) -> Outcome:
    """Find mass that goes into the greedy tokens while nearly everything that is watched falls."""
    if moved.empty:
        return "needs two observations"
    pushed = moved["family"] == "rejected"
    where = "rejected" if pushed.any() else "all probes"
    pushed = pushed if pushed.any() else ~pushed
    peaks = ["argmax_delta", "collision_start", "collision_end"]
    missing = moved["delta"].isna() | (pushed & moved[peaks].isna().any(axis=1))
    peaked = moved[pushed & moved[peaks].notna().all(axis=1)]
    families = moved[moved["delta"].notna()].groupby("family")
    if not len(families) or peaked.empty:
        return "needs finite greedy tokens and collision probabilities at two observations"
    prompts = Resamples(moved["prompt_id"])
    changes = {name: prompts.mean(rows["delta"], rows["prompt_id"]) for name, rows in families}
    n_fell = np.sum([change < -THRESHOLDS["least_nats"] for change in changes.values()], axis=0)  # (1 + R,)
    rise, before, after = (prompts.mean(peaked[name], peaked["prompt_id"]) for name in peaks)
    found = (rise > THRESHOLDS["least_nats"]) & (after > before)
    found &= n_fell / len(changes) >= THRESHOLDS["falling_share"]
    stayed = [str(name) for name, change in changes.items() if not change[0] < -THRESHOLDS["least_nats"]]
    but = f" (not {', '.join(stayed)})" if 0 < len(stayed) <= 3 and n_fell[0] else ""
    return Finding(
        found,
        f"{n_fell[0]} of {_counted(len(changes), 'family', 'families')} fell{but}; along {where} the greedy tokens "
        f"{rise[0]:+.2f} nats, collision probability {before[0]:.3g} to {after[0]:.3g}{_left_out(moved, missing)}",
        _counted(prompts.size, "prompt"),
    )


def find_valley(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find rejected responses that are unlikely, where the model is sure of something else, before they are pushed."""
    if not any(name in str(run.meta.get("trainer", "")) for name in _PREFERENCE):
        return "asked of preference training only"
    rejected = run.sequences[run.sequences["family"] == "rejected"]
    rejected = rejected[rejected["step"] == run.sequences["step"].min()]
    rate = _divided(rejected["logp_sum"], rejected["n_tokens"])
    seen = rejected[rate.notna()]
    if seen.empty:
        return "needs the family rejected, finite at the first observation"
    if seen["step"].min() > 0:
        return f"needs an observation before the first step; the first in this log is of step {seen['step'].min()}"
    prompts = Resamples(seen["prompt_id"])
    mean = prompts.mean(rate[seen.index], seen["prompt_id"])
    found = mean < math.log(THRESHOLDS["valley_p"])
    p = math.exp(min(mean[0], 0.0))  # rounding may lift a log-prob above zero
    numbers = f"rejected starts at {p:.3g} per token (geometric mean over {_counted(len(seen), 'probe')})"
    if seen["tau0_sum"].notna().any():
        # tau0 = collision probability - p(label) is the probability above which another token rises
        excess = prompts.mean(_divided(seen["tau0_sum"], seen["n_tokens"]), seen["prompt_id"])
        found &= excess > THRESHOLDS["valley_tau0"]
        fate = f"tokens below probability {excess[0]:.3f} fall with it" if excess[0] > 0 else "all others rise"
        numbers += f"; where a step pushes it down, {fate} (tau0 {excess[0]:+.3f} on average)"
    return Finding(found, numbers + _left_out(rejected, rate.isna(), "not finite"), _counted(prompts.size, "prompt"))


def find_transfer(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find answers to other training prompts that rise with the trained ones, beyond what held-out answers gain."""
    trainer = str(run.meta.get("trainer", ""))
    if "SFT" not in trainer and trainer != "Trainer":
        return "asked of SFT only"
    moved = moved[moved["family"].isin(["chosen", "other_train", "other_test"])]
    rate = _divided(moved["delta"], moved["n_tokens"])
    seen = moved.assign(rate=rate)[rate.notna()]
    prompts = Resamples(seen["prompt_id"])
    means = {
        str(family): prompts.mean(rows["rate"], rows["prompt_id"]) for family, rows in seen.groupby("family")
    }  # nats per token
    if not {"chosen", "other_train"} <= means.keys():
        return "needs the families chosen and other_train, finite at two observations"
    chosen, other = means["chosen"], means["other_train"]
    form = np.maximum(means["other_test"], 0) if "other_test" in means else np.zeros_like(other)
    found = (chosen > 0) & (other - form > THRESHOLDS["transfer_share"] * chosen)
    held_out = f"other_test {means['other_test'][0]:+.3f}, " if "other_test" in means else ""
    numbers = f"other_train {other[0]:+.3f} nats per token, {held_out}chosen {chosen[0]:+.3f}"
    if chosen[0] > 0:
        beyond = " beyond what held-out answers gain" if held_out else " (form included: other_test is not watched)"
        share = (other[0] - form[0]) / chosen[0]
        numbers += f": {f'{share:.0%}' if share > 0 else 'no part'} of chosen's rise{beyond}"
    return Finding(found, numbers + _left_out(moved, rate.isna()), _counted(prompts.size, "prompt"))


def find_lazy(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find questions whose correct answers do not rise in the step that is taken on them."""
    frame = run.displacements
    if frame.empty:
        return "needs watch(..., displacement=True) on a GRPO or RLOO trainer"
    change = _numbers(frame["logp_after"]) - _numbers(frame["logp_before"])
    delta = change.groupby([frame["step"], frame["question"]]).mean().dropna().reset_index(drop=True)
    if delta.empty:
        return "no correct answer has finite log-probs before and after its step"
    questions = Resamples(delta.index.to_series())
    lazy = delta <= 0
    found = questions.mean(lazy, delta.index.to_series()) > THRESHOLDS["lazy_share"]
    missing = int(change.isna().sum())
    left_out = f"; left out: {missing} of {len(frame)} correct answers (not finite)" if missing else ""
    return Finding(
        found,
        f"correct answers did not rise in {lazy.sum()} of {_counted(len(delta), 'mixed question')}; Delta "
        f"{delta.mean():+.3f} nats on average{left_out}",
        _counted(len(delta), "mixed question"),
    )


def find_large_steps(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find steps of which the account explains too little; those too small to be measured are left out."""
    if run.accounts.empty:
        return "needs watch(..., influence=True)"
    tiny = too_small_to_measure(run)
    finite = run.accounts["explained"].notna()
    accounts = run.accounts[finite & ~tiny]
    left_out = [
        f"{count} ({why})" for count, why in ((int(tiny.sum()), "too small to measure"), (int((~finite & ~tiny).sum()),
                                              "not finite")) if count
    ]  # fmt: skip
    note = f"; left out of {_counted(len(run.accounts), 'explained step')}: {', '.join(left_out)}" if left_out else ""
    if accounts.empty:
        return f"no account that can be judged{note}"
    n_low = int((accounts["explained"] < THRESHOLDS["explained"]).sum())
    worst = accounts.sort_values("explained").to_dict("records")[0]
    rate = "" if pd.isna(worst["learning_rate"]) else f"learning rate {worst['learning_rate']:.2g}, "
    return Finding(
        np.array([n_low > 0]),
        f"{n_low} of {_counted(len(accounts), 'explained step')} below {THRESHOLDS['explained']:g}; lowest "
        f"{worst['explained']:.7g} at step "
        f"{worst['step']} ({rate}rule {worst['rule'] or 'unknown'}){note}",
    )


def too_small_to_measure(run: RunTables) -> pd.Series:
    """Tell of each explained step whether it moved the explained probe tokens by less than float32 can measure.

    Returns:
        A row for each of `run.accounts`: whether the root mean square of their changes is below `measurable_nats`.
    """
    probes = run.sequences.drop_duplicates("probe_id")
    told = run.influence
    by_family = told.loc[told["probe_id"].isna(), "family"].unique()
    explained = probes["probe_id"].isin(told["probe_id"].dropna().unique()) | probes["family"].isin(by_family)
    n_tokens = probes.loc[explained if explained.any() else slice(None), "n_tokens"].sum()
    return run.accounts["measured_norm"] / math.sqrt(max(1, n_tokens)) < THRESHOLDS["measurable_nats"]


def find_log_problems(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find what makes the curves of this log untrustworthy."""
    problems = [said for said, _ in _log_problems(run)]
    observed = run.sequences["step"].nunique()
    told = "; ".join(problems) or f"{_counted(len(run.probes), 'probe')}, {observed} observations, all finite"
    return Finding(np.array([bool(problems)]), told)


def mend_log(run: RunTables) -> str:
    """Return what to do about the problems of a log, or about all that it could have where it has none."""
    return " ".join(remedy for _, remedy in _log_problems(run)) or " ".join(_LOG_REMEDIES.values())


_LOG_REMEDIES = {
    "NaN": "NaN: look for what overflows (--learning_rate, float16).",
    "truncated": "Truncated: raise --max_length.",
    "few": "Few probes: watch more prompts (--watch_prompts 50).",
    "one": "One observation: a smaller --watch_every.",
}


def _log_problems(run: RunTables) -> list[tuple[str, str]]:
    """Return what is wrong with a log, each with its remedy."""
    sequences, probes = run.sequences, run.probes
    problems: list[tuple[str, str]] = []
    broken = sequences[(_numbers(sequences["n_nonfinite"]) > 0) | _numbers(sequences["logp_sum"]).isna()]
    if len(broken):
        where = ", ".join(f"{count} of {family}" for family, count in
                          broken.drop_duplicates("probe_id")["family"].value_counts(sort=False).items())  # fmt: skip
        told = (
            f"{_counted(broken['probe_id'].nunique(), 'probe')} with NaN or infinite tokens, from step "
            f"{broken['step'].min()} on ({where})"
        )
        problems.append((told, _LOG_REMEDIES["NaN"]))
    cut = int((_numbers(probes["n_cut"]) > 0).sum())
    if len(probes) and cut / len(probes) > THRESHOLDS["truncated_share"]:
        problems.append((f"{cut} of {_counted(len(probes), 'probe')} truncated", _LOG_REMEDIES["truncated"]))
    counts = probes["family"].value_counts(sort=False)
    few = counts[counts < THRESHOLDS["fewest_probes"]]
    if len(few):
        named = f" ({', '.join(map(str, few.index))})" if len(few) < len(counts) or len(few) <= 3 else ""
        told = (
            f"fewer than {THRESHOLDS['fewest_probes']:g} probes in {len(few)} of "
            f"{_counted(len(counts), 'family', 'families')}{named}: {few.min()} in the smallest"
        )
        problems.append((told, _LOG_REMEDIES["few"]))
    steps = sequences["step"].nunique()
    if steps < 2:
        problems.append((f"{'one' if steps else 'no'} observation: nothing to compare", _LOG_REMEDIES["one"]))
    return problems


_PREFERENCE = ("DPO", "CPO", "KTO", "ORPO", "BCO", "XPO", "NashMD")
"""What the names of trainers that push rejected responses down contain."""


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
        ends.append(end.apply(_numbers).reindex(frame.index))
    start, last = ends
    frame["delta"] = last["logp_sum"] - start["logp_sum"]
    frame["argmax_delta"] = last["argmax_logp_sum"] - start["argmax_logp_sum"]
    frame["collision_start"] = _divided(start["collision_sum"], frame["n_tokens"])
    frame["collision_end"] = _divided(last["collision_sum"], frame["n_tokens"])
    return frame


def _numbers(values: pd.Series) -> pd.Series:
    """Return values as floats, NaN where they are not finite."""
    numbers = values.astype(float)
    return numbers.where(np.isfinite(numbers))


def _divided(values: pd.Series, by: pd.Series) -> pd.Series:
    return _numbers(_numbers(values) / _numbers(by))


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _left_out(rows: pd.DataFrame, missing: pd.Series, why: str = "not finite, or not seen at both ends") -> str:
    """Say how many probes of which family a rule had to leave out; nothing where it had all of them."""
    if not missing.any():
        return ""
    totals = rows["family"].value_counts()
    counts = rows.loc[missing, "family"].value_counts(sort=False)
    named = ", ".join(f"{count} of {totals[family]} {family}" for family, count in counts.items())
    return f"; left out: {named} ({why})"
