"""What does it say? The rulebook's hopes and courses, as yes and no."""

import pytest

from llm_dynamics.report import reading
from llm_dynamics.rules import judge

from .synthetic import SFT_DELTA, write_run, write_values


def by_claim(run):
    return {statement.claim: statement for statement in reading(run)}


def test_statements_are_the_rulebooks_and_say_the_same(dpo):
    verdicts = {own.name: own for own in judge(dpo)}
    for claim, statement in by_claim(dpo).items():
        assert verdicts[claim].kind != "fault"
        assert statement.holds is (verdicts[claim].status == "found")
        assert statement.evidence == verdicts[claim].evidence


def test_dpo_run_shows_the_squeezing_pattern(dpo):
    said = by_claim(dpo)
    assert {claim for claim, statement in said.items() if statement.holds} == {
        "margin grows", "rejected falls fastest", "most families fall", "greedy tokens rise",
    }  # fmt: skip
    assert not said["chosen rises"].holds
    assert "12 of 12" in said["most families fall"].evidence


def test_sft_run_shows_the_bell_of_rejected(sft):
    said = by_claim(sft)
    assert said["rejected rises, then falls"].holds
    assert "is highest at step" in said["rejected rises, then falls"].evidence
    assert all(statement.holds for statement in said.values())


def test_what_is_not_asked_or_not_watched_is_not_stated(tmp_path):
    run = write_run(tmp_path / "run", "GRPOTrainer", SFT_DELTA, n_prompts=2, keep_tokens=0)
    assert set(by_claim(run)) == {"chosen rises", "margin grows", "most families fall", "greedy tokens rise"}
    alone = write_values(tmp_path / "alone", {"chosen-1": [-9, -8, -7]}, trainer="SFTTrainer")
    assert set(by_claim(alone)) == {"chosen rises"}


@pytest.mark.parametrize("steps", [(0,), ()])
def test_too_few_observations_are_said_to_be_too_few(tmp_path, steps):
    run = write_values(tmp_path / "run", {"chosen-1": [-9] * len(steps), "rejected-1": [-9] * len(steps)}, steps=steps)
    (statement,) = reading(run)
    assert not statement.holds
    assert statement.evidence == "needs two observations"
