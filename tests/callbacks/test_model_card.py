"""The model card of a watched run, of any trainer: TRL's own text, then what moved."""

import contextlib
import io
from pathlib import Path

import pytest

from llm_dynamics import load_run, watch
from llm_dynamics.report import model_card_section
from llm_dynamics.trainers.nthr import NTHRGRPOTrainer
from tests.callbacks.explained import short_probes
from tests.trainers.runs import build
from tests.training import build_trainer, save_tiny_model

HEADING = "\n## Learning dynamics\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def card_of(trainer):
    return (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")


def finished(trainer, **options):
    """The trainer at its end; it wrote its card at two checkpoints."""
    watch(trainer, short_probes(), every=1, **options)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_it_is_trls_card_and_then_the_section(kind, model, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    plain = card_of(finished(build_trainer(kind, model, tmp_path / "plain", **settings)))
    assert HEADING not in plain
    trainer = finished(build_trainer(kind, model, tmp_path / "told", **settings), model_card=True)
    card = card_of(trainer)
    assert card.count(HEADING) == 1
    section = model_card_section(load_run(tmp_path / "told"))
    assert card == plain.replace("/plain", "/told").replace("plain", "told").rstrip("\n") + "\n\n" + section
    assert "What steps 0 to 2 did" in section
    assert "arxiv.org/abs/2407.10490" in section


def test_a_card_written_again_has_one_section(model, tmp_path):
    trainer = finished(build_trainer("dpo", model, tmp_path, max_steps=1), model_card=True)
    trainer.create_model_card(model_name="mine")
    first = card_of(trainer)
    trainer.create_model_card(model_name="mine")
    assert card_of(trainer) == first
    assert "mine" in first


def test_a_trainer_that_tells_by_itself_tells_once(tmp_path):
    trainer = finished(build(tmp_path, NTHRGRPOTrainer, max_steps=1), model_card=True)
    trainer.create_model_card()
    assert card_of(trainer).count(HEADING) == 1


def test_without_a_log_the_card_is_trls(model, tmp_path):
    trainer = build_trainer("dpo", model, tmp_path, max_steps=1)
    watch(trainer, short_probes(), every=1, model_card=True)
    trainer.create_model_card()
    assert HEADING not in card_of(trainer)


def test_only_the_first_process_writes(model, tmp_path, monkeypatch):
    trainer = finished(build_trainer("dpo", model, tmp_path, max_steps=1), model_card=True)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    (tmp_path / "README.md").write_text("# mine\n")
    trainer.create_model_card()
    assert card_of(trainer) == "# mine\n"
