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
        sequences: The sequences table, at least two observations.

    Returns:
        Whether it is found, and the numbers; None where two observations with finite values are missing.
    """
    moved = _moved(sequences)
    if moved.empty:
        return None
    families = moved.groupby("family")["delta"].mean()
    along = moved[moved["family"] == "chosen"] if "chosen" in families else moved
    greedy = float(along["argmax_delta"].mean())
    pushed = moved[moved["family"] == "rejected"] if "rejected" in families else moved
    collision = float(pushed["collision_end"].mean() - pushed["collision_start"].mean())
    fell = int((families < 0).sum())
    found = greedy > 0 and collision > 0 and fell >= THRESHOLDS["falling_share"] * len(families)
    evidence = (
        f"{fell} of {len(families)} families fell; the greedy tokens {greedy:+.2f} nats; collision probability "
        f"{pushed['collision_start'].mean():.3f} to {pushed['collision_end'].mean():.3f}"
    )
    return found, evidence


# ---- the rules ------------------------------------------------------------------------------------------------------


def _displacement(run: RunTables, moved: pd.DataFrame) -> _Finding:
    chosen, rejected = (moved[moved["family"] == family] for family in ("chosen", "rejected"))
    if chosen.empty or rejected.empty:
        return "needs the families chosen and rejected at two observations"
    fell = float((chosen["delta"] < 0).mean())
    margin = chosen.groupby("prompt_id")["delta"].mean() - rejected.groupby("prompt_id")["delta"].mean()
    margin = margin.dropna()
    if margin.empty:
        return "no prompt has both chosen and rejected"
    found = fell > THRESHOLDS["displaced_share"] and chosen["delta"].mean() < 0 and margin.mean() > 0
    return found, (
        f"chosen {chosen['delta'].mean():+.2f} nats on average, {fell:.0%} of its {len(chosen)} probes below their "
        f"start; margin over rejected {margin.mean():+.2f} nats"
    )


def _squeezing(run: RunTables, moved: pd.DataFrame) -> _Finding:
    return is_squeezing(run.sequences) or "needs two observations"


def _valley(run: RunTables, moved: pd.DataFrame) -> _Finding:
    if "DPO" not in str(run.meta.get("trainer", "")) and "CPO" not in str(run.meta.get("trainer", "")):
        return "asked of preference training only"
    first = run.sequences[run.sequences["step"] == run.sequences["step"].min()]
    rejected = first[first["family"] == "rejected"]
    rejected = rejected[np.isfinite(rejected["logp_sum"])]
    if rejected.empty:
        return "needs the family rejected"
    p = math.exp(float((rejected["logp_sum"] / rejected["n_tokens"]).mean()))
    return p < THRESHOLDS[
        "valley_p"
    ], f"rejected starts at {p:.3f} per token (geometric mean over {len(rejected)} probes)"


def _transfer(run: RunTables, moved: pd.DataFrame) -> _Finding:
    if "SFT" not in str(run.meta.get("trainer", "")):
        return "asked of SFT only"
    rates = {
        family: float((rows["delta"] / rows["n_tokens"]).mean())
        for family, rows in moved.groupby("family")
        if family in ("chosen", "other_train")
    }
    if len(rates) < 2:
        return "needs the families chosen and other_train at two observations"
    found = rates["chosen"] > 0 and rates["other_train"] > THRESHOLDS["transfer_share"] * rates["chosen"]
    return found, f"other_train {rates['other_train']:+.3f} nats per token, chosen {rates['chosen']:+.3f}"


def _lazy(run: RunTables, moved: pd.DataFrame) -> _Finding:
    frame = run.displacements
    if frame.empty:
        return "needs watch(..., displacement=True) on a GRPO or RLOO trainer"
    change = frame["logp_after"] - frame["logp_before"]
    delta = change.groupby([frame["step"], frame["question"]]).mean()
    lazy = float((delta <= 0).mean())
    return lazy > THRESHOLDS["lazy_share"], (
        f"correct answers did not rise in {lazy:.0%} of {len(delta)} mixed questions; Delta {delta.mean():+.3f} nats"
    )


def _explained(run: RunTables, moved: pd.DataFrame) -> _Finding:
    accounts = run.accounts
    if accounts.empty:
        return "needs watch(..., influence=True)"
    low = accounts[accounts["explained"] < THRESHOLDS["explained"]]
    worst = accounts.sort_values("explained", na_position="first").to_dict("records")[0]
    return not low.empty, (
        f"{len(low)} of {len(accounts)} explained steps below; lowest {worst['explained']:.4f} at step {worst['step']} "
        f"(learning rate {worst['learning_rate']:.2g}, rule {worst['rule']})"
    )


def _log_problems(run: RunTables, moved: pd.DataFrame) -> _Finding:
    sequences, probes = run.sequences, run.probes
    problems = []
    broken = int(sequences.loc[sequences["n_nonfinite"] > 0, "probe_id"].nunique()) if len(sequences) else 0
    if broken:
        problems.append(f"{broken} probes have NaN or infinite tokens")
    cut = float((probes["n_cut"].fillna(0) > 0).mean()) if len(probes) else 0.0
    if cut > THRESHOLDS["truncated_share"]:
        problems.append(f"{cut:.0%} of the probes are truncated")
    counts = probes["family"].value_counts()
    few = counts[counts < THRESHOLDS["fewest_probes"]]
    if len(few):
        problems.append(f"{len(few)} of {len(counts)} families have fewer than {THRESHOLDS['fewest_probes']} probes")
    steps = sequences["step"].nunique()
    if steps < 2:
        problems.append(f"{steps} observation: nothing to compare")
    return bool(problems), "; ".join(problems) or f"{len(probes)} probes, {steps} observations, all finite"


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
    """Return the change of every probe from the first to the last observation, where it is finite."""
    steps = sequences["step"]
    if steps.nunique() < 2:
        return pd.DataFrame(columns=["family", "prompt_id", "delta"])
    keep = ["probe_id", "prompt_id", "family", "n_tokens", "logp_sum", "argmax_logp_sum", "collision_sum"]
    start = sequences.loc[steps == steps.min(), keep].set_index("probe_id")
    end = sequences.loc[steps == steps.max(), keep].set_index("probe_id")
    frame = start.join(end[["logp_sum", "argmax_logp_sum", "collision_sum"]], rsuffix="_end", how="inner")
    frame["delta"] = frame["logp_sum_end"] - frame["logp_sum"]
    frame["argmax_delta"] = frame["argmax_logp_sum_end"] - frame["argmax_logp_sum"]
    frame["collision_start"] = frame["collision_sum"] / frame["n_tokens"]
    frame["collision_end"] = frame["collision_sum_end"] / frame["n_tokens"]
    return frame[np.isfinite(frame["delta"])].reset_index()
