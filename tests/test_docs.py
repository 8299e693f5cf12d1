"""The documentation is true: its examples run, and it names what is there."""

import json
import re
from dataclasses import fields
from pathlib import Path

import datasets
import pandas
import pytest
from trl import GRPOConfig
from typer.testing import CliRunner

from llm_dynamics import NTHRConfig, cli, watch
from llm_dynamics.callbacks.influence_settings import InfluenceSettings
from llm_dynamics.callbacks.probe_account import DETAILS
from llm_dynamics.demo.products import letter_reward, product_questions
from llm_dynamics.demo.reinforcement import QUICK, product_probes
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.influence import RULES
from llm_dynamics.probes import FAMILY_ORDER, HH_COLUMNS
from llm_dynamics.rules import RULE_NAMES
from llm_dynamics.runlog import load_run, schema
from llm_dynamics.trainers.nthr.config import METHODS
from tests.conftest import PREFERENCES
from tests.training import build_trainer, make_probes, save_tiny_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNLOG = (ROOT / "docs" / "runlog.md").read_text(encoding="utf-8")
INFLUENCE = (ROOT / "docs" / "influence.md").read_text(encoding="utf-8")
PROBES = (ROOT / "docs" / "probes.md").read_text(encoding="utf-8")
CURVES = (ROOT / "docs" / "curves.md").read_text(encoding="utf-8")
SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
NTHR = (ROOT / "docs" / "nthr.md").read_text(encoding="utf-8")
PAGES = (RUNLOG, PROBES, INFLUENCE, NTHR, CURVES, SCALING, EXTENDING)
TABLES = {"probes": schema.PROBES, **schema.TABLES}


def blocks(text, kind):
    return [code for named, code in re.findall(r"^```([^\n]*)\n(.*?)^```$", text, flags=re.M | re.S) if named == kind]


@pytest.mark.filterwarnings("ignore")  # the example takes TRL's defaults, some of which warn on a CPU
def test_the_examples_of_the_readme_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    save_tiny_model(tmp_path / "my-model")
    rows = [row | {"prompt": f"{number}. {row['prompt']}"} for number in range(4) for row in PREFERENCES]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    examples = blocks(README, "python test")
    assert len(examples) >= 2
    namespace = {"__name__": "readme"}
    for number, example in enumerate(examples, start=1):
        exec(compile(example, f"README.md, example {number}", "exec"), namespace)
    run = load_run("runs/dpo")
    assert run.observed_steps[0] == 0
    assert len(run.observed_steps) >= 2
    assert {"chosen", "rejected", "other_train", "ungrammatical"} == set(run.sequences["family"])
    assert "rejected" in capsys.readouterr().out


