"""The account of whole next-token distributions."""

import pytest
import torch

from llm_dynamics.influence import DistributionAccount, account_for_change, account_for_distribution
from llm_dynamics.kernel.derivatives import ResponseLogps
from tests.influence.steps import in_float64, run_steps
from tests.likelihood.models import make_responses, plain_logps
from tests.training import save_tiny_model

TOKENS = torch.tensor([7, 0, 12, 3])


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A DPO step in float64, as (probes, before, after, parts, labels at TOKENS)."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    recorder = run_steps("dpo", folder, tmp_path_factory.mktemp("dpo"), max_steps=2, weight_decay=0.1)
    taken = recorder.steps[-1]
    responses = make_responses(prompts=2, families=3, longest=8)
    with in_float64():
        logps = ResponseLogps(recorder.trainer.model, responses)
    labels = torch.tensor([label for response in responses for label in response.response_ids])[TOKENS]
    return logps, taken.before, taken.after, taken.update.parts, labels


def account(step, rule="midpoint"):
    logps, before, after, parts, _ = step
    with in_float64():
        return account_for_distribution(logps, TOKENS, before, after, parts, rule=rule)


def test_the_distributions_are_the_models_own(step):
    logps, before, _, _, _ = step
    model = logps.model
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        model.load_state_dict(before, strict=False)
        with in_float64():
            responses = make_responses(prompts=2, families=3, longest=8)
            expected = torch.cat([plain_logps(model.eval(), response) for response in responses])[TOKENS]
            torch.testing.assert_close(account(step).logp_before, expected, rtol=1e-9, atol=1e-12)
    finally:
        model.load_state_dict(weights, strict=False)


@pytest.mark.parametrize("rule", ["start", "midpoint", "gauss2"])
def test_the_column_of_the_label_is_the_account_of_the_token(step, rule):
    logps, before, after, parts, labels = step
    distribution = account(step, rule)
    with in_float64():
        tokens = account_for_change(logps, before, after, parts, rule=rule)
    column = labels[:, None]
    torch.testing.assert_close(distribution.measured.gather(1, column)[:, 0], tokens.measured[TOKENS])
    assert set(distribution.shares) == set(tokens.shares)
    for cause, share in tokens.shares.items():
        ours = distribution.shares[cause].gather(1, column)[:, 0]
        torch.testing.assert_close(ours, share[TOKENS], rtol=1e-9, atol=1e-13)


def test_no_mass_is_made_or_lost(step):
    distribution = account(step, "start")
    p = distribution.logp_before.exp()
    assert distribution.measured_mass.sum(dim=1).abs().max() <= 1e-12
    assert distribution.measured_mass.abs().max() > 1e-3
    for cause, share in distribution.shares.items():
        # to first order each cause by itself moves mass between tokens, sum_v pi(v) d log pi(v) = 0
        assert (p * share).sum(dim=1).abs().max() <= 1e-12, cause


def test_the_accounted_change_approaches_the_measured_one(step):
    gaps = []
    for rule in ("start", "midpoint", "gauss2"):
        distribution = account(step, rule)
        gap = distribution.accounted_mass - distribution.measured_mass
        gaps.append(float(gap.norm() / distribution.measured_mass.norm()))
        difference = distribution.accounted - distribution.measured
        assert difference.norm() <= gaps[-1] * 10 * distribution.measured.norm()
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2]
    assert gaps[2] <= 1e-4


def test_the_accounted_mass_of_gauss2_sums_to_nothing(step):
    assert account(step, "gauss2").accounted_mass.sum(dim=1).abs().max() <= 1e-5


def test_movers_are_the_tokens_that_moved_most_mass():
    before = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
    after = torch.tensor([[0.2, 0.35, 0.45], [0.1, 0.2, 0.7]], dtype=torch.float64)
    measured = after.log() - before.log()
    made = DistributionAccount(before.log(), measured, {"up": 0.75 * measured, "down": 0.25 * measured})
    table = made.movers(lambda ids: f"<{ids[0]}>", top=2)
    assert list(table.columns) == [
        "place", "token_id", "token", "p_before", "measured_mass", "accounted_mass", "measured", "up", "down",
    ]  # fmt: skip
    assert table["place"].tolist() == [0, 0, 1, 1]
    assert table["token_id"].tolist()[:2] == [0, 2]
    assert set(table["token_id"].tolist()[2:]) == {1, 2}
    assert table["token"].tolist()[0] == "<0>"
    row = table.iloc[1]
    assert row["p_before"] == pytest.approx(0.2)
    assert row["measured_mass"] == pytest.approx(0.25)
    assert row["accounted_mass"] == pytest.approx(0.25)
    assert row["up"] + row["down"] == pytest.approx(row["measured"])
    assert len(made.movers(str, top=10)) == 6  # no more than there are tokens


@pytest.mark.parametrize("tokens", [[3, 3], [-1], [10_000]])
def test_tokens_that_repeat_or_are_none_are_refused(step, tokens):
    logps, before, after, parts, _ = step
    with in_float64(), pytest.raises(ValueError, match=r"tokens must be distinct indices in 0\.\."):
        account_for_distribution(logps, torch.tensor(tokens), before, after, parts)
