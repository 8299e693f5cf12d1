"""Every rule on numbers chosen here, just above and just below its threshold."""

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.likelihood.verdicts import THRESHOLDS, is_squeezing, judge
from llm_dynamics.runlog import schema
from llm_dynamics.runlog.influence_schema import ACCOUNTS, INFLUENCE
from llm_dynamics.runlog.rollout_schema import DISPLACEMENTS
from tests.report.reinforced import write_rollouts
from tests.report.synthetic import DPO_DELTA, SFT_DELTA, write_accounts, write_run, write_values

NAMES = [
    "likelihood displacement", "squeezing", "valley", "hallucination transfer", "lazy likelihood",
    "first-order account", "probes and log",
]  # fmt: skip
SEQUENCES = ["step", "probe_id", "prompt_id", "family", "n_tokens", "n_nonfinite", "logp_sum", "argmax_logp_sum",
             "collision_sum", "tau0_sum"]  # fmt: skip


def empty(table):
    return table.empty_table().to_pandas()


@dataclass
class Tables:
    """What `judge` reads, in memory."""

    meta: dict = field(default_factory=lambda: {"trainer": "DPOTrainer"})
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
        assert all((own.question.endswith("?"), own.evidence, own.threshold, own.remedy))
        assert "nan" not in own.evidence.split()
        assert own.agreement is None or 0 <= own.agreement <= 1
        assert own.agreement is None or own.status != "unknown"
        assert ("unsure" in own.evidence) is (own.agreement is not None and own.agreement < 0.95)
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
    values = {"chosen-0": [-20.0, -21.0], "chosen-1": [-20.0, -21.0], "rejected-0": (-9.0, -12.0)}
    values["chosen-1"][end] = bad
    found = verdict("likelihood displacement", Tables(sequences=observed(values)))
    assert found.status == "found"  # by chosen-0 alone
    assert "1 of its 1 probe below" in found.evidence
    assert found.evidence.endswith("left out: 1 of 2 chosen (not finite, or not seen at both ends)")


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ({"chosen-0": (-1.0, -2.0)}, "needs the families chosen and rejected"),
        ({"other-0": (-1.0, -2.0)}, "needs the families"),
        ({"chosen-0": (math.nan, -2.0), "rejected-0": (-1.0, -2.0)}, "finite at two observations"),
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
    return observed(
        {f"family{i}-0": (-20.0, -21.0 if i < fell else -19.0) for i in range(fell + rose)}, **choice
    )  # fmt: skip


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
    still = {f"family{k}-0": (-9.0, -9.0 - 0.0099) for k in range(5)}
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
        "4 of 5 families fell (not family4); along all probes the greedy tokens +2.00 nats, collision probability "
        "0.5 to 0.75"
    )


@pytest.mark.parametrize("column", ["argmax_logp_sum", "collision_sum"])
def test_squeezing_reads_the_peaks_along_rejected(column):
    frame = observed({"chosen-0": (-9.0, -10.0), "rejected-0": (-9.0, -20.0)})
    last = frame["step"] == 10
    frame.loc[last & (frame["family"] == "chosen"), column] = -400.0
    assert is_squeezing(frame)[0] is True
    frame.loc[last & (frame["family"] == "rejected"), column] = -400.0
    assert is_squeezing(frame)[0] is False


def test_squeezing_compares_the_first_observation_with_the_last():
    frame = observed({"chosen-0": (-9.0, -1.0, -10.0)}, greedy=(-6.0, -9.0, -5.0), collision=(0.2, 0.1, 0.3),
                     steps=(5, 10, 200))  # fmt: skip
    assert is_squeezing(frame) == (
        True, "1 of 1 family fell; along all probes the greedy tokens +1.00 nats, collision probability 0.2 to 0.3"
    )  # fmt: skip
    assert is_squeezing(frame.sample(frac=1, random_state=0)) == is_squeezing(frame)


