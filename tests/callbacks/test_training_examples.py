"""What a step trained on, as text: prompts and responses of every layout of a batch."""

import pytest
import torch

from llm_dynamics.callbacks.training_examples import describe_examples
from llm_dynamics.influence import MicroBatch, as_one, by_halves
from tests.callbacks.explained import by_family, explain
from tests.conftest import FIRST, PREFERENCES, SECOND
from tests.training import save_tiny_model

END = "<|im_end|>"
PROMPTS = {(5, 6): "p0", (8,): "p1"}


def words(ids):
    return " ".join(map(str, ids))


def micro_batch(ids, labelled, *, first=0, c=None, example=None, shifted=False, **inputs):
    """A micro-batch of rows of ids with a loss on the tokens at places `labelled` of each row; c is -1 unless given."""
    ids = torch.tensor(ids)
    labels = torch.full(ids.shape, -100)
    for row, places in enumerate(labelled):
        labels[row, places] = ids[row, places]
    labels = torch.cat([labels[:, 1:], torch.full((len(ids), 1), -100)], dim=1) if shifted else labels[:, 1:]
    valid = labels != -100
    c = torch.where(valid, -1.0, 0.0) if c is None else torch.tensor(c)
    example = torch.arange(len(ids))[:, None].expand(labels.shape) if example is None else torch.tensor(example)
    inputs = {"input_ids": ids, **{name: torch.tensor(value) for name, value in inputs.items()}}
    return MicroBatch(inputs, labels, c * 0.5, c, example + first, shifted, None)


def describe(*batches, roles=None, **options):
    return describe_examples(batches, roles or as_one("trained"), PROMPTS, words, **options)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_right_padded_row_is_told_apart_into_prompt_and_response(shifted):
    batch = micro_batch(
        [[5, 6, 7, 8, 9], [8, 4, 3, 0, 0]],
        [[2, 3, 4], [1, 2]],
        attention_mask=[[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]],
        shifted=shifted,
    )
    described = describe(batch)
    columns = ["example", "role", "prompt_id", "prompt", "response", "n_tokens", "c_sum"]
    assert described.examples[columns].to_numpy().tolist() == [
        [0, "trained", "p0", "5 6", "7 8 9", 3, -3.0],
        [1, "trained", "p1", "8", "4 3", 2, -2.0],
    ]
    assert described.tokens[["example", "position", "token_id", "token"]].to_numpy().tolist() == [
        [0, 0, 7, "7"], [0, 1, 8, "8"], [0, 2, 9, "9"], [1, 0, 4, "4"], [1, 1, 3, "3"]
    ]  # fmt: skip
    assert described.tokens["logp"].tolist() == [-0.5] * 5


def test_a_text_with_a_loss_on_all_of_it_has_the_prompt_that_it_begins_with():
    batch = micro_batch([[5, 6, 7], [8, 4, 3], [5, 7, 6]], [[1, 2]] * 3, attention_mask=[[1, 1, 1]] * 3)
    assert describe(batch).examples["prompt_id"].tolist()[:2] == ["p0", "p1"]
    assert describe(batch).examples["prompt_id"].isna().tolist() == [False, False, True]


def test_batches_without_a_token_that_is_trained_on_have_empty_tables():
    ids = [[5, 6, 7]]
    for batches in ([micro_batch(ids, [[]], attention_mask=[[1, 1, 1]])], []):
        described = describe(*batches)
        assert len(described.examples) == len(described.tokens) == 0
        assert {"example", "prompt_id"} <= set(described.examples.columns)
        assert {"example", "token", "c"} <= set(described.tokens.columns)


def test_padding_on_the_left_is_no_part_of_the_prompt():
    batch = micro_batch(
        [[0, 0, 8, 4, 3, 0], [0, 5, 6, 7, 2, 1]],
        [[3, 4], [3, 4, 5]],
        attention_mask=[[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]],
    )
    examples = describe(batch).examples
    assert examples["prompt"].tolist() == ["8", "5 6"]
    assert examples["response"].tolist() == ["4 3", "7 2 1"]
    assert examples["prompt_id"].tolist() == ["p1", "p0"]


