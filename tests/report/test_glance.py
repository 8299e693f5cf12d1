"""The section "At a glance": a newcomer reads from it what fell, why, and what to try."""

import re
from html import unescape

import pytest

from llm_dynamics.report import write_report
from llm_dynamics.report.glance import MOST, _why
from llm_dynamics.rules import judge
from llm_dynamics.runlog import load_runs

from .synthetic import HOSTILE, write_accounts, write_run, write_values


def section(text):
    return text.split('<section id="glance"')[1].split("</section>")[0]


def glance_at(text, run):
    """What is read about one run: no tags, one space between words."""
    part = section(text).split(f'aria-label="{run} at a glance"')[1].split("</article>")[0]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", part.split(">", 1)[1])).replace("−", "-").split())


@pytest.fixture(scope="module")
def page(both, tmp_path_factory):
    return write_report(both, tmp_path_factory.mktemp("page") / "report.html").read_text("utf-8")


def test_it_stands_before_everything_else(page):
    assert page.index('id="glance"') < page.index('id="moved"')


def test_it_tells_what_fell_and_what_rose(page, both):
    for name, run in both.runs.items():
        text = glance_at(page, name)
        change = run.delta_from_start().query("step == 60").groupby("family")["delta_logp_sum"].mean()
        assert f"fell {(change < 0).sum()} of 12 families" in text
        assert f"rose {(change > 0).sum()} of 12 families" in text
        assert f"rejected {change['rejected']:+.{1 if abs(change['rejected']) >= 10 else 2}f}" in text
    # all of dpo's families fell: chosen is named though it moved least, the largest change first
    named = re.findall(r"</svg>(\w+) <strong>", section(page).split('aria-label="dpo at')[1].split("rose")[0])
    assert len(named) == MOST
    assert named[0] == "rejected"
    assert named[-1] == "chosen"
    assert "and 8 more" in glance_at(page, "dpo")


def test_every_verdict_that_was_found_is_named_with_its_remedy_and_leads_to_its_numbers(page, both):
    for place, (name, run) in enumerate(both.runs.items()):
        text = glance_at(page, name)
        found = [verdict for verdict in judge(run) if verdict.status == "found" and verdict.kind == "fault"]
        assert found
        for number, verdict in enumerate(found):
            unsure = ", unsure" if verdict.unsure else ""
            assert f"{verdict.name}{unsure} {verdict.question} Try: {verdict.remedy}" in text
            anchor = f"verdict-{place}-{number}"
            assert f'href="#{anchor}"' in section(page)
            assert f'<h4 id="{anchor}">{verdict.name}</h4>' in page


def test_every_link_leads_somewhere(page):
    links = set(re.findall(r'href="#([^"]+)"', page))
    assert links
    assert links <= set(re.findall(r'id="([^"]+)"', page))


def test_it_tells_why_where_steps_were_explained(explained, tmp_path):
    text = glance_at(write_report(explained, tmp_path / "report.html").read_text("utf-8"), explained.name)
    assert re.search(r"why chosen -\d+\.\d+ nats in all 24 steps: pushed down most by [a-z ,]+ \(-", text)


def test_momentum_is_put_in_words_where_it_is_named():
    named = {"name": "chosen", "measured": -1.0, "bars": [{"label": "momentum", "share": -2.0}]}
    other = named | {"bars": [{"label": "rejected tokens", "share": -2.0}]}
    assert _why([named], (1, 1)).endswith(
        "by momentum (−2.00). Momentum is what the optimizer still applies of the gradients of earlier steps."
    )
    assert _why([other], (1, 2)) == "chosen −1.00 nats in 1 of 2 steps: pushed down most by rejected tokens (−2.00)."


def test_where_no_step_was_explained_it_says_how(page):
    assert (
        "why No step was explained: watch(..., influence=True) , or --watch_influence of the recipes, does it."
        in glance_at(page, "dpo")
    )


@pytest.mark.parametrize("steps", [(0,), ()], ids=["one observation", "none"])
def test_a_run_too_short_to_compare_says_so(tmp_path, steps):
    run = write_values(tmp_path / "run", {"chosen-1": [-1] * len(steps)}, steps=steps)
    text = glance_at(write_report(run, tmp_path / "report.html").read_text("utf-8"), run.name)
    assert "Nothing to compare yet" in text
    assert "fell" not in text


def test_nothing_found_is_said(tmp_path):
    run = write_run(tmp_path / "run", "Trainer", {"chosen": 3.0, "rejected": 4.0}, steps=(0, 5), n_prompts=10)
    text = write_report(run, tmp_path / "report.html").read_text("utf-8")
    assert "No rule found a fault." in glance_at(text, run.name)


def test_names_are_escaped(hostile_account, tmp_path):
    write_accounts(hostile_account, steps=range(1, 2))
    runs = load_runs({HOSTILE: hostile_account.path})
    text = section(write_report(runs, tmp_path / "report.html").read_text("utf-8"))
    assert HOSTILE not in text
    assert HOSTILE in unescape(text)
