"""What a watched run observes, reports and writes."""

import json
import logging
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainerCallback

from llm_dynamics.callbacks import watch
from llm_dynamics.callbacks.token_budget import BYTES_PER_PART, BYTES_PER_TOKEN_ROW
from llm_dynamics.probes import ProbeSet
from llm_dynamics.runlog import RunLogError, load_run
from tests.training import FAMILIES, TIMED_COLUMNS, build_trainer, make_probes, plain_sums, save_tiny_model

FLOAT32 = 1e-5
"""Relative error of a sum of float32 log-probs."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dropout_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("dropout_model"), dropout=0.2)


@pytest.fixture(autouse=True)
def our_warnings(caplog):
    caplog.set_level(logging.WARNING, logger="llm_dynamics")


def train(kind, model_folder, output_dir, *, every=2, options=None, probes=None, **arguments):
    """A finished watched run: trainer, callback and run log."""
    trainer = build_trainer(kind, model_folder, output_dir, **arguments)
    callback = watch(trainer, probes or make_probes(), every=every, **(options or {}))
    trainer.train()
    return trainer, callback, load_run(output_dir)


@pytest.fixture(scope="module")
def sft(model_folder, tmp_path_factory):
    """Five steps of SFT, observed every two."""
    return train("sft", model_folder, tmp_path_factory.mktemp("sft"), max_steps=5)


@pytest.fixture(scope="module")
def dpo(model_folder, tmp_path_factory):
    """Two steps of DPO, observed at its start and end."""
    return train("dpo", model_folder, tmp_path_factory.mktemp("dpo"), max_steps=2)


def rows_with(trainer, key):
    rows = sorted(trainer.state.log_history, key=lambda row: row["step"])  # held rows stand after the trainer's first
    return {row["step"]: row for row in rows if key in row}


# ---- when -------------------------------------------------------------------------------------------------------


def test_observes_at_the_start_every_n_steps_and_at_the_end(sft):
    _, _, run = sft
    assert run.observed_steps == [0, 2, 4, 5]
    for frame in (run.steps, run.sequences, run.tokens):
        assert sorted(set(frame["step"])) == [0, 2, 4, 5]
    assert run.meta["finished_at_step"] == 5


def test_an_end_that_is_a_multiple_is_observed_once(dpo):
    trainer, _, run = dpo
    assert run.observed_steps == [0, 2]
    assert len([row for row in trainer.state.log_history if "probe/margin" in row]) == 2


def test_a_run_shorter_than_the_interval_is_observed_at_both_ends(model_folder, tmp_path):
    _, _, run = train("sft", model_folder, tmp_path, every=100, max_steps=2)
    assert run.observed_steps == [0, 2]


def test_every_observation_has_every_probe_once_in_the_order_of_the_set(sft):
    _, callback, run = sft
    expected = [probe.probe_id for probe in callback.probes]
    assert list(run.probes["probe_id"]) == expected
    for _, rows in run.sequences.groupby("step"):
        assert list(rows["probe_id"]) == expected
    lengths = run.probes.set_index("probe_id")["response_ids"].map(len)
    for (_, probe), rows in run.tokens.groupby(["step", "probe_id"]):
        assert list(rows["position"]) == list(range(lengths[probe]))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("stopped_at", [3, 4])
def test_the_end_of_a_run_that_another_callback_stops_is_observed(stopped_at, model_folder, tmp_path):
    trainer, _, run = train("sft", model_folder, tmp_path, max_steps=6, callbacks=[StopAt(stopped_at)])
    assert run.observed_steps == sorted({0, 2, stopped_at, stopped_at // 2 * 2})
    assert run.meta["finished_at_step"] == stopped_at
    assert list(rows_with(trainer, "probe/margin")) == run.observed_steps
    assert list(rows_with(trainer, "loss")) == list(range(1, stopped_at + 1))


def test_a_second_training_moves_the_first_log_aside_and_starts_its_own(model_folder, tmp_path, caplog):
    trainer, _, first = train("sft", model_folder, tmp_path, max_steps=2, every=1)
    before = first.sequences
    trainer.train()
    assert f"moved to {tmp_path / 'dynamics_before_001'}" in caplog.text
    moved, second = load_run(tmp_path / "dynamics_before_001"), load_run(tmp_path)
    pd.testing.assert_frame_equal(moved.sequences, before)
    assert second.observed_steps == [0, 1, 2]
    start = second.sequences[second.sequences["step"] == 0].reset_index(drop=True)
    end = before[before["step"] == 2].reset_index(drop=True)
    pd.testing.assert_frame_equal(start.drop(columns="step"), end.drop(columns="step"))
    assert second.steps["probe/chosen_delta"][0] == 0.0  # counted from its own start


# ---- what the trainer's rows say --------------------------------------------------------------------------------


def test_no_loss_row_is_swallowed(sft, dpo):
    assert list(rows_with(sft[0], "loss")) == [1, 2, 3, 4, 5]
    assert list(rows_with(dpo[0], "loss")) == [1, 2]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_metrics_stand_in_the_loss_row_of_their_step(kind, request):
    trainer, _, run = request.getfixturevalue(kind)
    observed = rows_with(trainer, "probe/chosen_logp")
    assert list(observed) == run.observed_steps
    for step in run.observed_steps[1:]:
        assert "loss" in observed[step]
        assert "dynamics/overhead" in observed[step]


def test_metrics_of_the_start_have_a_row_of_their_own_after_the_trainers_first(sft):
    first = sft[0].state.log_history[1]
    assert first["step"] == 0
    assert "loss" not in first
    assert "dynamics/overhead" not in first  # nothing was trained yet
    assert first["probe/chosen_delta"] == 0.0


def test_a_plain_trainer_gets_rows_of_our_own_and_keeps_its_loss_rows(model_folder, tmp_path):
    trainer, _, run = train("plain", model_folder, tmp_path, max_steps=3)
    observed = rows_with(trainer, "probe/chosen_logp")
    assert list(observed) == run.observed_steps == [0, 2, 3]
    assert not any("loss" in row for row in observed.values())
    assert list(rows_with(trainer, "loss")) == [1, 2, 3]


def test_every_observation_is_logged_at_its_own_step_however_sparse_the_trainers_rows(model_folder, tmp_path):
    trainer, _, run = train("sft", model_folder, tmp_path, every=2, max_steps=5, logging_steps=4)
    rows = rows_with(trainer, "probe/chosen_logp")
    assert list(rows) == run.observed_steps == [0, 2, 4, 5]
    assert [row["probe/chosen_logp"] for row in rows.values()] == run.steps["probe/chosen_logp"].tolist()
    assert list(rows_with(trainer, "loss")) == [4]
    assert "loss" in rows[4]  # beside the loss, not in a second row


def test_a_trainer_that_logs_nothing_gets_no_rows(model_folder, tmp_path):
    trainer, _, run = train("sft", model_folder, tmp_path, every=2, max_steps=2, logging_strategy="no")
    assert not rows_with(trainer, "probe/chosen_logp")
    assert run.observed_steps == [0, 2]


def test_grpos_template_arguments_reach_the_probes(model_folder, tmp_path):
    template = "{{ style | default('') }}{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    rows = [
        {
            "prompt": [{"role": "user", "content": "How?"}],
            "chosen": [{"role": "assistant", "content": "Like this."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
    ]
    trainer = build_trainer("grpo", model_folder, tmp_path, chat_template_kwargs={"style": "briefly"})
    trainer.processing_class.chat_template = template
    callback = watch(trainer, ProbeSet.from_preference_dataset(rows))
    assert trainer.processing_class.decode(callback.encoded[0].prompt_ids) == "brieflyHow?|"


def test_metrics_are_those_of_the_run_log_and_finite_floats(sft):
    trainer, _, run = sft
    steps = run.steps.set_index("step")
    for step, row in rows_with(trainer, "probe/chosen_logp").items():
        ours = {key: row[key] for key in row if key.startswith(("probe/", "squeeze/"))}
        assert len(ours) == 2 * len(FAMILIES) + 3 + 10
        assert all(type(value) is float and math.isfinite(value) for value in ours.values())
        assert ours == {key: steps[key][step] for key in ours}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_reported_numbers_are_those_of_the_final_model_scored_one_row_at_a_time(kind, request, model_folder):
    trainer, callback, run = request.getfixturevalue(kind)
    sums, greedy = plain_sums(model_folder, callback.encoded, trainer)
    start, _ = plain_sums(model_folder, callback.encoded)
    plain = pd.DataFrame({"sum": sums, "greedy": greedy, "delta": np.subtract(sums, start)})
    plain[["prompt", "family"]] = [(probe.prompt_id, probe.family) for probe in callback.probes]
    last = run.observed_steps[-1]
    final = run.sequences[run.sequences["step"] == last]
    np.testing.assert_allclose(final["logp_sum"], plain["sum"], rtol=FLOAT32)
    np.testing.assert_allclose(final["argmax_logp_sum"], plain["greedy"], rtol=FLOAT32)

    row = rows_with(trainer, "probe/chosen_logp")[last]
    for family, rows in plain.groupby("family"):
        assert row[f"probe/{family}_logp"] == pytest.approx(rows["sum"].mean(), rel=FLOAT32)
        assert row[f"probe/{family}_delta"] == pytest.approx(rows["delta"].mean(), abs=1e-3)
    chosen = plain[plain["family"] == "chosen"].set_index("prompt")
    rejected = plain[plain["family"] == "rejected"].set_index("prompt")
    assert row["probe/argmax_logp"] == pytest.approx(chosen["greedy"].mean(), rel=FLOAT32)
    assert row["probe/margin"] == pytest.approx((chosen["sum"] - rejected["sum"]).mean(), abs=1e-3)
    assert abs(row["probe/chosen_delta"]) > 0.1  # the model did move


def test_token_rows_add_up_to_the_sequence_rows(sft):
    _, _, run = sft
    keys = ["step", "probe_id"]
    summed = run.tokens.groupby(keys)[["logp", "entropy", "greedy_logp", "rank"]].sum()
    whole = run.sequences.set_index(keys)[["logp_sum", "entropy_sum", "argmax_logp_sum", "rank_sum"]]
    np.testing.assert_allclose(summed.loc[whole.index], whole, rtol=FLOAT32)


def test_step_rows_carry_the_trainers_last_loss_row_and_the_cost(sft):
    trainer, _, run = sft
    steps, losses = run.steps.set_index("step"), rows_with(trainer, "loss")
    assert steps[["loss", "grad_norm", "learning_rate", "overhead"]].loc[0].isna().all()
    assert steps["loss"][4] == losses[3]["loss"]
    assert (steps["seconds_observing"] > 0).all()
    assert (steps["overhead"][1:] > 0).all()
    assert (steps["seconds_training"] >= 0).all()


# ---- the reference ----------------------------------------------------------------------------------------------


def test_the_reference_of_an_adapter_is_the_base_model_at_every_step(model_folder, tmp_path):
    trainer = build_trainer("sft", model_folder, tmp_path, lora=True, max_steps=2)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # an adapter that was trained before: not the base model at step 0 either
            torch.nn.init.constant_(parameter, 0.05)
    callback = watch(trainer, make_probes(), every=1)
    trainer.train()
    run = load_run(tmp_path)
    base, _ = plain_sums(model_folder, callback.encoded)
    for _, rows in run.sequences.groupby("step"):
        np.testing.assert_allclose(rows["ref_logp_sum"], base, rtol=FLOAT32)
        assert np.abs(rows["logp_sum"] - rows["ref_logp_sum"]).max() > 0.1
    summed = run.tokens.groupby(["step", "probe_id"])["ref_logp"].sum()
    whole = run.sequences.set_index(["step", "probe_id"])["ref_logp_sum"]
    np.testing.assert_allclose(summed.loc[whole.index], whole, rtol=FLOAT32)


def test_the_reference_of_full_dpo_is_the_trainers_own(dpo, model_folder):
    _, callback, run = dpo
    reference, _ = plain_sums(model_folder, callback.encoded)
    for _, rows in run.sequences.groupby("step"):
        np.testing.assert_allclose(rows["ref_logp_sum"], reference, rtol=FLOAT32)


def test_without_a_reference_its_columns_are_null(sft):
    _, _, run = sft
    assert run.sequences["ref_logp_sum"].isna().all()
    assert run.tokens["ref_logp"].isna().all()


def test_a_reference_that_is_not_wanted_is_not_scored(model_folder, tmp_path):
    _, _, run = train("sft", model_folder, tmp_path, lora=True, max_steps=1, options={"reference": "none"})
    assert run.sequences["ref_logp_sum"].isna().all()


# ---- budgets ----------------------------------------------------------------------------------------------------


def test_max_overhead_skips_observations_but_the_first_and_last_and_says_so(model_folder, tmp_path, caplog):
    trainer, _, run = train("sft", model_folder, tmp_path, every=1, max_steps=4, options={"max_overhead": 1e-9})
    assert run.observed_steps == [0, 4]
    assert list(rows_with(trainer, "probe/margin")) == [0, 4]
    assert run.meta["max_overhead"] == 1e-9
    assert run.meta["skipped_steps"] == [1, 2, 3]
    said = [record.message for record in caplog.records if "max_overhead=1e-09" in record.message]
    assert [message.split(":")[0] for message in said] == [f"no observation at step {step}" for step in (1, 2, 3)]


def test_a_generous_max_overhead_skips_nothing(model_folder, tmp_path, caplog):
    _, _, run = train("sft", model_folder, tmp_path, every=1, max_steps=3, options={"max_overhead": 1e9})
    assert run.observed_steps == [0, 1, 2, 3]
    assert "skipped_steps" not in run.meta
    assert "max_overhead" not in caplog.text


def budget_for(rows, *, observations):
    """Megabytes that hold so many token rows at each of so many observations."""
    return observations * (BYTES_PER_PART + rows * BYTES_PER_TOKEN_ROW) / 1e6


def token_bytes(folder):
    return sum(part.stat().st_size for part in (folder / "dynamics" / "tokens").iterdir())


def test_a_small_token_budget_keeps_whole_prompts_and_the_tables_stay_within(model_folder, tmp_path, caplog):
    probes = make_probes(6, families=("chosen", "rejected"))
    options = {"token_budget_mb": budget_for(150, observations=4)}  # a prompt has about fifty token rows
    _, _, run = train("sft", model_folder, tmp_path, every=1, probes=probes, options=options, max_steps=2)
    kept = run.meta["token_probes"]
    prompts = {probe.split("/")[0] for probe in kept}
    assert 0 < len(prompts) < 6
    assert set(kept) == {probe.probe_id for probe in probes if probe.prompt_id in prompts}
    assert f"{len(kept)} probes keep their tokens" in caplog.text
    for _, rows in run.tokens.groupby("step"):
        assert set(rows["probe_id"]) == set(kept)
    assert sorted(set(run.tokens["step"])) == [0, 1, 2]
    assert len(run.sequences) == 3 * len(probes)  # sequences keep all
    assert token_bytes(tmp_path) <= options["token_budget_mb"] * 1e6


def test_a_run_made_longer_on_resuming_stays_within_its_token_budget_and_says_where_tokens_end(
    model_folder, tmp_path, caplog
):
    probes = make_probes(4, families=("chosen", "rejected"))
    saving = {"save_strategy": "steps", "save_steps": 2}
    options = {"token_budget_mb": budget_for(250, observations=4)}  # all fit the four observations that were planned
    train("sft", model_folder, tmp_path, every=1, probes=probes, options=options, max_steps=2, **saving)
    assert load_run(tmp_path).meta["token_probes"] == "all"
    trainer = build_trainer("sft", model_folder, tmp_path, max_steps=10)
    watch(trainer, probes, every=1, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    run = load_run(tmp_path)
    assert run.observed_steps == list(range(11))
    with_tokens = sorted(set(run.tokens["step"]))
    assert with_tokens == list(range(len(with_tokens)))
    assert run.meta["tokens_end_at_step"] == len(with_tokens) < 11
    assert "is used up" in caplog.text
    assert token_bytes(tmp_path) <= options["token_budget_mb"] * 1e6


@pytest.mark.parametrize("options", [{"tokens": False}, {"token_budget_mb": 0}], ids=["tokens", "budget"])
def test_without_tokens_the_rest_is_written_all_the_same(options, model_folder, tmp_path):
    _, _, run = train("sft", model_folder, tmp_path, max_steps=2, options=options)
    assert len(run.tokens) == 0
    assert token_bytes(tmp_path) == 0
    assert run.meta["token_probes"] == []
    assert run.observed_steps == [0, 2]
    assert len(run.sequences) == 2 * len(run.probes)


# ---- what breaks ------------------------------------------------------------------------------------------------


class BreakTheWeights(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                model.get_input_embeddings().weight.fill_(math.nan)


def test_a_broken_model_is_counted_and_has_no_mean_in_the_trainers_row(model_folder, tmp_path, caplog):
    trainer, _, run = train("sft", model_folder, tmp_path, every=1, max_steps=2, callbacks=[BreakTheWeights()])
    row = rows_with(trainer, "probe/n_nonfinite")
    n_tokens = run.sequences.query("step == 2")["n_tokens"].sum()
    assert row[1]["probe/n_nonfinite"] == 0
    assert row[2]["probe/n_nonfinite"] == n_tokens == run.steps["n_nonfinite"].iloc[-1]
    assert "loss" in row[2]
    assert not [key for key in row[2] if key.endswith(("_logp", "_delta", "margin")) or key.startswith("squeeze/")]
    assert f"step 2: {n_tokens} response tokens have NaN or infinite log-probs" in caplog.text
    broken = run.sequences.query("step == 2")
    assert broken["logp_sum"].isna().all()
    assert (broken["n_nonfinite"] == broken["n_tokens"]).all()
    assert math.isnan(run.steps["probe/chosen_logp"].iloc[-1])


# ---- resuming ---------------------------------------------------------------------------------------------------

SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "lora": False}


@pytest.fixture(scope="module", params=[2, 3], ids=["checkpoint_observed", "checkpoint_between"])
def uninterrupted(request, dropout_folder, tmp_path_factory):
    """Six steps of SFT with dropout, observed every 2 or 3, with a checkpoint at 4."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train("sft", dropout_folder, folder, every=request.param, **SAVING)
    return request.param, folder


