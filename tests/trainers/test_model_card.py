"""What a model card says: the method in use, its paper, and what the run log has."""

import contextlib
import io
import math
import re

import pytest
from trl import GRPOTrainer

from llm_dynamics import load_run, watch
from llm_dynamics.frames import GREEDY
from llm_dynamics.report import model_card_section, what_moved
from llm_dynamics.runlog import RunLogWriter, schema
from llm_dynamics.trainers.nthr import NTHRGRPOTrainer
from llm_dynamics.trainers.nthr.config import METHODS as NTHR_METHODS
from llm_dynamics.trainers.nthr.model_card import METHODS
from tests.callbacks.explained import short_probes
from tests.report.synthetic import write_values
from tests.trainers.runs import Script, build
from tests.training import build_trainer, save_tiny_model


def card_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A finished run of NTHR with a checkpoint at its end, and the card that the checkpoint wrote."""
    folder = tmp_path_factory.mktemp("watched")
    trainer = build(folder, script=Script(), max_steps=4, save_strategy="steps", save_steps=2)
    watch(trainer, short_probes(), every=2, displacement={"every": 1})
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return trainer, folder, card_of(folder)


def test_the_trainer_describes_its_paper_as_trls_do():
    assert NTHRGRPOTrainer._paper.keys() == GRPOTrainer._paper.keys() == {"title", "id", "citation"}
    assert set(METHODS) == set(NTHR_METHODS)
    for _, paper in METHODS.values():
        if paper:
            assert paper["citation"].startswith("@article{")
            assert paper["citation"].endswith("\n}")
            assert paper["title"] in paper["citation"]
            assert f"arXiv:{paper['id']}" in paper["citation"]


def test_the_card_names_the_method_and_its_citation(watched):
    card = watched[2]
    assert "trained with NTHR, a method introduced in" in card
    assert "https://huggingface.co/papers/2505.18830" in card
    assert "@article{deng2025effect," in card
    assert "- nthr" in card.split("---")[1]


@pytest.mark.parametrize(
    ("method", "says"),
    [("thr", "2510.03669"), ("nsr", "2506.01347"), ("none", "2402.03300"), ("random", "trained with GRPO with the")],
)
def test_a_run_of_another_method_does_not_claim_to_be_nthr(method, says, tmp_path):
    trainer = build(tmp_path, nthr_method=method)
    trainer.create_model_card(model_name="tiny")
    card = card_of(tmp_path)
    assert says in card
    assert "trained with NTHR" not in card
    assert "2505.18830" not in card
    assert "Learning dynamics" not in card  # nobody watched


def test_the_card_tells_what_moved_and_points_to_the_log(watched):
    trainer, folder, card = watched
    assert card.count("## Learning dynamics") == 1  # though it was written at each checkpoint
    section = card[card.index("## Learning dynamics") :]
    run = load_run(folder)
    assert section == model_card_section(run)
    assert "`dynamics/`" in section
    assert str(folder) not in card
    assert "log-prob at step 0" in section
    rows = dict(re.findall(r"^\| (\w+).*? \| (.*) \|$", section, flags=re.MULTILINE))
    for family, n, change in what_moved(run)[["family", "n_probes", "delta"]].itertuples(index=False):
        cells = rows["argmax" if family in GREEDY else family].replace("−", "-").split(" | ")
        assert int(cells[0]) == n
        assert float(cells[3]) == pytest.approx(change, abs=0.06 if abs(change) >= 10 else 0.006)
    deltas = run.displacements.assign(delta=run.displacements["logp_after"] - run.displacements["logp_before"])
    by_question = deltas.groupby(["step", "question"])["delta"].mean()
    (said,) = re.findall(r"by (\S+) nats on average", section)
    assert float(said.replace("−", "-")) == pytest.approx(by_question.mean(), abs=0.006)
    assert f"mean over {len(by_question)} questions" in section
    assert f"in {(by_question > 0).sum()} of them" in section
    assert len([row for row in trainer.state.log_history if "lld/delta" in row]) == 4


def test_a_card_of_a_log_that_cannot_be_read_is_trls(tmp_path, caplog):
    trainer = build(tmp_path)
    callback = watch(trainer, short_probes(), every=2)
    trainer.create_model_card()
    assert "Learning dynamics" not in card_of(tmp_path)  # no log yet
    callback.log_folder.mkdir()
    (callback.log_folder / schema.META_FILE).write_text('{"schema_version": 99}', encoding="utf-8")
    trainer.create_model_card()
    assert "Learning dynamics" not in card_of(tmp_path)
    assert "schema version 99" in caplog.text


def test_text_in_a_section_is_shown_and_does_not_act(tmp_path):
    hostile = "a|b<img src=x>*_c_"
    run = write_values(tmp_path / "dynamics", {f"{hostile}-1": [-5.0, -4.0, -3.0], "chosen-1": [-2.0, -1.0, math.nan]})
    section = model_card_section(run)
    assert "<img" not in section
    assert "a&#124;b&#60;img src=x&#62;" in section
    assert "not finite: 1 of chosen." in section
    (row,) = (line for line in section.splitlines() if line.startswith("| chosen"))
    assert row.split(" | ")[2:] == ["–", "–", "–", "– |"]


def test_a_log_without_observations_says_so(tmp_path):
    writer = RunLogWriter(tmp_path / "dynamics")
    writer.start(schema.PROBES.empty_table().to_pandas(), {})
    section = model_card_section(load_run(tmp_path))
    assert "Nothing was observed in this run. The run log is `dynamics/`" in section


def test_a_log_of_one_observation_has_nothing_to_compare(tmp_path):
    section = model_card_section(write_values(tmp_path / "dynamics", {"chosen-1": [-2.0]}, steps=(7,)))
    assert "Responses were observed once, at step 7. The run log is `dynamics/`" in section
    assert "change" not in section


def test_the_section_is_there_for_other_trainers(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    trainer = build_trainer("sft", model, tmp_path, max_steps=1)
    watch(trainer, short_probes(), every=1)
    trainer.train()
    section = model_card_section(load_run(tmp_path))
    assert "What steps 0 to 1 did" in section
    assert "lld/delta" not in section
