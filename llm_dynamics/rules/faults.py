"""The rules that find faults: each reads a run's tables and says what it finds there, or what is missing.

A rule decides for the run as it is and for resamples of its prompts (of its questions, in reinforcement), so that a
verdict can say whether it hangs on a few of them.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from llm_dynamics.frames.numbers import counted, nats, percent
from llm_dynamics.frames.resampling import Resamples
from llm_dynamics.rules.terms import (
    LEAST,
    THRESHOLDS,
    Finding,
    Outcome,
    RunTables,
    divided,
    family_changes,
    finite_values,
    say_left_out,
)

TRAINED = ("chosen", "rejected")
"""Families whose responses, or whose kind, a preference loss pushes itself: they cannot show what it does to others."""


def pairs_that_moved(moved: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series, str] | str:
    """Return the chosen probes of prompts that have both, the change of each such prompt's margin, what is left out."""
    pair = moved[moved["family"].isin(TRAINED)]
    finite = pair[pair["delta"].notna()]
    sides = finite.groupby(["family", "prompt_id"])["delta"].mean().unstack("family")
    margins = (sides["chosen"] - sides["rejected"]).dropna()
    if margins.empty:
        return "no prompt has both chosen and rejected"
    missing = pair["delta"].isna() | ~pair["prompt_id"].isin(margins.index)
    chosen = pair[~missing & (pair["family"] == "chosen")]
    return chosen, margins, say_left_out(pair, missing, "not finite, not seen at both ends, or without the other one")