@pytest.fixture
def saved(uninterrupted, tmp_path):
    """A copy of it, to be resumed from its checkpoint."""
    every, folder = uninterrupted
    return every, folder, shutil.copytree(folder, tmp_path / "run")


def resume(dropout_folder, folder, *, every, probes=None):
    trainer = build_trainer("sft", dropout_folder, folder, **SAVING)
    watch(trainer, probes or make_probes(), every=every)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    return trainer


def test_a_resumed_run_has_the_observations_of_the_uninterrupted_one(saved, dropout_folder):
    every, folder, copy = saved
    resume(dropout_folder, copy, every=every)
    run, expected = load_run(copy), load_run(folder)
    assert run.observed_steps == expected.observed_steps
    pd.testing.assert_frame_equal(run.sequences, expected.sequences, check_exact=True)
    pd.testing.assert_frame_equal(run.tokens, expected.tokens, check_exact=True)
    pd.testing.assert_frame_equal(
        run.steps.drop(columns=TIMED_COLUMNS), expected.steps.drop(columns=TIMED_COLUMNS), check_exact=True
    )
    pd.testing.assert_frame_equal(run.probes, expected.probes)
    assert run.meta["resumed_at"] == [4]
    assert run.meta["created"] == expected.meta["created"]
    assert run.meta["finished_at_step"] == 6


