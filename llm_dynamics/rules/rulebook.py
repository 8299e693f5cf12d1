"""The rulebook: every rule with its question, limit, controls and remedy, in the order in which they are read.

Limits are conventions of this package unless a source is named; they are in `THRESHOLDS`, and every rule states its
own. [LD] is Ren & Sutherland, *Learning Dynamics of LLM Finetuning* (arXiv 2407.10490), [NTHR] Deng et al. (arXiv
2505.18830), [CHES] Razin et al. (arXiv 2410.08847).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pandas as pd

from llm_dynamics.frames.numbers import percent
from llm_dynamics.rules import courses, faults
from llm_dynamics.rules.log_rule import find_log_problems, mend_log
from llm_dynamics.rules.terms import LEAST, THRESHOLDS, Outcome, RunTables

Kind = Literal["fault", "hope", "course"]


@dataclass(frozen=True)
class Rule:
    """One question that is asked of a run.

    Attributes:
        name: Its name, such as "squeezing".
        question: What it asks, in plain words.
        find: Reads the run and its `changes_of`, and says what it finds or what is missing.
        limit: What counts as found.
        needs: Families without which it does not tell: those that it is about, and its controls.
        remedy: What to do where a fault is found; a function where that depends on the run.
        kind: "fault", "hope" or "course"; see `Verdict`.
        asked_of: What the loss is given, `trained_on` of `meta.json`, in runs that it is asked of; all where empty.
        reads: "changes" between the first and the last observation, the "start" alone, or other "tables".
    """

    name: str
    question: str
    find: Callable[[RunTables, pd.DataFrame], Outcome]
    limit: str
    needs: tuple[str, ...] = ()
    remedy: str | Callable[[RunTables], str] = ""
    kind: Kind = "fault"
    asked_of: tuple[str, ...] = ()
    reads: Literal["changes", "start", "tables"] = "changes"


EXPLAIN = "watch(..., influence=True), or --watch_influence of the recipes"
"""How steps are explained."""

_EXTEND = (
    "SFT on both responses before the preference training [LD 4.3]: recipes/extend_sft.py with the "
    "config of your model and this run's data flags (--dataset_name, --as_chat), then this run again from the model "
    "that it saves (--model_name_or_path)"
)
_PUSHING, _PLAIN = ("pairs", "unpaired"), ("plain",)
_MOST, _GENERAL = (percent(THRESHOLDS[name]) for name in ("most", "general_share"))


def _against_displacement(run: RunTables) -> str:
    """Return what to do about chosen that falls; who pushed it is known where steps were explained."""
    who = "See in the account who pushed it" if len(run.accounts) else f"See who pushed it: {EXPLAIN}"
    return (
        f"{who}. Then add the SFT loss to DPO's (--loss_type sigmoid sft --loss_weights 1.0 1.0); or {_EXTEND}; or "
        "drop the pairs that displace most (kernel.ches_scores, highest normalised first [CHES]); or stop earlier."
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "likelihood displacement",
        "Did chosen fall although its margin grew?",
        faults.find_displacement,
        f"more than {_MOST} of the chosen probes below their start, their mean too (by more than {LEAST:g} nats), and "
        "the margin over rejected above its start",
        needs=("chosen", "rejected"),
        remedy=_against_displacement,
    ),
    Rule(
        "squeezing",
        "Does the mass go into the greedy tokens?",
        faults.find_squeezing,
        f"at least {_GENERAL} of the families fall since the first observation, while along the prefixes of rejected "
        f"the greedy tokens rise by more than {LEAST:g} nats and the collision probability rises",
        needs=("rejected",),
        remedy=f"Negative gradients on unlikely responses do this [LD 3.3]: {_EXTEND}; or lower --learning_rate, raise "
        "--beta, or stop earlier (SqueezingAlert(trainer, stop_on='squeezing')); or sample rejected from the model.",
    ),
    Rule(
        "general rise",
        "Does everything rise, rejected and broken text too?",
        faults.find_general_rise,
        f"at least {_GENERAL} of the families rise since the first observation, rejected and ungrammatical among them",
        needs=("rejected", "ungrammatical"),
        remedy="The model learns the form that all responses share (template, words, length) rather than which answer "
        "is right. At the start of SFT on a form that is new to it this is normal and passes. Else judge by the margin "
        "and not by chosen; in preference training look whether the pairs differ in more than a few tokens and whether "
        "chosen and rejected are the right way round, and lower the weight of the SFT loss where there is one.",
    ),
    Rule(
        "valley",
        "Was rejected already unlikely before preference training?",
        faults.find_valley,
        f"rejected below {THRESHOLDS['valley_p']:g} per token (geometric mean) at the first observation, while the "
        f"model is surer of other tokens there (tau0 = collision probability - p(label) above "
        f"{THRESHOLDS['valley_tau0']:g} on average)",
        needs=("rejected",),
        remedy=f"Pushing down what is unlikely squeezes most [LD, Prop. 2]: sample rejected from the model itself; or "
        f"{_EXTEND}.",
        asked_of=_PUSHING,
        reads="start",
    ),
    Rule(
        "hallucination transfer",
        "Do answers to other prompts rise as the trained ones do?",
        faults.find_transfer,
        f"other_train rises by more than {percent(THRESHOLDS['transfer_share'])} of chosen's rise per token, not "
        "counting what held-out answers (other_test) gain as well",
        needs=("chosen", "other_train", "other_test"),
        remedy="The model learns phrases rather than answers [LD 3.2]: fewer steps or epochs, a lower --learning_rate, "
        "more and more varied rows.",
        asked_of=_PLAIN,
    ),
    Rule(
        "lazy likelihood",
        "Do steps fail to raise the correct answers that they are taken on?",
        faults.find_lazy,
        f"Delta at or below 0 nats in more than {percent(THRESHOLDS['lazy_share'])} of the mixed questions",
        remedy="Penalties of wrong answers reach the right ones [NTHR]: NTHRGRPOTrainer (recipes/grpo.py --nthr_method "
        "nthr), or pos_only, w_reinforce there; or more answers per question (--num_generations), so that more are "
        "correct.",
        reads="tables",
    ),
    Rule(
        "first-order account",
        "Are steps too large for the theory?",
        faults.find_large_steps,
        f"explained below {percent(THRESHOLDS['explained'])} at any explained step that moved a probe token by "
        f"{THRESHOLDS['measurable_nats']:g} nats or more (root mean square)",
        remedy="Lower --learning_rate (or clip: --max_grad_norm) until steps are explainable; or take more nodes along "
        'the step, influence={"rule": "gauss2"}; else read the shares as a rough guide.',
        reads="tables",
    ),
    Rule(
        "probes and log",
        "Can these curves be trusted?",
        find_log_problems,
        f"NaN, more than {percent(THRESHOLDS['truncated_share'])} truncated, fewer than "
        f"{THRESHOLDS['fewest_prompts']:g} prompts in a family, probes of another form than the training rows, or "
        "fewer than two observations",
        remedy=mend_log,
        reads="tables",
    ),
    Rule(
        "chosen rises",
        "Do the chosen responses become likelier?",
        partial(courses.find_rise, family="chosen"),
        f"more than {_MOST} of the chosen probes above their start, their mean too, by more than {LEAST:g} nats",
        needs=("chosen",),
        kind="hope",
    ),
    Rule(
        "margin grows",
        "Does the model tell chosen from rejected better than before?",
        courses.find_growing_margin,
        f"the margin of chosen over rejected above its start in more than {_MOST} of the prompts, its mean too, by "
        f"more than {LEAST:g} nats",
        needs=("chosen", "rejected"),
        kind="hope",
    ),
    Rule(
        "rejected falls fastest",
        "Does rejected fall by more than anything else?",
        courses.find_fastest_fall,
        "rejected below its start, and by more nats than every other family [LD 3.3]",
        needs=("chosen", "rejected"),
        kind="course",
        asked_of=_PUSHING,
    ),
    Rule(
        "most families fall",
        "Does most of what is watched fall?",
        courses.find_general_fall,
        f"more than {_MOST} of the families below their start by more than {LEAST:g} nats [LD 3.3]",
        kind="course",
        asked_of=(*_PUSHING, "rollouts"),
    ),
    Rule(
        "greedy tokens rise",
        "Do the greedy tokens along chosen gain?",
        courses.find_greedy_rise,
        f"more than {_MOST} of the greedy continuations of chosen's prefixes above their start, their mean too",
        needs=("chosen",),
        kind="course",
    ),
    Rule(
        "rejected rises, then falls",
        "Does rejected rise at first, and fall back as the right answers are told apart?",
        courses.find_bell,
        f"rejected above both its start and its end at an observation between, by more than {LEAST:g} nats [LD 3.2]",
        needs=("rejected",),
        kind="course",
        asked_of=_PLAIN,
    ),
    Rule(
        "other_train rises",
        "Do answers leak to other prompts?",
        partial(courses.find_rise, family="other_train"),
        f"more than {_MOST} of the other_train probes above their start, their mean too [LD 3.2]",
        needs=("other_train",),
        kind="course",
        asked_of=_PLAIN,
    ),
    Rule(
        "ungrammatical falls",
        "Does broken text become less likely?",
        partial(courses.find_fall, family="ungrammatical"),
        f"more than {_MOST} of the ungrammatical probes below their start, their mean too [LD 3.2]",
        needs=("ungrammatical",),
        kind="course",
        asked_of=_PLAIN,
    ),
)

BY_NAME: Mapping[str, Rule] = {rule.name: rule for rule in RULES}

RULE_NAMES: tuple[str, ...] = tuple(rule.name for rule in RULES if rule.kind == "fault")
"""Names of the rules that find faults, in their order: those that a pipeline can stop at."""
