"""What examples are to each trainer's loss, in real batches: by their own text."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer, GRPOTrainer, KTOTrainer

from llm_dynamics.callbacks.roles import role_labelling, trained_on
from llm_dynamics.influence import MicroBatch
from tests.callbacks.explained import explain, short_probes
from tests.conftest import FIRST, PREFERENCES, SECOND
from tests.training import KINDS, build_trainer, many_letters, save_tiny_model

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


class Leaning(DPOTrainer):
    """A DPO of another name."""


class ThumbsOnly(KTOTrainer):
    """A KTO of another name."""


class Sampled(GRPOTrainer):
    """A GRPO of another name."""


KIN = {"dpo": (Leaning, "pairs"), "kto": (ThumbsOnly, "unpaired"), "grpo": (Sampled, "rollouts"),
       "sft": (None, "plain"), "rloo": (None, "rollouts"), "plain": (None, "plain")}  # fmt: skip


@pytest.mark.parametrize("kind", KIN)
def test_what_a_loss_is_given_does_not_hang_on_the_trainers_name(kind, model_folder, tmp_path, monkeypatch):
    kin, given = KIN[kind]
    if kin is not None:
        monkeypatch.setitem(KINDS, kind, (kin, KINDS[kind][1]))
    trainer = build_trainer(kind, model_folder, tmp_path)
    assert trained_on(trainer) == given
    assert kin is None or type(trainer) is kin


@pytest.mark.parametrize(("name", "config"), [("cpo.CPOTrainer", "CPOConfig"), ("orpo.ORPOTrainer", "ORPOConfig")])
def test_trainers_of_pairs_that_are_no_dpo_are_known_by_their_columns(name, config, model_folder, tmp_path):
    module = pytest.importorskip(f"trl.experimental.{name.split('.')[0]}")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    arguments = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "report_to": "none", "max_length": 64}
    trainer = getattr(module, name.split(".")[1])(
        model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=getattr(module, config)(**arguments),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=tokenizer,
    )
    assert trained_on(trainer) == "pairs"


class Bare:
    """A trainer of which the rows alone are known."""

    def __init__(self, *columns):
        self.train_dataset = Dataset.from_dict({name: [0] for name in columns}) if columns else [{"chosen": "a"}]


@pytest.mark.parametrize(
    ("columns", "given"),
    [
        (("chosen_input_ids", "rejected_input_ids"), "pairs"), (("prompt", "completion", "label"), "unpaired"),
        (("input_ids", "labels"), "plain"), (("text", "label"), "plain"), ((), None),
    ],
)  # fmt: skip
def test_rows_say_what_a_loss_is_given_where_the_trainer_is_of_no_known_kind(columns, given):
    assert trained_on(Bare(*columns)) == given