def test_a_resumed_run_logs_each_of_its_observations_once(saved, dropout_folder):
    every, folder, copy = saved
    trainer = resume(dropout_folder, copy, every=every)
    history = trainer.state.log_history
    assert sorted(row["step"] for row in history if "probe/margin" in row) == load_run(folder).observed_steps
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_observations_after_the_checkpoint_are_dropped_though_their_steps_are_not_observed_again(
    dropout_folder, tmp_path
):
    train("sft", dropout_folder, tmp_path, every=1, **SAVING)
    assert load_run(tmp_path).observed_steps == [0, 1, 2, 3, 4, 5, 6]
    resume(dropout_folder, tmp_path, every=100)
    run = load_run(tmp_path)
    assert run.observed_steps == [0, 1, 2, 3, 4, 6]
    for table in ("sequences", "tokens", "steps"):
        assert not (run.path / table / "step_000000005.parquet").exists()


def test_resuming_with_other_probes_is_refused_with_both_shown(saved, dropout_folder):
    every, folder, copy = saved
    others = make_probes(3)
    with pytest.raises(RunLogError, match="cannot continue the run log") as caught:
        resume(dropout_folder, copy, every=every, probes=others)
    assert others.fingerprint() in str(caught.value)
    assert make_probes().fingerprint() in str(caught.value)
    pd.testing.assert_frame_equal(load_run(copy).sequences, load_run(folder).sequences)


