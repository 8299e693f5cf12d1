"""Is this normal? Named rules over a run's numbers, each with its threshold, its evidence and what to do.

A rule reads frames with the columns of the run log and says *found*, *clear*, or *unknown* where the run does not tell.
Thresholds are conventions of this package unless a source is named; they are in `THRESHOLDS`, and every verdict states
its own. [LD] is Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), [NTHR] Deng et al. (arXiv
2505.18830).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

Status = Literal["found", "clear", "unknown"]

THRESHOLDS: Mapping[str, float] = {
    "displaced_share": 0.5,  # of chosen probes that lie below their start
    "falling_share": 0.8,  # of families that fall while the greedy tokens rise
    "valley_p": 0.1,  # exp of rejected's mean log-prob per token before preference training
    "transfer_share": 0.5,  # of chosen's rise per token that other_train shows
    "lazy_share": 0.25,  # of mixed questions whose correct answers did not rise
    "explained": 0.9,  # share of a step's change that the account must explain
    "fewest_probes": 10,  # of a family
    "truncated_share": 0.1,  # of probes that lost tokens
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
    def displacements(self) -> pd.DataFrame:
        """One row per correct completion that a step was taken on."""


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a run.

    Attributes:
        name: The rule's name, such as "squeezing".
        question: What it asks, in plain words.
        status: "found" (look at it), "clear", or "unknown" (the run does not tell).
        evidence: The numbers that decide, with units; for "unknown", what is missing.
        threshold: What counts as found.
        remedy: What to do where it is found.
    """

    name: str
    question: str
    status: Status
    evidence: str
    threshold: str
    remedy: str


_Finding = tuple[bool, str] | str
"""Whether it is found, with the evidence; or what is missing."""


def judge(run: RunTables) -> list[Verdict]:
    """Apply every rule to a run.

    A value that is NaN or infinite, or that is missing at one end of the run, decides nothing: the probe is left out,
    and the evidence says how many were.

    Args:
        run: The tables, log-probs in nats.

    Returns:
        One verdict per rule, what was found first.
    """
    moved = _moved(run.sequences)
    verdicts = []
    for name, question, rule, threshold, remedy in _RULES:
        finding = rule(run, moved)
        status: Status = "unknown" if isinstance(finding, str) else ("found" if finding[0] else "clear")
        evidence = finding if isinstance(finding, str) else finding[1]
        verdicts.append(Verdict(name, question, status, evidence, threshold, remedy))
    return sorted(verdicts, key=lambda verdict: ("found", "clear", "unknown").index(verdict.status))


def is_squeezing(sequences: pd.DataFrame) -> tuple[bool, str] | None:
    """Tell whether the mass moves into the greedy tokens while nearly everything that is watched falls.

    Found where the greedy tokens along the chosen probes' prefixes (all probes where there are none) rose since the
    first observation, at least `falling_share` of the families fell, and the collision probability along rejected (all)
    rose.

    Args:
        sequences: The sequences table; only its first and its last observation are compared.

    Returns:
        Whether it is found, and the numbers; None where two observations with finite values are missing.
    """
    return _squeezed(_moved(sequences))


# ---- the rules ------------------------------------------------------------------------------------------------------


def _displacement(run: RunTables, moved: pd.DataFrame) -> _Finding:
    pair = moved[moved["family"].isin(["chosen", "rejected"])]
    chosen, rejected = (_finite(pair[pair["family"] == family]) for family in ("chosen", "rejected"))
    if chosen.empty or rejected.empty:
        return "needs the families chosen and rejected, finite at two observations"
    n_fell = int((chosen["delta"] < 0).sum())
    margin = chosen.groupby("prompt_id")["delta"].mean() - rejected.groupby("prompt_id")["delta"].mean()
    margin = margin.dropna()
    if margin.empty:
        return "no prompt has both chosen and rejected"
    change = chosen["delta"].mean()
    found = n_fell / len(chosen) > THRESHOLDS["displaced_share"] and change < 0 and margin.mean() > 0
    return bool(found), (
        f"chosen {change:+.2f} nats on average, {n_fell} of its {_probes(len(chosen))} below their start; margin over "
        f"rejected {margin.mean():+.2f} nats{_left_out(pair, pair['delta'].isna())}"
    )


def _squeezing(run: RunTables, moved: pd.DataFrame) -> _Finding:
    if moved.empty:
        return "needs two observations"
    return _squeezed(moved) or "needs finite greedy tokens and collision probabilities at two observations"


