"""The account of a step: its order, its two modes, its linearity, and its edges."""

import math
from itertools import pairwise

import pytest
import torch

from llm_dynamics.influence import (
    RULES,
    StepAccount,
    account_for_change,
    accounted_change,
    explained_share,
    inner_products,
    measured_change,
    path_gradient,
)
from llm_dynamics.kernel.derivatives import ResponseLogps
from tests.influence.steps import in_float64, run_steps
from tests.likelihood.models import build, make_responses, without_float32_casts
from tests.training import save_tiny_model

RUNS = {
    "sft": {"max_steps": 2},
    "dpo": {"max_steps": 2, "weight_decay": 0.1},
    "grpo": {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "beta": 0.1},
}
ORDERS = {"start": 2, "midpoint": 3, "gauss2": 5}
SCALES = (1 / 16, 1 / 8, 1 / 4)


class Case:
    """A step of a real trainer in float64, and probes of the model that took it."""

    def __init__(self, kind, folder, output_dir):
        recorder = run_steps(kind, folder, output_dir, **RUNS[kind])
        step = recorder.steps[-1]
        self.before, self.after, self.parts = step.before, step.after, step.update.parts
        with in_float64():
            self.logps = ResponseLogps(recorder.trainer.model, make_responses(prompts=2, families=3, longest=8))

    def scaled(self, factor):
        return {n: self.before[n] + factor * (self.after[n] - self.before[n]) for n in self.before}

    def account(self, **options):
        with in_float64():
            return account_for_change(self.logps, self.before, self.after, self.parts, **options)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    return {kind: Case(kind, folder, tmp_path_factory.mktemp(kind)) for kind in RUNS}


