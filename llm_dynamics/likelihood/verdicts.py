"""Is this normal? Named rules over a run's numbers, each with its threshold, its evidence and what to do.

A rule reads frames with the columns of the run log and says *found*, *clear*, or *unknown* where the run does not tell.
Thresholds are conventions of this package unless a source is named; they are in `THRESHOLDS`, and every verdict states
its own. [LD] is Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), [NTHR] Deng et al. (arXiv
2505.18830), [CHES] Razin et al. (arXiv 2410.08847).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from llm_dynamics.likelihood.log_rule import find_log_problems, mend_log
from llm_dynamics.likelihood.verdict_rules import (
    find_displacement,
    find_large_steps,
    find_lazy,
    find_squeezing,
    find_transfer,
    find_valley,
)
from llm_dynamics.likelihood.verdict_rules import too_small_to_measure as too_small_to_measure
from llm_dynamics.likelihood.verdict_terms import THRESHOLDS as THRESHOLDS
from llm_dynamics.likelihood.verdict_terms import Outcome, RunTables, changes_of

Status = Literal["found", "clear", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a run.

    Attributes:
        name: The rule's name, such as "squeezing".
        question: What it asks, in plain words.
        status: "found" (look at it), "clear", or "unknown" (the run does not tell).
        evidence: The numbers that decide, with units, and that the decision is unsure where it is; for "unknown", what
            is missing.
        threshold: What counts as found.
        remedy: What to do where it is found.
        agreement: Share of 2,000 bootstrap resamples of the prompts (of the questions, in reinforcement) that decide
            the same, in [0, 1]; below 0.95 the decision is unsure. None where nothing is drawn. It is the noise of the
            probes, not that of the training run: another seed can decide otherwise.
    """

    name: str
    question: str
    status: Status
    evidence: str
    threshold: str
    remedy: str
    agreement: float | None = None

    @property
    def unsure(self) -> bool:
        """Whether too many resamples decide otherwise."""
        return self.agreement is not None and self.agreement < THRESHOLDS["sure"]


def judge(run: RunTables) -> list[Verdict]:
    """Apply every rule to a run.

    A value that is NaN or infinite, or that is missing at one end of the run, decides nothing: the probe is left out,
    and the evidence says how many were.

    Args:
        run: The tables, log-probs in nats.

    Returns:
        One verdict per rule: what was found first, and of that what is sure.
    """
    moved = changes_of(run.sequences)
    verdicts = []
    for name, question, rule, threshold, remedy_of in _RULES:
        outcome = rule(run, moved)
        remedy = remedy_of if isinstance(remedy_of, str) else remedy_of(run)
        if isinstance(outcome, str):
            verdicts.append(Verdict(name, question, "unknown", outcome, threshold, remedy))
            continue
        status: Status = "found" if outcome.found[0] else "clear"
        verdicts.append(Verdict(name, question, status, outcome.evidence, threshold, remedy, outcome.agreement))
    order = ("found", "clear", "unknown")
    return sorted(verdicts, key=lambda own: (order.index(own.status), own.status == "found" and own.unsure))


def is_squeezing(sequences: pd.DataFrame) -> tuple[bool, str] | None:
    """Tell whether the mass moves into the greedy tokens while nearly everything that is watched falls.

    Found where, since the first observation, at least `falling_share` of the families fell, while along the rejected
    probes' prefixes (along all, where there are none) the greedy tokens and the collision probability rose. Along
    chosen, greedy tokens also rise where the model learns the chosen answer itself.

    Args:
        sequences: The sequences table; only its first and its last observation are compared.

    Returns:
        Whether it is found, and the numbers; None where two observations with finite values are missing.
    """
    outcome = find_squeezing(None, changes_of(sequences))
    return None if isinstance(outcome, str) else (bool(outcome.found[0]), outcome.evidence)


EXPLAIN = "watch(..., influence=True), or --watch_influence of the recipes"
"""How steps are explained."""

_EXTEND = (
    "SFT on both responses before the preference training [LD 4.3]: recipes/extend_sft.py with the "
    "config of your model and this run's data flags (--dataset_name, --as_chat), then this run again from the model "
    "that it saves (--model_name_or_path)"
)


