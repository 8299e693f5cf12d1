"""Options are checked by their declared types: what is accepted trains, what is refused is named."""

import math
from dataclasses import MISSING, fields

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from llm_dynamics import load_run
from llm_dynamics.callbacks import WatchConfig, watch
from llm_dynamics.callbacks.displacement import DisplacementOptions
from llm_dynamics.callbacks.influence_settings import InfluenceSettings
from llm_dynamics.callbacks.probe_options import ProbeOptions
from llm_dynamics.influence import by_sign
from llm_dynamics.options import check_options, checked
from llm_dynamics.probes import ProbeSet
from llm_dynamics.trainers.nthr import NTHRConfig
from tests.conftest import PREFERENCES
from tests.training import build_trainer, make_probes, save_tiny_model


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no words")


HOSTILE = [
    0, 1, 2, -1, 10**400, 1.5, 3.0, 0.0, 1e-300, 1e300, math.nan, math.inf, -math.inf, True, False, None, "", "5",
    "auto", "sign", "nan", b"1", [], [1], ["chosen"], ("chosen",), {}, {"every": 3}, set(), object(), Unprintable(),
    int, 1j, np.int64(3), np.float32(0.5), np.float64("nan"), np.bool_(True),
    np.array([1, 2]), np.array(3), range(3),
]  # fmt: skip
CONFIGS = [ProbeOptions, InfluenceSettings, DisplacementOptions, WatchConfig]


def refusal(make, name, value):
    """What `make(name=value)` is refused with, None where it is accepted."""
    try:
        make(**{name: value})
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_refuses_by_name_or_accepts(config):
    for item in fields(config):
        refused = [refusal(config, item.name, value) for value in HOSTILE]
        assert all(item.name in message for message in refused if message is not None), item.name
        assert sum(message is not None for message in refused) > len(HOSTILE) / 2, f"{item.name} takes nearly anything"


def test_the_fields_of_nthr_refuse_by_name(tmp_path):
    def make(**given):
        return NTHRConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, num_iterations=2, **given)

    for name in NTHRConfig.__annotations__:
        refused = [refusal(make, name, value) for value in HOSTILE]
        assert all(name in message for message in refused if message is not None), name
        assert sum(message is not None for message in refused) > len(HOSTILE) / 2, f"{name} takes nearly anything"


@pytest.mark.parametrize("config", [*CONFIGS, NTHRConfig])
def test_defaults_are_allowed(config, tmp_path):
    check_options(config() if config is not NTHRConfig else NTHRConfig(str(tmp_path), bf16=False, use_cpu=True), config)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


ACCEPTED = {
    config: {
        item.name: [value for value in HOSTILE if refusal(config, item.name, value) is None]
        for item in fields(config)
        if item.default is not MISSING
        and item.name not in ("log_folder", "families", "training_tokens", "map_probes", "split_by")
    }
    for config in (ProbeOptions, InfluenceSettings)
}


def drawn(config):
    """A strategy of arguments of which each is accepted."""
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in ACCEPTED[config].items() if values})


@settings(
    max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(options=drawn(ProbeOptions), influence=drawn(InfluenceSettings), explained=st.booleans())
def test_what_is_accepted_trains(options, influence, explained, model_folder, tmp_path_factory):
    trainer = build_trainer("dpo", model_folder, tmp_path_factory.mktemp("run"), max_steps=2)
    callback = watch(trainer, make_probes(2), influence=influence if explained else False, **options)
    trainer.train()
    assert load_run(callback.log_folder).sequences["logp_sum"].notna().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens is 0; allowed: 1, 2, ..."),
        ({"squeeze_strength": math.inf}, "squeeze_strength is inf; allowed: a finite number above 0"),
        ({"max_overhead": math.inf}, "max_overhead is inf; allowed: a finite number above 0 or None"),
        ({"token_budget_mb": math.nan}, "token_budget_mb is nan; allowed: a finite number from 0"),
        ({"token_budget_mb": "200"}, "token_budget_mb is '200'"),
        ({"seed": [1]}, r"seed is \[1\]; allowed: 0, 1, ..."),
        ({"influence": 5}, "influence is 5; allowed: True, False or a mapping"),
        ({"displacement": 5}, "displacement is 5; allowed: True, False or a mapping"),
        ({"influence": {"split_by": 5}}, "split_by is 5; allowed: 'sign', 'role' or a function"),
        ({"influence": {"families": "chosen"}}, "families is 'chosen'; allowed: a list of texts or None"),
        ({"tracker_tables": "yes"}, "tracker_tables is 'yes'; allowed: True, False"),
        ({"tokens": 1}, "tokens is 1; allowed: True, False"),
    ],
)
def test_watch_refuses_what_would_die_in_training(arguments, message, model_folder, tmp_path):
    trainer = build_trainer("sft", model_folder, tmp_path)
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match=message):
        watch(trainer, make_probes(1), **arguments)
    assert trainer.callback_handler.callbacks == before


@pytest.mark.parametrize("bad", [1.5, "3", 0, True, [1], math.nan])
def test_probe_sets_name_a_bad_number_of_prompts(bad):
    for build in (
        lambda **given: ProbeSet.from_preference_dataset(PREFERENCES, **given),
        ProbeSet.from_preference_dataset(PREFERENCES).select,
    ):
        with pytest.raises(ValueError, match=r"n_prompts is .*allowed: 1, 2, ... or None"):
            build(n_prompts=bad)
    if bad != 0:
        with pytest.raises(ValueError, match=r"seed is .*allowed: a whole number$"):
            ProbeSet.from_preference_dataset(PREFERENCES, seed=bad)


def test_numbers_of_numpy_become_pythons_own():
    options = ProbeOptions(every=np.int64(3), max_overhead=np.float32(0.5), tokens=np.bool_(False), token_budget_mb=2)
    seen = (options.every, options.max_overhead, options.tokens, options.token_budget_mb)
    assert seen == (3, 0.5, False, 2.0)
    assert [type(value) for value in seen] == [int, float, bool, float]
    assert len(ProbeSet.from_preference_dataset(PREFERENCES, n_prompts=np.int64(3)).prompt_ids) == 3


def test_a_function_may_split_the_tokens():
    assert InfluenceSettings(split_by=by_sign).split_by is by_sign
    assert checked("x", float | None, None) is None