def test_resuming_without_a_log_warns_and_starts_one_there(saved, dropout_folder, caplog):
    every, _, copy = saved
    shutil.rmtree(copy / "dynamics")
    resume(dropout_folder, copy, every=every)
    assert "training resumes at step 4 but there is no run log" in caplog.text
    run = load_run(copy)
    assert run.observed_steps == [4, 6]
    assert run.steps["probe/chosen_delta"][0] == 0.0


def test_steps_skipped_after_the_checkpoint_are_forgotten_on_resuming(dropout_folder, tmp_path):
    train("sft", dropout_folder, tmp_path, every=1, options={"max_overhead": 1e-9}, **SAVING)
    assert load_run(tmp_path).meta["skipped_steps"] == [1, 2, 3, 4, 5]
    resume(dropout_folder, tmp_path, every=1)  # without a limit
    run = load_run(tmp_path)
    assert {5, 6} <= set(run.observed_steps)
    assert set(run.meta["skipped_steps"]).isdisjoint(run.observed_steps)


# ---- the log folder ---------------------------------------------------------------------------------------------


def test_meta_says_what_was_measured_on_what(sft, model_folder):
    trainer, callback, run = sft
    meta = json.loads((run.path / "meta.json").read_text())
    expected = {
        "trainer": "SFTTrainer",
        "model": str(model_folder),
        "adapter": None,
        "every": 2,
        "max_steps": 5,
        "world_size": 1,
        "n_probes": len(callback.probes),
        "families": list(FAMILIES),
        "probes_fingerprint": callback.probes.fingerprint(),
        "token_probes": "all",
        "n_parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
    assert {key: meta[key] for key in expected} == expected
    assert meta["arguments"]["learning_rate"] == trainer.args.learning_rate


def test_a_log_folder_of_ones_own_is_used(model_folder, tmp_path):
    trainer = build_trainer("sft", model_folder, tmp_path / "out", max_steps=1)
    callback = watch(trainer, make_probes(), log_folder=tmp_path / "log")
    trainer.train()
    assert load_run(tmp_path / "log").observed_steps == [0, 1]
    assert callback.log_folder == tmp_path / "log"
    assert not (tmp_path / "out" / "dynamics").exists()
