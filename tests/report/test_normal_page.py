"""The section "Is it normal?": what it says of each run, in words, safely."""

import re
from html import unescape

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_dynamics.frames.numbers import percent
from llm_dynamics.report import write_report
from llm_dynamics.report.normal import normal_view
from llm_dynamics.rules import judge
from llm_dynamics.runlog import load_run, load_runs
from llm_dynamics.runlog.schema import SEQUENCES, part_name
from tests.runlog.logs import as_before_stamps

from .reinforced import write_rollouts
from .synthetic import HOSTILE, write_run, write_values
from .test_page import Outline


def section(text):
    return text.split('<section id="normal"')[1].split("</section>")[0]


def verdicts_on(text, run):
    """The part of the section about one run, as markup."""
    return section(text).split(f'aria-label="Verdicts on {run}"')[1].split("</article>")[0]


def shown(markup):
    """What is read of a piece of markup: no tags, one space between words."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", markup)).replace("−", "-").split())


@pytest.fixture(scope="module")
def page(both, tmp_path_factory):
    return write_report(both, tmp_path_factory.mktemp("page") / "report.html").read_text("utf-8")


@pytest.mark.parametrize("run", ["sft", "dpo"])
def test_every_verdict_of_every_run_is_told(page, both, run):
    markup = verdicts_on(page, run)
    text, cards = shown(markup), [shown(card) for card in markup.split('<div class="verdict">')[1:]]
    verdicts = [own for own in judge(both[run]) if own.kind == "fault"]
    assert {verdict.status for verdict in verdicts} == {"found", "clear", "unknown"}
    found = [verdict for verdict in verdicts if verdict.status == "found"]
    answered = [verdict for verdict in verdicts if verdict.status != "unknown"]
    assert len(cards) == len(found)
    assert text.startswith(f"> {run}")
    assert f"{len(found)} of the {len(answered)} rules for faults that this run can answer found something." in text
    for card, verdict in zip(cards, found, strict=True):
        said = [f"found {verdict.name} {verdict.question}", f"seen {verdict.evidence}", f"limit {verdict.threshold}"]
        for part in [*said, f"remedy {verdict.remedy}"]:
            assert part in card
    for verdict in verdicts:
        if verdict.status == "clear":
            assert f"clear {verdict.name} {verdict.evidence}" in text
        if verdict.status == "unknown":
            folded = shown(markup.split("<details")[1].split("</details>")[0])
            assert f"{verdict.name} {verdict.evidence}" in folded


def test_what_was_found_comes_before_what_is_clear_and_the_unknown_is_folded(page):
    markup = verdicts_on(page, "sft")
    assert markup.index("> found<") < markup.index("> clear<") < markup.index("<details") < markup.index("> not told<")
    assert "<details open" not in markup


def test_status_is_a_word_and_a_shape(page):
    marks = re.findall(r'class="status"><span aria-hidden="true">(.)</span> ([a-z ]+)<', section(page))
    assert dict(marks) == {"▲": "found", "✓": "as hoped", "○": "clear", "?": "not told"}
    assert len(marks) == section(page).count('class="status"')


def test_the_sections_order_leads_from_what_moved_to_the_verdicts(page):
    assert page.index('id="glance"') < page.index('id="moved"') < page.index('id="normal"') < page.index('id="mass"')


def test_left_out_probes_are_told(page):
    assert "left out: 1 of 12 other_test" in shown(verdicts_on(page, "dpo"))


def test_citations_are_resolved(page):
    for source in ("arXiv 2407.10490", "arXiv 2505.18830", "arXiv 2410.08847"):
        assert source in section(page)


def test_a_verdict_that_hangs_on_a_few_prompts_says_so_on_the_page(tmp_path):
    values = {f"chosen-{i}": [-20.0, -21.0 if i < 7 else -19.0] for i in range(12)}
    run = write_values(tmp_path / "run", values | {f"rejected-{i}": [-30.0, -38.0] for i in range(12)}, steps=(0, 1))
    rows = run.sequences.assign(prompt_id=run.sequences["probe_id"].str.rsplit("-", n=1).str[1])
    as_before_stamps(run.path)
    for step, part in rows.groupby("step"):
        table = pa.Table.from_pandas(part, schema=SEQUENCES, preserve_index=False)
        pq.write_table(table, run.path / "sequences" / part_name(step))
    run = load_run(run.path)  # the one above remembers what it read before
    (unsure,) = (own for own in judge(run) if own.name == "likelihood displacement")
    assert unsure.agreement < 0.95
    text = shown(verdicts_on(write_report(run, tmp_path / "report.html").read_text("utf-8"), run.name))
    assert f"unsure: {percent(unsure.agreement)} of resamples of its 12 prompts decide so" in text


def test_a_minus_is_a_minus_and_a_name_keeps_its_hyphen(tmp_path):
    run = write_values(
        tmp_path / "run", {"chosen-1": [-3, -4], "rejected-1": [-5, -9], "a-2b-1": [-1, float("nan")]}, steps=(0, 1)
    )
    view = normal_view("run", run)
    evidence = {verdict["name"]: verdict["evidence"] for verdict in (*view["found"], *view["clear"])}
    assert "chosen −1.00 nats" in evidence["likelihood displacement"]
    assert "(chosen, rejected, a-2b)" in evidence["probes and log"]


def test_nothing_found_is_said(tmp_path):
    run = write_run(tmp_path / "run", "Trainer", {"chosen": 3.0, "rejected": 4.0}, steps=(0, 5), n_prompts=10)
    text = write_report(run, tmp_path / "report.html").read_text("utf-8")
    assert "None of the 2 rules for faults that this run can answer found something." in section(text)
    assert '<div class="verdict">' not in section(text)


def test_names_of_runs_and_families_are_escaped(hostile, tmp_path):
    text = write_report(load_runs({HOSTILE: hostile.path}), tmp_path / "report.html").read_text("utf-8")
    assert HOSTILE not in section(text)
    assert not {"img", "script"} & set(Outline(section(text)).tags)
    assert HOSTILE in unescape(section(text)).split("fewer than 6 prompts in 3 of 3 families")[1]


def test_what_would_act_in_a_name_is_drawn_out(tmp_path):
    run = write_values(tmp_path / "run", {"\u202eabc-1": [-1, -2]}, steps=(0, 1))
    text = section(write_report(run, tmp_path / "report.html").read_text("utf-8"))
    assert "\u202e" not in text
    assert "\\u202eabc" in text


@pytest.mark.parametrize("kind", ["grpo", "one observation", "empty", "no statistics", "all NaN"])
def test_runs_of_every_kind_are_judged(tmp_path, kind):
    if kind == "grpo":
        run = write_rollouts(
            write_run(tmp_path / "run", "GRPOTrainer", {"correct": 2.0}, steps=(0, 5), n_prompts=2), shift=-0.8
        )
    elif kind == "all NaN":
        run = write_values(tmp_path / "run", {"chosen-1": [float("nan")] * 3})
    else:
        steps = {"empty": (), "one observation": (0,)}.get(kind, (0, 10))
        run = write_values(tmp_path / "run", {"chosen-1": [-1.0] * 2, "rejected-1": [-2.0] * 2}, steps=steps)
    text = shown(verdicts_on(write_report(run, tmp_path / "report.html").read_text("utf-8"), run.name))
    assert {"grpo": "found lazy likelihood", "one observation": "one observation: nothing to compare",
            "empty": "no observation: nothing to compare", "no statistics": "squeezing needs a family that is not",
            "all NaN": "1 probe with NaN or infinite tokens"}[kind] in text  # fmt: skip
    assert not re.search(r"[+-]?\bnan\b", text)


def test_the_section_is_small(page):
    assert len(section(page).encode()) < 20_000
