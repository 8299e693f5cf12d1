"""The section "Why did it move?" of the page."""

import re
from html import unescape

import pytest

from llm_dynamics.report import write_report
from llm_dynamics.runlog import load_run, load_runs, schema

from .synthetic import HOSTILE, write_accounts, write_run
from .test_page import QUESTIONS, Outline, embedded

SHOWN = "[...document.querySelectorAll('.why-family:not([hidden])')].map((box) => box.dataset.whyFamily)"


@pytest.fixture(scope="module")
def path(explained, sft, tmp_path_factory):
    return write_report(load_runs({"sft": sft.path, "dpo": explained.path}), tmp_path_factory.mktemp("why") / "r.html")


@pytest.fixture(scope="module")
def hostile_path(hostile_account, tmp_path_factory):
    runs = load_runs({HOSTILE: hostile_account.path})
    return write_report(runs, tmp_path_factory.mktemp("hostile_why") / "r.html")


def choose(browser, which, place):
    browser.js(
        f"(() => {{ const pick = document.querySelector('[data-pick={which}]'); pick.selectedIndex = {place};"
        "pick.dispatchEvent(new Event('change')); })()"
    )


# ---- the document ----------------------------------------------------------------------------------------------------


def test_the_section_asks_why_and_shows_the_runs_that_were_explained(path):
    text = path.read_text("utf-8")
    outline = Outline(text)
    assert outline.headings == QUESTIONS
    assert re.findall(r'aria-label="Why families moved in (\w+)"', text) == ["dpo"]
    assert 'href="#why"' in text
    assert outline.tags.count("script") == 4
    assert len(embedded(outline)["why"]) == 1


def test_a_page_without_accounts_says_how_to_get_them_and_carries_nothing_else_of_it(sft, tmp_path):
    text = write_report(sft, tmp_path / "report.html").read_text("utf-8")
    outline = Outline(text)
    assert outline.headings == QUESTIONS
    assert "influence=True" in text.split('id="why"')[1].split("</section>")[0]
    assert embedded(outline)["why"] == []
    for left_over in ("waterfall", "data-why=", "why-steps"):
        assert left_over not in text.replace(outline.scripts[1], "")


def test_a_run_that_was_not_explained_is_named_with_the_way_to_change_that(path):
    text = re.sub(r"\s+", " ", unescape(path.read_text("utf-8")))
    assert "Not explained: sft. <code>watch(trainer, probes, influence=True)</code>" in text


def test_every_bar_has_its_label_and_number_in_the_table(path):
    text = unescape(path.read_text("utf-8"))
    table = text.split("Causes of the change of chosen in dpo, nats")[1].split("</table>")[0]
    labels = re.findall(r'aria-hidden="true"></span>([^<]+)', table)
    assert labels == [
        "chosen tokens, own prompt", "chosen tokens, other prompts", "rejected tokens, own prompt",
        "rejected tokens, other prompts", "momentum", "rest", "measured change",
    ]  # fmt: skip
    assert re.search(r'<span class="gathered">weight decay −[\d.]+, rounding', table)
    assert len(re.findall(r"<td>[+−][\d.]+</td>", table)) == len(labels)


def test_it_is_said_how_much_was_explained(path):
    text = path.read_text("utf-8")
    assert "All 24 optimizer steps were explained. The account explains 99.9984% of the measured change" in text
    assert re.search(r"chosen fell [\d.]+ nats over 24 explained steps: rejected tokens pushed it down by", text)


def test_a_run_of_which_some_steps_were_explained_says_so(tmp_path):
    run = write_run(tmp_path / "run", "SFTTrainer", {"chosen": 3.0}, steps=(0, 50), n_prompts=2)
    run = write_accounts(
        run, steps=range(5, 51, 5), roles=("trained",), own=False, nan_step=10, detail="probe", probes=()
    )
    assert "Training tokens were kept of" not in write_report(run, tmp_path / "report.html").read_text("utf-8")
    (run.path / "training_tokens" / schema.part_name(5)).unlink()
    text = write_report(load_run(run.path), tmp_path / "report.html").read_text("utf-8")
    assert "Training tokens were kept of 9 of the 10 explained steps" in text
    assert "10 of 50 optimizer steps were explained; the bars add up over those, not over the whole run." in text
    assert "1 explained step left out" in text
    assert "trained tokens" in text
    assert "own prompt" not in text.split('<section id="why"')[1].split("</section>")[0]


