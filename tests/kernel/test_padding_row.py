"""The padding token's embedding: log-probs depend on it wherever the token stands in a text; training leaves it out."""

from types import SimpleNamespace

import pytest
import torch

from llm_dynamics.kernel import (
    exact_block_norms,
    predict_from_kernel,
    pseudo_kernel,
    response_block_norms,
    token_block_norms,
    token_kernel,
)
from llm_dynamics.kernel.token_states import TokenStates, trainable_weights, units_of
from tests.kernel.brute_force import brute_force, in_float64, jacobian, learning, trainable
from tests.kernel.whole_jacobians import SMALL_VOCAB, blocks, build_small, jacobians, logits_at_responses
from tests.likelihood.models import build

EXACT = 1e-9


def text(prompt, response):
    return SimpleNamespace(prompt_ids=prompt, response_ids=response)


PAD = 0
TRAIN = [text((5, PAD, 3), (7, 4, PAD, 9)), text((4, 2, 8), (6, 5))]
PROBES = [text((PAD, 6), (3, PAD, 8)), TRAIN[0], text((9, 4), (PAD, 5, 7))]  # one response on both sides
COEFFICIENTS = torch.tensor([-0.3, 0.2, -0.5, 0.1, -0.4, 0.6])


@pytest.fixture(autouse=True)
def _float64():
    with in_float64():
        yield


def model_of(kind):
    model = build_small(tied=kind.startswith("tied"))
    assert model.get_input_embeddings().padding_idx == PAD, "the model has no padding row: these tests see nothing"
    if kind.endswith("none"):
        model.get_input_embeddings().padding_idx = None
    return filled(model)


def filled(model):
    """As of a pretrained model, whose padding token ends turns: torch begins the row with zeros."""
    row = model.get_input_embeddings().weight.data[PAD]
    row.copy_(0.3 * torch.randn(row.shape, generator=torch.Generator().manual_seed(1)))
    return model


KINDS = ["tied", "untied", "tied none", "untied none"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_step_on_texts_with_padding_tokens_moves_probes_as_the_kernel_says(kind):
    model = model_of(kind)
    kernel = token_kernel(model, TRAIN, PROBES)

    def logps(responses):
        labels = torch.tensor([token for r in responses for token in r.response_ids])
        return logits_at_responses(model, responses).log_softmax(1).gather(1, labels[:, None])[:, 0]

    parameters = [p for p in model.parameters() if p.requires_grad]
    start = logps(PROBES).detach()
    gradients = torch.autograd.grad(logps(TRAIN) @ COEFFICIENTS.double(), parameters)
    gaps = []
    for lr in (1e-4, 1e-5, 1e-6):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=lr)
            moved = logps(PROBES) - start
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=lr)
        predicted = predict_from_kernel(kernel, lr, COEFFICIENTS)
        gaps.append(float((moved - predicted).norm() / predicted.norm()))
    assert gaps[0] < 0.05
    assert gaps[1] == pytest.approx(gaps[0] / 10, rel=0.1)  # the gap is of the order of the learning rate
    assert gaps[2] == pytest.approx(gaps[0] / 100, rel=0.1)


