"""When steps are explained, what stays attached in between, and where the trainer's rows say it."""

import math

import pandas as pd
import pytest
from transformers import TrainerCallback

from llm_dynamics.callbacks import InfluenceCallback, watch
from llm_dynamics.runlog import load_run, schema
from tests.callbacks.explained import by_family, short_probes
from tests.conftest import FIRST
from tests.training import build_trainer, own_rows, save_tiny_model

CHEAP = {"training_tokens": ()}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), dropout=0.2)


@pytest.fixture(scope="module")
def probes():
    return short_probes(1, families=("chosen", "rejected"))


def attached(trainer):
    """What the tap leaves on a trainer: hooks on the model, and a clipping of its own."""
    model = trainer.model
    return len(model._forward_hooks), len(model._forward_pre_hooks), "clip_grad_norm_" in vars(trainer.accelerator)


CLEAN = (0, 0, False)
TAPPED = (1, 1, True)


class Look(TrainerCallback):
    """Records what is attached to the trainer in every step; can fail there, or stop the run after a step."""

    def __init__(self, *, stop_at=None, fail_at=None):
        self.seen, self.stop_at, self.fail_at = {}, stop_at, fail_at

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen[state.global_step + 1] = attached(self.trainer)
        if state.global_step + 1 == self.fail_at:
            self.fail_at = None
            raise RuntimeError("out of memory")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_at:
            control.should_training_stop = True


def prepare(model_folder, output_dir, probes, *, kind="sft", look=None, every=1, influence=None, **arguments):
    look = look or Look()
    arguments = {"gradient_accumulation_steps": 2, "learning_rate": 1e-3} | arguments
    trainer = build_trainer(kind, model_folder, output_dir, callbacks=[look], **arguments)
    look.trainer = trainer
    watch(trainer, probes, every=every, influence=CHEAP | (influence or {}))
    return trainer


# ---- when -------------------------------------------------------------------------------------------------------


def test_the_first_every_nth_and_the_last_step_are_explained_and_others_untouched(model_folder, tmp_path, probes):
    look = Look()
    trainer = prepare(model_folder, tmp_path, probes, look=look, every=5, influence={"every": 2}, max_steps=5)
    trainer.train()
    run = load_run(tmp_path)
    assert run.explained_steps == [1, 2, 4, 5]
    assert run.observed_steps == [0, 5]
    assert look.seen == {1: TAPPED, 2: TAPPED, 3: CLEAN, 4: TAPPED, 5: TAPPED}
    assert attached(trainer) == CLEAN
    assert trainer.accelerator.clip_grad_norm_.__func__ is type(trainer.accelerator).clip_grad_norm_
    expected = {"every": 2, "rule": "midpoint", "detail": "family", "families": ["chosen", "rejected"]}
    assert run.meta["influence"].items() >= (expected | {"training_tokens": [], "history": "total"}).items()


def test_the_last_step_of_epochs_is_explained(model_folder, tmp_path, probes):
    options = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 1}
    prepare(model_folder, tmp_path, probes, influence={"every": 4}, **options).train()
    assert load_run(tmp_path).explained_steps == [1, 4, 6]


def test_with_split_history_every_step_is_tapped_and_only_the_due_ones_explained(model_folder, tmp_path, probes):
    look = Look()
    influence = {"every": 3, "history": "split"}
    trainer = prepare(model_folder, tmp_path, probes, look=look, influence=influence, max_steps=4)
    trainer.train()
    run = load_run(tmp_path)
    assert run.explained_steps == [1, 3, 4]
    assert look.seen == dict.fromkeys((1, 2, 3, 4), TAPPED)
    assert attached(trainer) == CLEAN
    shares = by_family(run)  # the momentum of step 3 was filled by steps 1 and 2
    assert shares[:, :, "momentum_up"][3].abs().min() > 1e-3
    assert shares[:, :, "momentum"].abs().max() < 1e-4


def test_a_run_that_another_callback_stops_has_no_account_of_a_step_that_was_not_due(model_folder, tmp_path, probes):
    look = Look(stop_at=3)
    trainer = prepare(model_folder, tmp_path, probes, look=look, influence={"every": 2}, max_steps=6)
    trainer.train()
    assert load_run(tmp_path).explained_steps == [1, 2]
    assert load_run(tmp_path).observed_steps == [0, 1, 2, 3]
    assert attached(trainer) == CLEAN


def test_watch_explains_one_step_in_four_observations_unless_told_otherwise(model_folder, tmp_path, probes):
    trainer = build_trainer("sft", model_folder, tmp_path)
    watch(trainer, probes, every=3, influence=True)
    (callback,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, InfluenceCallback))
    assert callback.settings.every == 12
    assert callback.settings.training_tokens == ["chosen", "rejected"]