def find_displacement(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find chosen responses that fall although their margin over rejected grows."""
    pairs = pairs_that_moved(moved)
    if isinstance(pairs, str):
        return pairs
    chosen, margins, left_out = pairs
    fell = chosen["delta"] < -LEAST
    prompts = Resamples(chosen["prompt_id"])
    share = prompts.mean(fell, chosen["prompt_id"])
    change = prompts.mean(chosen["delta"], chosen["prompt_id"])
    margin = prompts.mean(margins, margins.index.to_series())
    return Finding(
        (share > THRESHOLDS["most"]) & (change < -LEAST) & (margin > LEAST),
        f"chosen {nats(change[0], sign=True)} nats on average, {fell.sum()} of its {counted(len(chosen), 'probe')} "
        f"below their start; margin over rejected {nats(margin[0], sign=True)} nats{left_out}",
        counted(prompts.size, "prompt"),
    )


def find_squeezing(run: RunTables | None, moved: pd.DataFrame) -> Outcome:
    """Find mass that goes into the greedy tokens while nearly everything that is watched falls."""
    prompts, changes = family_changes(moved)
    if set(changes) <= set(TRAINED):
        return "needs a family that is not trained on to tell whether all falls: watch `other_test` or `ungrammatical`"
    n_fell = np.sum([change < -LEAST for change in changes.values()], axis=0)  # (1 + R,)
    pushed = moved["family"] == "rejected"
    peaks = ["argmax_delta", "collision_start", "collision_end"]
    peaked = moved[pushed & moved[peaks].notna().all(axis=1)]
    if peaked.empty:
        return "needs finite greedy tokens and collision probabilities along rejected at two observations"
    rise, before, after = (prompts.mean(peaked[name], peaked["prompt_id"]) for name in peaks)
    stayed = [name for name, change in changes.items() if not change[0] < -LEAST]
    but = f" (not {', '.join(stayed)})" if 0 < len(stayed) <= 3 and n_fell[0] else ""
    missing = moved["delta"].isna() | (pushed & moved[peaks].isna().any(axis=1))
    return Finding(
        (n_fell / len(changes) >= THRESHOLDS["general_share"]) & (rise > LEAST) & (after > before),
        f"{n_fell[0]} of {counted(len(changes), 'family', 'families')} fell{but}; along rejected the greedy tokens "
        f"{nats(rise[0], sign=True)} nats, collision probability {before[0]:.3g} to {after[0]:.3g}"
        f"{say_left_out(moved, missing)}",
        counted(prompts.size, "prompt"),
    )


def find_general_rise(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find runs in which nearly everything rises, the responses that ought not to among them."""
    prompts, changes = family_changes(moved)
    n_rose = np.sum([change > LEAST for change in changes.values()], axis=0)  # (1 + R,)
    unwanted = ("rejected", "ungrammatical")
    named = [name for name in ("chosen", *unwanted) if name in changes]
    return Finding(
        (n_rose / len(changes) >= THRESHOLDS["general_share"])
        & np.all([changes[name] > LEAST for name in unwanted], axis=0),
        f"{n_rose[0]} of {counted(len(changes), 'family', 'families')} rose ("
        f"{', '.join(f'{name} {nats(changes[name][0], sign=True)}' for name in named)} nats)"
        f"{say_left_out(moved, moved['delta'].isna())}",
        counted(prompts.size, "prompt"),
    )


def find_valley(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find rejected responses that are unlikely, where the model is sure of something else, before they are pushed."""
    rejected = run.sequences[run.sequences["family"] == "rejected"]
    rejected = rejected[rejected["step"] == run.sequences["step"].min()]
    rates = pd.DataFrame({name: divided(rejected[f"{name}_sum"], rejected["n_tokens"]) for name in ("logp", "tau0")})
    missing = rates.isna().any(axis=1)
    seen, rates = rejected[~missing], rates[~missing]
    if seen.empty:
        return "needs rejected with finite log-probs and squeezing statistics (tau0) at the first observation"
    prompts = Resamples(seen["prompt_id"])
    # tau0 = collision probability - p(label) is the probability above which another token rises
    mean, excess = (prompts.mean(rates[name], seen["prompt_id"]) for name in rates)
    p = math.exp(min(mean[0], 0.0))  # rounding may lift a log-prob above zero
    fate = f"tokens below probability {excess[0]:.3f} fall with it" if excess[0] > 0 else "all others rise"
    return Finding(
        (mean < math.log(THRESHOLDS["valley_p"])) & (excess > THRESHOLDS["valley_tau0"]),
        f"rejected starts at {p:.3g} per token (geometric mean over {counted(len(seen), 'probe')}); where a step "
        f"pushes it down, {fate} (tau0 {excess[0]:+.3f}, mean over responses)"
        f"{say_left_out(rejected, missing, 'not finite')}",
        counted(prompts.size, "prompt"),
    )


def find_transfer(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find answers to other training prompts that rise with the trained ones, beyond what held-out answers gain."""
    names = ("chosen", "other_train", "other_test")
    watched = moved[moved["family"].isin(names)]
    rate = divided(watched["delta"], watched["n_tokens"])
    seen = watched.assign(rate=rate)[rate.notna()]
    prompts = Resamples(seen["prompt_id"])

    def mean(family: str, value: str) -> np.ndarray:
        return prompts.mean(seen[value].where(seen["family"] == family), seen["prompt_id"])

    chosen, other, form = (mean(name, "rate") for name in names)  # nats per token
    beyond = other - np.maximum(form, 0)
    rises = (mean("chosen", "delta") > LEAST) & (mean("other_train", "delta") > LEAST)
    first = {"other_train": other, "other_test": form, "chosen": chosen}
    numbers = ", ".join(f"{name} {nats(rates[0], sign=True)}" for name, rates in first.items())
    if chosen[0] > 0:
        share = percent(beyond[0] / chosen[0]) if beyond[0] > 0 else "no part"
        numbers += f": other_train has {share} of chosen's rise beyond what held-out answers gain"
    return Finding(
        rises & (beyond > THRESHOLDS["transfer_share"] * chosen),
        f"nats per token: {numbers}{say_left_out(watched, rate.isna())}",
        counted(prompts.size, "prompt"),
    )


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
        f"{nats(delta.mean(), sign=True)} nats on average{left_out}",
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
        f"{n_low} of {counted(len(accounts), 'explained step')} below {percent(THRESHOLDS['explained'])}; lowest "
        f"{percent(worst['explained'])} at step {worst['step']} ({rate}rule {worst['rule'] or 'unknown'}){note}",
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
