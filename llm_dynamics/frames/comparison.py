"""Runs side by side: how far each family moved, and whether two runs differ by more than the choice of prompts."""

from __future__ import annotations

from functools import partial

import pandas as pd

from llm_dynamics.frames.bootstrap import prompt_interval
from llm_dynamics.frames.matching import common_ids
from llm_dynamics.frames.moved import MOVED_COLUMNS, moved_probes, moved_row
from llm_dynamics.frames.order import in_order
from llm_dynamics.frames.runs import Chain, Log, Runs, is_single, named_chains, one_row_per_probe

COMPARE_COLUMNS = (
    "run", *MOVED_COLUMNS, "low", "high", "n_paired", "difference", "difference_low", "difference_high",
)  # fmt: skip


def compare(
    runs: Runs, *others: Log, per_token: bool = False, confidence: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Set runs side by side: how far each family moved from the first to the last observation, and the difference.

    The difference to the first run is paired: of every probe that is the same in both (prompt, response and their
    tokens), `change here - change in the first run`. Intervals are percentile bootstraps over prompts
    (`frames.bootstrap`): they cover the choice of prompts, not the seed of training.

    Args:
        runs: One run or its folder, several, or chains (see `align`): of a chain, the change from the start of its
            first stage to the end of its last.
        *others: Further runs or their folders: `compare("runs/dpo", "runs/ipo")`.
        per_token: Divide each probe's change by its number of tokens, in the intervals and in the differences.
        confidence: Of the intervals.
        n_resamples: Resamples of each interval.
        seed: Seed of the resamples; the same log gives the same numbers.

    Returns:
        One row per family and run, families in canonical order and a last one of the greedy tokens, named as in
        `what_moved`, runs in the order given. `run`, and the columns of `what_moved`: `family`, `n_probes`,
        `start`, `end`, `delta` (means over probes of the summed log-prob, nats), `delta_per_token`, `n_nonfinite`;
        `low`, `high`, the interval of `delta` (with `per_token`, of `delta_per_token`); `n_paired`, the probes of the
        difference; `difference`, `difference_low`, `difference_high`, its mean over them and its interval (nats; nats
        per token with `per_token`). NaN, and `n_paired` 0, in the rows of the first run and where no probe is shared;
        an interval is NaN where there are fewer than two prompts; of a run with one observation, so is every change.

    Raises:
        TypeError: For what is no run.
        ValueError: Where there is no run, two have one name, or `confidence` or `n_resamples` is not allowed.

    Example:
        >>> compare(load_runs({"dpo": "runs/dpo", "ipo": "runs/ipo"}))  # doctest: +SKIP
    """
    interval = partial(prompt_interval, confidence=confidence, n_resamples=n_resamples, seed=seed)
    if others and not is_single(runs):
        raise TypeError(f"the first of several runs is {type(runs).__name__}; allowed: a run log or its folder")
    chains = named_chains([runs, *others] if is_single(runs) else runs)
    first, *_ = chains
    base = _families(first, chains[first])
    rows = []
    for name, chain in chains.items():
        families = base if name == first else _families(name, chain)
        shared = pd.Index([]) if name == first else _shared(chains[first], chain)
        for family, probes in families.items():
            own = _change(probes, per_token)
            row = (name, *moved_row(family, probes), *interval(own, probes["prompt_id"]))
            kept = pd.Series(dtype=float)
            if family in base:
                both = probes.index.intersection(base[family].index).intersection(shared)
                gap = own[both] - _change(base[family], per_token)[both]
                kept = gap[probes["kept"][both] & base[family]["kept"][both]]
            rows.append((*row, len(kept), kept.mean(), *interval(kept, probes["prompt_id"].reindex(kept.index))))
    frame = pd.DataFrame(rows, columns=list(COMPARE_COLUMNS))
    places = {name: place for place, name in enumerate(chains)}
    return in_order(frame.assign(_run=frame["run"].map(places)), "_run").drop(columns="_run")


def _families(name: str, chain: Chain) -> dict[str, pd.DataFrame]:
    sequences = chain.observations(["logp", "argmax_logp"])
    one_row_per_probe(name, sequences)
    found = dict(moved_probes(sequences))
    if sequences["step"].nunique() < 2:  # nothing has moved yet, which is not a change of 0
        return {family: probes.assign(change=float("nan")) for family, probes in found.items()}
    return found


def _change(probes: pd.DataFrame, per_token: bool) -> pd.Series:
    return probes["change"] / probes["n_tokens"] if per_token else probes["change"]


def _shared(one: Chain, other: Chain) -> pd.Index:
    """Return the probes that are the same in two chains; within a chain, its ends decide."""
    one_stages, other_stages = list(one.stages.values()), list(other.stages.values())
    shared = common_ids(one_stages[0], other_stages[0])
    for stage in (*one_stages[1:], *other_stages[1:]):
        shared = shared.intersection(common_ids(one_stages[0], stage))
    return shared