def test_a_callback_of_its_own_brings_the_run_log_with_it(model_folder, tmp_path, probes):
    trainer = build_trainer("sft", model_folder, tmp_path, max_steps=1)
    trainer.add_callback(InfluenceCallback(trainer, probes, every=1, training_tokens=()))
    trainer.train()
    assert load_run(tmp_path).explained_steps == load_run(tmp_path).observed_steps[1:] == [1]


# ---- interrupted ------------------------------------------------------------------------------------------------


def tables_of(run):
    return {name: getattr(run, name).drop(columns="seconds", errors="ignore") for name in schema.ACCOUNT_TABLES}


def test_a_resumed_run_has_the_accounts_of_the_uninterrupted_one(model_folder, tmp_path, probes):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    influence = {"every": 2, "training_tokens": None, "map_probes": [f"{FIRST}/chosen"]}
    prepare(model_folder, tmp_path, probes, influence=influence, **options).train()
    uninterrupted = tables_of(load_run(tmp_path))
    trainer = prepare(model_folder, tmp_path, probes, influence=influence, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = load_run(tmp_path)
    assert resumed.meta["resumed_at"] == [2]
    assert resumed.explained_steps == [1, 2, 4, 5]
    for name, table in tables_of(resumed).items():
        assert name == "influence_tokens" or len(table)
        pd.testing.assert_frame_equal(table, uninterrupted[name], check_exact=True)


def test_what_a_failed_run_left_attached_is_removed_by_the_next(model_folder, tmp_path, probes):
    look = Look(fail_at=2)
    trainer = prepare(model_folder, tmp_path, probes, look=look, influence={"every": 2}, max_steps=3)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert attached(trainer) == TAPPED
    look.seen.clear()
    trainer.train()
    assert look.seen == dict.fromkeys((1, 2, 3), TAPPED)  # once, not twice
    assert attached(trainer) == CLEAN
    run = load_run(tmp_path)
    assert run.explained_steps == [1, 2, 3]
    assert (run.accounts["explained"] > 0.999).all()


# ---- the trainer's rows -----------------------------------------------------------------------------------------


def rows_with(trainer, key):
    rows = sorted(trainer.state.log_history, key=lambda row: row["step"])  # held rows stand after the trainer's first
    return {row["step"]: row for row in rows if key in row}


def test_shares_stand_beside_the_loss_where_that_step_is_logged_and_else_in_a_row_of_their_own(
    model_folder, tmp_path, probes
):
    trainer = prepare(model_folder, tmp_path, probes, every=9, max_steps=4, logging_steps=2, influence={"every": 1})
    trainer.train()
    run = load_run(tmp_path)
    rows = rows_with(trainer, "influence/explained")
    assert list(rows) == [1, 2, 3, 4]
    assert len([row for row in trainer.state.log_history if "influence/explained" in row]) == 4
    assert {step: "loss" in row for step, row in rows.items()} == {1: False, 2: True, 3: False, 4: True}
    shares = by_family(run)
    explained = run.accounts.set_index("step")["explained"]
    for step, row in rows.items():
        ours = {key: value for key, value in row.items() if key.startswith("influence/")}
        expected = {f"influence/{family}_{cause}": share for (family, cause), share in shares[step].items()}
        assert ours == pytest.approx(expected | {"influence/explained": explained[step]}, abs=1e-12)
        assert all(key.isascii() and type(value) is float and math.isfinite(value) for key, value in ours.items())

    alone = build_trainer("sft", model_folder, tmp_path / "alone", max_steps=4, logging_steps=2,
                          gradient_accumulation_steps=2, learning_rate=1e-3)  # fmt: skip
    alone.train()
    assert own_rows(trainer) == own_rows(alone)


def test_a_plain_trainer_has_rows_of_our_own_beside_its_losses(model_folder, tmp_path, probes):
    trainer = prepare(model_folder, tmp_path, probes, kind="plain", influence={"every": 2}, max_steps=2)
    trainer.train()
    assert list(rows_with(trainer, "influence/explained")) == list(rows_with(trainer, "loss")) == [1, 2]
    assert not any("loss" in row for row in rows_with(trainer, "influence/explained").values())


def test_a_trainer_that_logs_nothing_gets_no_rows_and_has_its_accounts(model_folder, tmp_path, probes):
    options = {"logging_strategy": "no", "max_steps": 1}
    trainer = prepare(model_folder, tmp_path, probes, influence={"every": 1}, **options)
    trainer.train()
    assert not rows_with(trainer, "influence/explained")
    assert load_run(tmp_path).explained_steps == [1]