def _squeezed(moved: pd.DataFrame) -> tuple[bool, str] | None:
    along, pushed = (moved["family"] == family for family in ("chosen", "rejected"))
    along, pushed = (rows if rows.any() else ~rows for rows in (along, pushed))
    greedy = moved.loc[along, "argmax_delta"].dropna()
    ends = moved.loc[pushed, ["collision_start", "collision_end"]].dropna()
    families = moved.groupby("family")["delta"].mean().dropna()
    if families.empty or greedy.empty or ends.empty:
        return None
    fell = int((families < 0).sum())
    before, after = ends["collision_start"].mean(), ends["collision_end"].mean()
    found = greedy.mean() > 0 and after > before and fell / len(families) >= THRESHOLDS["falling_share"]
    missing = moved["delta"].isna() | (along & moved["argmax_delta"].isna())
    missing |= pushed & moved[["collision_start", "collision_end"]].isna().any(axis=1)
    return bool(found), (
        f"{fell} of {len(families)} families fell; the greedy tokens {greedy.mean():+.2f} nats; collision probability "
        f"{before:.3g} to {after:.3g}{_left_out(moved, missing)}"
    )


def _valley(run: RunTables, moved: pd.DataFrame) -> _Finding:
    if not any(name in str(run.meta.get("trainer", "")) for name in _PREFERENCE):
        return "asked of preference training only"
    rejected = run.sequences[run.sequences["family"] == "rejected"]
    rejected = rejected[rejected["step"] == run.sequences["step"].min()]
    rate = _divided(rejected["logp_sum"], rejected["n_tokens"])
    if not rate.notna().any():
        return "needs the family rejected, finite at the first observation"
    p = math.exp(min(rate.mean(), 0.0))  # rounding may lift a log-prob above zero
    return p < THRESHOLDS["valley_p"], (
        f"rejected starts at {p:.3g} per token (geometric mean over {_probes(rate.count())})"
        f"{_left_out(rejected, rate.isna(), 'not finite')}"
    )


def _transfer(run: RunTables, moved: pd.DataFrame) -> _Finding:
    if "SFT" not in str(run.meta.get("trainer", "")):
        return "asked of SFT only"
    pair = moved[moved["family"].isin(["chosen", "other_train"])]
    rate = _divided(pair["delta"], pair["n_tokens"])
    means = rate.groupby(pair["family"]).mean().dropna()
    if len(means) < 2:
        return "needs the families chosen and other_train, finite at two observations"
    found = means["chosen"] > 0 and means["other_train"] > THRESHOLDS["transfer_share"] * means["chosen"]
    return bool(found), (
        f"other_train {means['other_train']:+.3f} nats per token, chosen {means['chosen']:+.3f}"
        f"{_left_out(pair, rate.isna())}"
    )


def _lazy(run: RunTables, moved: pd.DataFrame) -> _Finding:
    frame = run.displacements
    if frame.empty:
        return "needs watch(..., displacement=True) on a GRPO or RLOO trainer"
    change = _numbers(frame["logp_after"]) - _numbers(frame["logp_before"])
    delta = change.groupby([frame["step"], frame["question"]]).mean().dropna()
    if delta.empty:
        return "no correct answer has finite log-probs before and after its step"
    n_lazy, missing = int((delta <= 0).sum()), int(change.isna().sum())
    left_out = f"; left out: {missing} of {len(frame)} correct answers (not finite)" if missing else ""
    return n_lazy / len(delta) > THRESHOLDS["lazy_share"], (
        f"correct answers did not rise in {n_lazy} of {len(delta)} mixed questions; Delta {delta.mean():+.3f} nats"
        f"{left_out}"
    )


def _explained(run: RunTables, moved: pd.DataFrame) -> _Finding:
    accounts = run.accounts[run.accounts["explained"].notna()]
    missing = len(run.accounts) - len(accounts)
    if accounts.empty:
        return f"no finite account in {missing} explained steps" if missing else "needs watch(..., influence=True)"
    n_low = int((accounts["explained"] < THRESHOLDS["explained"]).sum())
    worst = accounts.sort_values("explained").to_dict("records")[0]
    rate = "" if pd.isna(worst["learning_rate"]) else f"learning rate {worst['learning_rate']:.2g}, "
    left_out = f"; left out: {missing} of {len(run.accounts)} explained steps (not finite)" if missing else ""
    return n_low > 0, (
        f"{n_low} of {len(accounts)} explained steps below; lowest {worst['explained']:.4f} at step {worst['step']} "
        f"({rate}rule {worst['rule'] or 'unknown'}){left_out}"
    )