def _against_displacement(run: RunTables) -> str:
    """Return what to do about chosen that falls; who pushed it is known where steps were explained."""
    who = "See in the account who pushed it" if len(run.accounts) else f"See who pushed it: {EXPLAIN}"
    return (
        f"{who}. Then add the SFT loss to DPO's (--loss_type sigmoid sft --loss_weights 1.0 1.0); or {_EXTEND}; or "
        "drop the pairs that displace most (kernel.ches_scores, highest normalised first [CHES]); or stop earlier."
    )


def _against_transfer(run: RunTables) -> str:
    """Return what to do about other answers that rise; held-out ones tell phrases from form."""
    watched = (run.sequences["family"] == "other_test").any()
    return (
        "The model learns phrases rather than answers [LD 3.2]: fewer steps or epochs, a lower --learning_rate, more "
        "and more varied rows."
        + ("" if watched else " Watch other_test too (--watch_families, an eval set), to tell phrases from form.")
    )


_RULES: tuple[
    tuple[str, str, Callable[[RunTables, pd.DataFrame], Outcome], str, str | Callable[[RunTables], str]], ...
] = (
    (
        "likelihood displacement",
        "Did chosen fall although its margin grew?",
        find_displacement,
        f"more than {THRESHOLDS['displaced_share']:.0%} of the chosen probes below their start, their mean too (by "
        f"more than {THRESHOLDS['least_nats']:g} nats), and the margin over rejected above its start",
        _against_displacement,
    ),
    (
        "squeezing",
        "Does the mass go into the greedy tokens?",
        find_squeezing,
        f"at least {THRESHOLDS['falling_share']:.0%} of the families fall since the first observation, while along the "
        f"prefixes of rejected the greedy tokens rise by more than {THRESHOLDS['least_nats']:g} nats and the collision "
        "probability rises",
        f"Negative gradients on unlikely responses do this [LD 3.3]: {_EXTEND}; or lower --learning_rate, raise "
        "--beta, or stop earlier (SqueezingAlert(trainer, stop_on='squeezing')); or sample rejected from the model.",
    ),
    (
        "valley",
        "Was rejected already unlikely before preference training?",
        find_valley,
        f"rejected below {THRESHOLDS['valley_p']:g} per token (geometric mean) at the first observation, while the "
        f"model is surer of other tokens there (tau0 = collision probability - p(label) above "
        f"{THRESHOLDS['valley_tau0']:g} on average)",
        f"Pushing down what is unlikely squeezes most [LD, Prop. 2]: sample rejected from the model itself; or "
        f"{_EXTEND}.",
    ),
    (
        "hallucination transfer",
        "Do answers to other prompts rise as the trained ones do?",
        find_transfer,
        f"other_train rises by more than {THRESHOLDS['transfer_share']:.0%} of chosen's rise per token, not counting "
        "what held-out answers (other_test, where it is watched) gain as well",
        _against_transfer,
    ),
    (
        "lazy likelihood",
        "Do steps fail to raise the correct answers that they are taken on?",
        find_lazy,
        f"Delta at or below 0 nats in more than {THRESHOLDS['lazy_share']:.0%} of the mixed questions",
        "Penalties of wrong answers reach the right ones [NTHR]: NTHRGRPOTrainer (recipes/grpo.py --nthr_method nthr), "
        "or pos_only, w_reinforce there; or more answers per question (--num_generations), so that more are correct.",
    ),
    (
        "first-order account",
        "Are steps too large for the theory?",
        find_large_steps,
        f"explained below {THRESHOLDS['explained']:g} at any explained step that moved a probe token by "
        f"{THRESHOLDS['measurable_nats']:g} nats or more (root mean square)",
        "Lower --learning_rate (or clip: --max_grad_norm) until steps are explainable; or take more nodes along the "
        'step, influence={"rule": "gauss2"}; else read the shares as a rough guide.',
    ),
    (
        "probes and log",
        "Can these curves be trusted?",
        find_log_problems,
        f"NaN, more than {THRESHOLDS['truncated_share']:.0%} truncated, fewer than {THRESHOLDS['fewest_probes']:g} "
        "probes in a family, probes of another form than the training rows, or fewer than two observations",
        mend_log,
    ),
)

RULE_NAMES: tuple[str, ...] = tuple(name for name, *_ in _RULES)
"""Names of the rules, in their order."""
