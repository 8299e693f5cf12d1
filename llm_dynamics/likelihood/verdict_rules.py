"""The rules behind the verdicts: each reads a run's tables and says what it finds there, or what is missing.

A rule decides for the run as it is and for resamples of its prompts (of its questions, in reinforcement), so that a
verdict can say whether it hangs on a few of them.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from llm_dynamics.likelihood.resampling import Resamples
from llm_dynamics.likelihood.verdict_terms import (
    THRESHOLDS,
    Finding,
    Outcome,
    RunTables,
    counted,
    divided,
    finite_values,
    say_left_out,
)

_PREFERENCE = ("DPO", "CPO", "KTO", "ORPO", "BCO", "XPO", "NashMD")
"""What the names of trainers that push rejected responses down contain."""


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
        f"chosen {change[0]:+.2f} nats on average, {fell.sum()} of its {counted(len(chosen), 'probe')} below their "
        f"start; margin over rejected {margin[0]:+.2f} nats{say_left_out(pair, pair['delta'].isna())}",
        counted(prompts.size, "prompt"),
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
        f"{n_fell[0]} of {counted(len(changes), 'family', 'families')} fell{but}; along {where} the greedy tokens "
        f"{rise[0]:+.2f} nats, collision probability {before[0]:.3g} to {after[0]:.3g}{say_left_out(moved, missing)}",
        counted(prompts.size, "prompt"),
    )


def find_valley(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find rejected responses that are unlikely, where the model is sure of something else, before they are pushed."""
    if not any(name in str(run.meta.get("trainer", "")) for name in _PREFERENCE):
        return "asked of preference training only"
    rejected = run.sequences[run.sequences["family"] == "rejected"]
    rejected = rejected[rejected["step"] == run.sequences["step"].min()]
    rate = divided(rejected["logp_sum"], rejected["n_tokens"])
    seen = rejected[rate.notna()]
    if seen.empty:
        return "needs the family rejected, finite at the first observation"
    if seen["step"].min() > 0:
        return f"needs an observation before the first step; the first in this log is of step {seen['step'].min()}"
    prompts = Resamples(seen["prompt_id"])
    mean = prompts.mean(rate[seen.index], seen["prompt_id"])
    found = mean < math.log(THRESHOLDS["valley_p"])
    p = math.exp(min(mean[0], 0.0))  # rounding may lift a log-prob above zero
    numbers = f"rejected starts at {p:.3g} per token (geometric mean over {counted(len(seen), 'probe')})"
    if seen["tau0_sum"].notna().any():
        # tau0 = collision probability - p(label) is the probability above which another token rises
        excess = prompts.mean(divided(seen["tau0_sum"], seen["n_tokens"]), seen["prompt_id"])
        found &= excess > THRESHOLDS["valley_tau0"]
        fate = f"tokens below probability {excess[0]:.3f} fall with it" if excess[0] > 0 else "all others rise"
        numbers += f"; where a step pushes it down, {fate} (tau0 {excess[0]:+.3f}, mean over responses)"
    return Finding(found, numbers + say_left_out(rejected, rate.isna(), "not finite"), counted(prompts.size, "prompt"))


def find_transfer(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find answers to other training prompts that rise with the trained ones, beyond what held-out answers gain."""
    trainer = str(run.meta.get("trainer", ""))
    if "SFT" not in trainer and trainer != "Trainer":
        return "asked of SFT only"
    moved = moved[moved["family"].isin(["chosen", "other_train", "other_test"])]
    rate = divided(moved["delta"], moved["n_tokens"])
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
    return Finding(found, numbers + say_left_out(moved, rate.isna()), counted(prompts.size, "prompt"))


def find_lazy(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find questions whose correct answers do not rise in the step that is taken on them."""
    frame = run.displacements
    if frame.empty:
        return "needs watch(..., displacement=True) on a GRPO or RLOO trainer"
    change = finite_values(frame["logp_after"]) - finite_values(frame["logp_before"])
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
        f"correct answers did not rise in {lazy.sum()} of {counted(len(delta), 'mixed question')}; Delta "
        f"{delta.mean():+.3f} nats on average{left_out}",
        counted(len(delta), "mixed question"),
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
    note = f"; left out of {counted(len(run.accounts), 'explained step')}: {', '.join(left_out)}" if left_out else ""
    if accounts.empty:
        return f"no account that can be judged{note}"
    n_low = int((accounts["explained"] < THRESHOLDS["explained"]).sum())
    worst = accounts.sort_values("explained").to_dict("records")[0]
    rate = "" if pd.isna(worst["learning_rate"]) else f"learning rate {worst['learning_rate']:.2g}, "
    return Finding(
        np.array([n_low > 0]),
        f"{n_low} of {counted(len(accounts), 'explained step')} below {THRESHOLDS['explained']:g}; lowest "
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
