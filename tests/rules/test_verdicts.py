"""Every rule on numbers chosen here, just above and just below its threshold."""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.frames.numbers import percent
from llm_dynamics.rules import RULE_NAMES, RULES, THRESHOLDS, is_squeezing, judge
from llm_dynamics.runlog import schema
from llm_dynamics.runlog.influence_schema import ACCOUNTS, INFLUENCE
from llm_dynamics.runlog.rollout_schema import DISPLACEMENTS
from tests.report.reinforced import write_rollouts
from tests.report.synthetic import DPO_DELTA, SFT_DELTA, write_accounts, write_run, write_values

NAMES = [rule.name for rule in RULES]
FAULTS = [
    "likelihood displacement", "squeezing", "general rise", "valley", "hallucination transfer", "lazy likelihood",
    "first-order account", "probes and log",
]  # fmt: skip
SEQUENCES = ["step", "probe_id", "prompt_id", "family", "n_tokens", "n_nonfinite", "logp_sum", "argmax_logp_sum",
             "collision_sum", "tau0_sum"]  # fmt: skip


def empty(table):
    return table.empty_table().to_pandas()


@dataclass
class Tables:
    """What `judge` reads, in memory."""

    meta: dict = field(default_factory=lambda: {"trained_on": "pairs"})
    probes: pd.DataFrame = field(default_factory=lambda: empty(schema.PROBES))
    sequences: pd.DataFrame = field(default_factory=lambda: empty(schema.SEQUENCES))
    accounts: pd.DataFrame = field(default_factory=lambda: empty(ACCOUNTS))
    influence: pd.DataFrame = field(default_factory=lambda: empty(INFLUENCE))
    displacements: pd.DataFrame = field(default_factory=lambda: empty(DISPLACEMENTS))


def observed(values, *, greedy=(-6.0, -4.0), collision=(0.5, 0.75), tau0=0.25, n_tokens=4, steps=(0, 10)):
    """The sequences table of `{"family-prompt": (log-prob at each step)}`; None: the probe is not observed then."""
    rows = [
        [step, name, name.rsplit("-", 1)[1], name.rsplit("-", 1)[0], n_tokens, 0, logp[place], greedy[place],
         n_tokens * collision[place], n_tokens * tau0]
        for name, logp in values.items() for place, step in enumerate(steps) if logp[place] is not None
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=SEQUENCES)


def verdict(name, run):
    """The verdict of one rule; all of them have their say, whatever the run."""
    verdicts = judge(run)
    assert sorted(own.name for own in verdicts) == sorted(NAMES)
    for own in verdicts:
        assert own.status in ("found", "clear", "unknown")
        assert all((own.question.endswith("?"), own.evidence, own.threshold))
        assert bool(own.remedy) is (own.kind == "fault") is (own.name in FAULTS)
        assert "nan" not in own.evidence.split()
        assert own.agreement is None or 0 <= own.agreement <= 1
        assert own.agreement is None or own.status != "unknown"
        assert ("unsure" in own.evidence) is own.unsure
        assert own.unsure or own.agreement is None or own.agreement >= 0.95
    return next(own for own in verdicts if own.name == name)


# ---- likelihood displacement ----------------------------------------------------------------------------------------


def displaced(chosen, rejected=-8.0):
    """Chosen probes of prompts 0, 1, ... that move by these nats, each with a rejected one."""
    pairs = {f"chosen-{prompt}": (-20.0, -20.0 + change) for prompt, change in enumerate(chosen)}
    pairs |= {f"rejected-{prompt}": (-30.0, -30.0 + rejected) for prompt in range(len(chosen))}
    return Tables(sequences=observed(pairs))


@pytest.mark.parametrize(
    ("chosen", "rejected", "status"),
    [
        ((-1.0, -1.0, -1.0, 0.5), -8.0, "found"),  # 3 of 4 fell, their mean is -0.625, the margin grew by 7.375
        ((-1.0, -1.0, 0.5, 0.5), -8.0, "clear"),  # 2 of 4 is not more than half
        ((-1.0, -1.0, -1.0, 5.0), -8.0, "clear"),  # the mean is +0.5
        ((-1.0, -1.0, -1.0, 0.5), -0.5, "clear"),  # the margin fell: -0.625 + 0.5
        ((1.0, 1.0), -8.0, "clear"),
        ((0.0, 0.0), -8.0, "clear"),  # did not move
        ((-0.0099, -0.0099), -8.0, "clear"),  # a response that loses 1% of its probability has not moved
        ((-0.0101, -0.0101), -8.0, "found"),
    ],
)
def test_displacement_is_chosen_that_falls_while_its_margin_grows(chosen, rejected, status):
    assert verdict("likelihood displacement", displaced(chosen, rejected)).status == status


