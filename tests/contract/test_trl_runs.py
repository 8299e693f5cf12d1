"""Contract with TRL and transformers: resuming, trackers and model cards, as `llm_dynamics/_trl.py` relies on them."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, WandbCallback
from transformers.utils.hub import hf_api
from trl import GRPOTrainer

from llm_dynamics import _trl
from llm_dynamics.callbacks import watch
from tests.callbacks.explained import short_probes
from tests.callbacks.trackers import fake_mlflow, fake_wandb
from tests.training import build_trainer, save_tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class Look(TrainerCallback):
    """Keeps what `look()` says at the events of a run."""

    def __init__(self, look):
        self.look, self.seen = look, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.seen["begin"] = self.look()

    def on_step_end(self, args, state, control, **kwargs):
        self.seen["step"] = self.look()

    def on_train_end(self, args, state, control, **kwargs):
        self.seen["end"] = self.look()


@pytest.mark.parametrize("given", [True, "path"])
def test_the_checkpoint_that_a_run_goes_on_from_is_known_when_it_begins(given, model_folder, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    build_trainer("sft", model_folder, tmp_path, **saving | {"max_steps": 1}).train()
    checkpoint = tmp_path / "checkpoint-1"
    trainer = build_trainer("sft", model_folder, tmp_path, **saving)
    noted = _trl.noting_checkpoint(trainer)
    look = Look(lambda: list(noted))
    trainer.add_callback(look)
    trainer.train(resume_from_checkpoint=True if given is True else str(checkpoint))
    assert look.seen["begin"] == [checkpoint], (
        "transformers does not load the optimizer through `_load_optimizer_and_scheduler(checkpoint)` before "
        "on_train_begin any more: see _trl.noting_checkpoint"
    )


def test_a_run_from_the_start_notes_no_checkpoint(model_folder, tmp_path):
    trainer = build_trainer("sft", model_folder, tmp_path, max_steps=1)
    noted = _trl.noting_checkpoint(trainer)
    trainer.train()
    assert noted == []


def test_open_trackers_are_those_of_transformers_callbacks_while_their_run_is_open(model_folder, tmp_path, monkeypatch):
    wandb, mlflow = fake_wandb(monkeypatch), fake_mlflow(monkeypatch)
    trainer = build_trainer(
        "sft",
        model_folder,
        tmp_path,
        max_steps=1,
        report_to=["tensorboard"],
        callbacks=[WandbCallback(), MLflowCallback()],
    )
    assert _trl.open_trackers(trainer) == {}, "a tracker is open before training"
    look = Look(lambda: _trl.open_trackers(trainer))
    trainer.add_callback(look)
    trainer.train()
    for event in ("begin", "step"):
        seen = look.seen[event]
        assert list(seen) == ["tensorboard", "wandb", "mlflow"], "transformers names its trackers otherwise"
        assert seen["wandb"] is wandb
        assert seen["mlflow"] is mlflow
        assert {"add_text", "add_custom_scalars_multilinechart", "flush"} <= set(dir(seen["tensorboard"]))
    assert list(look.seen["end"]) == ["wandb"]  # TensorBoard's writer and mlflow's run are closed by then


def test_trackio_is_open_while_its_callback_says_so(model_folder, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    calls = []
    monkeypatch.setattr(trackio, "init", lambda **options: calls.append("init"))
    monkeypatch.setattr(trackio, "finish", lambda: calls.append("finish"))
    monkeypatch.setattr(trackio, "log", lambda metrics: calls.append("log"))
    monkeypatch.setattr(trackio, "config", {}, raising=False)
    monkeypatch.setattr(trackio, "config", type("Config", (dict,), {"update": lambda self, *_, **__: None})())
    trainer = build_trainer("sft", model_folder, tmp_path, max_steps=1, report_to=["trackio"])
    look = Look(lambda: _trl.open_trackers(trainer))
    trainer.add_callback(look)
    assert _trl.open_trackers(trainer) == {}
    trainer.train()
    assert look.seen == {"begin": {"trackio": trackio}, "step": {"trackio": trackio}, "end": {}}
    assert calls.count("init") == 1


def test_the_names_of_scalars_in_a_tracker_begin_with_train(model_folder, tmp_path, monkeypatch):
    wandb = fake_wandb(monkeypatch)
    trainer = build_trainer("sft", model_folder, tmp_path, max_steps=1, callbacks=[WandbCallback()])
    trainer.train()
    assert any("train/loss" in row for row in wandb.rows), "see tracker_tables._scalar_chart, which names scalars"
    assert all("train/global_step" in row for row in wandb.rows), "see tracker_tables._GLOBAL_STEP"


def test_trl_describes_a_method_by_name_and_paper(model_folder, tmp_path):
    name, paper = _trl.name_and_paper(GRPOTrainer)
    assert name == "GRPO"
    assert paper.keys() == {"title", "id", "citation"}, (
        "TRL describes papers otherwise: see trainers/nthr/model_card.py"
    )
    trainer = build_trainer("grpo", model_folder, tmp_path)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"trained with {name}" in card, "create_model_card writes elsewhere or otherwise"
    assert paper["citation"] in card
    assert paper["id"] in card


@pytest.fixture
def uploads(monkeypatch):
    """What would have been uploaded: the files of each `upload_folder` that no pattern leaves out."""
    seen = []

    def upload_folder(self, *, folder_path, ignore_patterns=None, **kwargs):
        files = [file.relative_to(folder_path).as_posix() for file in Path(folder_path).rglob("*") if file.is_file()]
        seen.append(set(filter_repo_objects(files, ignore_patterns=ignore_patterns)))
        done = Future()
        done.set_result(None)
        return done if kwargs.get("run_as_future") else None

    repo = SimpleNamespace(repo_id="me/model")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return seen


@pytest.mark.parametrize(
    ("strategy", "push_log"),
    [("end", False), ("every_save", False), ("all_checkpoints", False), ("all_checkpoints", True)],
)
def test_a_push_leaves_the_run_log_out_unless_it_is_asked_for(model_folder, tmp_path, uploads, strategy, push_log):
    trainer = build_trainer(
        "sft", model_folder, tmp_path, push_to_hub=True, hub_strategy=strategy, save_strategy="steps", save_steps=1,
        max_steps=2,
    )  # fmt: skip
    (tmp_path / "dynamics_before_001").mkdir()
    (tmp_path / "dynamics_before_001" / "meta.json").write_text("{}")
    (tmp_path / "dynamics_of_fluids.txt").write_text("somebody's own")
    watch(trainer, short_probes(), every=1, push_log=push_log, log_folder=None)
    trainer.train()
    trainer.push_to_hub()
    whole = [files for files in uploads if "dynamics_of_fluids.txt" in files]
    checkpoints = [files for files in uploads if "trainer_state.json" in files]
    reason = "transformers does not upload through `hf_api().upload_folder` any more: see _trl.leave_out_of_pushes"
    assert len(whole) == (1 if strategy == "end" else 3), reason
    assert len(checkpoints) == (2 if "checkpoint" in strategy else 0), reason
    for files in whole:
        assert {name.split("/")[0] for name in files if "dynamics" in name} == (
            {"dynamics", "dynamics_before_001", "dynamics_of_fluids.txt"} if push_log else {"dynamics_of_fluids.txt"}
        ), reason
        assert "model.safetensors" in files
    assert not vars(hf_api()).keys() & {"upload_folder"}, "the shared HfApi is as it was"
