"""The row of the data set that a training example is, and what rows did to a family."""

import random
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from llm_dynamics.callbacks.training_rows import DatasetRows
from llm_dynamics.runlog.blame import blame
from tests.callbacks.explained import explain
from tests.conftest import PREFERENCES
from tests.training import save_tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def rows_of(dataset, **arguments):
    return DatasetRows(SimpleNamespace(train_dataset=dataset, args=SimpleNamespace(**arguments)))


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*keep_end:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("dpo", {"max_length": 40}),
        ("dpo", {"max_length": 12, "truncation_mode": "keep_end"}),
        ("sft", {"padding_free": False, "max_length": 24}),
        ("kto", {}),
        ("plain", {}),
    ],
)
def test_the_row_is_the_one_that_was_trained_on(kind, arguments, model_folder, tmp_path):
    trainer, run = explain(kind, model_folder, tmp_path, **arguments)
    examples, decode = run.training_examples, trainer.processing_class.decode
    assert len(examples) > 4
    assert examples["row"].notna().all()
    for example in examples.itertuples():
        row = trainer.train_dataset[int(example.row)]
        answer = {"chosen": "chosen_ids", "rejected": "rejected_ids"}.get(example.role, "completion_ids")
        whole = decode(row["prompt_ids"] + row[answer]) if "prompt_ids" in row else decode(row["input_ids"])
        trained_on = example.prompt + example.response
        assert trained_on in whole


def test_rollouts_and_texts_packed_with_others_have_no_row(model_folder, tmp_path):
    _, run = explain("grpo", model_folder, tmp_path / "grpo", max_steps=1)
    assert len(run.training_examples) > 0
    assert run.training_examples["row"].isna().all()
    trainer, run = explain("sft", model_folder, tmp_path / "sft", max_steps=1, packing=True, max_length=256)
    assert run.training_examples["row"].isna().any()
    for row in run.training_examples["row"].dropna():
        assert len(trainer.train_dataset[int(row)]["seq_lengths"]) == 1


def test_blame_of_a_run_is_the_sum_of_its_training_tokens(model_folder, tmp_path):
    _, run = explain("dpo", model_folder, tmp_path, max_steps=4)  # a second epoch: rows come twice
    frame = run.blame("chosen")
    assert frame["share"].is_monotonic_increasing
    assert frame["n_steps"].max() > 1
    tokens = run.training_tokens.query("target == 'chosen'")
    assert frame["share"].sum() == pytest.approx(tokens["share"].sum(), rel=1e-12)
    assert frame["c_sum"].sum() == pytest.approx(tokens["c"].sum(), abs=1e-6)
    assert frame["n_steps"].sum() == len(run.training_examples)
    assert sorted(frame["row"].tolist()) == sorted([*range(len(PREFERENCES))] * 2)
    worst = frame.iloc[0]
    examples = run.training_examples.query("row == @worst.row and role == @worst.role")
    by_hand = tokens.merge(examples[["step", "example"]], on=["step", "example"])["share"].sum()
    assert worst["share"] == pytest.approx(by_hand, rel=1e-12)
    assert worst["response"] == examples["response"].iloc[0]
    with pytest.raises(ValueError, match="no training token is told for 'other_train'; told: 'chosen', 'rejected'"):
        run.blame("other_train")


# ---- look-up -------------------------------------------------------------------------------------------------------


