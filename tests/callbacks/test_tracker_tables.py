"""What trackers receive: real TensorBoard event files and a real Trackio database; wandb and mlflow by stand-ins."""

import contextlib
import io
import json
import math
import os
import sqlite3

import pandas as pd
import pytest
import torch
import trackio
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, WandbCallback

from llm_dynamics import load_run, watch
from llm_dynamics.callbacks import tracker_tables as module
from llm_dynamics.callbacks.tracker_tables import TrackerTables, observation_tables
from llm_dynamics.report.text import token_label
from llm_dynamics.runlog import RunLogWriter
from tests.callbacks.explained import short_probes
from tests.callbacks.trackers import fake_mlflow, fake_wandb
from tests.trainers.runs import Script, build, same_weights
from tests.training import TIMED, build_trainer, save_tiny_model

OURS = ("probe/", "squeeze/", "influence/", "nthr/", "lld/")
OBSERVED = [0, 2, 4]
PROJECT = "llm-dynamics-test"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def nthr_run(folder, **options):
    """Four steps of NTHR, observed, explained and measured every two."""
    tables = options.pop("tracker_tables", True)
    trainer = build(folder, script=Script(), max_steps=4, optim="adamw_torch", learning_rate=1e-3, **options)
    watch(
        trainer,
        short_probes(),
        every=2,
        influence={"every": 2, "training_tokens": ()},
        displacement=True,
        tracker_tables=tables,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return trainer


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A run that reports to TensorBoard and Trackio, both real and offline."""
    assert str(trackio.utils.TRACKIO_DIR) == os.environ["TRACKIO_DIR"]  # see conftest.py: not the user's
    folder = tmp_path_factory.mktemp("reported")
    trainer = nthr_run(folder, report_to=["tensorboard", "trackio"], project=PROJECT, run_name=folder.name)
    return trainer, folder


def events(folder):
    (run,) = (folder / "runs").iterdir()
    accumulator = EventAccumulator(str(run), size_guidance={"tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def texts(accumulator, name):
    found = accumulator.Tensors(f"{name}/text_summary")
    return {event.step: event.tensor_proto.string_val[0].decode() for event in found}


def trackio_rows(run_name):
    with contextlib.closing(sqlite3.connect(trackio.utils.TRACKIO_DIR / f"{PROJECT}.db")) as database:
        rows = database.execute("SELECT metrics FROM metrics WHERE run_name = ? ORDER BY id", (run_name,)).fetchall()
    return [json.loads(text) for (text,) in rows]


def steps_of(name):
    """The steps at which the run of `nthr_run` has a metric of ours."""
    return {"probe/": OBSERVED, "squeeze/": OBSERVED, "influence/": [1, 2, 4], "nthr/": [1, 2, 3, 4], "lld/": [1, 3]}[
        next(prefix for prefix in OURS if name.startswith(prefix))
    ]


def expected_scalars(trainer):
    return {
        (name, row["step"]): value
        for row in trainer.state.log_history
        for name, value in row.items()
        if name.startswith(OURS)
    }


def test_tensorboard_has_every_scalar_at_its_step_finite_and_in_ascii(reported):
    trainer, folder = reported
    accumulator, expected = events(folder), expected_scalars(trainer)
    tags = [tag for tag in accumulator.Tags()["scalars"] if tag.startswith(tuple(f"train/{name}" for name in OURS))]
    seen = {(tag.removeprefix("train/"), event.step): event.value for tag in tags for event in accumulator.Scalars(tag)}
    assert {name.split("/")[0] + "/" for name, _ in seen} == set(OURS)
    assert seen == pytest.approx(expected, rel=1e-6)  # event files hold float32
    assert all(name.isascii() and math.isfinite(value) for (name, _), value in seen.items())
    for tag in tags:
        steps = [event.step for event in accumulator.Scalars(tag)]
        due = steps_of(tag.removeprefix("train/"))
        assert steps == due or ("momentum" in tag and steps == due[1:]), tag  # there is none at the first step


def test_trackio_has_every_scalar_at_its_step_finite_and_in_ascii(reported):
    trainer, folder = reported
    rows = trackio_rows(folder.name)
    seen = {
        (name.removeprefix("train/"), row["train/global_step"]): value
        for row in rows
        for name, value in row.items()
        if name.removeprefix("train/").startswith(OURS)
    }
    assert seen == expected_scalars(trainer)
    assert all(name.isascii() and math.isfinite(value) for (name, _), value in seen.items())


def test_trackio_has_the_tables_of_each_observation_and_the_curves(reported):
    _, folder = reported
    run = load_run(folder)
    rows = [row for row in trackio_rows(folder.name) if "dynamics/families" in row]
    assert [row["train/global_step"] for row in rows] == OBSERVED
    deltas = run.delta_from_start()
    deltas["per_token"] = deltas["delta_logp_sum"] / deltas["n_tokens"]
    for row in rows:
        step = row["train/global_step"]
        assert row["dynamics/families"]["_type"] == "trackio.table"
        families = pd.DataFrame(row["dynamics/families"]["_value"]).set_index("family")
        now = deltas[deltas["step"] == step].groupby("family")
        assert (families["step"] == step).all()
        assert families["n_probes"].to_dict() == now.size().to_dict()
        for name, column in (("logp", "logp_sum"), ("delta", "delta_logp_sum"), ("delta_per_token", "per_token")):
            assert families[name].to_dict() == pytest.approx(now[column].mean().to_dict())
        check_tokens(pd.DataFrame(row["dynamics/tokens"]["_value"]), run, step)
    (curves,) = (row for row in trackio_rows(folder.name) if "dynamics/curves" in row)
    assert curves["train/global_step"] == 4
    page = (trackio.utils.MEDIA_DIR / curves["dynamics/curves"]["file_path"]).read_text(encoding="utf-8")
    assert "chosen" in page
    assert "plotly" in page


def check_tokens(tokens, run, step):
    shown = list(run.probes["probe_id"][:3])
    kept = run.tokens[run.tokens["probe_id"].isin(shown)]
    now, start = (kept[kept["step"] == at].reset_index(drop=True) for at in (step, 0))
    assert list(dict.fromkeys(tokens["probe_id"])) == shown
    assert tokens["token"].tolist() == [token_label(token, 40) for token in now["token"]]
    assert tokens["logp"].tolist() == pytest.approx(now["logp"].tolist())
    assert tokens["delta"].tolist() == pytest.approx((now["logp"] - start["logp"]).tolist(), abs=1e-6)


def test_tensorboard_has_the_tables_as_markdown_and_one_chart_of_its_curves(reported):
    _, folder = reported
    accumulator, run = events(folder), load_run(folder)
    families, tokens = texts(accumulator, "dynamics/families"), texts(accumulator, "dynamics/tokens")
    assert list(families) == list(tokens) == OBSERVED
    for step in OBSERVED:
        lines = families[step].splitlines()
        assert len(lines) == 2 + 3  # the families of `short_probes`
        cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
        chosen = run.sequences.query("step == @step and family == 'chosen'")["logp_sum"].mean()
        assert cells[:3] == [str(step), "chosen", "2"]
        assert float(cells[3]) == pytest.approx(chosen, rel=1e-3)
        shown = run.tokens[run.tokens["probe_id"].isin(run.probes["probe_id"][:3])]
        assert len(tokens[step].splitlines()) == 2 + (shown["step"] == step).sum()
        assert "<|im_end|>" not in tokens[step]  # text does not act
        assert "&#60;&#124;im_end&#124;&#62;" in tokens[step]
    layout = accumulator.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    for family in ("chosen", "rejected", "other_train"):
        assert f"train/probe/{family}_delta".encode() in layout
        assert f"train/probe/{family}_delta" in accumulator.Tags()["scalars"]


def test_a_reported_run_ends_with_the_bytes_of_one_that_reports_nothing(reported, tmp_path):
    trainer, _ = reported
    alone = nthr_run(tmp_path, tracker_tables=False)
    assert not any(isinstance(callback, TrackerTables) for callback in alone.callback_handler.callbacks)
    assert same_weights(trainer, alone)
    rows = [
        [
            {key: repr(value) for key, value in row.items() if not key.endswith((*TIMED, "dynamics/overhead"))}
            for row in run.state.log_history
        ]
        for run in (trainer, alone)
    ]
    assert rows[0] == rows[1]


# ---- the other trackers, when there is nothing to send to, and when they fail -----------------------------------


def sft(model_folder, folder, *, callbacks=(), **options):
    tables = options.pop("tracker_tables", True)
    trainer = build_trainer("sft", model_folder, folder, callbacks=callbacks, **{"max_steps": 4} | options)
    watch(trainer, short_probes(), every=2, tracker_tables=tables)
    return trainer


def test_wandb_has_tables_and_a_plotly_figure_at_the_trainers_steps(model_folder, tmp_path, monkeypatch):
    wandb = fake_wandb(monkeypatch)
    sft(model_folder, tmp_path, callbacks=[WandbCallback()]).train()
    assert wandb.opened == 1
    families, tokens = wandb.rows_with("dynamics/families"), wandb.rows_with("dynamics/tokens")
    assert list(families) == list(tokens) == OBSERVED
    names = ["step", "family", "n_probes", "logp", "delta", "delta_per_token"]
    run = load_run(tmp_path)
    for step, table in families.items():
        assert table.columns == names
        assert [row[:3] for row in table.data] == [[step, f, 2] for f in ("chosen", "rejected", "other_train")]
        check_tokens(pd.DataFrame(tokens[step].data, columns=tokens[step].columns), run, step)
    (figure,) = wandb.rows_with("dynamics/curves").values()
    assert "chosen" in {trace.name for trace in figure.value.data}
    assert list(wandb.rows_with("train/probe/chosen_delta")) == OBSERVED


def test_mlflow_has_growing_tables_and_a_figure_in_the_run_that_is_open(model_folder, tmp_path, monkeypatch):
    mlflow = fake_mlflow(monkeypatch)
    sft(model_folder, tmp_path, callbacks=[MLflowCallback()]).train()
    assert mlflow.opened == 1
    families = mlflow.tables["dynamics/families.json"]
    assert families["step"] == [0] * 3 + [2] * 3 + [4] * 3
    assert sorted(set(mlflow.tables["dynamics/tokens.json"]["step"])) == OBSERVED
    assert list(mlflow.figures) == ["dynamics/curves.html"]
    scalars = [step for step, metrics in mlflow.metrics if "probe/chosen_delta" in metrics]
    assert scalars == OBSERVED


def test_a_run_of_the_tracker_that_was_closed_is_not_opened_again(model_folder, tmp_path, monkeypatch):
    mlflow = fake_mlflow(monkeypatch)
    trainer = sft(model_folder, tmp_path, callbacks=[MLflowCallback()], logging_strategy="no")
    trainer.add_callback(At(2, lambda: mlflow.end_run(), event="on_step_begin"))
    trainer.train()
    assert set(mlflow.tables["dynamics/families.json"]["step"]) == {0, 2}
    assert not mlflow.figures


class At(TrainerCallback):
    """Calls a function at an event of one step."""

    def __init__(self, step, act, event="on_step_end"):
        def call(args, state, control, **kwargs):
            if state.global_step == step:
                act()

        setattr(self, event, call)


def test_without_a_tracker_no_table_is_made(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "observation_tables", None)
    monkeypatch.setattr(module, "load_run", None)
    trainer = sft(model_folder, tmp_path)
    assert isinstance(trainer.callback_handler.callbacks[-1], TrackerTables)
    trainer.train()
    assert load_run(tmp_path).observed_steps == OBSERVED


def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(model_folder, tmp_path, monkeypatch, caplog):
    wandb, mlflow = fake_wandb(monkeypatch), fake_mlflow(monkeypatch)

    def fail(*_, **__):
        raise ConnectionError("service is down")

    monkeypatch.setattr(wandb, "Table", fail)
    trainer = sft(model_folder, tmp_path, callbacks=[WandbCallback(), MLflowCallback()])
    trainer.train()
    assert trainer.state.global_step == 4
    warned = [record.message for record in caplog.records if "did not take the tables" in record.message]
    assert len(warned) == 1
    assert "wandb did not take the tables of step 0 (ConnectionError: service is down)" in warned[0]
    assert set(mlflow.tables["dynamics/families.json"]["step"]) == set(OBSERVED)
    assert wandb.rows_with("dynamics/curves")  # it is asked again each time


def test_a_run_that_is_stopped_sends_its_last_observation_while_the_tracker_is_open(model_folder, tmp_path):
    trainer = sft(model_folder, tmp_path, report_to=["tensorboard"], max_steps=9)
    trainer.add_callback(At(3, lambda: setattr(trainer.control, "should_training_stop", True)))
    trainer.train()
    assert load_run(tmp_path).observed_steps == [0, 2, 3]
    (run,) = (tmp_path / "runs").iterdir()
    assert len(list(run.iterdir())) == 1  # the writer was not opened a second time
    accumulator = events(tmp_path)
    assert [event.step for event in accumulator.Scalars("train/probe/chosen_delta")] == [0, 2, 3]
    assert list(texts(accumulator, "dynamics/families")) == [0, 2, 3]
    assert accumulator.Tensors("custom_scalars__config__")


def test_a_resumed_run_sends_what_it_observes_itself(model_folder, tmp_path, monkeypatch):
    saving = {"save_strategy": "steps", "save_steps": 2}
    wandb = fake_wandb(monkeypatch)
    trainer = sft(model_folder, tmp_path, **saving)
    trainer.create_model_card = lambda **_: None  # TRL's asks the real wandb
    trainer.train()
    trainer = sft(model_folder, tmp_path, callbacks=[WandbCallback()])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert list(wandb.rows_with("dynamics/families")) == [4]
    deltas = [row[4] for row in wandb.rows_with("dynamics/families")[4].data]
    final = load_run(tmp_path).delta_from_start().query("step == 4").groupby("family", sort=False)
    assert deltas == pytest.approx(final["delta_logp_sum"].mean().tolist())  # since the first observation of all


def test_what_is_not_finite_is_a_gap(model_folder, tmp_path, monkeypatch):
    wandb = fake_wandb(monkeypatch)
    trainer = sft(model_folder, tmp_path, callbacks=[WandbCallback()], max_steps=2)

    def break_weights():
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight.fill_(math.nan)

    trainer.callback_handler.callbacks.insert(0, At(2, break_weights))
    trainer.train()
    table = wandb.rows_with("dynamics/families")[2]
    assert [row[3:] for row in table.data] == [[None] * 3] * 3
    frames = observation_tables(
        RunLogWriter(tmp_path / "dynamics"), 0, 2, load_run(tmp_path).probes, set(load_run(tmp_path).probes["probe_id"])
    )
    assert frames["dynamics/families"]["logp"].isna().all()