def test_sequences_of_a_packed_row_have_prompts_of_their_own():
    batch = micro_batch(
        [[5, 6, 7, 2, 8, 4, 2]],
        [[2, 3, 5, 6]],
        example=[[0, 0, 0, 1, 1, 1]],
        position_ids=[[0, 1, 2, 3, 0, 1, 2]],
    )
    described = describe(batch)
    assert described.examples["prompt"].tolist() == ["5 6", "8"]
    assert described.examples["response"].tolist() == ["7 2", "4 2"]
    assert described.examples["prompt_id"].tolist() == ["p0", "p1"]
    assert described.tokens["position"].tolist() == [0, 1, 0, 1]
    assert described.tokens["example"].tolist() == [0, 0, 1, 1]


def test_rows_without_a_mask_begin_at_their_first_token():
    assert describe(micro_batch([[5, 6, 7]], [[2]])).examples["prompt"].tolist() == ["5 6"]


def test_a_prompt_that_no_probe_has_has_no_id():
    assert describe(micro_batch([[5, 9, 7]], [[2]])).examples["prompt_id"].tolist() == [None]


def test_examples_are_numbered_over_micro_batches_and_one_without_labels_is_left_out():
    first = micro_batch([[5, 6, 7], [8, 4, 3]], [[2], []])
    second = micro_batch([[8, 4, 3]], [[1, 2]], first=2)
    described = describe(first, second)
    assert described.examples["example"].tolist() == [0, 2]
    assert described.tokens["example"].tolist() == [0, 2, 2]


def test_a_token_without_a_coefficient_is_no_row_and_keeps_its_place():
    batch = micro_batch([[5, 6, 7, 8, 9]], [[2, 3, 4]], c=[[0.0, 2.0, 0.0, -1.0]])
    described = describe(batch)
    assert described.tokens[["position", "token_id", "c"]].to_numpy().tolist() == [[0, 7, 2.0], [2, 9, -1.0]]
    assert described.examples["c_sum"].tolist() == [1.0]
    assert described.examples["response"].tolist() == ["7 8 9"]


def test_coefficients_are_those_of_the_mean_over_processes():
    described = describe(micro_batch([[5, 6, 7, 8]], [[2, 3]]), n_processes=4)
    assert described.tokens["c"].tolist() == [-0.25, -0.25]
    assert described.examples["c_sum"].tolist() == [-0.5]


def test_the_role_is_that_of_the_examples_tokens():
    batch = micro_batch([[5, 6, 7], [5, 6, 8]], [[2], [2]])
    assert describe(batch, roles=by_halves("chosen", "rejected")).examples["role"].tolist() == ["chosen", "rejected"]
    assert describe(batch, roles=lambda batch: {}).examples["role"].tolist() == ["trained", "trained"]


PACKED = {"packed": {"packing": True, "max_length": 64}, "padding_free": {"padding_free": True, "max_length": None}}


@pytest.mark.parametrize("layout", PACKED)
def test_packed_batches_of_a_real_trainer_are_told_as_single_examples(layout, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    _, run = explain("sft", folder, tmp_path / "run", max_steps=1, **PACKED[layout])
    chosen = {row["prompt"]: row["chosen"] for row in PREFERENCES}
    assert len(run.training_examples) >= 2
    for example in run.training_examples.itertuples():
        assert chosen[example.prompt] == example.response.removesuffix(END).strip()
    ids = {PREFERENCES[0]["prompt"]: FIRST, PREFERENCES[1]["prompt"]: SECOND}
    assert run.training_examples["prompt_id"].dropna().tolist() == [
        ids[prompt] for prompt in run.training_examples["prompt"] if prompt in ids
    ]
    assert run.training_examples["prompt_id"].notna().any()
    assert (run.accounts["explained"] > 0.999).all()
    shares = by_family(run)
    for family, share in run.training_tokens.groupby("target")["share"].sum().items():
        assert share == pytest.approx(shares[1, family, "up"], abs=1e-3)