def test_a_text_of_two_rows_is_of_neither_and_a_pair_of_equal_answers_of_its_row():
    ids = [[1, 2, 3], [4, 5], [1, 2, 3], [6]]
    rows = rows_of(Dataset.from_dict({"input_ids": ids}))
    assert [rows(row) for row in ids] == [None, 1, None, 3]
    assert rows([1, 2]) is None
    assert rows([]) is None
    pairs = {"prompt_ids": [[1], [2]], "chosen_ids": [[7, 8], [9]], "rejected_ids": [[7, 8], [10]]}
    rows = rows_of(Dataset.from_dict(pairs))
    assert (rows([1, 7, 8]), rows([2, 9]), rows([2, 10]), rows([1, 9])) == (0, 1, 1, None)


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        ({"max_length": 3}, [[1, 2, 3], [4, 5]]),
        ({"max_length": 3, "truncation_mode": "keep_start"}, [[1, 2, 3], [4, 5]]),
        ({"max_length": 2, "truncation_mode": "keep_end"}, [[8, 9], [4, 5]]),
        ({"max_length": None}, [[1, 2, 3, 8, 9], [4, 5]]),
    ],
)
def test_texts_are_cut_as_the_collator_cuts_them(arguments, seen):
    rows = rows_of(Dataset.from_dict({"prompt_ids": [[1, 2], [4]], "completion_ids": [[3, 8, 9], [5]]}), **arguments)
    assert [rows(ids) for ids in seen] == [0, 1]


def test_rows_are_counted_over_batches_selections_and_shuffles():
    ids = [[number, number + 1, 7] for number in range(2500)]
    dataset = Dataset.from_dict({"input_ids": ids, "other": ["x"] * 2500})
    for one in (dataset, dataset.shuffle(seed=1), dataset.select(range(2499, -1, -2))):
        rows = rows_of(one)
        for row in (0, 999, 1000, len(one) - 1):
            assert rows(one[row]["input_ids"]) == row


@pytest.mark.parametrize("form", ["stream", "transform", "list", "text", "images"])
def test_what_has_no_token_table_has_no_rows(form):
    dataset = Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    forms = {
        "stream": lambda: dataset.to_iterable_dataset(),
        "transform": lambda: dataset.with_transform(lambda rows: pytest.fail("a transform was run")),
        "list": lambda: [{"input_ids": [1, 2]}],
        "text": lambda: Dataset.from_dict({"input_ids": ["1 2", "3"], "prompt": ["a", "b"]}),
        "images": lambda: Dataset.from_dict({"prompt": ["a", "b"]}),
    }
    assert rows_of(forms[form]())([1, 2]) is None


def test_the_look_up_draws_no_random_number_and_follows_a_data_set_that_is_exchanged():
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    rows = rows_of(Dataset.from_dict({"input_ids": [[1], [2]]}))
    before = state()
    assert rows([2]) == 1
    assert state() == before
    rows.trainer.train_dataset = Dataset.from_dict({"input_ids": [[2], [1]]})
    assert rows([2]) == 0


# ---- sums ----------------------------------------------------------------------------------------------------------


def test_blame_counts_by_row_or_by_text_and_leaves_out_what_is_no_number():
    examples = pd.DataFrame(
        {
            "step": [1, 1, 2, 2], "example": [0, 1, 0, 1], "row": pd.array([3, None, 3, None], dtype="Int64"),
            "role": "trained", "prompt": ["a", "b", "a", "c"], "response": ["x", "y", "x", "y"], "n_tokens": 2,
            "c_sum": [-1.0, -2.0, -4.0, -8.0],
        }
    )  # fmt: skip
    tokens = pd.DataFrame(
        {
            "step": [1, 1, 1, 2, 2, 2], "example": [0, 0, 1, 0, 1, 1], "target": ["chosen"] * 5 + ["rejected"],
            "share": [1.0, -4.0, 2.0, -1.0, np.nan, -100.0],
        }
    )  # fmt: skip
    frame = blame(tokens, examples, "chosen")
    assert frame[["prompt", "share", "c_sum", "n_steps", "n_nonfinite"]].to_numpy().tolist() == [
        ["a", -4.0, -5.0, 2, 0], ["c", 0.0, -8.0, 1, 1], ["b", 2.0, -2.0, 1, 0]
    ]  # fmt: skip
    assert frame["row"].tolist() == [3, pd.NA, pd.NA]
    for empty in (tokens.iloc[:0], tokens):
        with pytest.raises(ValueError, match="no training token is told for 'p0/chosen'; told"):
            blame(empty, examples, "p0/chosen")
