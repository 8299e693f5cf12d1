"""The coefficients that the tape reads off real losses are those of the losses' own formulas."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.influence.steps import PlainLogProbs, in_float64, run_steps
from tests.training import save_tiny_model

BETA = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def coefficients(batch):
    """c of the tokens with a label, by example."""
    has_label = batch.labels != -100
    return {k: batch.c[has_label & (batch.example == k)] for k in batch.example.unique().tolist()}


def test_sft_asks_the_same_of_every_token_of_the_global_step(folder, tmp_path):
    step = run_steps("sft", folder, tmp_path, gradient_accumulation_steps=3).steps[0]
    c = torch.cat([batch.c[batch.labels != -100] for batch in step.tape.batches])
    torch.testing.assert_close(c, torch.full_like(c, -1 / len(c)), rtol=1e-12, atol=0)
    assert len(step.tape.batches) == 3


def test_a_plain_trainer_asks_the_same_of_every_token(folder, tmp_path):
    step = run_steps("plain", folder, tmp_path, gradient_accumulation_steps=2).steps[0]
    c = torch.cat([batch.c[batch.labels != -100] for batch in step.tape.batches])
    torch.testing.assert_close(c, torch.full_like(c, -1 / len(c)), rtol=1e-5, atol=0)  # its loss is in float32


@torch.no_grad()
def plain_sums(model, batch, kept):
    """Each row's sum of log-probs over the tokens in `kept`, from the model's own logits."""
    logits = model(input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"]).logits
    logp = logits[:, :-1].log_softmax(-1).gather(2, batch.inputs["input_ids"][:, 1:, None])[..., 0]
    return (logp * kept).sum(dim=1)


@pytest.fixture(scope="module")
def dpo(folder, tmp_path_factory):
    """Sigmoid, then sigmoid and IPO off the reference: each with its log-ratios, (2B,) per micro-batch."""

    def apply(trainer, loss):
        trainer.loss_types, trainer.loss_weights = [loss], [1.0]

    output_dir = tmp_path_factory.mktemp("dpo")
    losses = ["sigmoid", "sigmoid", "ipo"]
    options = {"gradient_accumulation_steps": 2, "learning_rate": 0.02, "beta": BETA}
    recorder = run_steps("dpo", folder, output_dir, settings=losses, apply=apply, **options)
    reference = recorder.trainer.ref_model
    result = []
    with in_float64():
        for step in recorder.steps:
            ratios = [b.logps.sum(dim=1) - plain_sums(reference, b, b.labels != -100) for b in step.tape.batches]
            result.append((step, ratios))
    return result


@pytest.mark.parametrize("index", [0, 1])
def test_dpo_asks_beta_times_the_chance_of_error_of_every_token(dpo, index):
    step, ratios = dpo[index]
    scale = sum(len(r) for r in ratios) / 2 if len(ratios) == 1 else len(ratios) * len(ratios[0]) / 2
    for batch, ratio in zip(step.tape.batches, ratios, strict=True):
        chosen, rejected = ratio.chunk(2)
        size = BETA * torch.sigmoid(-BETA * (chosen - rejected)) / scale
        expected = torch.cat([-size, size])[:, None].expand_as(batch.c) * (batch.labels != -100)
        torch.testing.assert_close(batch.c, expected, rtol=1e-9, atol=0)
    if index == 1:
        assert max(float(r.abs().max()) for r in ratios) > 0.1  # off the reference, so the margin matters


def test_ipo_asks_twice_what_the_margin_misses(dpo):
    step, ratios = dpo[2]
    for batch, ratio in zip(step.tape.batches, ratios, strict=True):
        lengths = (batch.labels != -100).sum(dim=1)
        chosen, rejected = (ratio / lengths).chunk(2)
        missing = 2 * (1 / (2 * BETA) - (chosen - rejected)) / (len(ratio) / 2 * len(ratios))
        expected = (torch.cat([-missing, missing]) / lengths)[:, None] * (batch.labels != -100)
        torch.testing.assert_close(batch.c, expected, rtol=1e-9, atol=0)


@pytest.fixture(scope="module")
def grpo(folder, tmp_path_factory):
    """Every loss type on policy, each with what `_compute_loss` was given, by micro-batch."""
    given = []

    def keep_inputs(trainer):
        compute = trainer._compute_loss

        def kept(model, inputs):
            given.append({name: inputs[name] for name in ("advantages", "completion_mask", "num_items_in_batch")})
            return compute(model, inputs)

        trainer._compute_loss = kept

    losses = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"]
    recorder = run_steps(
        "grpo",
        folder,
        tmp_path_factory.mktemp("grpo"),
        settings=losses,
        apply=lambda trainer, loss: setattr(trainer, "loss_type", loss),
        prepare=keep_inputs,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        temperature=0.8,
        epsilon_high=5.0,  # cispo's cap on the weight, which is 1 on policy
        generation_kwargs={"suppress_tokens": [0, 1, *range(3, 317)]},  # so that some completions end early
    )
    pairs = zip(given[::2], given[1::2], strict=True)
    return dict(zip(losses, zip(recorder.steps, pairs, strict=True), strict=True))


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo"])
def test_grpo_on_policy_asks_the_advantage_over_the_normaliser(grpo, loss):
    step, given = grpo[loss]
    assert any(inputs["advantages"].any() for inputs in given)
    assert len({int(length) for inputs in given for length in inputs["completion_mask"].sum(dim=1)}) > 1
    for batch, inputs in zip(step.tape.batches, given, strict=True):
        mask = inputs["completion_mask"].double()
        normaliser = {
            "grpo": mask.sum(dim=1, keepdim=True) * len(mask) * 2,
            "bnpo": mask.sum() * 2,
            "dr_grpo": mask.numel() / mask.shape[1] * 6 * 2,  # max_completion_length is 6
            "dapo": inputs["num_items_in_batch"],
            "cispo": inputs["num_items_in_batch"],
        }[loss]
        expected = -inputs["advantages"].double()[:, None] * mask / normaliser
        c = batch.c[:, -mask.shape[1] :]
        torch.testing.assert_close(c, expected, rtol=1e-6, atol=0)  # advantages come in float32
        assert not batch.c[:, : -mask.shape[1]].any()


def test_the_log_probs_on_tape_are_those_the_loss_saw(grpo):
    """With the sampling temperature, and zero where there is no label."""
    batch = grpo["grpo"][0].tape.batches[0]
    logits = torch.randn(5, 7, dtype=torch.float64)
    targets = torch.tensor([0, 3, 6, 1, 1])
    at_temperature = PlainLogProbs.apply(logits, torch.eye(7, dtype=torch.float64), None, targets, 0.8, 1)[0]
    assert torch.equal(at_temperature, (logits / 0.8).log_softmax(-1)[range(5), targets])
    assert (batch.logps[batch.labels != -100] < 0).all()
    assert not batch.logps[batch.labels == -100].any()


def test_the_sign_of_dpo_follows_the_sigmoid(dpo):
    """The scalar loss of the tape's own log-probs has the tape's own coefficients as its gradient."""
    step, ratios = dpo[1]
    for batch, ratio in zip(step.tape.batches, ratios, strict=True):
        free = ratio.clone().requires_grad_()
        chosen, rejected = free.chunk(2)
        loss = -logsigmoid(BETA * (chosen - rejected)).mean() / len(ratios)
        (gradient,) = torch.autograd.grad(loss, free)
        for row, expected in enumerate(gradient):
            c = batch.c[row][batch.labels[row] != -100]
            torch.testing.assert_close(c, expected.expand_as(c), rtol=1e-9, atol=0)