def test_the_examples_of_the_page_on_the_account_run_in_a_run_of_dpo(tmp_path, capsys):
    trainer = build_trainer("dpo", save_tiny_model(tmp_path / "model"), tmp_path / "out", max_steps=2)
    namespace = {"__name__": "influence", "trainer": trainer, "probes": make_probes()}
    examples = blocks(INFLUENCE, "python test")
    assert len(examples) >= 2
    for number, example in enumerate(examples, start=1):
        exec(compile(example, f"docs/influence.md, example {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "momentum" in printed
    assert "explained" in printed
    assert "share" in printed


@pytest.mark.filterwarnings("ignore")  # as above
def test_the_example_of_the_page_on_nthr_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    questions = product_questions()
    tokenizer = build_tiny_tokenizer([row["prompt"][0]["content"] for row in questions])
    namespace = {
        "__name__": "nthr",
        "model": build_tiny_model(len(tokenizer)),
        "tokenizer": tokenizer,
        "questions": datasets.Dataset.from_list(questions),
        "reward": letter_reward,
        "probes": product_probes(questions, tokenizer, QUICK),
        "common": {"max_steps": 2, "max_completion_length": 12, "bf16": False, "use_cpu": True, "report_to": "none"},
    }
    (example,) = blocks(NTHR, "python test")
    exec(compile(example, "docs/nthr.md", "exec"), namespace)
    assert "threshold" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # as above
def test_the_examples_of_the_pages_on_curves_and_extending_run(tmp_path, capsys):
    trainer = build_trainer("dpo", save_tiny_model(tmp_path / "model"), tmp_path / "out", max_steps=2)
    namespace = {"__name__": "extending", "trainer": trainer, "rows": PREFERENCES}
    for number, example in enumerate(blocks(EXTENDING, "python test"), start=1):
        exec(compile(example, f"docs/extending.md, example {number}", "exec"), namespace)
    assert set(load_run(tmp_path / "out").influence["cause"]) >= {"strong", "weak"}
    (example,) = blocks(CURVES, "python test")
    exec(compile(example, "docs/curves.md", "exec"), {"__name__": "curves", "folder": tmp_path / "out"})
    assert "likelihood displacement" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # as above
def test_every_other_example_runs(tmp_path, monkeypatch, capsys):
    folder = save_tiny_model(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)

    def fresh(kind, name):
        trainer = build_trainer(kind, folder, tmp_path / "runs" / name, max_steps=1)
        return {"__name__": name, "trainer": trainer, "probes": make_probes()}

    for kind in ("sft", "dpo"):
        watched = fresh(kind, kind)
        watch(watched["trainer"], watched["probes"], influence=True)
        watched["trainer"].train()
    rows = [{"prompt": f"Question {i}?", "chosen": f"answer number {i}", "rejected": f"no {i}"} for i in range(120)]
    hh = {
        column: rows[0]["chosen"]
        for columns in HH_COLUMNS.values()
        for column in ([columns] if isinstance(columns, str) else columns)
    }
    (tmp_path / "hh_helpful_probes_train.jsonl").write_text(json.dumps(hh | {"prompt": "Hello"}) + "\n")
    tokenizer = build_tiny_tokenizer([row["chosen"] for row in rows])
    questions = datasets.Dataset.from_list(product_questions())
    contexts = {
        "README.md": {"reward": letter_reward, "questions": questions, "watch": watch},
        "probes.md": {"train_rows": rows[:100], "test_rows": rows[100:], "tokenizer": tokenizer},
        "runlog.md": {"pandas": pandas},
    }
    texts = {"README.md": README, "probes.md": PROBES, "runlog.md": RUNLOG, "curves.md": CURVES}
    ran = 0
    for page, text in texts.items():
        for number, example in enumerate(blocks(text, "python"), start=1):
            namespace = fresh("dpo", f"{page}_{number}") | contexts.get(page, {})
            exec(compile(example, f"{page}, untagged example {number}", "exec"), namespace)
            ran += 1
    assert ran == sum(len(blocks(text, "python")) for text in (README, *PAGES)) >= 7


def test_the_page_on_curves_names_every_verdict(tmp_path):
    for name in RULE_NAMES:
        assert f"*{name}*" in CURVES or name in ("first-order account", "probes and log"), name


def test_the_page_on_nthr_names_every_option_and_method():
    for field in set(NTHRConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__):
        assert f"`{field}`" in NTHR, field
    for method in METHODS:
        assert f'`"{method}"`' in NTHR, method


def test_the_page_on_the_account_names_every_option_and_rule():
    for name in (*(field.name for field in fields(InfluenceSettings)), *RULES, *DETAILS):
        assert f"`{name}`" in INFLUENCE or f'`"{name}"`' in INFLUENCE, name


@pytest.mark.parametrize("table", TABLES)
def test_the_page_on_the_run_log_has_every_column_as_the_schema_describes_it(table):
    _, _, section = RUNLOG.partition(f"\n### {table}\n")
    section = section.split("\n### ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", section, flags=re.M)
    assert rows == [
        (field.name, str(field.type), field.metadata[b"doc"].decode().replace("|", r"\|")) for field in TABLES[table]
    ]


def test_the_page_on_the_run_log_names_files_and_the_schema_version():
    for name in (schema.META_FILE, schema.PROBES_FILE, schema.part_name(25), schema.FOLDER):
        assert name in RUNLOG
    assert f"`schema_version` (now {schema.SCHEMA_VERSION})" in RUNLOG


@pytest.mark.parametrize("text", [README, PROBES], ids=["README.md", "docs/probes.md"])
def test_every_family_is_explained(text):
    assert not [family for family in FAMILY_ORDER if f"`{family}`" not in text]


def test_the_readme_explains_every_squeezing_statistic():
    sums = {name.removesuffix("_sum") for name in schema.SEQUENCES.names if name.endswith("_sum")}
    statistics = sums - {"logp", "ref_logp", "argmax_logp", "rank"}
    assert not [name for name in statistics if f"`{name}`" not in README]


def test_links_within_the_project_lead_somewhere():
    for text, folder in ((README, ROOT), *((page, ROOT / "docs") for page in PAGES)):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            if "://" not in target:
                assert (folder / target).exists(), target
    for folder in re.findall(r"`(llm_dynamics/[\w./]*|tests/)`", README):
        assert (ROOT / folder).exists(), folder


def test_commands_in_the_readme_exist():
    for command in re.findall(r"llm-dynamics ((?:probes )?[a-z]+)", README):
        result = CliRunner().invoke(cli.app, [*command.split(), "--help"])
        assert result.exit_code == 0, command
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(
        r"\bmake ([\w./-]+)", " ".join([*blocks(README, ""), *re.findall(r"`([^`\n]+)`", README)])
    ):
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.M), f"make {target}"