def test_displacement_gives_its_numbers():
    evidence = verdict("likelihood displacement", displaced((-1.0, -1.0, -1.5, -1.5))).evidence
    assert evidence == (
        "chosen -1.25 nats on average, 4 of its 4 probes below their start; margin over rejected +6.75 nats"
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None], ids=str)
@pytest.mark.parametrize("end", [0, 1])
def test_a_chosen_probe_that_is_not_finite_or_seen_at_one_end_only_is_left_out_and_told(bad, end):
    values = {"chosen-0": [-20.0, -21.0], "chosen-1": [-20.0, -21.0]}
    values |= {"rejected-0": (-9.0, -12.0), "rejected-1": (-9.0, -12.0)}
    values["chosen-1"][end] = bad
    found = verdict("likelihood displacement", Tables(sequences=observed(values)))
    assert found.status == "found"  # by chosen-0 alone
    assert "1 of its 1 probe below" in found.evidence
    assert "left out: 1 of 2 chosen, 1 of 2 rejected (not finite, not seen at both ends, or without" in found.evidence
    assert found.unsure  # one prompt is left
    assert found.evidence.endswith("unsure: it rests on 1 prompt alone")


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ({"chosen-0": (-1.0, -2.0)}, "watch `rejected` ("),
        ({"other-0": (-1.0, -2.0)}, "watch `chosen` and `rejected` ("),
        ({"chosen-0": (math.nan, -2.0), "rejected-0": (-1.0, -2.0)}, "needs finite values of chosen at two"),
        ({"chosen-0": (-1.0, -2.0), "rejected-1": (-1.0, -2.0)}, "no prompt has both"),
    ],
)
def test_displacement_is_unknown_without_pairs(values, missing):
    unknown = verdict("likelihood displacement", Tables(sequences=observed(values)))
    assert unknown.status == "unknown"
    assert missing in unknown.evidence


# ---- squeezing ------------------------------------------------------------------------------------------------------


def fallen(fell, rose, **choice):
    """As many families of one probe each that fell and that rose."""
    names = ["rejected", *(f"family{i}" for i in range(1, fell + rose))]
    return observed({f"{name}-0": (-20.0, -21.0 if i < fell else -19.0) for i, name in enumerate(names)}, **choice)


@pytest.mark.parametrize(
    ("fell", "rose", "greedy", "collision", "found"),
    [
        (4, 1, (-6.0, -4.0), (0.5, 0.6), True),  # 4 of 5 is 0.8
        (3, 1, (-6.0, -4.0), (0.5, 0.6), False),  # 0.75
        (5, 0, (-4.0, -6.0), (0.5, 0.6), False),  # the greedy tokens fell
        (5, 0, (-6.0, -6.0), (0.5, 0.6), False),
        (5, 0, (-6.0, -4.0), (0.6, 0.5), False),  # the mass spread
    ],
)
def test_squeezing_is_mass_that_goes_into_the_greedy_tokens_while_families_fall(fell, rose, greedy, collision, found):
    sequences = fallen(fell, rose, greedy=greedy, collision=collision)
    assert is_squeezing(sequences)[0] is found
    assert verdict("squeezing", Tables(sequences=sequences)).status == ("found" if found else "clear")


def test_changes_below_a_hundredth_of_a_nat_are_no_falls():
    still = {f"{name}-0": (-9.0, -9.0 - 0.0099) for name in ("rejected", "a", "b", "c", "d")}
    assert verdict("squeezing", Tables(sequences=observed(still))).status == "clear"
    fallen = dict.fromkeys(still, (-9.0, -9.0 - 0.0101))
    assert verdict("squeezing", Tables(sequences=observed(fallen))).status == "found"
    nine = {f"chosen-{k}": (-9.0, -9.0 - 0.0099) for k in range(9)} | {"chosen-9": (-9.0, -10.0)}
    far = {f"rejected-{k}": (-9.0, -12.0) for k in range(10)}
    displaced = verdict("likelihood displacement", Tables(sequences=observed(nine | far)))
    assert displaced.status == "clear"
    assert "1 of its 10 probes below" in displaced.evidence


def test_squeezing_gives_its_numbers():
    assert is_squeezing(fallen(4, 1))[1] == (
        "4 of 5 families fell (not family4); along rejected the greedy tokens +2.00 nats, collision probability "
        "0.5 to 0.75; unsure: it rests on 1 prompt alone"
    )


@pytest.mark.parametrize("column", ["argmax_logp_sum", "collision_sum"])
def test_squeezing_reads_the_peaks_along_rejected(column):
    frame = observed({"chosen-0": (-9.0, -10.0), "rejected-0": (-9.0, -20.0), "random-0": (-9.0, -10.0)})
    last = frame["step"] == 10
    frame.loc[last & (frame["family"] == "chosen"), column] = -400.0
    assert is_squeezing(frame)[0] is True
    frame.loc[last & (frame["family"] == "rejected"), column] = -400.0
    assert is_squeezing(frame)[0] is False


def test_squeezing_compares_the_first_observation_with_the_last():
    values = {f"{name}-{k}": (-9.0, -1.0, -10.0) for name in ("rejected", "random") for k in range(2)}
    frame = observed(values, greedy=(-6.0, -9.0, -5.0), collision=(0.2, 0.1, 0.3), steps=(5, 10, 200))
    assert is_squeezing(frame) == (
        True, "2 of 2 families fell; along rejected the greedy tokens +1.00 nats, collision probability 0.2 to 0.3"
    )  # fmt: skip
    assert is_squeezing(frame.sample(frac=1, random_state=0)) == is_squeezing(frame)


def test_families_without_a_finite_probe_do_not_count_as_clear_and_are_told():
    values = {"other_test-0": (-9.0, -10.0), "rejected-0": (-9.0, -20.0), "random-0": (-9.0, math.nan)}
    found, evidence = is_squeezing(observed(values))
    assert found
    assert "2 of 2 families fell" in evidence
    assert "left out: 1 of 1 random (not finite, or not seen at both ends)" in evidence


@pytest.mark.parametrize("column", ["argmax_logp_sum", "collision_sum", "logp_sum"])
@pytest.mark.parametrize("bad", [math.nan, None], ids=str)
def test_squeezing_is_unknown_where_its_numbers_were_not_measured(column, bad):
    frame = fallen(5, 0)
    frame[column] = bad
    assert is_squeezing(frame) is None
    assert verdict("squeezing", Tables(sequences=frame)).status == "unknown"


