"""Every rule on real runs: one where it is found, one where it is clear, for the reason that the rule is about."""

import math

import numpy as np
import pandas as pd
import pytest

from llm_dynamics.frames.numbers import nats, percent
from llm_dynamics.rules import judge
from tests.rules.judged_runs import Runs, ends


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def verdict(name, run):
    return next(own for own in judge(run) if own.name == name)


def statuses(run):
    return {own.name: own.status for own in judge(run)}


# ---- the runs that several rules judge -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft(runs):
    """SFT of a blank model: it learns words and answers at once."""
    return runs.watched("sft", "blank", "chosen", max_steps=30, learning_rate=3e-3)


@pytest.fixture(scope="module")
def dpo(runs):
    """DPO on an extended model, every step explained."""
    return runs.watched("dpo", "extended", "pairs", learning_rate=1e-3, influence=True, families=("chosen", "rejected"))


@pytest.fixture(scope="module")
def dpo_with_sft(runs):
    """The same DPO with the SFT loss added."""
    return runs.watched("dpo", "extended", "pairs", learning_rate=1e-3, loss_type=("sigmoid", "sft"))


@pytest.fixture(scope="module")
def pushed(runs):
    """KTO on rejected responses alone, which a model that is sure of another reply finds unlikely."""
    return runs.watched("kto", "generic", "thumbs_down", learning_rate=3e-4)


@pytest.fixture(scope="module")
def pushed_likely(runs):
    """The same KTO where the rejected responses are likely."""
    return runs.watched("kto", "extended", "thumbs_down", learning_rate=3e-4)


# ---- likelihood displacement ----------------------------------------------------------------------------------------


def test_dpo_that_takes_chosen_down_is_found_and_the_sft_loss_clears_it(dpo, dpo_with_sft):
    found, clear = verdict("likelihood displacement", dpo), verdict("likelihood displacement", dpo_with_sft)
    assert (found.status, clear.status) == ("found", "clear")
    for own, run in ((found, dpo), (clear, dpo_with_sft)):
        assert own.agreement >= 0.95
        table = ends(run)
        delta = (table["logp_sum_end"] - table["logp_sum_start"]).groupby(table["family"])
        fell = (table["logp_sum_end"] < table["logp_sum_start"])[table["family"] == "chosen"]
        assert own.evidence == (
            f"chosen {nats(delta.mean()['chosen'], sign=True)} nats on average, {fell.sum()} of its 12 probes "
            "below their start; margin over rejected "
            f"{nats(delta.mean()['chosen'] - delta.mean()['rejected'], sign=True)} nats"
        )


def test_sft_displaces_nothing(sft):
    assert verdict("likelihood displacement", sft).status == "clear"


# ---- squeezing ------------------------------------------------------------------------------------------------------


def test_pushing_unlikely_responses_squeezes_and_pushing_likely_ones_does_not(pushed, pushed_likely, sft):
    found = verdict("squeezing", pushed)
    assert found.status == "found"
    assert found.agreement >= 0.95
    for run in (pushed_likely, sft):
        assert verdict("squeezing", run).status == "clear"
    table = ends(pushed)
    fell = (table["logp_sum_end"] - table["logp_sum_start"]).groupby(table["family"]).mean() < 0
    rejected = table[table["family"] == "rejected"]
    rise = (rejected["argmax_logp_sum_end"] - rejected["argmax_logp_sum_start"]).mean()
    before, after = ((rejected[f"collision_sum_{end}"] / rejected["n_tokens"]).mean() for end in ("start", "end"))
    assert found.evidence == (
        f"{fell.sum()} of 6 families fell; along rejected the greedy tokens {nats(rise, sign=True)} nats, collision "
        f"probability {before:.3g} to {after:.3g}"
    )


# ---- valley ---------------------------------------------------------------------------------------------------------


def test_rejected_that_is_unlikely_before_training_is_a_valley_and_sft_on_it_fills_it(pushed, pushed_likely, dpo):
    found = verdict("valley", pushed)
    assert found.status == "found"
    for run in (pushed_likely, dpo):
        assert verdict("valley", run).status == "clear"
    rejected = pd.read_parquet(pushed.path / "sequences").query("family == 'rejected' and step == 0")
    p = math.exp((rejected["logp_sum"] / rejected["n_tokens"]).mean())
    tau0 = (rejected["tau0_sum"] / rejected["n_tokens"]).mean()
    assert p < 0.1
    assert found.evidence == (
        f"rejected starts at {p:.3g} per token (geometric mean over 12 probes); where a step pushes it down, tokens "
        f"below probability {tau0:.3f} fall with it (tau0 {tau0:+.3f}, mean over responses)"
    )


def test_an_untrained_model_is_sure_of_nothing_and_has_no_valley(runs):
    run = runs.watched("dpo", "blank", "pairs", learning_rate=1e-3, max_steps=2, families=("chosen", "rejected"))
    rejected = pd.read_parquet(run.path / "sequences").query("family == 'rejected' and step == 0")
    assert (rejected["logp_sum"] / rejected["n_tokens"]).mean() < math.log(0.1)
    assert verdict("valley", run).status == "clear"


