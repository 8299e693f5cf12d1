import ast
import base64
import hashlib
import json
import re
import string
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

import llm_dynamics.report
from llm_dynamics.report import text, write_report
from llm_dynamics.report.content import MAX_FAMILIES, script_data
from llm_dynamics.report.measured import measured
from llm_dynamics.report.text import shortened
from llm_dynamics.runlog import RunLogs, RunLogWriter, load_run, load_runs

from .synthetic import DPO_DELTA, HOSTILE, write_run, write_values
from .unpacking import unpack_json

QUESTIONS = [
    "At a glance", "What moved?", "Is it normal?", "Why did it move?", "Where did the mass go?", "Which tokens?",
    "What does it say?", "How was it measured?",
]  # fmt: skip


class Outline(HTMLParser):
    """What a browser would make of the page: elements, what they would load, headings, script contents."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.headings, self.scripts, self.handlers = [], [], [], [], []
        self._open = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._open = tag
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.loads.append(value)
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open == "h2":
            self.headings.append(data)
        if self._open == "script":
            self.scripts.append(data)


def embedded(outline):
    return json.loads(next(script for script in outline.scripts if script.startswith('{"compares"')))


def unpacked_index(page):
    return unpack_json(page.split('id="token-data">')[1].split("\n")[0].split("</script>")[0])


@pytest.fixture(scope="module")
def page(both, tmp_path_factory):
    return write_report(both, tmp_path_factory.mktemp("page") / "new" / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def hostile_page(hostile, tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile_page") / "report.html"
    return write_report(load_runs({HOSTILE: hostile.path}), path, title=HOSTILE).read_text("utf-8")


def test_every_section_asks_its_question(page):
    assert Outline(page).headings == QUESTIONS


def test_plotly_is_embedded_once(page):
    assert page.count("* plotly.js v") == 1


def test_nothing_is_loaded_from_anywhere(page):
    outline = Outline(page)
    assert outline.loads
    assert all(load.startswith("#") for load in outline.loads)
    assert "default-src 'none'" in unescape(page.split("<title>")[0])
    assert "@import" not in page.split("</style>")[0]


def test_page_states_language_title_and_viewport(page):
    assert '<html lang="en">' in page
    assert "<title>What moved in training</title>" in page
    assert 'name="viewport"' in page


def test_table_shows_start_end_and_what_was_left_out(page):
    table = page.split('aria-label="What moved in dpo, as a table"')[1].split("</table>")[0]
    rows = re.findall(r"<tr.*?</tr>", table, re.S)
    assert "11<span" in next(row for row in rows if "other_test" in row)
    assert "argmax (chosen prefix)" in rows[-1]
    assert "1 probe left out" in page


def test_statements_say_whether_they_came_true(page):
    assert re.search(r"<span class=\"mark\">yes</span>\s*<div><p class=\"claim\">rejected falls fastest", page)


def test_the_cost_of_watching_is_one_sum_in_seconds_and_against_the_same_training(explained):
    run = explained
    observing, explaining = run.steps["seconds_observing"].sum(), run.accounts["seconds"].sum()
    run.steps["seconds_training"] = 10.0
    cost = dict(measured(run)[0])["cost of watching"]
    assert cost == "28.5 s (observing 4.5 s + explaining 24.0 s), 95% of the 30.0 s of training"
    assert observing + explaining == 28.5
    run.accounts["seconds"] = 0.0
    assert dict(measured(run)[0])["cost of watching"] == "4.5 s (observing 4.5 s), 15% of the 30.0 s of training"
    run.steps["seconds_training"] = 0.0
    assert dict(measured(run)[0])["cost of watching"] == "4.5 s (observing 4.5 s)"


def test_measured_shows_meta_and_tolerates_its_absence(page, tmp_path):
    for part in (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm-dynamics 0.1.0, torch 2.9.0",
        "beta 0.1",
        "seed 7",
    ):
        assert part in page
    bare = write_report(write_values(tmp_path / "run", {"chosen-1": [-1, -2, -3]}, trainer=None), tmp_path / "p.html")
    assert "How was it measured?" in bare.read_text("utf-8")


def test_hostile_text_is_never_markup(hostile_page):
    outline = Outline(hostile_page)
    assert HOSTILE not in hostile_page
    assert "<img" not in hostile_page.replace(outline.scripts[1], "")  # plotly.js aside
    assert "img" not in outline.tags
    assert not outline.handlers
    assert outline.tags.count("script") == 4  # two of data, which never run, plotly.js and the page's own
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in hostile_page


def test_hostile_text_survives_as_data(hostile_page):
    index = unpacked_index(hostile_page)
    assert HOSTILE in index["strings"]
    assert HOSTILE in index["texts"]
    assert HOSTILE in index["families"]
    assert index["runs"] == [HOSTILE]
    names = {trace["name"] for trace in embedded(Outline(hostile_page))["curves"][HOSTILE]["response-change"]}
    assert names >= {"&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;"}  # plotly reads names as HTML


def test_packed_data_holds_no_character_of_markup(hostile_page):
    data = next(script for script in Outline(hostile_page).scripts if script.startswith("eN"))
    assert set(data) <= set(string.ascii_letters + string.digits + "+/=\n")


def test_only_the_two_scripts_of_the_page_may_run(hostile_page):
    outline = Outline(hostile_page)
    policy = unescape(hostile_page.split('Content-Security-Policy" content="')[1].split('"')[0])
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    runs = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in outline.scripts[1::2]]
    assert allowed == runs
    rest = re.sub(r" 'sha256-[^']+'", "", policy)
    assert rest == "default-src 'none'; script-src; style-src 'unsafe-inline'; img-src data: blob:"


@pytest.mark.parametrize("steps", [(0,), ()], ids=["one observation", "none"])
def test_a_run_too_short_to_compare_renders(tmp_path, steps):
    run = write_run(tmp_path / "run", "DPOTrainer", DPO_DELTA, steps=steps or (0,), n_prompts=2)
    if not steps:
        run = write_values(tmp_path / "empty", {"chosen-1": []}, steps=())
    text = write_report(run, tmp_path / "report.html").read_text("utf-8")
    assert Outline(text).headings == QUESTIONS
    assert "needs two observations" in text
    assert embedded(Outline(text))["compares"] is False


def test_a_single_run_needs_no_name(dpo, tmp_path):
    assert f"<h3>{dpo.name} " in write_report(dpo, tmp_path / "report.html").read_text("utf-8")


def test_runs_without_tokens_or_squeezing_say_so(tmp_path):
    text = write_report(write_values(tmp_path / "run", {"chosen-1": [-1, -2, -3]}), tmp_path / "r.html").read_text(
        "utf-8"
    )
    assert "These runs kept no tokens" in text
    assert "kept no squeezing statistics" in text


def test_a_large_run_stays_small(tmp_path):
    run = write_run(tmp_path / "run", "DPOTrainer", DPO_DELTA, steps=tuple(range(100)), n_prompts=42, keep_tokens=0)
    path = write_report(run, tmp_path / "report.html")
    assert len(run.probes) >= 500
    assert path.stat().st_size < 7e6  # of which plotly.js is 4.8 MB


def test_report_loads_no_model_library():
    for file in Path(llm_dynamics.report.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not {name.split(".")[0] for name in names} & {"torch", "transformers", "trl", "peft"}
            ours = {name for name in names if name.startswith("llm_dynamics.")}
            assert {name.split(".")[1] for name in ours} <= {"files", "report", "runlog", "frames", "rules"}


def many_families(folder, n, response="Ten."):
    """A log of two observations in which each probe is a family of its own."""
    writer = RunLogWriter(folder)
    about = {"probe_id": [f"p/{i}" for i in range(n)], "prompt_id": "p", "family": [f"kind {i}" for i in range(n)]}
    probes = {
        "prompt": "How long?",
        "response": response,
        "prompt_ids": [[1]] * n,
        "response_ids": [[4]] * n,
        "n_cut": 0,
    }
    writer.start(pd.DataFrame(about | probes), {})
    for step in (0, 1):
        frame = pd.DataFrame(about | {"n_tokens": 1, "n_nonfinite": 0, "logp_sum": -1.0 - step})
        writer.write(step, sequences=frame, tokens=None, scalars=dict)
    return load_run(folder)


def test_more_families_than_can_be_told_apart_are_not_drawn_and_counted(tmp_path):
    run = many_families(tmp_path / "dynamics", 60)
    page = write_report(run, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "20 more families are not drawn" in page
    assert "kind 59" in page  # in the table
    curves = script_data(RunLogs({"run": run}))["curves"]["run"]
    assert all(len(traces) <= 2 * (MAX_FAMILIES + 1) for traces in curves.values())
    few = many_families(tmp_path / "few", 3)
    assert "more families are not drawn" not in write_report(few, tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_huge_text_is_cut_before_it_is_cleaned(tmp_path, monkeypatch):
    cleaned = []
    acting = text._ACTING

    class Counting:
        def sub(self, how, found):
            cleaned.append(len(found))
            return acting.sub(how, found)

    monkeypatch.setattr(text, "_ACTING", Counting())
    run = many_families(tmp_path / "dynamics", 2, response="x \x00" * 1_000_000)
    assert write_report(run, tmp_path / "page.html").stat().st_size < 8e6
    assert max(cleaned) < 50_000
    assert shortened(" " * 10_000 + "a b", 5) == "a b"
    assert shortened("a" + " " * 10_000 + "b", 5) == "a…"


@pytest.mark.parametrize("content", [b"my thesis", b"PAR1", b'{"a": 1}', b"\x89PNG"])
def test_a_file_that_is_no_page_is_not_written_over(tmp_path, content):
    run = many_families(tmp_path / "dynamics", 2)
    (tmp_path / "mine").write_bytes(content)
    with pytest.raises(ValueError, match="no HTML page"):
        write_report(run, tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == content