@pytest.fixture(scope="module")
def dpo(cases):
    return cases["dpo"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", RUNS)
def test_the_remainder_falls_with_the_order_of_the_rule(cases, kind, rule):
    """Along the update of a real step, made larger and smaller: |remainder| ~ size^order."""
    case = cases[kind]
    points = []
    with in_float64():
        for scale in SCALES:
            after = case.scaled(scale)
            measured = measured_change(case.logps, case.before, after)
            remainder = measured - accounted_change(case.logps, case.before, after, rule=rule)
            points.append((math.log(scale), math.log(float(remainder.norm()))))
    for (x1, y1), (x2, y2) in pairwise(points):
        assert (y2 - y1) / (x2 - x1) == pytest.approx(ORDERS[rule], abs=0.2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", RUNS)
def test_the_account_of_a_step_adds_up(cases, kind, rule):
    case = cases[kind]
    account = case.account(rule=rule)
    assert set(account.shares) == set(case.parts)
    with in_float64():
        whole = accounted_change(case.logps, case.before, case.after, rule=rule)
        values = case.logps.values(case.after) - case.logps.values(case.before)
    torch.testing.assert_close(account.accounted, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(account.measured, values, rtol=0, atol=0)
    torch.testing.assert_close(account.accounted + account.remainder, account.measured, rtol=1e-12, atol=1e-15)
    assert account.explained == explained_share(account.measured, account.accounted)
    assert account.explained > {"start": 0.95, "midpoint": 0.9999, "gauss2": 0.99999999}[rule]


def test_a_share_is_the_path_integral_by_central_differences(dpo):
    """<grad log pi(theta_t), u> at the midpoint, by a difference quotient of the values."""
    account = dpo.account(rule="midpoint")
    middle = dpo.scaled(0.5)
    for cause, part in dpo.parts.items():
        if cause == "rounding":
            continue
        step = 1e-3
        moved = [{n: middle[n] + sign * step * part.get(n, 0.0) for n in middle} for sign in (-1, 1)]
        with in_float64():
            low, high = (dpo.logps.values(weights) for weights in moved)
        torch.testing.assert_close(account.shares[cause], (high - low) / (2 * step), rtol=1e-4, atol=1e-8)


@pytest.fixture(scope="module")
def groups(dpo):
    """Sums over tokens with weights: all, one token, a difference, and nothing."""
    n = dpo.logps.n_tokens
    return torch.stack([torch.ones(n), torch.eye(n)[3], torch.linspace(-1, 1, n), torch.zeros(n)], dim=0).double()


@pytest.mark.parametrize("rule", RULES)
def test_forward_and_reverse_mode_agree(dpo, groups, rule):
    by_token, by_group = dpo.account(rule=rule), dpo.account(rule=rule, groups=groups)
    torch.testing.assert_close(by_group.measured, groups @ by_token.measured, rtol=1e-12, atol=1e-14)
    for cause, shares in by_token.shares.items():
        torch.testing.assert_close(by_group.shares[cause], groups @ shares, rtol=1e-9, atol=1e-13)
    assert not by_group.accounted[3]


@pytest.mark.parametrize("rule", RULES)
def test_the_path_gradient_gives_the_shares(dpo, groups, rule):
    account = dpo.account(rule=rule, groups=groups[2:3])
    with in_float64():
        gradient = path_gradient(dpo.logps, dpo.before, dpo.after, groups[2], rule=rule)
    for cause, product in inner_products(gradient, dpo.parts).items():
        assert product == pytest.approx(float(account.shares[cause][0]), rel=1e-9, abs=1e-14)


def test_shares_are_linear_in_the_parts(dpo):
    up, down = dpo.parts["up"], dpo.parts["down"]
    mixed = {"mixed": {n: 2 * up[n] - 3 * down[n] for n in up}, "up": up, "down": down}
    with in_float64():
        shares = account_for_change(dpo.logps, dpo.before, dpo.after, mixed).shares
    torch.testing.assert_close(shares["mixed"], 2 * shares["up"] - 3 * shares["down"], rtol=1e-9, atol=1e-12)
    assert shares["up"].abs().max() > 1e-3
    assert shares["down"].abs().max() > 1e-3


def test_a_part_of_some_parameters_counts_for_these_alone(dpo):
    name = next(iter(dpo.before))
    one, others = ({n: v for n, v in dpo.parts["up"].items() if (n == name) == ours} for ours in (True, False))
    with in_float64():
        shares = account_for_change(dpo.logps, dpo.before, dpo.after, {"one": one, "others": others}).shares
    torch.testing.assert_close(shares["one"] + shares["others"], dpo.account().shares["up"], rtol=1e-9, atol=1e-12)


def test_a_change_measured_already_is_taken(dpo):
    known = torch.arange(dpo.logps.n_tokens, dtype=torch.float64)
    assert torch.equal(dpo.account(measured=known).measured, known)


def test_the_step_of_bfloat16_weights_is_measured_and_accounted_in_float32():
    """In bfloat16 the noise of the forwards would be larger than what a step does."""
    torch.manual_seed(0)
    model = build("llama_untied", dtype=torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    after = {name: value + (0.01 * torch.randn_like(value)) for name, value in before.items()}
    part = {name: after[name].float() - value.float() for name, value in before.items()}
    account = account_for_change(ResponseLogps(model, make_responses()), before, after, {"step": part}, rule="gauss2")
    assert account.explained > 0.9999


def test_rules_integrate_polynomials_up_to_their_degree():
    for rule, degree in (("start", 0), ("midpoint", 1), ("gauss2", 3)):
        for k in range(degree + 2):
            exact = sum(weight * node**k for node, weight in RULES[rule]) == pytest.approx(1 / (k + 1), abs=1e-12)
            assert exact == (k <= degree)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.account(rule="simpson"),
        lambda c: accounted_change(c.logps, c.before, c.after, rule="simpson"),
        lambda c: path_gradient(c.logps, c.before, c.after, torch.ones(c.logps.n_tokens), rule="simpson"),
    ],
    ids=["account", "accounted_change", "path_gradient"],
)
def test_a_rule_that_is_not_known_is_refused_by_name(dpo, call):
    with pytest.raises(ValueError, match="rule is 'simpson'; allowed: start, midpoint, gauss2"):
        call(dpo)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 2, 3)])
def test_groups_of_the_wrong_shape_are_refused(dpo, shape):
    with pytest.raises(ValueError, match=rf"groups must be \(G, N\) with N = {dpo.logps.n_tokens}"):
        dpo.account(groups=torch.ones(shape))


@pytest.mark.parametrize(
    ("measured", "accounted", "explained"),
    [
        ([3.0, 4.0], [3.0, 4.0], 1.0),
        ([3.0, 4.0], [0.0, 0.0], 0.0),
        ([3.0, 4.0], [-3.0, -4.0], -3.0),
        ([0.0, 0.0], [0.0, 0.0], math.nan),
        ([0.0, 0.0], [1e-30, 0.0], math.nan),
        ([], [], math.nan),
        ([math.nan, 1.0], [0.0, 1.0], math.nan),
        ([1.0, 1.0], [math.inf, 1.0], -math.inf),
    ],
)
def test_the_explained_share_at_its_edges(measured, accounted, explained):
    share = explained_share(torch.tensor(measured).double(), torch.tensor(accounted).double())
    assert share == pytest.approx(explained, nan_ok=True)
    account = StepAccount({"cause": torch.tensor(accounted).double()}, torch.tensor(measured).double())
    assert account.explained == pytest.approx(explained, nan_ok=True)


def test_accounting_leaves_the_model_as_it_was(dpo):
    model = dpo.logps.model
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    state = torch.get_rng_state()
    dpo.account(rule="gauss2")
    with without_float32_casts():
        dpo.account(groups=torch.ones(1, dpo.logps.n_tokens))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