@pytest.mark.parametrize("contraction", ["gram", "materialise"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_the_probes_derivative_times_the_gradient_of_training(kind, contraction):
    model = model_of(kind)
    with learning(model):
        derivative = jacobian(model, PROBES, trainable(model))
    twin = derivative @ jacobian(model, TRAIN, trainable(model)).T
    for budget in (2048, 0.3):  # either side is kept, whole or in blocks
        values = token_kernel(model, TRAIN, PROBES, contraction=contraction, memory_budget_mb=budget).values
        assert (values - twin).abs().max() <= EXACT * twin.abs().max()
    swapped = token_kernel(model, PROBES, TRAIN, contraction=contraction).values
    with learning(model):
        derivative = jacobian(model, TRAIN, trainable(model))
    twin = derivative @ jacobian(model, PROBES, trainable(model)).T
    assert (swapped - twin).abs().max() <= EXACT * twin.abs().max()


@pytest.mark.parametrize("name", ["gemma2_soft_capped", "gpt2_conv1d"])
def test_scaled_embeddings_and_tables_of_their_own_forward_have_the_row_too(name):
    model = filled(build(name, dtype=torch.float64))
    model.get_input_embeddings().padding_idx = 7
    with learning(model):
        derivative = jacobian(model, PROBES, trainable(model))
    twin = derivative @ jacobian(model, TRAIN, trainable(model)).T
    assert (twin - brute_force(model, TRAIN, PROBES)).abs().max() > 1e-5 * twin.abs().max()
    assert (token_kernel(model, TRAIN, PROBES).values - twin).abs().max() <= EXACT * twin.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_with_itself_is_symmetric_where_training_has_the_whole_derivative(kind):
    model = model_of(kind)
    values = token_kernel(model, PROBES, PROBES).values
    gap = (values - values.T).abs().max() / values.abs().max()
    assert gap > 1e-3 if kind == "tied" else gap <= EXACT
    pseudo = pseudo_kernel(model, PROBES, PROBES)  # a Gram matrix of outputs, whatever training leaves out
    assert (pseudo - pseudo.T).abs().max() <= EXACT * pseudo.abs().max()
    assert torch.linalg.eigvalsh(pseudo).min() >= -EXACT * pseudo.abs().max()
    plain = [text((5, 6, 3), (7, 4, 9)), text((4, 2, 8), (6, 5))]
    values = token_kernel(model, plain, plain).values
    assert (values - values.T).abs().max() <= EXACT * values.abs().max()


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize(("probes", "trains"), [(PROBES, TRAIN), (TRAIN, PROBES)], ids=["fewer", "more"])
def test_pseudo_kernels_do_not_depend_on_which_side_is_larger(kind, probes, trains):
    model = model_of(kind)
    with learning(model):
        parameters = list(model.parameters())
        scaled = [logits_at_responses(model, side).sum(1) / SMALL_VOCAB**0.5 for side in (probes, trains)]
        twin = jacobians(scaled[0], parameters) @ jacobians(scaled[1], parameters).T
    with pytest.warns(UserWarning, match="cannot see"):
        values = pseudo_kernel(model, probes, trains, output="sum")
    assert (values - twin).abs().max() <= EXACT * twin.abs().max()


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize(("probes", "trains"), [(PROBES[:1], TRAIN), (TRAIN, PROBES[:1])], ids=["fewer", "more"])
def test_norms_are_of_the_block_that_a_step_acts_through(kind, probes, trains):
    model = model_of(kind)
    with learning(model):
        j_m = jacobians(logits_at_responses(model, probes), list(model.parameters()))
    j_l = jacobians(logits_at_responses(model, trains), list(model.parameters()))
    k = torch.einsum("mvp,lwp->mlvw", j_m, j_l)
    squares = k.square().sum((2, 3))
    if kind == "untied":
        exact = exact_block_norms(model, probes, trains)
        assert (exact.squared_norm - squares).abs().max() <= EXACT * squares.max()
        return
    assert ((blocks(model, probes, trains) - k).abs().max() / k.abs().max()) > 1e-3
    # one draw e, the same as the estimator's: ||K e||^2 (or ||K^T e||^2, which has the same mean) itself
    e = 2 * torch.randint(2, (1, SMALL_VOCAB), generator=torch.Generator().manual_seed(3)) - 1
    one = token_block_norms(model, probes[:1], trains[:1], draws=1, generator=torch.Generator().manual_seed(3))
    swapped = len(probes[0].response_ids) < len(trains[0].response_ids)
    place = one.squared_norm[:1, 0] if not swapped else one.squared_norm[0, :1]
    first = k[0, 0].double()
    product = e[0].double() @ first if swapped else first @ e[0].double()
    assert float(place[0]) == pytest.approx(float(product.square().sum()), rel=EXACT)
    estimate = response_block_norms(model, probes, trains, draws=64)
    total = torch.zeros(len(probes), len(trains), dtype=torch.float64)
    owners = [torch.tensor([i for i, r in enumerate(side) for _ in r.response_ids]) for side in (probes, trains)]
    for m, l in torch.cartesian_prod(torch.arange(k.shape[0]), torch.arange(k.shape[1])).tolist():  # noqa: E741
        total[owners[0][m], owners[1][l]] += squares[m, l]
    assert ((estimate.squared_norm - total).abs() <= 5 * estimate.squared_norm_error).all()


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_and_directional_derivatives_of_states_agree_on_the_row(trained):
    model = model_of("tied")
    states = TokenStates(model, PROBES)
    weights = trainable_weights(model, None)
    direction = {name: torch.randn(value.shape, dtype=value.dtype) for name, value in weights.items()}
    along = states.jvp(weights, direction, lambda h: h.sum(1), lambda t: t[:, None], trained=trained)[:, 0]
    for number, (response, place) in enumerate(units_of(states)):
        gradient = states.gradient(weights, response, lambda h, place=place: h[place].sum(), trained=trained)
        product = sum((gradient[name] * direction[name]).sum() for name in gradient)
        assert float(product) == pytest.approx(float(along[number]), rel=EXACT, abs=1e-12)
