"""Every training token's share, against one backward per token and the definition."""

from dataclasses import dataclass, replace

import pytest
import torch

from llm_dynamics.influence import influence_of_training_tokens, inner_products, path_gradient
from llm_dynamics.kernel.derivatives import ResponseLogps
from tests.influence.steps import Step, in_float64, run_steps
from tests.likelihood.models import build, make_responses
from tests.training import save_tiny_model

DROPOUT = 0.2
GROUPS = {"per_device_train_batch_size": 4, "num_generations": 4}
RUNS = {
    "sft_accumulated": ("sft", 1.0, {"gradient_accumulation_steps": 2}),
    "sft_packed": ("sft", 1.0, {"packing": True, "max_length": 64}),
    "sft_lora": ("sft", 1.0, {"lora": True, "dropout": DROPOUT, "gradient_accumulation_steps": 2}),
    "dpo_rmsprop": ("dpo", 1.0, {"optim": "rmsprop", "gradient_checkpointing": False}),
    "dpo_lora": ("dpo", 1.0, {"lora": True, "dropout": DROPOUT}),
    "grpo_temperature": ("grpo", 0.6, GROUPS | {"temperature": 0.6, "beta": 0.2}),
}


@dataclass
class Case:
    """A finished step, the model that took it, and a target: a weighted sum of probe tokens."""

    model: object
    logps: ResponseLogps
    step: Step
    temperature: float
    gradient: dict

    def influence(self, *, batches=None, **options):
        with in_float64():
            return influence_of_training_tokens(
                self.model,
                self.logps.split,
                self.step.tape.batches if batches is None else batches,
                self.step.before,
                self.step.update.per_gradient,
                self.gradient,
                **{"temperature": self.temperature} | options,
            )


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """The second step of every run, with attention dropout; clipped, so that the clip factor counts."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), dropout=DROPOUT)
    result = {}
    for name, (kind, temperature, options) in RUNS.items():
        options = {"max_steps": 2, "max_grad_norm": 0.1, "weight_decay": 0.1} | options
        recorder = run_steps(kind, folder, tmp_path_factory.mktemp(name), **options)
        model, step = recorder.trainer.model.train(), recorder.steps[1]
        with in_float64():
            logps = ResponseLogps(model, make_responses(prompts=1, families=2, longest=6))
            token_weights = torch.linspace(-1, 2, logps.n_tokens).double()
            gradient = path_gradient(logps, step.before, step.after, token_weights)
        assert step.clip < 1
        result[name] = Case(model, logps, step, temperature, gradient)
    return result


@pytest.fixture(scope="module")
def grpo(cases):
    return cases["grpo_temperature"]


def one_backward_per_token(case, names):
    """c_l <F * grad f, grad log pi(y_l)> at the weights before the step, dropout drawn again: share by place."""
    model, shares = case.model, {}
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    now = {name: p.detach().clone() for name, p in parameters.items()}
    direction = {name: case.gradient[name] * case.step.update.per_gradient[name] for name in names}
    state = torch.get_rng_state()
    try:
        for name, parameter in parameters.items():
            parameter.data.copy_(case.step.before[name])
        for k, batch in enumerate(case.step.tape.batches):
            torch.set_rng_state(batch.random.cpu)
            logp = (model(**batch.inputs).logits / case.temperature).log_softmax(-1)
            for b, s in batch.has_loss.nonzero().tolist():
                token = logp[b, s, batch.labels[b, s]]
                gradients = torch.autograd.grad(token, list(parameters.values()), retain_graph=True)
                products = (float((g * direction[n]).sum()) for n, g in zip(parameters, gradients, strict=True))
                shares[k, b, s] = float(batch.c[b, s]) * sum(products)
    finally:
        torch.set_rng_state(state)
        for name, parameter in parameters.items():
            parameter.data.copy_(now[name])
    return shares


@pytest.mark.parametrize("name", RUNS)
def test_shares_are_those_of_one_backward_per_token(cases, name):
    case = cases[name]
    with in_float64():
        expected = one_backward_per_token(case, set(case.step.before))
    tokens = case.influence()
    assert [tuple(place) for place in tokens.places.tolist()] == sorted(expected)
    theirs = torch.tensor([expected[tuple(place)] for place in tokens.places.tolist()], dtype=torch.float64)
    torch.testing.assert_close(tokens.shares, theirs, rtol=1e-9, atol=1e-10 * float(theirs.abs().max()))
    assert theirs.abs().max() > 0


@pytest.mark.parametrize("name", RUNS)
def test_shares_of_all_tokens_sum_to_those_of_the_labels(cases, name):
    case = cases[name]
    parts = case.step.update.parts
    of_labels = inner_products(case.gradient, {label: parts[label] for label in ("up", "down") if label in parts})
    tokens = case.influence()
    assert float(tokens.shares.sum()) == pytest.approx(sum(of_labels.values()), rel=1e-9)
    c = torch.cat([batch.c[batch.has_loss] for batch in case.step.tape.batches])
    for label, mask in (("up", c < 0), ("down", c > 0)):
        assert float(tokens.shares[mask].sum()) == pytest.approx(of_labels.get(label, 0.0), rel=1e-8, abs=1e-15)


@pytest.mark.parametrize("name", RUNS)
def test_dropout_and_temperature_are_repeated(cases, name):
    assert cases[name].influence().replay_error <= 1e-12


@pytest.mark.parametrize("name", ["sft_accumulated", "dpo_lora"])
def test_a_replay_under_other_masks_says_so(cases, name):
    batches = [replace(batch, random=None) for batch in cases[name].step.tape.batches]
    assert cases[name].influence(batches=batches).replay_error > 1e-3


def test_a_replay_at_another_temperature_says_so(grpo):
    assert grpo.influence(temperature=1.0).replay_error > 1e-3


def test_every_process_counts_as_one_of_n(grpo):
    one, four = grpo.influence(), grpo.influence(n_processes=4)
    torch.testing.assert_close(four.shares * 4, one.shares, rtol=1e-12, atol=0)


def test_a_part_of_the_batches_has_the_shares_of_its_tokens(cases):
    case = cases["sft_accumulated"]
    tokens = case.influence()
    for k, batch in enumerate(case.step.tape.batches):
        mine = case.influence(batches=[batch])
        torch.testing.assert_close(mine.shares, tokens.shares[tokens.places[:, 0] == k], rtol=1e-12, atol=0)


def test_tokens_without_a_coefficient_are_left_out(grpo):
    batch = grpo.step.tape.batches[0]
    first_row = torch.arange(len(batch.c))[:, None] == 0
    silent = replace(batch, c=batch.c.masked_fill(first_row, 0))
    tokens = grpo.influence(batches=[silent])
    assert 0 not in tokens.places[:, 1]
    assert len(tokens.shares) == int((batch.has_loss & ~first_row).sum())


def test_nothing_is_left_behind(cases):
    case = cases["sft_lora"]
    model = case.model
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.base_model.model.model.layers[0].eval()  # a module that is in evaluation mode by intent
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    case.influence()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.grad for parameter in model.parameters()] == gradients
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    model.train()


def test_an_optimizer_that_is_not_known_is_refused(grpo):
    unknown = replace(grpo.step, update=replace(grpo.step.update, per_gradient={}))
    with pytest.raises(ValueError, match="the optimizer's step is not known as a function of the gradient"):
        replace(grpo, step=unknown).influence()


def test_parameters_that_had_no_gradient_count_for_nothing(grpo):
    some = next(iter(grpo.gradient))
    others = {name: factor for name, factor in grpo.step.update.per_gradient.items() if name != some}
    part = replace(grpo, step=replace(grpo.step, update=replace(grpo.step.update, per_gradient=others)))
    without = {name: value for name, value in grpo.gradient.items() if name != some}
    torch.testing.assert_close(
        part.influence().shares, replace(grpo, gradient=without).influence().shares, rtol=1e-12, atol=0
    )


def test_a_model_whose_logits_are_made_in_an_unknown_way_is_refused(grpo):
    whole = replace(grpo.logps.split, backbone=None, model=build("llama_tied"))
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM computes its logits in an unknown way"):
        influence_of_training_tokens(grpo.model, whole, [], {}, {"w": 1.0}, {"w": torch.ones(1)})