def test_hostile_text_is_never_markup(hostile_path):
    text = hostile_path.read_text("utf-8")
    outline = Outline(text)
    assert HOSTILE not in text
    assert "<img" not in text.replace(outline.scripts[1], "")
    assert not outline.handlers
    assert outline.tags.count("script") == 4
    (data,) = embedded(outline)["why"]
    assert HOSTILE in data["families"]


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_section_renders_without_errors_or_sideways_scrolling(browser, path, width, dark):
    browser.open(path, width=width, dark=dark)
    assert browser.errors == []
    assert browser.js("document.documentElement.scrollWidth") == width
    assert browser.js(SHOWN) == ["chosen"]
    bars = "[...document.querySelectorAll('.why-family:not([hidden]) .why-steps path')]"
    assert (
        browser.js(f"{bars}.filter((bar) => bar.checkVisibility() && bar.getBoundingClientRect().height > 1).length")
        > 48
    )


def test_bars_of_the_waterfall_are_drawn_to_scale(browser, path):
    browser.open(path)
    rows = browser.js(
        "[...document.querySelectorAll('.why-family:not([hidden]) .waterfall tbody tr')].map((row) =>"
        "[row.querySelector('.fallbar').getBoundingClientRect().width, row.lastElementChild.textContent])"
    )
    sizes = [
        (width, abs(float(text.replace("−", "-")))) for width, text in rows if abs(float(text.replace("−", "-"))) > 1
    ]
    assert len(sizes) >= 5
    for width, nats in sizes:
        assert width / nats == pytest.approx(sizes[0][0] / sizes[0][1], rel=0.02)


def test_picking_a_family_shows_its_causes_and_its_training_tokens(browser, path):
    browser.open(path)
    choose(browser, "family", 1)
    assert browser.js(SHOWN) == ["rejected"]
    assert browser.js("document.querySelector('[data-pick=target]').selectedOptions[0].textContent") == "rejected"
    assert browser.js("document.querySelectorAll('.why-columns mark').length") == 20
    places = browser.js("[...document.querySelectorAll('.why-column .strong .place')].map((one) => one.textContent)")
    assert sorted(map(int, places)) == sorted([*range(1, 11)] * 2)
    assert browser.errors == []


def test_a_sentence_reads_as_it_was_trained_with_its_token_marked(browser, path):
    browser.open(path)
    choose(browser, "target", 0)
    sentence = "[...document.querySelector('.sentence').childNodes].filter((one) => one.nodeName !== 'SUP')"
    words = browser.js(f"{sentence}.map((one) => one.textContent).join('')")
    assert words == "Eggs are fine however you cook them; just leave it in the pan until you remember it again."
    marked = "document.querySelector('.sentence mark').style.backgroundColor"
    assert browser.js(marked).startswith("rgb(var(--fell-rgb)")
    assert "72 training tokens left out" in browser.js("document.querySelector('.why-tokens').textContent")


def test_every_control_can_be_reached_by_tab(browser, path):
    browser.open(path)
    reached = set()
    for _ in range(60):
        browser.press("Tab", 9)
        reached.add(browser.js("(({ dataset, tagName }) => dataset.pick || tagName)(document.activeElement)"))
    assert reached >= {"family", "target", "SUMMARY"}