def test_peaks_along_rejected_that_are_not_finite_are_not_replaced_by_those_of_others():
    frame = observed({"chosen-0": (-9.0, -10.0), "rejected-0": (-9.0, -20.0)})
    frame.loc[frame["family"] == "rejected", "argmax_logp_sum"] = math.nan
    assert is_squeezing(frame) is None


@pytest.mark.parametrize("steps", [(), (7,)])
def test_squeezing_needs_two_observations(steps):
    frame = observed({"chosen-0": (-9.0,)}, steps=steps)
    assert is_squeezing(frame) is None
    assert verdict("squeezing", Tables(sequences=frame)).evidence == "needs two observations"


def test_judging_leaves_the_tables_as_they_were():
    run = Tables(sequences=fallen(4, 1))
    before = run.sequences.copy()
    judge(run)
    pd.testing.assert_frame_equal(run.sequences, before)


# ---- valley ---------------------------------------------------------------------------------------------------------


def valley(*rates, trained_on="pairs", tau0=0.25):
    """Rejected probes of 4 tokens whose probability per token is each of `rates` at the start."""
    values = {f"rejected-{i}": (4 * math.log(rate) if rate else -math.inf, -1.0) for i, rate in enumerate(rates)}
    return Tables({"trained_on": trained_on}, sequences=observed(values, tau0=tau0))


@pytest.mark.parametrize(
    ("rates", "status"),
    [
        ((0.099,), "found"),
        ((0.101,), "clear"),
        ((0.01, 0.9), "found"),  # sqrt(0.009) = 0.095
        ((0.0102, 1.0), "clear"),  # sqrt(0.0102) = 0.101
    ],
)
def test_valley_is_rejected_that_is_unlikely_at_the_first_observation(rates, status):
    assert verdict("valley", valley(*rates)).status == status


@pytest.mark.parametrize(("tau0", "status"), [(0.011, "found"), (0.009, "clear"), (-0.1, "clear")])
def test_a_model_that_is_sure_of_nothing_else_has_no_valley(tau0, status):
    assert verdict("valley", valley(0.05, tau0=tau0)).status == status


@pytest.mark.parametrize("bad", [math.nan, None], ids=str)
def test_a_log_without_squeezing_statistics_does_not_tell_a_valley_from_an_untrained_model(bad):
    run = valley(0.05, 0.05)
    run.sequences.loc[run.sequences["probe_id"] == "rejected-1", "tau0_sum"] = bad
    assert "left out: 1 of 2 rejected (not finite)" in verdict("valley", run).evidence
    run.sequences["tau0_sum"] = bad
    untold = verdict("valley", run)
    assert untold.status == "unknown"
    assert "tau0" in untold.evidence


def test_valley_is_not_told_by_an_observation_after_the_first_step():
    run = valley(0.05)
    run.sequences = run.sequences.assign(step=run.sequences["step"] + 20)
    late = verdict("valley", run)
    assert late.status == "unknown"
    assert "the first in this log is of step 20" in late.evidence


@pytest.mark.parametrize("trained_on", ["pairs", "unpaired"])
def test_valley_is_asked_of_losses_that_push_responses_down(trained_on):
    assert verdict("valley", valley(0.05, trained_on=trained_on)).status == "found"


@pytest.mark.parametrize("trained_on", ["plain", "rollouts"])
def test_valley_is_not_asked_of_others(trained_on):
    assert verdict("valley", valley(0.05, trained_on=trained_on)).evidence == (
        "asked of training on pairs or unpaired only"
    )


@pytest.mark.parametrize("meta", [{}, {"trained_on": None}, {"trainer": "DPOTrainer"}])
def test_a_log_that_does_not_say_what_was_trained_on_is_not_judged_by_a_name(meta):
    run = valley(0.05)
    run.meta = meta
    assert "does not say what was trained on" in verdict("valley", run).evidence


def test_valley_tells_what_it_left_out():
    found = verdict("valley", valley(0.05, 0))
    assert found.evidence == (
        "rejected starts at 0.05 per token (geometric mean over 1 probe); where a step pushes it down, tokens below "
        "probability 0.250 fall with it (tau0 +0.250, mean over responses); left out: 1 of 2 rejected (not finite); "
        "unsure: it rests on 1 prompt alone"
    )
    assert verdict("valley", valley(0)).status == "unknown"
    assert verdict("valley", Tables(sequences=observed({"chosen-0": (-1.0, -1.0)}))).status == "unknown"


def test_a_response_without_tokens_is_left_out():
    run = valley(0.05, 0.5)
    run.sequences.loc[run.sequences["probe_id"] == "rejected-1", "n_tokens"] = 0
    assert "starts at 0.05" in verdict("valley", run).evidence


# ---- hallucination transfer -----------------------------------------------------------------------------------------


def transfer(chosen, other, held_out=0.0, trained_on="plain", n=2):
    names = {"chosen": (-20.0, chosen), "other_train": (-40.0, other), "other_test": (-40.0, held_out)}
    values = {f"{name}-{k}": (start, start + change) for name, (start, change) in names.items() for k in range(n)}
    return Tables({"trained_on": trained_on}, sequences=observed(values))


@pytest.mark.parametrize(
    ("chosen", "other", "status"),
    [
        (8.0, 2.5, "found"), (8.0, 2.0, "clear"), (8.0, -4.0, "clear"), (-8.0, 4.0, "clear"), (0.0, 1.0, "clear"),
        (0.009, 0.009, "clear"), (0.02, 0.02, "found"),  # a response that gains 1% of its probability has moved
    ],
)  # fmt: skip
def test_transfer_is_other_answers_that_rise_by_more_than_a_quarter_as_much(chosen, other, status):
    assert verdict("hallucination transfer", transfer(chosen, other)).status == status