def test_families_without_a_finite_probe_do_not_count_as_clear_and_are_told():
    values = {"chosen-0": (-9.0, -10.0), "rejected-0": (-9.0, -20.0), "random-0": (-9.0, math.nan)}
    found, evidence = is_squeezing(observed(values))
    assert found
    assert "2 of 2 families fell" in evidence
    assert evidence.endswith("left out: 1 of 1 random (not finite, or not seen at both ends)")


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


def valley(*rates, trainer="DPOTrainer", tau0=0.25):
    """Rejected probes of 4 tokens whose probability per token is each of `rates` at the start."""
    values = {f"rejected-{i}": (4 * math.log(rate) if rate else -math.inf, -1.0) for i, rate in enumerate(rates)}
    return Tables({"trainer": trainer}, sequences=observed(values, tau0=tau0))


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
def test_a_log_without_squeezing_statistics_is_judged_by_how_likely_rejected_is(bad):
    run = valley(0.05)
    run.sequences["tau0_sum"] = bad
    found = verdict("valley", run)
    assert found.status == "found"
    assert "tau0" not in found.evidence


def test_valley_is_not_told_by_an_observation_after_the_first_step():
    run = valley(0.05)
    run.sequences = run.sequences.assign(step=run.sequences["step"] + 20)
    late = verdict("valley", run)
    assert late.status == "unknown"
    assert "the first in this log is of step 20" in late.evidence


@pytest.mark.parametrize(
    "trainer", ["DPOTrainer", "OnlineDPOTrainer", "CPOTrainer", "KTOTrainer", "ORPOTrainer", "BCOTrainer"]
)
def test_valley_is_asked_of_trainers_that_push_responses_down(trainer):
    assert verdict("valley", valley(0.05, trainer=trainer)).status == "found"


@pytest.mark.parametrize("trainer", ["SFTTrainer", "GRPOTrainer", "NTHRGRPOTrainer", "Trainer", "", None])
def test_valley_is_not_asked_of_others(trainer):
    assert verdict("valley", valley(0.05, trainer=trainer)).evidence == "asked of preference training only"


def test_valley_tells_what_it_left_out():
    found = verdict("valley", valley(0.05, 0))
    assert found.evidence == (
        "rejected starts at 0.05 per token (geometric mean over 1 probe); where a step pushes it down, tokens below "
        "probability 0.250 fall with it (tau0 +0.250, mean over responses); left out: 1 of 2 rejected (not finite)"
    )
    assert verdict("valley", valley(0)).status == "unknown"
    assert verdict("valley", Tables(sequences=observed({"chosen-0": (-1.0, -1.0)}))).status == "unknown"


def test_a_response_without_tokens_is_left_out():
    run = valley(0.05, 0.5)
    run.sequences.loc[run.sequences["probe_id"] == "rejected-1", "n_tokens"] = 0
    assert "starts at 0.05" in verdict("valley", run).evidence


# ---- hallucination transfer -----------------------------------------------------------------------------------------


def transfer(chosen, other, held_out=None, trainer="SFTTrainer"):
    values = {"chosen-0": (-20.0, -20.0 + chosen), "other_train-0": (-40.0, -40.0 + other)}
    if held_out is not None:
        values["other_test-0"] = (-40.0, -40.0 + held_out)
    return Tables({"trainer": trainer}, sequences=observed(values))


@pytest.mark.parametrize(
    ("chosen", "other", "status"),
    [(8.0, 2.5, "found"), (8.0, 2.0, "clear"), (8.0, -4.0, "clear"), (-8.0, 4.0, "clear"), (0.0, 1.0, "clear")],
)
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
    run = transfer(8.0, 8.0)
    assert verdict("hallucination transfer", run).evidence == (
        "other_train +2.000 nats per token, chosen +2.000: 100% of chosen's rise (form included: other_test is not "
        "watched)"
    )
    assert verdict("hallucination transfer", transfer(8.0, 6.0, 2.0)).evidence == (
        "other_train +1.500 nats per token, other_test +0.500, chosen +2.000: 50% of chosen's rise beyond what "
        "held-out answers gain"
    )
    assert verdict("hallucination transfer", transfer(-8.0, 8.0)).evidence == (
        "other_train +2.000 nats per token, chosen -2.000"
    )
    assert verdict("hallucination transfer", transfer(8.0, -8.0)).evidence.endswith(
        ": no part of chosen's rise (form included: other_test is not watched)"
    )
    run.sequences.loc[run.sequences["family"] == "other_train", "n_tokens"] = 64
    assert verdict("hallucination transfer", run).status == "clear"  # 0.125 against 2 nats per token


