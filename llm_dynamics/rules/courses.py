"""The rules that say what happened: what one hopes of a run (chosen rises, its margin grows), and what is usual."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llm_dynamics.frames.numbers import counted, nats
from llm_dynamics.frames.resampling import Resamples
from llm_dynamics.rules.faults import pairs_that_moved
from llm_dynamics.rules.terms import (
    LEAST,
    THRESHOLDS,
    Finding,
    Outcome,
    RunTables,
    family_changes,
    finite_values,
    say_left_out,
)


def find_rise(run: RunTables, moved: pd.DataFrame, *, family: str) -> Outcome:
    """Find most probes of a family, and their mean, above their start."""
    return _moves(moved, family, up=True)


def find_fall(run: RunTables, moved: pd.DataFrame, *, family: str) -> Outcome:
    """Find most probes of a family, and their mean, below their start."""
    return _moves(moved, family, up=False)


def find_greedy_rise(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find greedy tokens that gain along chosen's prefixes."""
    chosen = moved[moved["family"] == "chosen"].assign(family="argmax")
    return _moves(chosen.assign(delta=chosen["argmax_delta"]), "argmax", up=True)


def _moves(moved: pd.DataFrame, family: str, *, up: bool) -> Outcome:
    """Tell whether most probes of a family, and their mean, moved this way by more than the least change."""
    rows = moved[moved["family"] == family]
    seen = rows[rows["delta"].notna()]
    if seen.empty:
        return f"needs finite values of {family} at two observations"
    sign = 1 if up else -1
    prompts = Resamples(seen["prompt_id"])
    moves = sign * seen["delta"] > LEAST
    share, change = (prompts.mean(values, seen["prompt_id"]) for values in (moves, seen["delta"]))
    per_token = float((seen["delta"] / seen["n_tokens"]).mean())
    return Finding(
        (share > THRESHOLDS["most"]) & (sign * change > LEAST),
        f"{family} {nats(change[0], sign=True)} nats on average ({nats(per_token, sign=True)} per token), "
        f"{moves.sum()} of its {counted(len(seen), 'probe')} {'above' if up else 'below'} their start"
        f"{say_left_out(rows, rows['delta'].isna())}",
        counted(prompts.size, "prompt"),
    )


def find_growing_margin(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find a margin of chosen over rejected that grows in most prompts, and on average."""
    pairs = pairs_that_moved(moved)
    if isinstance(pairs, str):
        return pairs
    _, margins, left_out = pairs
    ids = margins.index.to_series()
    prompts = Resamples(ids)
    grew = margins > LEAST
    share, change = (prompts.mean(values, ids) for values in (grew, margins))
    return Finding(
        (share > THRESHOLDS["most"]) & (change > LEAST),
        f"margin over rejected {nats(change[0], sign=True)} nats on average, grew in {grew.sum()} of "
        f"{counted(len(margins), 'prompt')}{left_out}",
        counted(prompts.size, "prompt"),
    )


def find_fastest_fall(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find rejected responses that fall by more nats than every other family."""
    prompts, changes = family_changes(moved)
    rejected = changes.pop("rejected")
    lowest = min(changes, key=lambda name: changes[name][0])
    return Finding(
        (rejected < -LEAST) & (rejected <= np.min(list(changes.values()), axis=0)),
        f"rejected {nats(rejected[0], sign=True)} nats on average; lowest of the others: {lowest} "
        f"{nats(changes[lowest][0], sign=True)}{say_left_out(moved, moved['delta'].isna())}",
        counted(prompts.size, "prompt"),
    )


def find_general_fall(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find most families below their start."""
    prompts, changes = family_changes(moved)
    n_fell = np.sum([change < -LEAST for change in changes.values()], axis=0)
    stayed = [f"{name} {nats(change[0], sign=True)}" for name, change in changes.items() if not change[0] < -LEAST]
    return Finding(
        n_fell > THRESHOLDS["most"] * len(changes),
        f"{n_fell[0]} of {counted(len(changes), 'family', 'families')} fell"
        + (f"; not: {', '.join(stayed)} nats" if stayed else ""),
        counted(prompts.size, "prompt"),
    )


def find_bell(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find rejected responses that rise at first and then fall back."""
    rows = run.sequences[run.sequences["family"] == "rejected"].drop_duplicates(["probe_id", "step"])
    curves = rows.assign(logp=finite_values(rows["logp_sum"])).pivot(index="probe_id", columns="step", values="logp")
    whole = curves.dropna()  # a mean over other probes at each step could rise by itself
    if whole.empty or len(whole.columns) < 3:
        return "needs three observations at which rejected is finite"
    prompts = Resamples(rows["prompt_id"])
    of_probe = rows.drop_duplicates("probe_id").set_index("probe_id")["prompt_id"].reindex(whole.index)
    means = np.array([prompts.mean(whole[step], of_probe) for step in whole.columns])  # (steps, 1 + R)
    top = means.argmax(axis=0)
    peak = means.max(axis=0)
    missing = len(curves) - len(whole)
    return Finding(
        (peak - means[0] > LEAST) & (peak - means[-1] > LEAST),
        f"rejected starts at {nats(means[0, 0])} nats, is highest at step {whole.columns[top[0]]} "
        f"({nats((peak - means[0])[0], sign=True)}) and ends at {nats(means[-1, 0])} "
        f"({nats((means[-1] - peak)[0], sign=True)} from there)"
        + (f"; left out: {missing} of {len(curves)} rejected (not finite at every observation)" if missing else ""),
        counted(prompts.size, "prompt"),
    )
