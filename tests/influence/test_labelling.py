"""Labellings partition the tokens with a loss, and the parts of every partition are the same gradient."""

import pytest
import torch

from llm_dynamics.influence import MicroBatch, as_one, by_example, by_halves, by_push, by_sign
from tests.influence.steps import relative_gap, run_steps, total
from tests.training import save_tiny_model

LABELLINGS = {
    "sign": by_sign,
    "halves": by_halves("chosen", "rejected"),
    "push": by_push("pulled", "pushed"),
    "example": by_example,
    "one": as_one("all"),
}


def micro_batch(c, example=None):
    c = torch.tensor(c)
    rows = torch.arange(len(c))[:, None].expand(c.shape)
    example = rows if example is None else torch.tensor(example)
    return MicroBatch({}, torch.ones_like(c, dtype=torch.long), torch.zeros_like(c), c, example, False, None)


def labels_of(labelling, batch):
    """Each token's label, None where it has none; fails where it has two."""
    masks = labelling(batch)
    names = [[None] * batch.c.shape[1] for _ in range(len(batch.c))]
    for label, mask in masks.items():
        assert mask.shape == batch.c.shape
        assert mask.dtype == torch.bool
        for b, s in mask.nonzero().tolist():
            assert names[b][s] is None, f"{names[b][s]} and {label}"
            names[b][s] = label
    return names


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same step of DPO and GRPO under every labelling."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    options = {"dpo": {}, "grpo": {"per_device_train_batch_size": 4, "num_generations": 4, "beta": 0.3}}
    return {
        (kind, name): run_steps(
            kind,
            folder,
            tmp_path_factory.mktemp(f"{kind}_{name}"),
            labelling=labelling,
            gradient_accumulation_steps=2,
            max_steps=2,
            **options[kind],
        ).steps[1]  # off the reference: KL to it gives coefficients of their own
        for kind in options
        for name, labelling in LABELLINGS.items()
    }


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
@pytest.mark.parametrize("name", LABELLINGS)
def test_labels_partition_the_tokens_with_a_loss_and_their_parts_add_up(runs, kind, name):
    step = runs[kind, name]
    for batch in step.tape.batches:
        names = labels_of(LABELLINGS[name], batch)
        assert all(names[b][s] is not None for b, s in batch.has_loss.nonzero().tolist())
        if name != "one":
            assert len({label for row in names for label in row}) > 1
    assert relative_gap(total(step.parts), step.gradient_of_loss()) <= 1e-10


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_parts_by_example_are_finer_than_parts_by_push(runs, kind):
    """Every example is pulled or pushed as a whole, so the sums of its part agree with those by push."""
    examples, pushes = runs[kind, "example"], runs[kind, "push"]
    label_of = {}
    for batch in pushes.tape.batches:
        names = labels_of(LABELLINGS["push"], batch)
        for b, s in batch.has_loss.nonzero().tolist():
            label_of[int(batch.example[b, s])] = names[b][s]
    for label, part in pushes.parts.items():
        mine = {f"example_{k}": examples.parts[f"example_{k}"] for k, name in label_of.items() if name == label}
        assert relative_gap(total(mine), part) <= 1e-10


def test_dpo_halves_are_the_signs_of_the_loss(runs):
    """The chosen half is pulled up and the rejected half pushed down, in every micro-batch."""
    for step in (runs["dpo", "halves"], runs["dpo", "sign"]):
        for batch in step.tape.batches:
            chosen = by_halves("chosen", "rejected")(batch)["chosen"]
            assert ((batch.c < 0) == (chosen & batch.has_loss)).all()
    halves, signs = runs["dpo", "halves"].parts, runs["dpo", "sign"].parts
    assert relative_gap(halves["chosen"], signs["up"]) <= 1e-10
    assert relative_gap(halves["rejected"], signs["down"]) <= 1e-10


def test_halves_are_counted_within_the_micro_batch():
    batch = micro_batch([[1.0], [1.0], [1.0], [1.0]], example=[[4], [5], [6], [7]])
    assert labels_of(by_halves("a", "b"), batch) == [["a"], ["a"], ["b"], ["b"]]


def test_push_is_of_the_whole_example_also_in_a_packed_row():
    batch = micro_batch([[-3.0, 1.0, 2.0, -1.0, 0.0]], example=[[2, 2, 3, 3, 4]])
    assert labels_of(by_push("up", "down"), batch) == [["up", "up", "down", "down", "up"]]


def test_tokens_without_a_coefficient_have_no_sign():
    assert labels_of(by_sign, micro_batch([[-1.0, 0.0, 2.0]])) == [["up", None, "down"]]
