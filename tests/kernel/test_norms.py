"""Norms of kernel blocks and their proxies against whole Jacobians, in float64; estimators statistically."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llm_dynamics.kernel.exact_norms import exact_block_norms
from llm_dynamics.kernel.norms import relative_stability, response_block_norms, token_block_norms
from llm_dynamics.kernel.proxies import kernel_proxies, squared_residual_norm, squared_softmax_norm
from tests.kernel.whole_jacobians import (
    SMALL_VOCAB,
    blocks,
    build_small,
    draw_responses,
    labels_of,
    logits_at_responses,
)
from tests.likelihood.models import build, without_float32_casts

EXACT = {"atol": 1e-11, "rtol": 1e-10}
PROBES = draw_responses([2, 3], seed=1)
TRAINS = draw_responses([3, 1], seed=2)


@pytest.fixture(autouse=True)
def all_in_float64():
    with without_float32_casts():
        yield


@pytest.fixture(scope="module")
def tied_blocks():
    with without_float32_casts():
        return blocks(build_small(tied=True), PROBES, TRAINS)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def trace_and_square(kernel):
    return kernel.diagonal(dim1=2, dim2=3).sum(-1), kernel.square().sum((2, 3))


def assert_equals_blocks(norms, kernel):
    trace, square = trace_and_square(kernel)
    torch.testing.assert_close(norms.trace, trace, **EXACT)
    torch.testing.assert_close(norms.squared_norm, square, **EXACT)
    torch.testing.assert_close(norms.norm, square.sqrt(), **EXACT)
    assert not norms.squared_norm_error.any()
    assert not norms.norm_error.any()
    assert norms.draws == 0


@pytest.mark.parametrize("bias", [False, True])
def test_exact_norms_are_those_of_the_brute_force_block(bias):
    model = build_small(bias=bias)
    assert_equals_blocks(exact_block_norms(model, PROBES, TRAINS), blocks(model, PROBES, TRAINS))


def test_exact_norms_follow_what_is_differentiated_and_where():
    model = build_small()
    lower = {name: p for name, p in model.named_parameters() if "layers" in name}
    assert_equals_blocks(
        exact_block_norms(model, PROBES, TRAINS, weights=lower), blocks(model, PROBES, TRAINS, list(lower.values()))
    )
    moved = build_small(seed=8)  # other weights than the model's own
    norms = exact_block_norms(model, PROBES, TRAINS, weights=dict(moved.named_parameters()))
    assert_equals_blocks(norms, blocks(moved, PROBES, TRAINS))


def test_exact_norms_of_adapters_under_a_tied_head():
    model = build_small(tied=True)
    config = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).double().eval()
    adapters = [p for p in adapted.parameters() if p.requires_grad]
    assert_equals_blocks(exact_block_norms(adapted, PROBES, TRAINS), blocks(adapted, PROBES, TRAINS, adapters))


def test_exact_norms_carry_the_logit_scale():
    model = build("granite_divided")
    probe, train = draw_responses([1], seed=1), draw_responses([1], seed=2)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    weights = {"lm_head.weight": model.lm_head.weight}
    norms = exact_block_norms(model, probe, train, weights=weights)
    trace, square = trace_and_square(blocks(model, probe, train, [model.lm_head.weight]))
    torch.testing.assert_close(norms.trace, trace.double(), atol=0, rtol=1e-4)
    torch.testing.assert_close(norms.squared_norm, square.double(), atol=0, rtol=1e-4)


@pytest.mark.parametrize(("probes", "trains"), [(PROBES, TRAINS), (TRAINS, PROBES)], ids=["more", "fewer"])
def test_one_draw_is_the_products_with_one_sign_vector(probes, trains, tied_blocks):
    kernel = tied_blocks if probes is PROBES else tied_blocks.permute(1, 0, 3, 2)
    norms = token_block_norms(build_small(tied=True), probes, trains, draws=1, generator=seeded(4))
    assert norms.squared_norm.shape == kernel.shape[:2]
    assert norms.norm_error.isnan().all()
    generator = seeded(4)
    # TRAINS has fewer tokens: its side draws, whatever its role
    for t in range(4):
        e = (2 * torch.randint(2, (1, SMALL_VOCAB), generator=generator) - 1)[0].double()
        for p in range(5):
            product = tied_blocks[p, t] @ e
            at = (p, t) if probes is PROBES else (t, p)
            assert norms.squared_norm[at].item() == pytest.approx(product.square().sum().item(), rel=1e-10)
            assert norms.trace[at].item() == pytest.approx((e @ product).item(), rel=1e-9, abs=1e-9)


def test_estimates_lie_within_their_errors(tied_blocks):
    model = build_small(tied=True)
    few, many = (token_block_norms(model, PROBES, TRAINS[1:], draws=draws, generator=seeded(0)) for draws in (16, 144))
    trace, square = trace_and_square(tied_blocks[:, 3:])
    for estimate in (few, many):
        assert ((estimate.trace - trace).abs() < 4 * estimate.trace_error).all()
        assert ((estimate.squared_norm - square).abs() < 4 * estimate.squared_norm_error).all()
        assert ((estimate.norm - square.sqrt()).abs() < 4 * estimate.norm_error).all()
    # nine times the draws, a third of the error; the errors are estimates themselves
    assert 0.2 < (many.squared_norm_error / few.squared_norm_error).mean() < 0.5
    assert 0.2 < (many.trace_error / few.trace_error).mean() < 0.5


def test_the_error_falls_with_the_root_of_the_draws(tied_blocks):
    model, generator = build_small(tied=True), seeded(0)
    trace, square = trace_and_square(tied_blocks[:, 3:])

    def spread(draws, repeats):
        estimates = [
            token_block_norms(model, PROBES, TRAINS[1:], draws=draws, generator=generator) for _ in range(repeats)
        ]
        return [
            ((torch.stack(values) - true) / true.abs().mean()).square().mean().sqrt().item()
            for values, true in (([e.squared_norm for e in estimates], square), ([e.trace for e in estimates], trace))
        ]

    for one, nine in zip(spread(1, 40), spread(9, 12), strict=True):
        assert 0.15 < nine / one < 0.6  # a third, as far as so few repeats tell


def test_the_standard_error_is_that_of_the_draws(tied_blocks):
    model = build_small(tied=True)
    generator = seeded(0)
    singles = [token_block_norms(model, PROBES, TRAINS[1:], draws=1, generator=generator) for _ in range(5)]
    together = token_block_norms(model, PROBES, TRAINS[1:], draws=5, generator=seeded(0))
    samples = torch.stack([single.squared_norm for single in singles])
    torch.testing.assert_close(together.squared_norm, samples.mean(0), **EXACT)
    torch.testing.assert_close(together.squared_norm_error, samples.std(0) / 5**0.5, **EXACT)
    torch.testing.assert_close(together.norm_error, samples.std(0) / 5**0.5 / (2 * samples.mean(0).sqrt()), **EXACT)


@pytest.mark.parametrize("swap", [False, True])
def test_norms_of_whole_responses_sum_their_tokens_blocks(tied_blocks, swap):
    model = build_small(tied=True)
    tokens = trace_and_square(tied_blocks)[1]
    expected = torch.stack([rows.sum(0) for rows in tokens.split([2, 3])])
    expected = torch.stack([columns.sum(1) for columns in expected.split([3, 1], dim=1)], dim=1)  # (2, 2)
    probes, trains = (TRAINS, PROBES) if swap else (PROBES, TRAINS)
    expected = expected.T if swap else expected
    one = response_block_norms(model, probes[:1], trains, draws=40, generator=seeded(0))
    assert one.squared_norm.shape == (1, 2)  # one probe, two training responses: the probe's side draws
    assert ((one.squared_norm - expected[:1]).abs() < 4 * one.squared_norm_error).all()
    both = response_block_norms(model, probes, trains, draws=40, generator=seeded(0))
    assert ((both.squared_norm - expected).abs() < 4 * both.squared_norm_error).all()
    assert (both.squared_norm_error < 0.5 * expected).all()
    assert both.trace is None


def test_estimators_leave_the_model_and_the_random_state_alone():
    model = build_small(tied=True, dtype=torch.float32).train()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    first = token_block_norms(model, PROBES, TRAINS, draws=2)
    again = token_block_norms(model, PROBES, TRAINS, draws=2)
    assert torch.equal(first.squared_norm, again.squared_norm)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training


def test_batches_and_sequences_past_the_rotary_limit_do_not_change_an_estimate():
    model = build("dynamic_rope")
    probes, trains = draw_responses([2, 20, 3], seed=1), draw_responses([2], seed=2)
    together = token_block_norms(model, probes, trains, draws=2)
    alone = [token_block_norms(model, [probe], trains, draws=2) for probe in probes]
    torch.testing.assert_close(
        together.squared_norm[:2], alone[0].squared_norm, atol=0, rtol=1e-3
    )  # the second probe is past the limit
    model = build_small(tied=True)
    one, many = (token_block_norms(model, PROBES, TRAINS, draws=2, batch_tokens=size) for size in (1, 10_000))
    torch.testing.assert_close(one.squared_norm, many.squared_norm, **EXACT)


def ranks_by_definition(column):
    return [1 + sum(b < a for b in column) + (sum(b == a for b in column) - 1) / 2 for a in column]


def test_relative_stability_is_spearmans_correlation_of_each_column():
    before = torch.tensor([[1.0, 5.0, 2.0], [2.0, 3.0, 2.0], [7.0, 1.0, 2.0], [9.0, 3.0, 2.0]])
    after = torch.tensor([[10.0, 1.0, 1.0], [11.0, 2.0, 2.0], [30.0, 2.0, 3.0], [90.0, 7.0, 4.0]])
    stability = relative_stability(before, after)
    assert stability[0].item() == pytest.approx(1.0, rel=1e-12)
    assert stability[2].isnan()
    ranks = torch.tensor([ranks_by_definition(side[:, 1].tolist()) for side in (before, after)])
    assert ranks.tolist() == [[4, 2.5, 1, 2.5], [1, 2.5, 2.5, 4]]
    assert stability[1].item() == pytest.approx(torch.corrcoef(ranks)[0, 1].item(), rel=1e-6)
    assert relative_stability(before[:, :1], -before[:, :1]).item() == pytest.approx(-1.0, rel=1e-12)
    assert stability.dtype == torch.float64


def test_norms_of_projection_and_residual_are_those_of_the_written_out_matrices():
    logp = torch.randn(4, 9, generator=seeded(1), dtype=torch.float64).mul(2).log_softmax(-1)
    labels = torch.tensor([0, 8, 3, 3])
    for n in range(4):
        a = torch.eye(9, dtype=torch.float64) - logp[n].exp().expand(9, 9)
        assert squared_softmax_norm(logp)[n].item() == pytest.approx(a.square().sum().item(), rel=1e-10)
        spectral = 9 * logp[n].exp().square().sum()
        assert spectral.item() == pytest.approx(torch.linalg.matrix_norm(a, 2).square().item(), rel=1e-10)
        g = torch.eye(9, dtype=torch.float64)[labels[n]] - logp[n].exp()
        assert squared_residual_norm(logp, labels)[n].item() == pytest.approx(g.square().sum().item(), rel=1e-10)


def step(model, responses, coefficients, eta):
    """A copy of the model after one plain gradient step on sum_l c_l log pi(y_l)."""
    after = copy.deepcopy(model)
    logp = logits_at_responses(after, responses).log_softmax(-1).gather(1, labels_of(responses)[:, None])[:, 0]
    gradients = torch.autograd.grad((coefficients * logp).sum(), list(after.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(after.parameters(), gradients, strict=True):
            parameter -= eta * gradient
    return after


@pytest.mark.parametrize("coefficients", [None, [-0.5, 2.0, -1.0, 0.25]], ids=["sft", "given"])
def test_the_proxies_are_their_definitions_and_bound_the_norm(tied_blocks, coefficients):
    eta, c = 1e-6, torch.tensor(coefficients or [-1.0] * 4, dtype=torch.float64)
    model = build_small(tied=True)
    after = step(model, TRAINS, c, eta)
    given = None if coefficients is None else c
    proxies = kernel_proxies(model, after, PROBES, TRAINS, coefficients=given)
    with torch.no_grad():
        old, new, trained = (
            logits_at_responses(m, responses).log_softmax(-1)
            for m, responses in ((model, PROBES), (after, PROBES), (model, TRAINS))
        )
    onehot = torch.nn.functional.one_hot(labels_of(TRAINS), SMALL_VOCAB)
    energy = (c[:, None] * (onehot - trained.exp())).square().sum()
    for p, part in enumerate((slice(0, 2), slice(2, 5))):
        delta, pi = (new - old)[part], old[part].exp()
        a = torch.eye(SMALL_VOCAB, dtype=torch.float64) - pi[:, None, :]
        assert proxies.sign_delta[p].item() == pytest.approx(delta.mean().item(), rel=1e-6)
        expected = delta.square().sum() / (a.square().sum() * energy)
        assert proxies.lbk[p].item() == pytest.approx(expected.item(), rel=1e-6)
        largest = torch.linalg.matrix_norm(a, 2).square().max()
        assert proxies.spectral_lbk[p].item() == pytest.approx(
            (delta.square().sum() / (largest * energy)).item(), rel=1e-6
        )
        square = tied_blocks[part].square().sum().item()
        assert proxies.lbk[p] < proxies.spectral_lbk[p] < eta**2 * square


def test_a_step_along_one_direction_makes_the_spectral_bound_tight():
    """One token and the head alone: K = (h.h') I, and nothing is lost but what A takes from g."""
    model = build_small()
    probe, train = draw_responses([1], seed=1), draw_responses([1], seed=2)
    model.model.requires_grad_(False)
    kernel = blocks(model, probe, train, [model.lm_head.weight])[0, 0]
    after = copy.deepcopy(model)
    logp = logits_at_responses(after, train).log_softmax(-1)[0, train[0].response_ids[0]]
    (gradient,) = torch.autograd.grad(-logp, [after.lm_head.weight])
    eta = 1e-6
    with torch.no_grad():
        after.lm_head.weight -= eta * gradient
    proxies = kernel_proxies(model, after, probe, train)
    # ||K||_F^2 = V ||K||_2^2 here: a factor V is the Frobenius norm's own
    ratio = (proxies.spectral_lbk * SMALL_VOCAB / (eta**2 * kernel.square().sum())).item()
    assert 0.1 < ratio < 1


def test_bad_input_is_refused_by_name():
    model = build_small()
    with pytest.raises(ValueError, match="draws is 0"):
        token_block_norms(model, PROBES, TRAINS, draws=0)
    with pytest.raises(ValueError, match="no responses given"):
        response_block_norms(model, PROBES, [])
    with pytest.raises(ValueError, match="requires a gradient"):
        exact_block_norms(build_small().requires_grad_(False), PROBES, TRAINS)
    with pytest.raises(NotImplementedError, match="tied to the input embeddings"):
        exact_block_norms(build_small(tied=True), PROBES, TRAINS)
    with pytest.raises(NotImplementedError, match="soft-capped"):
        exact_block_norms(build("gemma2_soft_capped"), PROBES, TRAINS)
    with pytest.raises(ValueError, match=r"P >= 2 observed responses; seen \(1, 3\)"):
        relative_stability(torch.ones(1, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"coefficients must be \(L,\), one for each of 4 training tokens"):
        kernel_proxies(model, model, PROBES, TRAINS, coefficients=torch.ones(3))
    with pytest.raises(ValueError, match="not all zero"):
        kernel_proxies(model, model, PROBES, TRAINS, coefficients=torch.zeros(4))
    with pytest.raises(ValueError, match="13 and 101 logits"):
        kernel_proxies(model, build("llama_tied"), PROBES, TRAINS)
