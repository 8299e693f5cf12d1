"""The pages on reading logs are true: their Python and their SQL run, and say what the functions say."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import llm_dynamics
from llm_dynamics import frames, load_run, token_curves

from ..runlog.logs import IDS, explain, new_log, observe
from .logs import probes_frame, write_log

DOCS = Path(__file__).parents[2] / "docs"
ANALYSIS = (DOCS / "analysis.md").read_text(encoding="utf-8")
RUNLOG = (DOCS / "runlog.md").read_text(encoding="utf-8")


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, flags=re.M | re.S)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Logs of SFT, DPO and IPO runs under `runs/`; the last two start where SFT ended."""
    monkeypatch.chdir(tmp_path)
    probes = probes_frame(4, ("chosen", "rejected"))
    rng = np.random.default_rng(0)
    value = -rng.gamma(2, 3, (len(probes), 3))  # three tokens each

    def log(name, steps, change):
        observations, tokens = {}, {}
        for step in steps:
            logp = value + change * step / steps[-1]
            about = {"probe_id": probes["probe_id"], "n_tokens": 3}
            sums = {"logp_sum": logp.sum(axis=1), "entropy_sum": 3.0, "ref_logp_sum": value.sum(axis=1)}
            observations[step] = pd.DataFrame(about | sums)
            tokens[step] = pd.DataFrame(
                {"probe_id": np.repeat(probes["probe_id"], 3), "position": np.tile([0, 1, 2], len(probes)),
                 "token_id": np.tile([7, 8, 9], len(probes)), "logp": logp.ravel(), "entropy": 1.0, "rank": 4}
            )  # fmt: skip
        epochs = {step: step / 10 for step in steps}
        return write_log(tmp_path / "runs" / name / "dynamics", probes, observations, epochs=epochs, tokens=tokens)

    log("sft", (0, 10, 20), 2.0)
    value += 2.0
    log("dpo", (0, 10, 20, 30), -1.0)
    log("ipo", (0, 15, 30), -3.0)
    return tmp_path / "runs"


def test_the_examples_of_the_page_on_numbers_run_one_after_the_other(runs, capsys):
    namespace = {"__name__": "analysis"}
    examples = blocks(ANALYSIS, "python test")
    assert len(examples) == len(re.findall(r"^```python", ANALYSIS, flags=re.M)) >= 5
    for number, example in enumerate(examples, start=1):
        exec(compile(example, f"docs/analysis.md, example {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "difference_low" in printed
    assert "-6.0" in printed  # IPO falls by 2 nats a token more than DPO, over 3 tokens


def test_the_page_on_numbers_names_functions_that_there_are():
    named = set(re.findall(r"^\| `(\w+)`(?:, `(\w+)`)?", ANALYSIS, flags=re.M))
    names = {name for pair in named for name in pair if name}
    assert {"align", "compare", "delta", "family_curves", "token_curves"} <= names
    assert names <= set(llm_dynamics.__all__)
    for name in ("what_moved", "squeezing_curves", "margin_path"):
        assert f"`{name}`" in ANALYSIS
        assert name in frames.__all__


def test_links_lead_somewhere():
    for text in (ANALYSIS, RUNLOG):
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (DOCS / target).exists(), target


def test_the_python_for_logs_that_outgrow_memory_runs_and_agrees(runs, capsys):
    pytest.importorskip("polars")
    namespace = {"__name__": "runlog"}
    examples = blocks(RUNLOG, "python test")
    assert len(examples) == 2
    for number, example in enumerate(examples, start=1):
        exec(compile(example, f"docs/runlog.md, tested example {number}", "exec"), namespace)
    found = namespace["mean"].sort("family", "step").collect()["logp"].to_list()
    assert found == pytest.approx(token_curves(load_run(runs / "dpo"))["mean"].tolist())


def statements():
    return [statement for block in blocks(RUNLOG, "sql") for statement in block.split(";") if statement.strip()]


def test_the_sql_of_the_page_on_the_run_log_runs(tmp_path, monkeypatch):
    duckdb = pytest.importorskip("duckdb")
    monkeypatch.chdir(tmp_path)
    writer = new_log(tmp_path / "runs" / "dpo" / "dynamics")
    for step in (0, 5):
        observe(writer, step, (-1.0 - step, -2.0), **({"probe/margin": 1.0} if step else {}))
    explain(writer, 5)
    answers = [duckdb.sql(statement).df() for statement in statements()]
    assert len(answers) >= 6
    assert not any(answer.empty for answer in answers)
    assert "probe/margin" in answers[1]
    assert set(answers[2]["cause"]) == {"momentum", "up", "down", "remainder"}
    assert len(IDS) == 2


def test_the_sql_on_tokens_says_what_token_curves_says(runs):
    duckdb = pytest.importorskip("duckdb")
    curves, change = [
        duckdb.sql(statement).df() for statement in statements() if "/tokens/*" in statement
    ]  # the two of the section on large logs
    expected = token_curves(load_run(runs / "dpo")).sort_values(["step", "family"])
    assert curves[["mean", "n"]].to_numpy() == pytest.approx(expected[["mean", "n"]].to_numpy())
    assert np.array(curves["ends"].tolist()) == pytest.approx(expected[["low", "high"]].to_numpy())
    expected = token_curves(load_run(runs / "dpo"), delta=True).sort_values(["step", "family"])
    assert change["delta"].tolist() == pytest.approx(expected["mean"].tolist(), abs=1e-6)
