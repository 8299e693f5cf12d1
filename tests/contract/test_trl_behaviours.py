"""What TRL's trainers do around a step (evaluate, stop early, load the best model, log) is the same when watched."""

import pytest

from tests.contract.trl_behaviours import QUICK, compare
from tests.training import save_tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), dropout=0.1))


@pytest.mark.parametrize("case", QUICK)
def test_a_watched_run_behaves_as_the_run_alone(case, model_folder):
    assert compare(case, model_folder) == "same"
