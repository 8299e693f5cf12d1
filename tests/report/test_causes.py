import math

import numpy as np
import pytest

from llm_dynamics.report import family_accounts
from llm_dynamics.report.account_words import balance_in_words, in_words, notes, steps_explained, steps_in_words
from llm_dynamics.report.causes import cause_names, label_of
from llm_dynamics.report.palette import cause_colours
from llm_dynamics.report.why import why

from .accounts import account, bare_run, examples


def bars(account):
    return {(cause.name, cause.part): cause.share for cause in account.causes}


@pytest.fixture
def run(tmp_path):
    return bare_run(tmp_path / "run")


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_causes_add_up_over_steps_to_the_measured_change(explained):
    for name, one in family_accounts(explained).items():
        frame = explained.influence[explained.influence["family"] == name]
        assert one.measured == pytest.approx(frame.groupby("step")["measured"].first().sum())
        assert math.fsum(bars(one).values()) == pytest.approx(one.measured)
        total = np.sum([cause.by_step for cause in one.causes], axis=0)
        np.testing.assert_allclose(total, one.measured_by_step, atol=1e-9)
        assert one.steps == list(range(1, 25))


def test_families_come_in_canonical_order_chosen_first(explained):
    assert list(family_accounts(explained))[:2] == ["chosen", "rejected"]


def test_a_cause_is_split_into_own_prompt_and_other_prompts_where_that_was_measured(run):
    run = account(run, 1, {"up": 5.0, "down": -9.0, "momentum": -1.0}, own={"up": 2.0, "down": -10.0})
    assert bars(family_accounts(run)["chosen"]) == {
        ("up", "own"): 2.0, ("up", "others"): 3.0, ("down", "own"): -10.0, ("down", "others"): 1.0,
        ("momentum", ""): -1.0,
    }  # fmt: skip


def test_a_cause_is_not_split_where_a_step_has_no_own_share(run):
    run = account(run, 1, {"up": 5.0}, own={"up": 2.0})
    run = account(run, 2, {"up": 5.0})
    assert bars(family_accounts(run)["chosen"]) == {("up", ""): 10.0}


def test_bars_stand_in_the_order_of_a_waterfall_with_unknown_causes_before_the_remainder(run):
    causes = ["remainder", "zeal", "decay", "momentum_down", "down", "momentum_up", "up"]
    run = account(run, 1, dict.fromkeys(causes, 1.0))
    assert [cause.name for cause in family_accounts(run)["chosen"].causes] == [
        "up", "down", "momentum_up", "momentum_down", "zeal", "decay", "remainder",
    ]  # fmt: skip


def test_negligible_causes_share_a_bar_that_names_its_parts(run):
    run = account(run, 1, {"up": 100.0, "down": -50.0, "decay": 0.4, "rounding": -0.3, "remainder": 0.6})
    *_, rest = family_accounts(run)["chosen"].causes
    assert rest.name == "rest"
    assert {cause.name: cause.share for cause in rest.gathered} == {"decay": 0.4, "rounding": -0.3}
    assert rest.share == pytest.approx(0.1)


def test_a_single_negligible_cause_keeps_its_name(run):
    run = account(run, 1, {"up": 100.0, "decay": 0.1})
    assert bars(family_accounts(run)["chosen"]) == {("up", ""): 100.0, ("decay", ""): 0.1}


def test_causes_that_cancel_over_the_steps_are_not_negligible(run):
    run = account(run, 1, {"up": 9.0, "down": -1.0, "decay": 5.0, "rounding": -4.0})
    run = account(run, 2, {"up": 9.0, "down": -1.0, "decay": -5.0, "rounding": 4.0})
    assert "rest" not in {cause.name for cause in family_accounts(run)["chosen"].causes}


def test_a_cause_that_is_missing_in_a_step_counts_nothing_there(run):
    run = account(run, 1, {"up": 1.0})
    run = account(run, 2, {"up": 1.0, "momentum": 3.0})
    (momentum,) = [cause for cause in family_accounts(run)["chosen"].causes if cause.name == "momentum"]
    assert momentum.by_step.tolist() == [0.0, 3.0]


def test_a_step_that_is_not_finite_is_left_out_and_counted(run):
    run = account(run, 1, {"up": 1.0, "down": -3.0})
    run = account(run, 2, {"up": math.nan, "down": -3.0}, measured=-2.0)
    run = account(run, 3, {"up": 1.0, "down": -3.0}, measured=math.inf)
    one = family_accounts(run)["chosen"]
    assert (one.steps, one.measured, one.n_left_out) == ([1], -2.0, 2)


def test_a_family_without_one_finite_step_is_left_out(run):
    assert family_accounts(account(run, 1, {"up": math.nan})) == {}


def test_shares_that_do_not_add_up_are_shown_as_such(run):
    run = account(run, 1, {"up": 1.0, "down": -3.0}, measured=-7.0)
    one = family_accounts(run)["chosen"]
    assert bars(one)["unaccounted", ""] == pytest.approx(-5.0)
    assert math.fsum(bars(one).values()) == pytest.approx(one.measured)
    assert "not accounted for" in in_words(one, cause_names(run))


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "up", "down"),
    [
        ([(0, "chosen", -1.0), (1, "rejected", 1.0)], "chosen tokens", "rejected tokens"),
        ([(0, "trained", -1.0), (1, "trained", -1.0)], "trained tokens", "tokens pushed down"),
        ([(0, "completion", -1.0), (1, "completion", 1.0)], "tokens pulled up", "tokens pushed down"),
        ([(0, "a", -1.0), (1, "b", -1.0), (2, "c", 1.0)], "tokens pulled up", "c tokens"),
    ],
)
def test_signs_are_named_after_a_role_only_where_they_coincide(run, rows, up, down):
    run = account(run, 1, {"up": 1.0, "down": -3.0, "momentum_up": 1.0}, tables={"training_examples": examples(*rows)})
    names = cause_names(run)
    assert (names["up"], names["down"]) == (up, down)
    assert names["momentum_up"] == f"momentum of {up}"