def test_the_explained_share_is_drawn_by_step_against_its_line(browser, path):
    browser.open(path)
    curve = "document.querySelector('.why-explained')"
    assert browser.js(f"{curve}.data[0].x.length") == 24
    assert browser.js(f"{curve}.data[0].y[0]") == pytest.approx(1 - 0.99998, rel=1e-3)  # what is missing, upside down
    assert browser.js(f"{curve}.data[1].y[0]") == pytest.approx(1 - 0.41, rel=1e-3)  # by the gradient alone
    assert browser.js(f"{curve}.layout.shapes[0].y0") == pytest.approx(1 - 0.9)
    low, high = browser.js(f"{curve}.layout.yaxis.range")
    assert low > -1 > high  # the line is in sight
    words = browser.js("document.querySelector('.why-explained-box figcaption').textContent")
    assert "dashed line is 90%. No step is below 90%; the lowest is 99.998%." in words


def test_causes_can_be_added_up_over_steps(browser, path):
    browser.open(path)
    steps = "document.querySelector('.why-family:not([hidden]) .why-steps').data"
    single = browser.js(f"{steps}.map((trace) => trace.y)")
    browser.js("document.querySelector('[data-pick=cumulative]').click()")
    summed = browser.js(f"{steps}.map((trace) => trace.y)")
    for alone, running in zip(single, summed, strict=True):
        assert running == pytest.approx([sum(alone[: place + 1]) for place in range(len(alone))], abs=1e-9)


def test_explained_runs_stand_side_by_side_with_one_family_and_one_scale(browser, explained, tmp_path):
    other = write_run(tmp_path / "other", "DPOTrainer", {"chosen": -1.0, "rejected": -2.0}, steps=(0, 4), n_prompts=3)
    other = write_accounts(other, steps=range(1, 5), scale=3.0)
    page = write_report(load_runs({"one": explained.path, "other": other.path}), tmp_path / "report.html")
    tops = "[...document.querySelectorAll('.why-run')].map((run) => run.getBoundingClientRect().top)"
    browser.open(page, width=390)
    assert len(set(browser.js(tops))) == 2
    browser.open(page)
    assert len(set(browser.js(tops))) == 1
    choose(browser, "family", 1)
    assert browser.js(SHOWN) == ["rejected", "rejected"]
    steps = "[...document.querySelectorAll('.why-family:not([hidden]) .why-steps')]"
    first, second = browser.js(f"{steps}.map((one) => one.layout.yaxis.range)")
    assert first == second
    widths = browser.js(
        "[...document.querySelectorAll('.why-family:not([hidden]) .waterfall tbody tr')].map((row) =>"
        "[row.querySelector('.fallbar').getBoundingClientRect().width, row.lastElementChild.textContent])"
    )
    sizes = [(width, abs(float(text.replace("−", "-")))) for width, text in widths]
    ratios = [width / nats for width, nats in sizes if width > 20]
    assert len(ratios) >= 6
    assert max(ratios) == pytest.approx(min(ratios), rel=0.02)
    browser.js("document.querySelectorAll('[data-pick=cumulative]')[1].click()")
    assert browser.js("document.querySelectorAll('[data-pick=cumulative]:checked').length") == 2
    assert browser.errors == []


def test_bars_follow_the_theme_and_paper_is_light(browser, path):
    colour = "document.querySelector('.why-family:not([hidden]) .why-steps').data[0].marker.color"
    chip = "getComputedStyle(document.querySelector('.waterfall .chip')).backgroundColor"
    browser.open(path, dark=True)
    assert (browser.js(colour), browser.js(chip)) == ("#6db3f2", "rgb(109, 179, 242)")
    browser.js("window.dispatchEvent(new Event('beforeprint'))")
    assert (browser.js(colour), browser.js(chip)) == ("#0b5cad", "rgb(11, 92, 173)")


def test_hostile_text_shows_as_text_and_nothing_of_it_runs(browser, hostile_path):
    browser.open(hostile_path, width=390)
    for place in (1, 0):
        choose(browser, "family", place)
    assert browser.errors == []
    assert browser.js("document.querySelectorAll('img, iframe, object, embed').length") == 0
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert HOSTILE in browser.js("document.querySelector('#why .warned').textContent")
    assert HOSTILE.split(" ")[0] in browser.js("document.querySelector('.why-tokens').textContent")
    assert "\u202e" not in browser.js("document.querySelector('#why').textContent")