@pytest.mark.parametrize(
    ("other", "held_out", "status"),
    [
        (4.0, 1.0, "found"),  # 3 of 8
        (4.0, 2.0, "clear"),  # a quarter
        (4.0, 4.0, "clear"),  # form, which any answer shares
        (4.0, -9.0, "found"),
        (2.0, -9.0, "clear"),  # a fall of held-out answers is no rise of the others
    ],
)
def test_what_held_out_answers_gain_as_well_is_not_transferred(other, held_out, status):
    assert verdict("hallucination transfer", transfer(8.0, other, held_out)).status == status


def test_transfer_is_per_token():
    run = transfer(8.0, 6.0, 2.0)
    assert verdict("hallucination transfer", run).evidence == (
        "nats per token: other_train +1.50, other_test +0.500, chosen +2.00: other_train has 50% of chosen's rise "
        "beyond what held-out answers gain"
    )
    assert verdict("hallucination transfer", transfer(-8.0, 8.0, 4.0)).evidence == (
        "nats per token: other_train +2.00, other_test +1.00, chosen -2.00"
    )
    assert "has no part of chosen's rise" in verdict("hallucination transfer", transfer(8.0, -8.0)).evidence
    run.sequences.loc[run.sequences["family"] == "other_train", "n_tokens"] = 64
    assert verdict("hallucination transfer", run).status == "clear"  # 0.094 against 2 nats per token


@pytest.mark.parametrize("other", [8.0, 2.5, 1.0])
def test_transfer_is_not_told_without_held_out_answers(other):
    run = transfer(8.0, other)
    run.sequences = run.sequences[run.sequences["family"] != "other_test"]
    untold = verdict("hallucination transfer", run)
    assert untold.status == "unknown"
    assert untold.evidence.startswith("watch `other_test` (")


def test_transfer_is_unknown_elsewhere():
    asked = verdict("hallucination transfer", transfer(8.0, 8.0, trained_on="pairs"))
    assert asked.evidence == "asked of training on plain only"
    infinite = verdict("hallucination transfer", transfer(8.0, math.inf))
    assert infinite.evidence == "needs finite values of other_train at two observations"


# ---- general rise ---------------------------------------------------------------------------------------------------


def risen(**changes):
    """Two probes of each family, that move by these nats; chosen rises by 18."""
    values = {f"{name}-{k}": (-40.0, -40.0 + change) for name, change in ({"chosen": 18.0} | changes).items()
              for k in range(2)}  # fmt: skip
    return Tables(sequences=observed(values))


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"rejected": 9.0, "ungrammatical": 4.0}, "found"),
        ({"rejected": 9.0, "ungrammatical": 4.0, "random": 2.0, "other_train": -1.0}, "found"),  # 4 of 5
        ({"rejected": 9.0, "ungrammatical": 4.0, "random": -2.0}, "clear"),  # 3 of 4
        ({"rejected": -7.0, "ungrammatical": 4.0, "random": 2.0, "a": 1.0}, "clear"),  # as hoped
        ({"rejected": 9.0, "ungrammatical": -4.0, "random": 2.0, "a": 1.0}, "clear"),  # broken text is told apart
        ({"rejected": 0.009, "ungrammatical": 4.0}, "clear"),
        ({"rejected": 9.0}, "unknown"),
        ({"ungrammatical": 9.0}, "unknown"),
    ],
)
def test_a_general_rise_is_all_that_rises_with_what_ought_not_to(changes, status):
    assert verdict("general rise", risen(**changes)).status == status


def test_a_run_that_goes_as_hoped_is_said_to():
    run = risen(rejected=-6.9, ungrammatical=-3.0)
    by_name = {own.name: own for own in judge(run)}
    assert by_name["chosen rises"].status == by_name["margin grows"].status == "found"
    assert by_name["chosen rises"].evidence == (
        "chosen +18.0 nats on average (+4.50 per token), 2 of its 2 probes above their start"
    )
    assert by_name["margin grows"].evidence == "margin over rejected +24.9 nats on average, grew in 2 of 2 prompts"
    assert by_name["likelihood displacement"].status == by_name["general rise"].status == "clear"


@pytest.mark.parametrize("share_falling", [0.0, 0.25, 0.4, 0.5, 0.6, 1.0])
@pytest.mark.parametrize("mean", [-3.0, -0.5, 0.5, 3.0])
def test_no_two_rules_contradict_each_other(share_falling, mean):
    n_fell = round(20 * share_falling)
    chosen = np.where(np.arange(20) < n_fell, -1.0, 1.0)
    run = displaced(chosen - chosen.mean() + mean)
    by_name = {own.name: own.status for own in judge(run)}
    assert not by_name["likelihood displacement"] == by_name["chosen rises"] == "found"
    if by_name["likelihood displacement"] == "found":
        assert by_name["margin grows"] != "clear"


# ---- lazy likelihood ------------------------------------------------------------------------------------------------


def lazy(*changes):
    """One correct answer of a question each, that a step moves by these nats."""
    rows = {"step": 1, "question": range(len(changes)), "logp_before": -20.0, "logp_after": np.add(-20.0, changes)}
    return Tables({"trained_on": "rollouts"}, displacements=pd.DataFrame(rows))


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ((0.5, 0.5, -0.5), "found"),
        ((0.5, 0.5, 0.5, -0.5), "clear"),  # a quarter is not more than a quarter
        ((0.5, 0.5, 0.0), "found"),  # what stays did not rise
        ((0.5,), "clear"),
    ],
)
def test_lazy_is_correct_answers_that_do_not_rise(changes, status):
    assert verdict("lazy likelihood", lazy(*changes)).status == status