def test_a_cause_nobody_knows_is_named_as_logged(run):
    run = account(run, 1, {"router_loss": 1.0})
    (cause,) = family_accounts(run)["chosen"].causes
    assert label_of(cause, cause_names(run)) == "router loss"
    assert cause_colours("router_loss") == cause_colours("router_loss")


# ---- words -----------------------------------------------------------------------------------------------------------


def test_words_name_the_largest_causes_by_size_with_their_direction(run):
    tables = {"training_examples": examples((0, "chosen", -1.0), (1, "rejected", 1.0))}
    causes = {"up": 70.0, "down": -80.0, "momentum": -5.0, "decay": -0.1, "remainder": 0.01}
    run = account(run, 1, causes, own={"up": 30.0, "down": -90.0}, tables=tables)
    assert in_words(family_accounts(run)["chosen"], cause_names(run)) == (
        "chosen fell 15.1 nats over 1 explained step: rejected tokens pushed it down by 80.0 (its own prompt’s −90.0, "
        "other prompts’ +10.0); chosen tokens pulled it up by 70.0 (its own prompt’s +30.0, other prompts’ +40.0); "
        "momentum pushed it down by 5.00; everything else adds −0.0900."
    )


def test_words_are_true_where_things_go_the_other_way(run):
    run = account(run, 1, {"up": -2.0, "down": 5.0})
    assert in_words(family_accounts(run)["chosen"], cause_names(run)) == (
        "chosen rose 3.00 nats over 1 explained step: tokens pushed down pulled it up by 5.00; "
        "tokens pulled up pushed it down by 2.00."
    )


def test_a_family_that_nothing_moved_did_not_move(run):
    run = account(run, 1, {"up": 0.0})
    assert in_words(family_accounts(run)["chosen"], cause_names(run)) == "chosen did not move over 1 explained step."


def test_it_is_said_whether_every_step_was_explained(tmp_path, run):
    for step in range(1, 5):
        run = account(run, step, {"up": 1.0})
    assert steps_in_words(*steps_explained(run)) == "All 4 optimizer steps were explained."
    other = bare_run(tmp_path / "other", steps=(0, 20))
    for step in (1, 11):
        other = account(other, step, {"up": 1.0})
    assert steps_in_words(*steps_explained(other)).startswith(
        "2 of 20 optimizer steps were explained; the bars add up over those"
    )


@pytest.mark.parametrize(
    ("remainder", "percent"),
    [(0.0, "100%"), (2.0, "96%"), (0.05, "99.9975%"), (1e-7, "more than 99.9999%"), (20.0, "−300%")],
)
def test_the_explained_part_is_pooled_over_steps_and_never_rounded_up_to_all(run, remainder, percent):
    for step in (1, 2):
        run = account(run, step, {"up": 1.0}, measured_norm=10.0, remainder_norm=remainder)
    run = account(run, 3, {"up": 1.0}, measured_norm=math.nan, remainder_norm=1.0)
    said = balance_in_words(run.accounts)
    assert f"explains {percent} of the measured change" in said
    assert "gradient" not in said


def test_the_gradient_alone_is_compared_where_it_was_measured(run):
    run = account(run, 1, {"up": 1.0}, measured_norm=10.0, remainder_norm=0.1, explained_by_gradient=0.25)
    assert "scaled as well as can be: 25%" in balance_in_words(run.accounts)


def test_without_norms_nothing_is_claimed(run):
    assert "not known" in balance_in_words(account(run, 1, {"up": 1.0}).accounts)


def test_notes_are_told_once(run):
    for step in (1, 2):
        run = account(run, step, {"step": 1.0}, note="Foo cannot be split")
    assert notes(run.accounts) == ["Foo cannot be split"]
    assert notes(account(run, 3, {"up": 1.0}).accounts) == ["Foo cannot be split (2 of 3 steps)"]


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_the_waterfall_walks_from_zero_to_the_measured_change(explained):
    view, _ = why("dpo", explained)
    for family in view["families"]:
        at = family["zero"]
        for bar in family["bars"]:
            assert bar["start"] == pytest.approx(at, abs=1e-6)
            at = bar["end"]
            assert 0 <= bar["left"] <= bar["left"] + bar["size"] <= 100 + 1e-6
        assert family["total"]["end"] == pytest.approx(at, abs=1e-6)
        assert family["total"]["start"] == pytest.approx(family["zero"])


def test_many_steps_are_added_up_so_that_the_page_stays_small(run):
    for step in range(1, 251):
        run = account(run, step, {"up": 1.0, "down": -2.0})
    _, data = why("dpo", run)
    steps = data["families"]["chosen"]
    assert steps["size"] == 3
    assert len(steps["steps"]) == len(steps["measured"]) == 84
    assert steps["steps"][0] == 3
    assert steps["steps"][-1] == 250
    assert sum(steps["measured"]) == -250.0
    assert [sum(cause["y"]) for cause in steps["causes"]] == [250.0, -500.0]