def _log_problems(run: RunTables, moved: pd.DataFrame) -> _Finding:
    sequences, probes = run.sequences, run.probes
    problems = []
    bad = (_numbers(sequences["n_nonfinite"]) > 0) | _numbers(sequences["logp_sum"]).isna()
    broken = sequences.loc[bad, "probe_id"].nunique()
    if broken:
        problems.append(f"{_probes(broken)} with NaN or infinite tokens")
    cut = int((_numbers(probes["n_cut"]) > 0).sum())
    if len(probes) and cut / len(probes) > THRESHOLDS["truncated_share"]:
        problems.append(f"{cut} of {_probes(len(probes))} truncated")
    counts = probes["family"].value_counts()
    few = counts[counts < THRESHOLDS["fewest_probes"]]
    if len(few):
        fewest = f"fewer than {THRESHOLDS['fewest_probes']:g} probes"
        problems.append(f"{len(few)} of {len(counts)} families with {fewest} ({', '.join(map(str, few.index))})")
    steps = sequences["step"].nunique()
    if steps < 2:
        problems.append(f"{'one' if steps else 'no'} observation: nothing to compare")
    return bool(problems), "; ".join(problems) or f"{_probes(len(probes))}, {steps} observations, all finite"


_PREFERENCE = ("DPO", "CPO", "KTO", "ORPO", "BCO", "XPO")
"""What the names of trainers that push rejected responses down contain."""

_RULES: tuple[tuple[str, str, Callable[[RunTables, pd.DataFrame], _Finding], str, str], ...] = (
    (
        "likelihood displacement",
        "Did chosen fall although its margin grew?",
        _displacement,
        f"more than {THRESHOLDS['displaced_share']:.0%} of the chosen probes below their start, their mean too, and "
        "the margin over rejected above its start",
        "Look at who pushed it (watch(..., influence=True)). Extend first: SFT on both responses, then DPO [LD 4.3]; "
        "or add the SFT loss (loss_type sigmoid,sft), drop the pairs with the highest CHES, or stop earlier.",
    ),
    (
        "squeezing",
        "Does the mass go into the greedy tokens?",
        _squeezing,
        f"greedy tokens rise, at least {THRESHOLDS['falling_share']:.0%} of the families fall, and the collision "
        "probability along rejected rises, all since the first observation",
        "Negative gradients on unlikely responses do this [LD 3.3]: extend first, lower the learning rate or the "
        "number of epochs, or use pairs that the model itself finds likely.",
    ),
    (
        "valley",
        "Was rejected already unlikely before preference training?",
        _valley,
        f"rejected below {THRESHOLDS['valley_p']:g} per token (geometric mean) at the first observation",
        "Pushing down what is unlikely squeezes most [LD, Prop. 2]. SFT on rejected as well (recipes/extend_sft.py), "
        "then DPO; or sample rejected responses from the model.",
    ),
    (
        "hallucination transfer",
        "Do answers to other prompts rise as the trained ones do?",
        _transfer,
        f"other_train rises by more than {THRESHOLDS['transfer_share']:.0%} of chosen's rise per token",
        "The model learns phrases rather than answers [LD 3.2]: fewer epochs, more varied data, a lower learning rate.",
    ),
    (
        "lazy likelihood",
        "Do steps fail to raise the correct answers that they are taken on?",
        _lazy,
        f"Delta at or below 0 in more than {THRESHOLDS['lazy_share']:.0%} of the mixed questions",
        "Penalties of wrong answers reach the right ones [NTHR]: NTHRGRPOTrainer, a smaller weight of negative "
        "advantages, or more correct samples per group.",
    ),
    (
        "first-order account",
        "Are steps too large for the theory?",
        _explained,
        f"explained below {THRESHOLDS['explained']:g} at any explained step",
        'Use rule="gauss2", or read the shares as a rough guide; a lower learning rate makes steps explainable.',
    ),
    (
        "probes and log",
        "Can these curves be trusted?",
        _log_problems,
        f"NaN, more than {THRESHOLDS['truncated_share']:.0%} truncated, fewer than {THRESHOLDS['fewest_probes']:g} "
        "probes in a family, or fewer than two observations",
        "Watch more prompts, raise max_length, or look for what overflows; means over few move with each of them.",
    ),
)


def _moved(sequences: pd.DataFrame) -> pd.DataFrame:
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


def _finite(moved: pd.DataFrame) -> pd.DataFrame:
    return moved[moved["delta"].notna()]


def _probes(count: int) -> str:
    return f"{count} probe{'' if count == 1 else 's'}"


def _left_out(rows: pd.DataFrame, missing: pd.Series, why: str = "not finite, or not seen at both ends") -> str:
    """Say how many probes of which family a rule had to leave out; nothing where it had all of them."""
    if not missing.any():
        return ""
    totals = rows["family"].value_counts()
    counts = rows.loc[missing, "family"].value_counts(sort=False)
    named = ", ".join(f"{count} of {totals[family]} {family}" for family, count in counts.items())
    return f"; left out: {named} ({why})"