def test_lazy_counts_questions_of_steps_not_answers():
    run = lazy(-1.0, -1.0, 4.0, 1.0, 1.0, 1.0)
    run.displacements["question"] = [0, 0, 0, 1, 2, 0]
    run.displacements["step"] = [1, 1, 1, 1, 1, 2]
    found = verdict("lazy likelihood", run)  # means 2/3, 1, 1, 1
    assert found.status == "clear"
    assert found.evidence == "correct answers did not rise in 0 of 4 mixed questions; Delta +0.917 nats on average"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_lazy_leaves_out_what_is_not_finite(bad):
    clear = verdict("lazy likelihood", lazy(0.5, bad))
    assert clear.status == "clear"
    assert clear.evidence.endswith(
        "left out: 1 of 2 correct answers (not finite); unsure: it rests on 1 mixed question alone"
    )
    assert verdict("lazy likelihood", lazy(bad)).status == "unknown"


def test_lazy_is_unknown_without_displacements():
    assert "displacement=True" in verdict("lazy likelihood", Tables()).evidence


# ---- first-order account --------------------------------------------------------------------------------------------


def accounts(*explained, measured=1.0):
    """Accounts of steps that moved the 4 tokens of one probe by `measured` nats (norm)."""
    rows = {"step": range(1, len(explained) + 1), "explained": explained, "learning_rate": 2e-4, "rule": "midpoint"}
    return Tables(
        sequences=observed({"chosen-0": (-2.0, -1.0)}), accounts=pd.DataFrame(rows).assign(measured_norm=measured)
    )


@pytest.mark.parametrize(
    ("explained", "status"),
    [((0.99, 0.9), "clear"), ((0.99, 0.899), "found"), ((1.0, -3.0), "found"), ((-math.inf,), "found")],
)
def test_account_is_found_where_any_step_is_explained_badly(explained, status):
    assert verdict("first-order account", accounts(*explained)).status == status


def test_account_names_the_worst_step():
    assert verdict("first-order account", accounts(0.95, 0.5, 0.7)).evidence == (
        "2 of 3 explained steps below 90%; lowest 50% at step 2 (learning rate 0.0002, rule midpoint)"
    )


def test_accounts_without_a_number_do_not_decide():
    clear = verdict("first-order account", accounts(0.95, math.nan))
    assert clear.status == "clear"
    assert "lowest 95% at step 1" in clear.evidence
    assert clear.evidence.endswith("left out of 2 explained steps: 1 (not finite)")
    assert verdict("first-order account", accounts(math.nan)).status == "unknown"
    assert "influence=True" in verdict("first-order account", Tables()).evidence


def test_steps_too_small_for_float32_are_left_out():
    # 4 tokens: a norm of 2e-5 is 1e-5 nats per token
    assert verdict("first-order account", accounts(0.1, measured=2.01e-5)).status == "found"
    tiny = verdict("first-order account", accounts(0.1, 0.2, measured=1.99e-5))
    assert tiny.status == "unknown"
    assert "left out of 2 explained steps: 2 (too small to measure)" in tiny.evidence
    mixed = verdict("first-order account", accounts(0.1, 0.99, measured=[1e-6, 1.0]))
    assert (mixed.status, mixed.evidence) == (
        "clear",
        "0 of 1 explained step below 90%; lowest 99% at step 2 (learning rate 0.0002, rule midpoint); left out of 2 "
        "explained steps: 1 (too small to measure)",
    )


@pytest.mark.parametrize(("family", "probe"), [("chosen", None), ("chosen", "chosen-0")])
def test_the_size_of_a_step_is_that_of_the_tokens_that_were_explained(family, probe):
    run = accounts(0.1, measured=2.01e-5)  # 4 of 8 tokens are explained
    run.sequences = observed({"chosen-0": (-2.0, -1.0), "rejected-0": (-2.0, -1.0)})
    assert verdict("first-order account", run).status == "unknown"  # nothing says which
    run.influence = pd.DataFrame({"step": [1], "family": [family], "probe_id": [probe], "cause": ["up"]})
    assert verdict("first-order account", run).status == "found"


def test_an_account_of_which_little_is_known_is_judged():
    run = accounts(0.5)
    run.accounts = run.accounts.assign(learning_rate=math.nan, rule=None)
    assert verdict("first-order account", run).evidence.endswith("lowest 50% at step 1 (rule unknown)")


def test_what_was_found_for_sure_stands_first_and_remedies_know_the_run():
    sure = observed(
        {f"chosen-{k}": (-9.0, -10.0) for k in range(12)} | {f"rejected-{k}": (-9.0, -12.0) for k in range(12)}
    )
    found = judge(Tables(sequences=sure))
    assert found[0].name == "likelihood displacement"
    assert "watch(..., influence=True)" in found[0].remedy
    explained = Tables(sequences=sure, accounts=accounts(0.99).accounts)
    assert judge(explained)[0].remedy.startswith("See in the account who pushed it. Then")


def test_an_unsure_finding_stands_behind_a_sure_one():
    mixed = {f"chosen-{k}": (-9.0, -8.0 if k < 5 else -11.0) for k in range(12)}  # 7 of 12 fell
    mixed |= {f"rejected-{k}": (-90.0, -120.0) for k in range(12)}
    found = [own for own in judge(Tables(sequences=observed(mixed, tau0=1.0))) if own.status == "found"]
    found = [own for own in found if own.kind == "fault"]
    assert [own.unsure for own in found] == sorted(own.unsure for own in found)
    assert {own.name: own.unsure for own in found}["likelihood displacement"]
    assert not found[0].unsure