# ---- hallucination transfer -----------------------------------------------------------------------------------------


def test_new_phrases_transfer_and_known_phrases_that_are_told_apart_do_not(runs, sft):
    told_apart = runs.watched("sft", "ambiguous", "chosen", max_steps=20, learning_rate=3e-3)
    found, clear = verdict("hallucination transfer", sft), verdict("hallucination transfer", told_apart)
    assert (found.status, clear.status) == ("found", "clear")
    assert found.agreement >= 0.95
    for own, run in ((found, sft), (clear, told_apart)):
        table = ends(run)
        rate = ((table["logp_sum_end"] - table["logp_sum_start"]) / table["n_tokens"]).groupby(table["family"]).mean()
        assert rate["chosen"] > 0
        assert own.evidence.startswith(
            "nats per token: "
            + ", ".join(f"{name} {nats(rate[name], sign=True)}" for name in ("other_train", "other_test", "chosen"))
        )
    assert rate["other_train"] < 0  # of the second: what belongs to other prompts is unlearned


# ---- lazy likelihood ------------------------------------------------------------------------------------------------


def test_wrong_answers_made_of_the_right_tokens_make_grpo_lazy_and_no_penalty_does_not(runs):
    lazy, eager = runs.reinforced("none"), runs.reinforced("pos_only")
    found, clear = verdict("lazy likelihood", lazy), verdict("lazy likelihood", eager)
    assert (found.status, clear.status) == ("found", "clear")
    for own, run in ((found, lazy), (clear, eager)):
        rows = pd.read_parquet(run.path / "displacements")
        delta = (rows["logp_after"] - rows["logp_before"]).groupby([rows["step"], rows["question"]]).mean()
        assert own.evidence.startswith(
            f"correct answers did not rise in {(delta <= 0).sum()} of 12 mixed questions; Delta "
            f"{nats(delta.mean(), sign=True)} "
        )


# ---- first-order account --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_steps(runs):
    return runs.watched(
        "dpo", "extended", "pairs", learning_rate=5e-2, influence=True, max_steps=3, families=("chosen", "rejected")
    )


def test_a_learning_rate_far_too_large_breaks_the_account_and_a_usual_one_does_not(large_steps, dpo):
    found, clear = verdict("first-order account", large_steps), verdict("first-order account", dpo)
    assert (found.status, clear.status) == ("found", "clear")
    for own, run in ((found, large_steps), (clear, dpo)):
        explained = pd.read_parquet(run.path / "accounts").set_index("step")["explained"]
        assert own.evidence.startswith(
            f"{(explained < 0.9).sum()} of {len(explained)} explained steps below 90%; lowest "
            f"{percent(explained.min())} at step {explained.idxmin()} (learning rate "
        )


def test_steps_that_float32_cannot_measure_are_not_blamed_on_the_theory(runs):
    run = runs.watched(
        "dpo", "extended", "pairs", learning_rate=1e-9, influence=True, max_steps=2, families=("chosen", "rejected")
    )
    assert (run.accounts["explained"] < 0.9).all()  # what is measured is rounding
    own = verdict("first-order account", run)
    assert own.status == "unknown"
    assert own.evidence.endswith("left out of 2 explained steps: 2 (too small to measure)")


# ---- probes and log -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "dpo_with_sft", "pushed"])
def test_a_log_of_twelve_prompts_whose_steps_stay_finite_is_clear(name, request):
    own = verdict("probes and log", request.getfixturevalue(name))
    assert (own.status, own.evidence) == ("clear", "72 probes, 2 observations, all finite")


@pytest.mark.filterwarnings("ignore:.*grad.*")
def test_weights_that_overflow_are_found_and_no_other_rule_is_misled(runs):
    run = runs.watched("sft", "blank", "chosen", max_steps=3, learning_rate=1e30, optim="sgd")
    broken = pd.read_parquet(run.path / "sequences").query("n_nonfinite > 0")
    assert broken["probe_id"].nunique() == 72
    own = verdict("probes and log", run)
    assert own.status == "found"
    assert own.evidence.startswith("72 probes with NaN or infinite tokens, from step 3 on (12 of chosen, ")
    assert {status for name, status in statuses(run).items() if name != "probes and log"} == {"unknown"}


def test_truncated_and_few_probes_are_found(runs):
    run = runs.watched("sft", "blank", "chosen", max_steps=1, learning_rate=1e-3, max_length=10, n_prompts=3)
    n_cut = pd.read_parquet(run.path / "probes.parquet")["n_cut"]
    own = verdict("probes and log", run)
    assert own.status == "found"
    assert f"{np.count_nonzero(n_cut)} of {len(n_cut)} probes truncated" in own.evidence
    assert "fewer than 6 prompts in 6 of 6 families: 3 in the smallest" in own.evidence
