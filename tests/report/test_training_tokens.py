import math

import numpy as np
import pandas as pd
import pytest

from llm_dynamics.report import strongest_tokens
from llm_dynamics.report.training_tokens import N_STRONGEST, strongest_examples
from llm_dynamics.report.why import why

from .accounts import account, bare_run, examples, tokens

TWO = examples((0, "chosen", -1.0, "yes"), (1, "rejected", 1.0, "no"))


@pytest.fixture
def run(tmp_path):
    return bare_run(tmp_path / "run")


def with_tokens(run, step, *frames, told=TWO):
    return account(run, step, {"up": 1.0}, tables={"training_tokens": pd.concat(frames), "training_examples": told})


def marks(sentences):
    """(step, example, position) of the strong tokens, by place."""
    found = [(mark["place"], one.step, one.example, mark["position"]) for one in sentences for mark in one.strong]
    return [place[1:] for place in sorted(found)]


def test_the_strongest_tokens_of_all_steps_are_found_in_both_directions(explained):
    frame = explained.training_tokens
    for target in strongest_tokens(explained):
        own = frame[(frame["target"] == target.target) & np.isfinite(frame["share"])].sort_values("share")
        expected = own[["step", "example", "position"]].to_numpy().tolist()
        assert marks(target.down) == [tuple(row) for row in expected[:N_STRONGEST]]
        assert marks(target.up) == [tuple(row) for row in expected[: -N_STRONGEST - 1 : -1]]


def test_tokens_of_one_response_stand_in_one_sentence_with_all_its_tokens(run):
    run = with_tokens(run, 3, tokens([-0.1, -5.0, 0.5, -3.0]), tokens([-4.0, 0.0], example=1))
    (target,) = strongest_tokens(run)
    first, second = target.down
    assert [mark["place"] for mark in first.strong] == [1, 3, 4]
    assert [mark["position"] for mark in first.strong] == [1, 3, 0]
    assert [mark["share"] for mark in second.strong] == [-4.0]
    assert first.pieces[0].tokens == [" w0", " w1", " w2", " w3"]
    assert first.pieces[0].shares.tolist() == [-0.1, -5.0, 0.5, -3.0]
    assert marks(target.up) == [(3, 0, 2)]


def test_of_a_long_response_what_stands_around_the_strong_tokens_is_shown(run):
    shares = np.full(500, -1e-3)
    shares[[3, 60, 300]] = -1.0
    (target,) = strongest_tokens(with_tokens(run, 1, tokens(shares)), n=3)
    (sentence,) = target.down
    assert [(piece.start, len(piece.tokens)) for piece in sentence.pieces] == [(0, 101), (260, 81)]
    assert sentence.n_tokens == 500
    assert sentence.pieces[1].tokens[0] == " w260"


def test_shares_that_are_not_finite_are_left_out_counted_and_kept_as_gaps(run):
    run = with_tokens(run, 1, tokens([math.nan, -2.0, math.inf]), tokens([math.nan], target="rejected"))
    chosen, rejected = strongest_tokens(run)
    assert chosen.n_nonfinite == 2
    assert marks(chosen.down) == [(1, 0, 1)]
    assert np.isnan(chosen.down[0].pieces[0].shares).tolist() == [True, False, True]
    assert chosen.examples["share"].tolist() == [-2.0]
    assert (rejected.n_nonfinite, rejected.down, rejected.up) == (1, [], [])


def test_a_run_without_training_tokens_has_none(run):
    assert strongest_tokens(run) == []
    assert strongest_tokens(account(run, 1, {"up": 1.0})) == []


def test_examples_are_summed_over_their_tokens_and_over_the_steps_that_trained_on_them(run):
    run = with_tokens(run, 1, tokens([-1.0, -2.0]), tokens([4.0], example=1))
    # in the second step the same responses stand at other places of the batch
    turned = TWO.assign(example=[1, 0])
    run = with_tokens(run, 2, tokens([-1.0], example=1), tokens([0.5], example=0), told=turned)
    (target,) = strongest_tokens(run)
    hurting, helping = strongest_examples(target, run.training_examples)
    assert hurting[["role", "response", "share", "n_steps"]].to_numpy().tolist() == [["chosen", "yes", -4.0, 2]]
    assert helping[["role", "response", "share", "n_steps"]].to_numpy().tolist() == [["rejected", "no", 4.5, 2]]


def test_an_example_without_a_text_is_shown_without(run):
    run = with_tokens(run, 1, tokens([-1.0, -2.0], example=7))
    _, data = why("dpo", run)
    (card,) = data["targets"][0]["down"]
    assert (card["role"], card["prompt"], card["own"]) == ("", "", False)
    assert data["targets"][0]["hurting"][0]["share"] == -3.0


def test_families_come_first_and_probes_are_called_by_family_and_prompt(explained):
    _, data = why("dpo", explained)
    kinds = [target["kind"] for target in data["targets"]]
    assert kinds == ["family"] * (len(kinds) - 1) + ["probe"]
    assert data["targets"][0]["name"] == "chosen"
    assert data["targets"][-1]["label"] == "chosen: How long should I boil an egg?"
    prompts = {card["prompt"]: card["own"] for card in data["targets"][-1]["down"]}
    assert prompts["How long should I boil an egg?"] is True
    assert prompts["Question 1: what do plants need to grow?"] is False


def test_tokens_are_embedded_within_a_budget_but_one_target_always(explained):
    view, data = why("dpo", explained, max_tokens=1)
    assert [target["name"] for target in data["targets"]] == ["chosen"]
    assert view["n_targets"] == 13
    assert view["n_shown"] == 1


def test_it_is_known_of_how_many_steps_training_tokens_were_kept(run):
    run = account(run, 1, {"up": 1.0})
    run = with_tokens(run, 2, tokens([-1.0]))
    view, _ = why("dpo", run)
    assert (view["n_token_steps"], view["n_explained"]) == (1, 2)