def test_a_plain_trainer_with_the_families_of_sft_is_asked_too():
    assert verdict("hallucination transfer", transfer(8.0, 8.0, trainer="Trainer")).status == "found"


def test_transfer_is_unknown_elsewhere():
    assert verdict("hallucination transfer", transfer(8.0, 8.0, trainer="DPOTrainer")).evidence == "asked of SFT only"
    assert verdict("hallucination transfer", transfer(8.0, math.inf)).status == "unknown"
    alone = Tables({"trainer": "SFTTrainer"}, sequences=observed({"chosen-0": (-2.0, -1.0)}))
    assert verdict("hallucination transfer", alone).evidence.startswith("needs the families chosen and other_train")


# ---- lazy likelihood ------------------------------------------------------------------------------------------------


def lazy(*changes):
    """One correct answer of a question each, that a step moves by these nats."""
    rows = {"step": 1, "question": range(len(changes)), "logp_before": -20.0, "logp_after": np.add(-20.0, changes)}
    return Tables({"trainer": "GRPOTrainer"}, displacements=pd.DataFrame(rows))


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
    assert clear.evidence.endswith("left out: 1 of 2 correct answers (not finite)")
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
        "2 of 3 explained steps below 0.9; lowest 0.5 at step 2 (learning rate 0.0002, rule midpoint)"
    )


def test_accounts_without_a_number_do_not_decide():
    clear = verdict("first-order account", accounts(0.95, math.nan))
    assert clear.status == "clear"
    assert "lowest 0.95 at step 1" in clear.evidence
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
        "0 of 1 explained step below 0.9; lowest 0.99 at step 2 (learning rate 0.0002, rule midpoint); left out of 2 "
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
    assert verdict("first-order account", run).evidence.endswith("lowest 0.5 at step 1 (rule unknown)")


def test_what_was_found_for_sure_stands_first_and_remedies_know_the_run():
    sure = observed(
        {f"chosen-{k}": (-9.0, -10.0) for k in range(12)} | {f"rejected-{k}": (-9.0, -12.0) for k in range(12)}
    )
    found = judge(Tables(sequences=sure))
    assert found[0].name == "likelihood displacement"
    assert "watch(..., influence=True)" in found[0].remedy
    explained = Tables(sequences=sure, accounts=accounts(0.99).accounts)
    assert judge(explained)[0].remedy.startswith("See in the account who pushed it. Then")
    sft = {"meta": {"trainer": "SFTTrainer"}}
    rows = {f"{family}-{k}": (-9.0, -5.0 - 3.9 * (k % 2)) for family in ("chosen", "other_train") for k in range(4)}
    assert "Watch other_test too" in verdict("hallucination transfer", Tables(sequences=observed(rows), **sft)).remedy
    rows |= {"other_test-0": (-9.0, -9.0)}
    assert "other_test" not in verdict("hallucination transfer", Tables(sequences=observed(rows), **sft)).remedy


def test_an_unsure_finding_stands_behind_a_sure_one():
    mixed = {f"chosen-{k}": (-9.0, -8.0 if k < 5 else -11.0) for k in range(12)}  # 7 of 12 fell
    mixed |= {f"rejected-{k}": (-90.0, -120.0) for k in range(12)}
    found = [own for own in judge(Tables(sequences=observed(mixed, tau0=1.0))) if own.status == "found"]
    assert [own.unsure for own in found] == sorted(own.unsure for own in found)
    assert {own.name: own.unsure for own in found}["likelihood displacement"]
    assert not found[0].unsure