# ---- probes and log -------------------------------------------------------------------------------------------------


def watched(n_probes=10, *, cut=0, families=("chosen",)):
    names = [f"{family}-{i}" for family in families for i in range(n_probes)]
    split = [name.split("-") for name in names]
    probes = pd.DataFrame({"probe_id": names, "family": [one[0] for one in split],
                           "prompt_id": [one[1] for one in split], "n_cut": 0})  # fmt: skip
    probes.loc[: cut - 1, "n_cut"] = 5
    return Tables(probes=probes, sequences=observed(dict.fromkeys(names, (-2.0, -1.0))))


def test_a_log_without_problems_is_clear():
    clear = verdict("probes and log", watched())
    assert (clear.status, clear.evidence) == ("clear", "10 probes, 2 observations, all finite")


@pytest.mark.parametrize(
    ("run", "evidence"),
    [
        (watched(5), "fewer than 6 prompts in 1 of 1 family (chosen): 5 in the smallest"),
        (watched(10, cut=2), "2 of 10 probes truncated"),
        (watched(3, families=("a", "b")), "fewer than 6 prompts in 2 of 2 families (a, b): 3 in the smallest"),
        (watched(3, families="abcd"), "fewer than 6 prompts in 4 of 4 families: 3 in the smallest"),
        (Tables(), "no observation: nothing to compare"),
    ],
)
def test_what_is_wrong_with_a_log_is_found(run, evidence):
    found = verdict("probes and log", run)
    assert (found.status, found.evidence) == ("found", evidence)


