"""What a run is told, and whether it is stopped, when its mass goes into the greedy tokens."""

import contextlib
import logging
import os
import sqlite3

import pytest
import trackio
from transformers import TrainerCallback

import llm_dynamics.callbacks.squeezing_alert as module
from llm_dynamics import SqueezingAlert, load_run, watch
from llm_dynamics.probes import ProbeSet
from llm_dynamics.rules import is_squeezing
from tests.callbacks.trackers import fake_wandb
from tests.conftest import PREFERENCES
from tests.training import build_trainer, make_probes, own_rows, save_tiny_model, weights_of

PROJECT = "llm-dynamics-alerts"
LARGE_STEPS = {"learning_rate": 2e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 6}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def our_warnings(caplog):
    caplog.set_level(logging.WARNING, logger="llm_dynamics")


def falling_probes():
    """Rejected, and the same texts as a family that is not trained on: both fall in a DPO run with large steps."""
    families = ("rejected", "rejected_semantic")
    return ProbeSet.from_preference_dataset(
        PREFERENCES, n_prompts=4, families=families, columns={"rejected_semantic": "rejected"}
    )


def warnings(caplog):
    return [record.message for record in caplog.records if record.name == module.__name__]


def train(model_folder, folder, *, every=1, max_steps=5, callbacks=(), arguments=None, **alert):
    """A DPO run with a large learning rate, of which rejected and texts like it are watched, with its alert."""
    trainer = build_trainer("dpo", model_folder, folder, max_steps=max_steps, **LARGE_STEPS, **arguments or {})
    watch(trainer, falling_probes(), every=every, tokens=False)
    alert = SqueezingAlert(trainer, **alert)
    for callback in (alert, *callbacks):
        trainer.add_callback(callback)
    trainer.train()
    return trainer, alert


