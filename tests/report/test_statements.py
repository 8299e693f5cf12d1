import math

import pytest

from llm_dynamics.frames import margin_path
from llm_dynamics.report import reading

from .synthetic import SFT_DELTA, write_run, write_values


def by_claim(run):
    return {statement.claim.split(":")[0]: statement for statement in reading(run)}


def test_dpo_run_shows_the_squeezing_pattern(dpo):
    said = by_claim(dpo)
    assert list(said) == ["rejected falls fastest", "most families fall", "argmax rises", "likelihood displacement"]
    assert all(statement.holds for statement in said.values())
    assert "12 of 12" in said["most families fall"].evidence


def test_a_family_that_fell_faster_than_rejected_is_named(tmp_path):
    run = write_values(
        tmp_path / "run", {"chosen-1": [-9, -9, -9], "rejected-1": [-9, -9, -12], "random-1": [-9, -9, -14]}
    )
    statement = by_claim(run)["rejected falls fastest"]
    assert not statement.holds
    assert "faster: random −5.00 nats (−2.50 nats per token)" in statement.evidence


def test_rejected_that_rises_does_not_fall_fastest(tmp_path):
    run = write_values(tmp_path / "run", {"chosen-1": [-9, -9, -8], "rejected-1": [-9, -9, -8]})
    assert not by_claim(run)["rejected falls fastest"].holds


@pytest.mark.parametrize(
    ("chosen", "rejected", "holds"),
    [(-12, -20, True), (-12, -11, False), (-9, -20, False)],
    ids=["falls while the margin grows", "falls and the margin shrinks", "rises"],
)
def test_displacement_needs_a_fall_and_a_growing_margin(tmp_path, chosen, rejected, holds):
    run = write_values(tmp_path / "run", {"chosen-1": [-10, -10, chosen], "rejected-1": [-10, -10, rejected]})
    statement = by_claim(run)["likelihood displacement"]
    assert statement.holds is holds
    assert "margin" in statement.evidence


def test_sft_run_shows_the_bell_of_rejected(sft):
    said = by_claim(sft)
    assert said["rejected first rises, then falls"].holds
    assert "highest" in said["rejected first rises, then falls"].evidence
    assert all(statement.holds for statement in said.values())


def test_a_probe_that_is_missing_for_a_while_makes_no_bell(tmp_path):
    values = {"chosen-1": [-9, -8, -7], "rejected-1": [-10, -10.1, -10.2], "rejected-2": [-90, math.nan, -90.2]}
    statement = by_claim(write_values(tmp_path / "run", values, trainer="SFTTrainer"))[
        "rejected first rises, then falls"
    ]
    assert not statement.holds
    assert statement.evidence.startswith("start −10.0 nats")
    assert statement.evidence.endswith("left out: 1 of 2 rejected (not finite at every observation)")


def test_the_margin_grows_on_the_same_probes_at_both_ends(tmp_path):
    values = {"chosen-1": [-10, -10, -12], "rejected-1": [-40, -40, -41], "rejected-2": [-10, -10, math.nan]}
    run = write_values(tmp_path / "run", values)
    assert margin_path(run) == (30.0, 29.0)
    statement = by_claim(run)["likelihood displacement"]
    assert not statement.holds
    assert statement.evidence.endswith("left out: 1 of 2 rejected (not finite at both ends)")


@pytest.mark.parametrize("rejected", [[-10, -9, -8], [-10, -11, -12], [-10, -12, -9]])
def test_a_rejected_without_a_peak_inside_is_no_bell(tmp_path, rejected):
    run = write_values(tmp_path / "run", {"chosen-1": [-9, -8, -7], "rejected-1": rejected}, trainer="SFTTrainer")
    assert not by_claim(run)["rejected first rises, then falls"].holds


def test_a_family_that_is_not_watched_is_not_judged(tmp_path):
    run = write_values(tmp_path / "run", {"chosen-1": [-9, -8, -7]}, trainer="SFTTrainer")
    assert list(by_claim(run)) == ["chosen rises"]


def test_other_trainers_are_told_what_fell(tmp_path):
    run = write_run(tmp_path / "run", "GRPOTrainer", SFT_DELTA, n_prompts=2, keep_tokens=0)
    assert list(by_claim(run)) == ["most families fall", "argmax rises"]


def test_probes_that_are_not_finite_do_not_decide(tmp_path):
    values = {"chosen-1": [-9, -9, -10], "chosen-2": [-9, -9, float("nan")], "rejected-1": [-9, -9, -12]}
    said = by_claim(write_values(tmp_path / "run", values))
    assert said["likelihood displacement"].holds
    assert "nan" not in " ".join(statement.evidence for statement in said.values())


@pytest.mark.parametrize(("steps", "says"), [((0,), "only one observation"), ((), "no observation")])
def test_too_few_observations_are_said_to_be_too_few(tmp_path, steps, says):
    run = write_values(tmp_path / "run", {"chosen-1": [-9] * len(steps), "rejected-1": [-9] * len(steps)}, steps=steps)
    (statement,) = reading(run)
    assert not statement.holds
    assert says in statement.evidence


def test_all_families_not_finite_is_said(tmp_path):
    nan = float("nan")
    run = write_values(tmp_path / "run", {"chosen-1": [-9, nan, nan], "rejected-1": [-9, nan, nan]})
    (statement,) = reading(run)
    assert not statement.holds