def test_probes_of_one_prompt_count_once_and_six_prompts_are_enough():
    crowded = watched(12)
    crowded.probes["prompt_id"] = [str(k // 3) for k in range(12)]
    assert "fewer than 6 prompts in 1 of 1 family (chosen): 4 in the smallest" in (
        verdict("probes and log", crowded).evidence
    )
    assert verdict("probes and log", watched(6)).status == "clear"


def test_a_tenth_truncated_is_clear():
    assert verdict("probes and log", watched(10, cut=1)).status == "clear"


@pytest.mark.parametrize("column", ["n_nonfinite", "logp_sum"])
def test_probes_that_are_not_finite_are_found(column):
    run = watched()
    run.sequences.loc[3, column] = 1 if column == "n_nonfinite" else -math.inf
    assert verdict("probes and log", run).evidence == (
        "1 probe with NaN or infinite tokens, from step 10 on (1 of chosen)"
    )


def test_a_single_observation_is_found():
    run = watched()
    run.sequences = run.sequences[run.sequences["step"] == 0]
    assert verdict("probes and log", run).evidence == "one observation: nothing to compare"


# ---- all of them ----------------------------------------------------------------------------------------------------


def test_what_was_found_comes_first_and_the_rules_keep_their_order():
    run = displaced((-1.0, -1.0))
    verdicts = judge(run)
    places = [("found", "clear", "unknown").index(own.status) for own in verdicts]
    assert places == sorted(places)
    for status in ("clear", "unknown"):
        names = [own.name for own in verdicts if own.status == status]
        assert names == sorted(names, key=NAMES.index)
    assert list(RULE_NAMES) == FAULTS


def test_a_run_of_which_nothing_was_logged_is_unknown():
    by_name = {own.name: own.status for own in judge(Tables(meta={}))}
    assert by_name == dict.fromkeys(NAMES, "unknown") | {"probes and log": "found"}


def test_thresholds_are_stated():
    stated = {own.name: own.threshold for own in judge(Tables())}
    assert "50%" in stated["likelihood displacement"]
    assert "80%" in stated["squeezing"]
    assert f"{THRESHOLDS['valley_p']:g}" in stated["valley"]
    assert "6 prompts" in " ".join(stated["probes and log"].split())


@pytest.mark.parametrize("fifths", [1, 2, 3, 7, 19])
def test_exactly_four_fifths_of_the_families_is_enough(fifths):
    assert is_squeezing(fallen(4 * fifths, fifths))[0] is True
    assert is_squeezing(fallen(4 * fifths - 1, fifths + 1))[0] is False


# ---- how sure -------------------------------------------------------------------------------------------------------


def test_a_decision_that_hangs_on_a_few_prompts_says_so():
    sure = verdict("likelihood displacement", displaced([-1.0] * 12))
    assert (sure.status, sure.agreement) == ("found", 1.0)
    assert "unsure" not in sure.evidence
    unsure = verdict("likelihood displacement", displaced([-1.0] * 7 + [1.0] * 5))
    assert unsure.status == "found"  # 7 of 12, by -0.17 nats on average
    assert 0.5 < unsure.agreement < 0.8
    assert unsure.evidence.endswith(f"; unsure: {percent(unsure.agreement)} of resamples of its 12 prompts decide so")


def test_probes_of_one_prompt_are_drawn_together():
    # one prompt with many probes that rise, eleven with one that falls: as probes they are sure, as prompts not
    changes = {f"chosen{i}-0": 1.0 for i in range(10)} | {f"chosen-{i}": -1.0 for i in range(1, 12)}
    values = {name: (-20.0, -20.0 + change) for name, change in changes.items()}
    values |= {f"rejected-{i}": (-30.0, -38.0) for i in range(12)}
    sequences = observed(values)
    sequences["family"] = sequences["family"].str.rstrip("0123456789")
    crowded = verdict("likelihood displacement", Tables(sequences=sequences))
    assert crowded.status == "found"
    assert "11 of its 21 probes below" in crowded.evidence
    assert 0.5 < crowded.agreement < 0.95


@pytest.mark.parametrize("change", [-1.0, 1.0])
def test_one_prompt_alone_has_no_spread_and_is_never_sure(change):
    alone = verdict("likelihood displacement", displaced([change]))
    assert alone.agreement is None
    assert alone.unsure
    assert verdict("lazy likelihood", lazy(change)).unsure
    assert not verdict("likelihood displacement", displaced([change] * 2)).unsure


def test_questions_are_drawn_where_there_are_no_probes():
    unsure = verdict("lazy likelihood", lazy(*[0.5] * 5, *[-0.5] * 2))
    assert unsure.status == "found"  # 2 of 7
    assert f"{percent(unsure.agreement)} of resamples of its 7 mixed questions decide so" in unsure.evidence


def test_what_draws_nothing_has_no_agreement():
    by_name = {own.name: own.agreement for own in judge(accounts(0.95))}
    assert by_name["first-order account"] is by_name["probes and log"] is by_name["lazy likelihood"] is None


# ---- real run logs --------------------------------------------------------------------------------------------------


def test_a_dpo_log_shows_displacement_and_squeezing(tmp_path):
    run = write_accounts(write_run(tmp_path / "run", "DPOTrainer", DPO_DELTA, nan_probe="other_test-3"))
    by_name = {own.name: own for own in judge(run)}
    assert {own.name for own in judge(run) if own.status == "found" and own.kind == "fault"} == {
        "likelihood displacement", "squeezing", "valley", "probes and log",
    }  # fmt: skip
    assert "12 of 12 families fell" in by_name["squeezing"].evidence
    assert "left out: 1 of 12 other_test" in by_name["squeezing"].evidence
    assert by_name["probes and log"].evidence == (
        "1 probe with NaN or infinite tokens, from step 5 on (1 of other_test)"
    )
    assert by_name["first-order account"].status == "clear"
    assert "24 explained steps" in by_name["first-order account"].evidence


def test_an_sft_log_shows_transfer(tmp_path):
    by_name = {own.name: own.status for own in judge(write_run(tmp_path / "run", "SFTTrainer", SFT_DELTA))}
    assert by_name["hallucination transfer"] in ("found", "clear")
    assert by_name["squeezing"] == by_name["likelihood displacement"] == by_name["probes and log"] == "clear"
    assert by_name["valley"] == by_name["first-order account"] == "unknown"


def test_a_grpo_log_shows_lazy_likelihood(tmp_path):
    run = write_rollouts(write_run(tmp_path / "run", "GRPOTrainer", {"correct": 1.0}), shift=-0.8)
    assert verdict("lazy likelihood", run).status == "found"
    assert verdict("likelihood displacement", run).status == "unknown"


VALUES = st.one_of(st.none(), st.sampled_from([math.nan, math.inf, -math.inf]), st.floats(-1e300, 1e300))
PROBE_IDS = st.sampled_from(["chosen-0", "chosen-1", "rejected-0", "rejected-1", "other_train-0", "x-0"])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.dictionaries(
        st.tuples(PROBE_IDS, st.integers(0, 2)), st.tuples(VALUES, VALUES, VALUES, st.integers(0, 3)), max_size=12
    ),
    trained_on=st.sampled_from(["plain", "pairs"]),
    scalars=st.lists(st.tuples(VALUES, VALUES), max_size=3),
)
def test_no_rule_raises_whatever_the_numbers(rows, trained_on, scalars):
    sequences = [
        [step, name, name[-1], name[:-2], n_tokens, None, *values] for (name, step), (*values, n_tokens) in rows.items()
    ]
    run = Tables(
        {"trained_on": trained_on}, sequences=pd.DataFrame(sequences, columns=SEQUENCES[:-1]).assign(tau0_sum=0.5)
    )
    changes = pd.DataFrame(scalars, columns=["logp_before", "logp_after"])
    run.displacements = changes.assign(step=1, question=range(len(changes)))
    run.accounts = pd.DataFrame({"explained": [own for own, _ in scalars]}, dtype=float)
    run.accounts = run.accounts.assign(step=1, learning_rate=None, rule=None, measured_norm=1.0)
    verdict("squeezing", run)


@pytest.mark.parametrize("steps", [(), (0,), (0, 10)])
def test_a_log_with_null_statistics_is_judged(tmp_path, steps):
    run = write_values(tmp_path / "run", {"chosen-1": [-3.0, -4.0], "rejected-1": [-5.0, -9.0]}, steps=steps)
    assert verdict("squeezing", run).status == "unknown"
    assert verdict("likelihood displacement", run).status == ("found" if len(steps) > 1 else "unknown")


# ---- no verdict without its control ---------------------------------------------------------------------------------

WATCHED = ("chosen", "rejected", "other_train", "other_test", "ungrammatical")
CHANGES = st.fixed_dictionaries({name: st.sampled_from([-9.0, -3.0, -0.5, 0.5, 3.0, 9.0]) for name in WATCHED})


def full(changes, trained_on, *, steps=(0, 5, 10), **choice):
    """A run of every family, of three prompts each, that move by these nats; valleys, greedy tokens and all."""
    values = {f"{name}-{k}": [-20.0 + change * (step - steps[0]) / 10 for step in steps]
              for name, change in changes.items() for k in range(3)}  # fmt: skip
    ends = np.linspace(0, 1, len(steps))
    choice = {"greedy": -6 + 2 * ends, "collision": 0.5 + 0.2 * ends} | choice
    return Tables({"trained_on": trained_on}, sequences=observed(values, steps=steps, **choice))


ASKED = st.sampled_from(["pairs", "unpaired", "plain", "rollouts"])
READING = [rule for rule in RULES if rule.reads != "tables"]


def statuses(run):
    return {own.name: own for own in judge(run)}


@settings(max_examples=6, deadline=None)
@given(changes=CHANGES, trained_on=ASKED)
def test_a_rule_whose_control_is_taken_away_or_not_finite_does_not_tell(changes, trained_on):
    run = full(changes, trained_on)
    before = statuses(run)
    assert {"found", "clear"} >= {before[rule.name].status for rule in READING if trained_on in rule.asked_of}
    for family in WATCHED:
        without = replace(run, sequences=run.sequences[run.sequences["family"] != family])
        broken = run.sequences.assign(logp_sum=run.sequences["logp_sum"].where(run.sequences["family"] != family))
        for tables, what in ((without, f"`{family}`"), (replace(run, sequences=broken), family)):
            said = statuses(tables)
            for rule in READING:
                told = said[rule.name]
                if family in rule.needs:
                    assert told.status == "unknown"
                    assert what in told.evidence or told.evidence.startswith("asked of")


@settings(max_examples=6, deadline=None)
@given(changes=CHANGES, trained_on=ASKED)
def test_nothing_that_is_taken_from_a_log_makes_a_verdict_firm_that_its_rule_cannot_tell(changes, trained_on):
    run = full(changes, trained_on)
    rows = run.sequences
    alone = replace(run, sequences=rows[rows["step"] == 0])
    late = replace(run, sequences=rows[rows["step"] > 0])
    peakless = replace(run, sequences=rows.assign(argmax_logp_sum=None, collision_sum=None, tau0_sum=None))
    pair = replace(run, sequences=rows[rows["family"].isin(["chosen", "rejected"])])
    once, since, blunt, two = map(statuses, (alone, late, peakless, pair))
    for rule in READING:
        assert once[rule.name].status == "unknown" or rule.reads == "start"
        told = since[rule.name]
        if rule.reads == "start":
            assert told.status == "unknown"
        else:  # what was not seen is not clear; what is found is found since then
            assert told.status != "clear"
            assert told.status == "unknown" or "since step 5, the first observed" in told.evidence
    for name in ("squeezing", "valley", "greedy tokens rise"):
        assert blunt[name].status == "unknown"
    for name in ("squeezing", "general rise"):
        assert two[name].status == "unknown"


def test_every_rule_is_found_in_one_such_run_and_clear_in_another():
    seen = {rule.name: set() for rule in READING}
    ups, downs = dict.fromkeys(WATCHED, 9.0), dict.fromkeys(WATCHED, -3.0)
    for changes in (
        ups,
        downs | {"rejected": -9.0},
        ups | {"rejected": -9.0, "ungrammatical": -3.0, "other_test": -3.0},
    ):
        for trained_on in ("pairs", "plain"):
            for greedy in ((-6.0, -5.0, -4.0), (-4.0, -5.0, -6.0)):
                for tau0 in (0.0, 0.25):
                    for own in judge(full(changes, trained_on, greedy=greedy, tau0=tau0)):
                        seen.get(own.name, set()).add(own.status)
    del seen["rejected rises, then falls"]  # these go straight
    assert all({"found", "clear"} <= said for said in seen.values()), seen


def test_a_bell_is_found_on_the_same_probes_at_every_observation():
    def bell(*curves):
        values = {f"rejected-{k}": curve for k, curve in enumerate(curves)}
        return verdict("rejected rises, then falls", Tables({"trained_on": "plain"}, sequences=observed(
            values, steps=(0, 5, 10), greedy=(-6.0,) * 3, collision=(0.5,) * 3)))  # fmt: skip

    assert bell((-9.0, -5.0, -9.5), (-9.0, -6.0, -9.5)).evidence == (
        "rejected starts at -9.00 nats, is highest at step 5 (+3.50) and ends at -9.50 (-4.00 from there)"
    )
    for straight in ((-10.0, -9.0, -8.0), (-10.0, -11.0, -12.0), (-10.0, -12.0, -9.0)):
        assert bell(straight, straight).status == "clear"
    gap = bell((-10.0, -10.1, -10.2), (-90.0, math.nan, -90.2))
    assert gap.status == "clear"
    assert "left out: 1 of 2 rejected (not finite at every observation)" in gap.evidence


def test_the_margin_grows_on_the_same_prompts_at_both_ends():
    values = {"chosen-0": (-10.0, -12.0), "rejected-0": (-40.0, -41.0), "chosen-1": (-10.0, -12.0)}
    run = Tables(sequences=observed(values | {"rejected-1": (-10.0, math.nan)}))
    shrank = verdict("margin grows", run)
    assert shrank.status == "clear"
    assert shrank.evidence.startswith("margin over rejected -1.00 nats on average, grew in 0 of 1 prompt; left out: ")
    assert verdict("likelihood displacement", run).status == "clear"


@pytest.mark.parametrize("other", [-2.0, -9.0])
def test_rejected_falls_fastest_where_nothing_falls_by_more(other):
    told = verdict("rejected falls fastest", risen(chosen=-1.0, rejected=-3.0, random=other))
    assert told.status == ("found" if other == -2.0 else "clear")
    assert f"lowest of the others: random -{abs(other):.2f}" in told.evidence
