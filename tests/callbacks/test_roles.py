"""What examples are to each trainer's loss, in real batches: by their own text."""

import pytest
import torch

from llm_dynamics.callbacks.roles import role_labelling
from llm_dynamics.influence import MicroBatch
from tests.callbacks.explained import explain, short_probes
from tests.conftest import FIRST, PREFERENCES, SECOND
from tests.training import build_trainer, many_letters, save_tiny_model

CHOSEN = {row["prompt"]: row["chosen"] for row in PREFERENCES}
REJECTED = {row["prompt"]: row["rejected"] for row in PREFERENCES}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def examples(model_folder, tmp_path):
    """The examples of one step of a kind of trainer; chosen is the only family, so that it is quick."""

    def of(kind):
        probes = short_probes(2, families=("chosen",))
        return explain(kind, model_folder, tmp_path, probes=probes, max_steps=1)[1].training_examples

    return of


def text(response):
    return response.split("<|")[0].strip()


@pytest.mark.parametrize(("kind", "sides"), [("dpo", ("chosen", "rejected")), ("kto", ("desirable", "undesirable"))])
def test_roles_of_preferences_are_those_of_the_dataset(kind, sides, examples):
    rows = examples(kind)
    assert set(rows["role"]) == set(sides)
    for row in rows.itertuples():
        expected = (CHOSEN if row.role == sides[0] else REJECTED)[row.prompt]
        assert text(row.response) == expected
        assert (row.c_sum < 0) == (row.role == sides[0])


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_roles_of_completions_are_those_of_their_rewards(kind, examples):
    rows = examples(kind)
    assert set(rows["prompt"]) <= set(CHOSEN)  # left padding is no part of them
    assert (rows.groupby("prompt").size() == 2).all()
    assert {"correct", "wrong"} == set(rows["role"])
    rows["reward"] = many_letters(rows["response"])
    above = rows["reward"] > rows.groupby("prompt")["reward"].transform("mean")
    below = rows["reward"] < rows.groupby("prompt")["reward"].transform("mean")
    assert (rows.loc[above, "role"] == "correct").all()
    assert (rows.loc[below, "role"] == "wrong").all()
    assert above.any()
    prompts = {PREFERENCES[0]["prompt"]: FIRST, PREFERENCES[1]["prompt"]: SECOND}
    assert (rows["prompt_id"] == rows["prompt"].map(prompts)).sum() == rows["prompt"].isin(prompts).sum()


def test_all_examples_of_fine_tuning_are_trained_on(examples):
    rows = examples("sft")
    assert set(rows["role"]) == {"trained"}
    for row in rows.itertuples():
        assert text(row.response) == CHOSEN[row.prompt]


LABELLED = {
    "sft": {"trained"},
    "plain": {"trained"},
    "dpo": {"chosen", "rejected"},
    "kto": {"desirable", "undesirable"},
}
LABELLED |= {"grpo": {"correct", "wrong"}, "rloo": {"correct", "wrong"}}


@pytest.mark.parametrize("kind", LABELLED)
def test_the_roles_of_a_trainer_divide_its_tokens(kind, model_folder, tmp_path):
    label = role_labelling(build_trainer(kind, model_folder, tmp_path))
    c = torch.tensor([[-1.0, -1.0], [-0.5, -0.5], [1.0, 1.0], [0.5, 0.5]])
    example = torch.arange(4)[:, None].expand(4, 2)
    masks = label(MicroBatch({}, torch.ones(4, 2, dtype=torch.long), c, c, example, False, None))
    assert set(masks) == LABELLED[kind]
    assert (sum(mask.int() for mask in masks.values()) == 1).all()
    if len(masks) == 2:
        pulled, pushed = sorted(masks, key=lambda name: name in ("rejected", "undesirable", "wrong"))
        assert masks[pulled][:, 0].tolist() == [True, True, False, False]
        assert masks[pushed][:, 0].tolist() == [False, False, True, True]