# ---- probes and log -------------------------------------------------------------------------------------------------


def watched(n_probes=10, *, cut=0, families=("chosen",)):
    names = [f"{family}-{i}" for family in families for i in range(n_probes)]
    probes = pd.DataFrame({"probe_id": names, "family": [name.split("-")[0] for name in names], "n_cut": 0})
    probes.loc[: cut - 1, "n_cut"] = 5
    return Tables(probes=probes, sequences=observed(dict.fromkeys(names, (-2.0, -1.0))))


def test_a_log_without_problems_is_clear():
    clear = verdict("probes and log", watched())
    assert (clear.status, clear.evidence) == ("clear", "10 probes, 2 observations, all finite")


@pytest.mark.parametrize(
    ("run", "evidence"),
    [
        (watched(9), "fewer than 10 probes in 1 of 1 family (chosen): 9 in the smallest"),
        (watched(10, cut=2), "2 of 10 probes truncated"),
        (watched(3, families=("a", "b")), "fewer than 10 probes in 2 of 2 families (a, b): 3 in the smallest"),
        (watched(3, families="abcd"), "fewer than 10 probes in 4 of 4 families: 3 in the smallest"),
        (Tables(), "no observation: nothing to compare"),
    ],
)
def test_what_is_wrong_with_a_log_is_found(run, evidence):
    found = verdict("probes and log", run)
    assert (found.status, found.evidence) == ("found", evidence)


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
    for status in ("found", "clear", "unknown"):
        names = [own.name for own in verdicts if own.status == status]
        assert names == sorted(names, key=NAMES.index)


def test_a_run_of_which_nothing_was_logged_is_unknown():
    by_name = {own.name: own.status for own in judge(Tables(meta={}))}
    assert by_name == dict.fromkeys(NAMES[:-1], "unknown") | {"probes and log": "found"}


def test_thresholds_are_stated():
    stated = {own.name: own.threshold for own in judge(Tables())}
    assert "50%" in stated["likelihood displacement"]
    assert "80%" in stated["squeezing"]
    assert f"{THRESHOLDS['valley_p']:g}" in stated["valley"]
    assert "10 probes" in " ".join(stated["probes and log"].split())


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
    assert unsure.evidence.endswith(f"; unsure: {unsure.agreement:.0%} of resamples of its 12 prompts decide so")


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


def test_one_prompt_alone_has_no_spread():
    assert verdict("likelihood displacement", displaced([-1.0])).agreement is None


def test_questions_are_drawn_where_there_are_no_probes():
    unsure = verdict("lazy likelihood", lazy(*[0.5] * 5, *[-0.5] * 2))
    assert unsure.status == "found"  # 2 of 7
    assert f"{unsure.agreement:.0%} of resamples of its 7 mixed questions decide so" in unsure.evidence


def test_what_draws_nothing_has_no_agreement():
    by_name = {own.name: own.agreement for own in judge(accounts(0.95))}
    assert by_name["first-order account"] is by_name["probes and log"] is by_name["lazy likelihood"] is None


# ---- real run logs --------------------------------------------------------------------------------------------------


def test_a_dpo_log_shows_displacement_and_squeezing(tmp_path):
    run = write_accounts(write_run(tmp_path / "run", "DPOTrainer", DPO_DELTA, nan_probe="other_test-3"))
    by_name = {own.name: own for own in judge(run)}
    assert {own.name for own in judge(run) if own.status == "found"} == {
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
    trainer=st.sampled_from(["SFTTrainer", "DPOTrainer"]),
    scalars=st.lists(st.tuples(VALUES, VALUES), max_size=3),
)
def test_no_rule_raises_whatever_the_numbers(rows, trainer, scalars):
    sequences = [
        [step, name, name[-1], name[:-2], n_tokens, None, *values] for (name, step), (*values, n_tokens) in rows.items()
    ]
    run = Tables({"trainer": trainer}, sequences=pd.DataFrame(sequences, columns=SEQUENCES[:-1]).assign(tau0_sum=0.5))
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
