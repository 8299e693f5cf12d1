"""The account under the optimizers that `TrainingArguments.optim` names, known and unknown."""

import pytest

from tests.callbacks.explained import by_family, explain, measured, observed_change, short_probes
from tests.training import save_tiny_model

RATES = {
    "sgd": 0.05,
    "rmsprop": 2e-4,
    "adamw_torch": 1e-3,
    "adamw_torch_fused": 1e-3,
    "adagrad": 1e-3,
    "adafactor": 1e-3,
}
"""Learning rates at which two steps move the probes by tenths of nats."""
NAMES = {"sgd": "SGD", "rmsprop": "RMSprop", "adamw_torch": "AdamW", "adamw_torch_fused": "AdamW", "adagrad": "Adagrad"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def train(model_folder, tmp_path):
    def run(optim):
        probes = short_probes(2, families=("chosen", "rejected"))
        arguments = {"optim": optim, "learning_rate": RATES[optim], "weight_decay": 0.1}
        return explain("dpo", model_folder, tmp_path, probes=probes, **arguments)[1]

    return run


def assert_balanced(run):
    shares, change = by_family(run), measured(run)
    assert (shares.groupby(["step", "family"]).sum() - change).abs().max() <= 1e-9
    assert (change - observed_change(run)).abs().max() < 2e-4
    assert change.abs().max() > 0.05
    assert (run.accounts["explained"] > 0.999).all()
    return shares


@pytest.mark.parametrize("optim", ["sgd", "rmsprop", "adamw_torch", "adamw_torch_fused"])
def test_a_known_optimizer_is_split_into_causes_that_add_up(optim, train):
    run = train(optim)
    shares = assert_balanced(run)
    causes = {"up", "down", "other", "decay", "rounding", "remainder"}
    has_moment = optim.startswith("adamw")
    assert set(shares[2].index.get_level_values("cause")) == causes | ({"momentum"} if has_moment else set())
    assert shares[:, :, "rounding"].abs().max() < 1e-4  # else a cause was read off wrongly
    assert shares[:, :, "up"].abs().min() > 1e-3
    assert list(run.accounts["optimizer"]) == [NAMES[optim]] * 2
    assert run.accounts["note"].isna().all()
    summed = run.training_tokens.groupby(["step", "target"])["share"].sum()
    both = shares[:, :, "up"] + shares[:, :, "down"]
    assert (summed - both.rename_axis(["step", "target"])).abs().max() < 1e-3


@pytest.mark.parametrize("optim", ["adagrad", "adafactor"])
def test_an_optimizer_that_is_not_known_has_its_step_as_one_cause_and_a_note(optim, train):
    run = train(optim)
    shares = assert_balanced(run)
    assert set(shares.index.get_level_values("cause")) == {"step", "remainder"}
    assert run.accounts["note"].str.contains(r"is not known: its whole update is one cause, `step`").all()
    assert (run.accounts["note"].str.split().str[0] == run.accounts["optimizer"]).all()
    assert run.influence["own_share"].isna().all()
    for table in ("training_tokens", "training_examples", "influence_maps"):
        assert len(getattr(run, table)) == 0
