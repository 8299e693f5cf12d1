"""Watching by configuration: what is refused, what is built, what is attached."""

import dataclasses

import pytest
from trl import TrlParser

from llm_dynamics import ProbeCallback, WatchConfig
from llm_dynamics.callbacks import DisplacementCallback, InfluenceCallback
from tests.conftest import PREFERENCES
from tests.training import build_trainer, make_probes, save_tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def attached(trainer, kind):
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind)]


def test_every_field_is_a_flag_with_help():
    for field in dataclasses.fields(WatchConfig):
        assert field.name.startswith("watch_")
        assert len(field.metadata["help"]) > 20
    (config,) = TrlParser((WatchConfig,)).parse_args_and_config(
        [
            "--watch_families",
            "chosen",
            "random",
            "--no_watch_tokens",
            "--watch_max_overhead",
            "0.2",
            "--watch_influence",
        ]
    )
    assert config == WatchConfig(
        watch_families=["chosen", "random"], watch_tokens=False, watch_max_overhead=0.2, watch_influence=True
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"watch_families": ["chosen", "argmax"]}, "watch_families.*argmax"),
        ({"watch_families": []}, "watch_families.*known"),
        ({"watch_prompts": 0}, "watch_prompts is 0; allowed: 1"),
        ({"watch_every": -1}, r"watch_every is -1; allowed: 0, 1"),
        ({"watch_influence": True, "watch_influence_every": 0}, "watch_influence_every is 0; allowed"),
        ({"watch_influence_every": 5}, "watch_influence_every is 5 and watch_influence is False"),
        ({"watch_token_budget_mb": -1.0}, "watch_token_budget_mb is -1.0; allowed"),
        ({"watch_token_budget_mb": float("nan")}, "watch_token_budget_mb is nan; allowed"),
        ({"watch_max_overhead": 0.0}, "watch_max_overhead is 0.0; allowed"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(given, message):
    with pytest.raises(ValueError, match=message):
        WatchConfig(**given)


def test_nothing_is_attached_where_watching_is_off(model_folder, tmp_path, tokenizer):
    trainer = build_trainer("dpo", model_folder, tmp_path)
    before = list(trainer.callback_handler.callbacks)
    assert WatchConfig(watch_every=0, watch_probes="missing").attach(trainer, PREFERENCES, tokenizer) is None
    assert trainer.callback_handler.callbacks == before


def test_arguments_reach_the_callbacks(model_folder, tmp_path, tokenizer):
    trainer = build_trainer("dpo", model_folder, tmp_path)
    config = WatchConfig(
        watch_every=3,
        watch_prompts=2,
        watch_influence=True,
        watch_influence_every=6,
        watch_max_overhead=0.5,
        watch_log_folder=str(tmp_path / "log"),
    )
    callback = config.attach(trainer, PREFERENCES, tokenizer)
    assert attached(trainer, ProbeCallback) == [callback]
    assert (callback.every, callback.options.max_overhead, callback.log_folder) == (3, 0.5, tmp_path / "log")
    assert len(callback.probes.prompt_ids) == 2
    (influence,) = attached(trainer, InfluenceCallback)
    assert influence.settings.every == 6


def test_influence_by_default_is_four_times_rarer(model_folder, tmp_path, tokenizer):
    trainer = build_trainer("dpo", model_folder, tmp_path)
    WatchConfig(watch_every=2, watch_influence=True).attach(trainer, PREFERENCES, tokenizer)
    (influence,) = attached(trainer, InfluenceCallback)
    assert influence.settings.every == 8


def test_displacement_is_for_trainers_that_roll_out(model_folder, tmp_path, tokenizer):
    config = WatchConfig(watch_displacement=True)
    trainer = build_trainer("grpo", model_folder, tmp_path)
    config.attach(trainer, PREFERENCES, tokenizer)
    assert attached(trainer, DisplacementCallback)
    with pytest.raises(TypeError, match="roll out"):
        config.attach(build_trainer("sft", model_folder, tmp_path), PREFERENCES, tokenizer)


def test_a_saved_probe_set_is_watched_as_it_is(model_folder, tmp_path, tokenizer):
    saved = make_probes(2).save(tmp_path / "probes.parquet")
    trainer = build_trainer("sft", model_folder, tmp_path)
    callback = WatchConfig(watch_probes=str(saved), watch_prompts=1).attach(trainer, PREFERENCES, tokenizer)
    assert callback.probes == make_probes(2)
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet"):
        WatchConfig(watch_probes=str(tmp_path / "gone.parquet")).attach(trainer, PREFERENCES, tokenizer)


# ---- building ---------------------------------------------------------------------------------------------------


def test_offline_families_are_built_beside_the_pair(tokenizer):
    families = ["rejected", "chosen", "random_tokens", "other_train", "other_test"]
    config = WatchConfig(watch_families=families, watch_prompts=100)
    probes = config.build_probes(PREFERENCES[:4], tokenizer, held_out=PREFERENCES[4:])
    assert set(probes.families) == set(families)
    assert len(probes.prompt_ids) == 4
    held_out = {row["chosen"].strip() for row in PREFERENCES[4:]}
    assert {probe.response.strip() for probe in probes if probe.family == "other_test"} <= held_out


def test_prompts_are_drawn_from_rows_that_have_every_text(tokenizer):
    rows = [dict(row, human_random="The sea is blue." if i in (1, 4) else None) for i, row in enumerate(PREFERENCES)]
    config = WatchConfig(watch_families=["chosen", "human_random", "other_train"])
    probes = config.build_probes(rows, tokenizer)
    assert {probe.prompt for probe in probes} == {rows[1]["prompt"], rows[4]["prompt"]}
    drawn = {probe.response.strip() for probe in probes if probe.family == "other_train"}
    assert drawn <= {row["chosen"].strip() for row in rows}


def test_the_chosen_response_need_not_be_watched_itself(tokenizer):
    probes = WatchConfig(watch_families=["ungrammatical"]).build_probes(PREFERENCES, tokenizer)
    assert probes.families == ("ungrammatical",)


def test_completions_are_watched_without_rejected_with_a_word(tokenizer, caplog):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PREFERENCES]
    probes = WatchConfig(watch_prompts=3).build_probes(rows, tokenizer)
    assert set(probes.families) == {"chosen", "other_train", "ungrammatical"}
    assert "no 'rejected' column" in caplog.text
    with pytest.raises(ValueError, match="no 'rejected' column"):
        WatchConfig(watch_families=["rejected"]).build_probes(rows, tokenizer)


def test_a_family_that_the_rows_lack_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="chosen_semantic"):
        WatchConfig(watch_families=["chosen", "chosen_semantic"]).build_probes(PREFERENCES, tokenizer)


def test_the_same_seed_draws_the_same_probes(tokenizer):
    config = WatchConfig(watch_prompts=3)
    assert config.build_probes(PREFERENCES, tokenizer) == config.build_probes(list(PREFERENCES), tokenizer)
    other = dataclasses.replace(config, watch_seed=5).build_probes(PREFERENCES, tokenizer)
    assert other != config.build_probes(PREFERENCES, tokenizer)