class Stop(TrainerCallback):
    """Stops the run at step 3."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@pytest.fixture
def findings(monkeypatch):
    """Give the observations of a run their findings: "f" found, "c" clear, "u" unknown; returns how many were asked."""
    asked = []

    def of(letters):
        made = {"f": (True, "5 of 5 families fell"), "c": (False, "0 of 5 families fell"), "u": None}

        def judged(sequences):
            asked.append(sorted(set(sequences["step"])))
            return made[letters[len(asked) - 1]]

        monkeypatch.setattr(module, "is_squeezing", judged)
        return asked

    return of


def test_a_run_that_squeezes_is_told_once_with_the_numbers_that_decide(model_folder, tmp_path, caplog):
    trainer, alert = train(model_folder, tmp_path)
    sequences = load_run(tmp_path).sequences
    by_step = {step: is_squeezing(sequences[sequences["step"].isin([0, step])]) for step in range(1, 6)}
    first = min(step for step, (found, _) in by_step.items() if found)
    assert alert.found_at == first
    assert sum(found for found, _ in by_step.values()) > 1  # later ones are not told again
    (said,) = warnings(caplog)
    assert said.startswith(f"step {first}: squeezing: {by_step[first][1]}")
    assert trainer.state.global_step == 5  # nothing was stopped


def alerts_of_trackio(run_name):
    with contextlib.closing(sqlite3.connect(trackio.utils.TRACKIO_DIR / f"{PROJECT}.db")) as database:
        return database.execute("SELECT title, text, level FROM alerts WHERE run_name = ?", (run_name,)).fetchall()


def test_the_alerts_of_trackio_have_it_once(model_folder, tmp_path):
    assert str(trackio.utils.TRACKIO_DIR) == os.environ["TRACKIO_DIR"]  # see conftest.py: not the user's
    reported = {"report_to": ["trackio"], "project": PROJECT, "run_name": tmp_path.name}
    _, alert = train(model_folder, tmp_path, arguments=reported)
    ((title, text, level),) = alerts_of_trackio(tmp_path.name)
    sequences = load_run(tmp_path).sequences
    _, evidence = is_squeezing(sequences[sequences["step"].isin([0, alert.found_at])])
    assert title == f"step {alert.found_at}: squeezing"
    assert text.startswith(f"{evidence}. ")
    assert level == "warn"


def test_a_run_that_is_stopped_between_observations_is_told_before_its_tracker_closes(model_folder, tmp_path, findings):
    findings("cf")
    reported = {"report_to": ["trackio"], "project": PROJECT, "run_name": tmp_path.name}
    train(model_folder, tmp_path, every=2, callbacks=[Stop()], arguments=reported)
    ((title, *_),) = alerts_of_trackio(tmp_path.name)
    assert title == "step 3: squeezing"


def test_wandb_is_alerted_too(model_folder, tmp_path, findings, monkeypatch):
    wandb, sent = fake_wandb(monkeypatch), []
    opened = wandb.init

    def init(**options):
        opened(**options)
        wandb.run.alert = lambda title, text, level: sent.append((title, text, level))

    monkeypatch.setattr(wandb, "init", init)
    findings("cffcc")
    train(model_folder, tmp_path, arguments={"report_to": ["wandb"]})
    ((title, text, level),) = sent
    assert title == "step 2: squeezing"
    assert text.startswith("5 of 5 families fell. ")
    assert level == "WARN"


def test_a_tracker_that_fails_ends_nothing(model_folder, tmp_path, findings, monkeypatch, caplog):
    wandb = fake_wandb(monkeypatch)  # its run has no alert()
    findings("fcccc")
    trainer, alert = train(model_folder, tmp_path, arguments={"report_to": ["wandb"]})
    assert wandb.opened == 1
    assert trainer.state.global_step == 5
    assert alert.found_at == 1
    found, failed = warnings(caplog)
    assert found.startswith("step 1: squeezing")
    assert failed.startswith("wandb did not take the alert (AttributeError: ")


def test_stop_on_squeezing_ends_the_run_at_that_step(model_folder, tmp_path):
    trainer, alert = train(model_folder, tmp_path, stop_on="squeezing")
    assert alert.found_at is not None
    assert trainer.state.global_step == alert.found_at < 5
    run = load_run(tmp_path)
    assert run.observed_steps == list(range(alert.found_at + 1))
    assert run.meta["finished_at_step"] == alert.found_at


def test_the_first_observation_is_compared_with_each_later_one(model_folder, tmp_path, findings, caplog):
    asked = findings("ccc")
    _, alert = train(model_folder, tmp_path, every=2)
    assert asked == [[0, 2], [0, 4], [0, 5]]
    assert alert.found_at is None
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    ("letters", "patience", "stops_at"),
    [
        ("cfccc", 1, 2),
        ("fcffc", 2, 4),  # one alone is not two in a row
        ("fcfcf", 2, None),
        ("fufff", 2, 4),  # what cannot be told breaks the row
        ("fffff", 3, 3),
        ("uuuuf", 1, 5),
    ],
)
def test_patience_is_observations_in_a_row(letters, patience, stops_at, model_folder, tmp_path, findings, caplog):
    findings(letters)
    trainer, alert = train(model_folder, tmp_path, stop_on="squeezing", patience=patience)
    assert alert.found_at == stops_at
    assert trainer.state.global_step == (stops_at or 5)
    assert len(warnings(caplog)) == (stops_at is not None)


def test_the_observation_of_a_run_that_another_callback_stops_is_judged_too(model_folder, tmp_path, findings, caplog):
    asked = findings("cf")
    _, alert = train(model_folder, tmp_path, every=2, callbacks=[Stop()])
    assert asked == [[0, 2], [0, 3]]
    assert alert.found_at == 3
    assert len(warnings(caplog)) == 1


def test_a_second_training_is_judged_anew(model_folder, tmp_path, findings, caplog):
    findings("fccff")
    trainer, alert = train(model_folder, tmp_path, max_steps=2)
    assert alert.found_at == 1
    trainer.train()
    assert alert.found_at == 2
    assert [said.split(":")[0] for said in warnings(caplog)] == ["step 1", "step 2"]


def test_the_alert_changes_nothing_of_the_training(model_folder, tmp_path):
    with_alert, alert = train(model_folder, tmp_path / "with")
    without = build_trainer("dpo", model_folder, tmp_path / "without", max_steps=5, **LARGE_STEPS)
    without.train()
    assert alert.found_at is not None
    assert weights_of(with_alert) == weights_of(without)
    assert own_rows(with_alert) == own_rows(without)


def test_other_processes_read_no_log_and_stop_as_the_main_one_says(model_folder, tmp_path, monkeypatch, caplog):
    trainer = build_trainer("dpo", model_folder, tmp_path)
    watcher = watch(trainer, falling_probes())
    alert = SqueezingAlert(trainer, stop_on="squeezing")
    sent = []

    def broadcast(value):
        sent.append(value)
        return (True, "5 of 5 families fell")  # what the main process found

    monkeypatch.setattr(module, "broadcast", broadcast)
    monkeypatch.setattr(SqueezingAlert, "_finding", lambda self: pytest.fail("judged on another process"))
    watcher._observed = 7
    state, control = trainer.state, trainer.control
    state.global_step, state.is_world_process_zero = 7, False
    alert.on_step_end(trainer.args, state, control)
    assert sent == [None]
    assert control.should_training_stop
    assert alert.found_at == 7
    assert warnings(caplog) == []  # the main process says it
    alert.on_step_end(trainer.args, state, control)
    state.global_step = 8  # not observed: processes must not wait for each other
    alert.on_step_end(trainer.args, state, control)
    assert sent == [None]


def test_a_trainer_that_is_not_watched_is_refused(model_folder, tmp_path):
    with pytest.raises(ValueError, match="call watch"):
        SqueezingAlert(build_trainer("dpo", model_folder, tmp_path))


@pytest.mark.parametrize(
    ("choice", "named"),
    [
        ({"stop_on": "displacement"}, "stop_on is 'displacement'"),
        ({"stop_on": True}, "stop_on is True"),
        ({"patience": 0}, "patience is 0"),
        ({"patience": 1.5}, "patience is 1.5"),
        ({"patience": True}, "patience is True"),
    ],
)
def test_bad_arguments_are_named(choice, named, model_folder, tmp_path):
    trainer = build_trainer("dpo", model_folder, tmp_path)
    watch(trainer, make_probes(n_prompts=1))
    with pytest.raises(ValueError, match=named):
        SqueezingAlert(trainer, **choice)
