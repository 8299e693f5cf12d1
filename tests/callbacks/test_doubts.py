"""What is seldom meant is said when the callback is attached, and everything else is left in peace."""

import logging

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from llm_dynamics.callbacks import watch
from llm_dynamics.callbacks.doubts import form_of_rows, warn_of_other_form
from llm_dynamics.probes import ProbeSet
from llm_dynamics.probes.forms import forms
from llm_dynamics.report import write_report
from llm_dynamics.rules import judge
from llm_dynamics.runlog import load_run
from tests.conftest import PREFERENCES
from tests.training import KINDS, build_trainer, dataset_for, make_probes, save_tiny_model

ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}


def as_chat(row):
    """The row with its texts as messages."""
    return {
        name: [{"role": ROLES[name], "content": value}] if name in ROLES else value for name, value in dict(row).items()
    }


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def chat_probes():
    return ProbeSet.from_preference_dataset([as_chat(row) for row in PREFERENCES], families=["chosen", "rejected"])


@pytest.fixture
def warned(caplog):
    """What our own loggers warned of since."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name.endswith("callbacks.doubts")]


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("kind", KINDS)
def test_probes_of_another_form_than_the_rows_are_doubted(kind, chat, model_folder, chat_probes, warned, tmp_path):
    rows = dataset_for(kind, AutoTokenizer.from_pretrained(model_folder))
    if chat:
        rows = Dataset.from_list([as_chat(row) for row in rows])
    trainer = build_trainer(kind, model_folder, tmp_path, rows=rows)
    warn_of_other_form(trainer, chat_probes if chat else make_probes())
    assert warned() == []
    warn_of_other_form(trainer, make_probes() if chat else chat_probes)
    if kind == "plain":  # input_ids: nobody can tell
        assert warned() == []
    else:
        rows, prompts = ("chat messages", "plain text") if chat else ("plain text", "chat messages")
        assert len(warned()) == 1
        assert f"rows are {rows}, and the prompts of the probes are {prompts}" in warned()[0]
        assert f"is put around the {'rows' if chat else 'probes'} alone" in warned()[0]


def test_texts_that_may_hold_a_template_and_probes_of_both_forms_are_not_doubted(
    model_folder, chat_probes, warned, tmp_path
):
    trainer = build_trainer("dpo", model_folder, tmp_path)
    both = ProbeSet([*make_probes()[:1], *chat_probes[-1:]])
    warn_of_other_form(trainer, both)
    trainer.train_dataset = Dataset.from_list([{"text": "<|im_start|>user\nHello<|im_end|>"}])
    warn_of_other_form(trainer, chat_probes)
    trainer.train_dataset = Dataset.from_list([as_chat(PREFERENCES[0])]).to_iterable_dataset()
    warn_of_other_form(trainer, make_probes())
    assert warned() == []


def test_watching_after_training_is_doubted_and_a_further_training_is_watched(model_folder, warned, tmp_path):
    trainer = build_trainer("sft", model_folder, tmp_path, max_steps=2)
    trainer.train()
    watcher = watch(trainer, make_probes(), every=1)
    assert len(warned()) == 1
    assert "has already trained 2 steps" in warned()[0]
    trainer.train()
    assert watcher.observed_step == 2


def test_an_untrained_trainer_on_rows_like_the_probes_is_not_doubted(model_folder, warned, tmp_path):
    watch(build_trainer("dpo", model_folder, tmp_path), make_probes(), influence=True)
    assert warned() == []


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_the_log_says_in_which_form_rows_and_probes_are_and_the_verdict_and_page_repeat_it(
    chat, model_folder, tmp_path
):
    rows = Dataset.from_list([as_chat(row) for row in PREFERENCES]) if chat else None
    trainer = build_trainer("dpo", model_folder, tmp_path / "run", max_steps=1, rows=rows)
    watch(trainer, make_probes(), every=1)
    trainer.train()
    run = load_run(tmp_path / "run")
    rows_are = "chat messages" if chat else "plain text"
    assert run.meta["forms"] == {"rows": rows_are, "prompts": "plain text", "chat_template": True}
    verdict = {verdict.name: verdict for verdict in judge(run)}["probes and log"]
    said = "the training rows are chat messages, and the prompts of the probes plain text"
    assert (said in verdict.evidence) == ("Other form: build the probes" in verdict.remedy) == chat
    page = write_report(run, tmp_path / "report.html").read_text("utf-8")
    assert "prompts are plain text, without the model’s chat template" in page


def test_forms_are_none_where_they_cannot_be_told(model_folder, chat_probes, tmp_path):
    trainer = build_trainer("plain", model_folder, tmp_path)
    trainer.processing_class.chat_template = None
    both = ProbeSet([*make_probes()[:1], *chat_probes[-1:]])
    assert forms(both, trainer.processing_class, form_of_rows(trainer)) == {
        "rows": None,
        "prompts": "both",
        "chat_template": False,
    }
