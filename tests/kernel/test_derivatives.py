"""Log-probs as a function of the weights, against one row at a time, autograd and central differences in float64."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from llm_dynamics.kernel import derivatives
from llm_dynamics.kernel.derivatives import ResponseLogps
from llm_dynamics.kernel.weights import unshared
from tests.kernel.brute_force import in_float64, jacobian, trainable
from tests.likelihood.models import VOCAB, build, make_responses, plain_logps

MODELS = ["llama_tied", "llama_untied", "gpt2_conv1d", "qwen3_qk_norm", "gemma2_soft_capped", "lora"]
RESPONSES = make_responses(prompts=2, families=3, longest=6)
EXACT = {"rtol": 1e-9, "atol": 1e-11}


LORA = {"r": 3, "lora_dropout": 0.3, "target_modules": "all-linear", "init_lora_weights": False}


def build_case(name):
    """A float64 model in training mode, with dropout where it has any."""
    if name != "lora":
        return build(name, dtype=torch.float64).train()
    torch.manual_seed(1)
    return get_peft_model(build("llama_tied"), LoraConfig(task_type="CAUSAL_LM", **LORA)).double().train()


class Twin:
    """A model with the brute-force Jacobian of all response tokens, at its own weights."""

    def __init__(self, name):
        self.model = build_case(name)
        self.names = trainable(self.model)
        self.weights = {n: p for n, p in self.model.named_parameters() if n in set(self.names)}
        with in_float64():
            self.model.eval()
            self.jacobian = jacobian(self.model, RESPONSES, self.names)
            self.distributions = torch.cat([plain_logps(self.model, response) for response in RESPONSES])
            self.model.train()
        labels = torch.tensor([label for response in RESPONSES for label in response.response_ids])
        self.values = self.distributions.gather(1, labels[:, None])[:, 0]
        generator = torch.Generator().manual_seed(5)
        self.direction = {n: torch.randn(p.shape, generator=generator).double() for n, p in self.weights.items()}

    def flat(self, by_name):
        return torch.cat([by_name[name].flatten() for name in self.names])

    def logps(self, **options):
        return ResponseLogps(self.model, RESPONSES, **options)


@pytest.fixture(scope="module")
def twins():
    return {name: Twin(name) for name in MODELS}


@pytest.fixture(autouse=True)
def no_casts():
    with in_float64():
        yield


LAYOUTS = [{}, {"share_prompts": False}, {"batch_tokens": 1}, {"batch_tokens": 30, "share_prompts": False}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_values_derivatives_and_gradients_are_those_of_one_row_at_a_time(twins, name, layout):
    twin = twins[name]
    logps = twin.logps(**layout)
    torch.testing.assert_close(logps.values(twin.weights), twin.values, **EXACT)

    values, change = logps.jvp(twin.weights, twin.direction)
    expected = twin.jacobian @ twin.flat(twin.direction)
    torch.testing.assert_close(values, twin.values, **EXACT)
    torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))

    token_weights = torch.linspace(-1, 1, logps.n_tokens).double()
    gradient = logps.gradient(twin.weights, token_weights)
    assert {n: g.shape for n, g in gradient.items()} == {n: p.shape for n, p in twin.weights.items()}
    torch.testing.assert_close(twin.flat(gradient), token_weights @ twin.jacobian, **EXACT)
    product = twin.flat(gradient) @ twin.flat(twin.direction)
    torch.testing.assert_close(product, token_weights @ change, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_distributions_and_their_derivatives_are_those_of_one_row_at_a_time(twins, name):
    twin = twins[name]
    tokens = torch.tensor([5, 0, 17, 3])
    logps = twin.logps(batch_tokens=20)
    torch.testing.assert_close(logps.distributions(twin.weights, tokens), twin.distributions[tokens], **EXACT)
    start, change = logps.jvp_distributions(twin.weights, twin.direction, tokens)
    torch.testing.assert_close(start, twin.distributions[tokens], **EXACT)
    h = 1e-6
    ends = [{n: p + sign * h * twin.direction[n] for n, p in twin.weights.items()} for sign in (-1, 1)]
    low, high = (logps.distributions(weights, tokens) for weights in ends)
    torch.testing.assert_close(change, (high - low) / (2 * h), rtol=1e-5, atol=1e-6 * float(change.abs().max()))
    labels = torch.tensor([label for response in RESPONSES for label in response.response_ids])[tokens]
    expected = (twin.jacobian @ twin.flat(twin.direction))[tokens]
    ours = change.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_other_weights_are_those_of_a_model_that_has_them(twins):
    twin = twins["llama_tied"]
    moved = {n: p.detach() + 0.1 * twin.direction[n] for n, p in twin.weights.items()}
    other = copy.deepcopy(twin.model).eval()
    other.load_state_dict(moved, strict=False)  # the tied head follows
    expected = torch.cat([plain_logps(other, response) for response in RESPONSES])
    tokens = torch.arange(len(expected))
    torch.testing.assert_close(twin.logps().distributions(moved, tokens), expected, **EXACT)
    assert not torch.allclose(expected, twin.distributions)


def test_a_direction_of_some_weights_leaves_the_others_alone(twins):
    twin = twins["qwen3_qk_norm"]
    part = {name: twin.direction[name] for name in twin.names[2:5]}
    whole = {name: part.get(name, torch.zeros_like(p)) for name, p in twin.weights.items()}
    logps = twin.logps()
    expected = twin.jacobian @ twin.flat(whole)
    torch.testing.assert_close(logps.jvp(twin.weights, part)[1], expected, **EXACT)
    assert not logps.jvp(twin.weights, {})[1].any()
    few = {name: twin.weights[name] for name in part}
    torch.testing.assert_close(logps.jvp(few, part)[1], expected, **EXACT)
    for name, gradient in logps.gradient(few, torch.ones(logps.n_tokens)).items():
        at = twin.names.index(name)
        start = sum(twin.weights[n].numel() for n in twin.names[:at])
        mine = twin.jacobian[:, start : start + gradient.numel()].sum(dim=0)
        torch.testing.assert_close(gradient.flatten(), mine, **EXACT)


@pytest.mark.parametrize("batch_tokens", [1, 25, 4096])
def test_tokens_come_in_the_order_of_the_responses(twins, batch_tokens):
    twin = twins["llama_untied"]
    order = [4, 0, 5, 2, 1, 3]
    logps = ResponseLogps(twin.model, [RESPONSES[i] for i in order], batch_tokens=batch_tokens)
    by_response = twin.values.split([len(response.response_ids) for response in RESPONSES])
    torch.testing.assert_close(logps.values(twin.weights), torch.cat([by_response[i] for i in order]), **EXACT)
    assert logps.owner.tolist() == [k for k, i in enumerate(order) for _ in by_response[i]]
    assert logps.n_tokens == len(twin.values)
    some = logps.subset([RESPONSES[3], RESPONSES[1]])
    torch.testing.assert_close(some.values(twin.weights), torch.cat([by_response[3], by_response[1]]), **EXACT)


def test_batches_without_weight_are_not_run(twins):
    twin = twins["llama_tied"]
    logps = twin.logps(batch_tokens=1, share_prompts=False)
    token_weights = (logps.owner == 4).double()
    with mock.patch.object(derivatives, "_label_logps", wraps=derivatives._label_logps) as run:
        gradient = logps.gradient(twin.weights, token_weights)
        assert run.call_count == 1
        nothing = logps.gradient(twin.weights, torch.zeros(logps.n_tokens))
        assert run.call_count == 1
    torch.testing.assert_close(twin.flat(gradient), token_weights @ twin.jacobian, **EXACT)
    assert not twin.flat(nothing).any()


# ---- models as trainers have them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tied", "lora"])
def test_a_model_with_trls_head_and_checkpointing_gives_the_same(twins, name):
    twin = Twin(name)
    base = twin.model.get_base_model() if name == "lora" else twin.model
    add_fused_lm_head(base)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    logps = twin.logps()
    torch.testing.assert_close(logps.values(twin.weights), twin.values, **EXACT)
    change = logps.jvp(twin.weights, twin.direction)[1]
    torch.testing.assert_close(change, twin.jacobian @ twin.flat(twin.direction), rtol=1e-9, atol=1e-9)
    gradient = logps.gradient(twin.weights, torch.ones(logps.n_tokens))
    torch.testing.assert_close(twin.flat(gradient), twin.jacobian.sum(dim=0), **EXACT)
    assert base.is_gradient_checkpointing


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_weights_are_computed_in_float32(autocast):
    model = build("llama_untied", dtype=torch.bfloat16)
    low = dict(model.named_parameters())
    high = {name: parameter.detach().float() for name, parameter in low.items()}
    reference = copy.deepcopy(model).float()
    direction = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for name, p in high.items()}
    logps, exact = ResponseLogps(model, RESPONSES), ResponseLogps(reference, RESPONSES)
    some = {name: direction[name] for name in list(direction)[3:6]}
    ones = torch.ones(logps.n_tokens)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        for weights in (low, high, {name: low[name] for name in some}):
            values = logps.values(weights)
            assert values.dtype == torch.float32
            torch.testing.assert_close(values, exact.values(high), rtol=1e-5, atol=1e-5)
            distributions = (one.distributions(at, torch.arange(4)) for one, at in ((logps, weights), (exact, high)))
            torch.testing.assert_close(*distributions)
            change = logps.jvp(weights, some)[1]
            torch.testing.assert_close(change, exact.jvp(high, some)[1], rtol=1e-4, atol=1e-3)
        name, gradient = next(iter(logps.gradient(low, ones).items()))
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, exact.gradient(high, ones)[name], rtol=1e-3, atol=1e-3)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())


# ---- what is left behind ---------------------------------------------------------------------------------------------


def state_of(model):
    """Everything that a call must leave alone."""
    return {
        "modes": [module.training for module in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone().tolist() for p in model.parameters()],
        "tensors": [id(parameter) for parameter in model.parameters()],
        "weights": [parameter.detach().clone().tolist() for parameter in model.parameters()],
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "random": torch.get_rng_state().tolist(),
        "grad_mode": torch.is_grad_enabled(),
    }


@pytest.fixture
def odd_model():
    """A model in no plain state: mixed modes, frozen and graded parameters, an attention kernel without derivatives."""
    model = build("llama_tied", dtype=torch.float64).train()
    model.model.layers[0].eval()
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k % 3 != 1)
        parameter.grad = torch.full_like(parameter, 2.0) if k % 2 else None
    return model


def calls(logps, model):
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    direction = {n: torch.ones_like(p) for n, p in weights.items()}
    tokens = torch.tensor([0, 2])
    return {
        "values": lambda: logps.values(weights),
        "jvp": lambda: logps.jvp(weights, direction),
        "gradient": lambda: logps.gradient(weights, torch.ones(logps.n_tokens)),
        "distributions": lambda: logps.distributions(weights, tokens),
        "jvp_distributions": lambda: logps.jvp_distributions(weights, direction, tokens),
    }


@pytest.mark.parametrize("call", ["values", "jvp", "gradient", "distributions", "jvp_distributions"])
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
def test_a_call_leaves_everything_as_it_was(odd_model, call, fails):
    logps = ResponseLogps(odd_model, RESPONSES)
    # a fused kernel cannot run here: that the calls below run at all shows that another stood in for it
    odd_model.config._attn_implementation_internal = "flash_attention_2"
    seen = []

    def hook(module, args, output):
        seen.append((module.training, odd_model.config._attn_implementation))
        torch.rand(1)
        if fails:
            raise ZeroDivisionError

    before = state_of(odd_model)
    handle = odd_model.model.layers[1].mlp.register_forward_hook(hook)
    function = calls(logps, odd_model)[call]
    if fails:
        with pytest.raises(ZeroDivisionError):
            function()
    else:
        function()
    handle.remove()
    assert set(seen) == {(False, "sdpa")}
    assert state_of(odd_model) == before


def test_no_responses_are_refused():
    with pytest.raises(ValueError, match="no responses given"):
        ResponseLogps(build("llama_tied"), [])


def test_a_parameter_that_no_log_prob_depends_on_has_a_gradient_of_zero():
    model = build("llama_tied", dtype=torch.float64)
    model.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    response = SimpleNamespace(prompt_ids=(4,), response_ids=(5, VOCAB - 1))
    gradient = ResponseLogps(model, [response]).gradient(dict(model.named_parameters()), torch.ones(2))
    assert torch.equal(gradient["extra"], torch.zeros(3, dtype=torch.float64))
    assert gradient["model.norm.weight"].any()


def test_gradients_that_share_memory_are_told_apart():
    shared, base = torch.ones(2, 3), torch.arange(6.0).view(2, 3)
    given = [shared, shared, None, torch.ones(()).expand(4), base[0], base[1], base.T]
    own = unshared(given)
    values = [None if tensor is None else tensor.clone() for tensor in given]
    for k, tensor in enumerate(own):
        if tensor is not None:
            tensor.add_(k + 1)
    assert own[2] is None
    assert all(torch.equal(own[k], value + k + 1) for k, value in enumerate(values) if value is not None)
