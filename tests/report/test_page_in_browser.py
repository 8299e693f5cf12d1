"""The report in a real browser. Skipped where no Chromium is installed (Debian: `apt-get install chromium`)."""

import pytest

from llm_dynamics.report import write_report
from llm_dynamics.runlog import load_runs

from .synthetic import HOSTILE, write_run

FULL_RANGE = "document.querySelector('[data-curves=dpo]').layout.yaxis.range"


@pytest.fixture(scope="module")
def page(both, tmp_path_factory):
    return write_report(both, tmp_path_factory.mktemp("page") / "report.html")


def lines(browser, run="dpo"):
    return browser.js(f"document.querySelector('[data-curves={run}]').data.map((trace) => trace.meta.family)")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_renders_without_errors_requests_or_sideways_scrolling(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    assert browser.errors == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert browser.js("document.documentElement.scrollWidth") == width
    assert browser.js("document.querySelectorAll('.plot > .plot-container').length") == 2 + 2 * 8 + 1  # a heat-map
    boxes = "[...document.querySelectorAll('main > section')].map((section) => section.getBoundingClientRect().height)"
    assert min(browser.js(boxes)) > 100


def test_panels_stand_side_by_side_only_where_there_is_room(browser, page):
    tops = "[...document.querySelectorAll('#moved .run')].map((run) => run.getBoundingClientRect().top)"
    browser.open(page, width=1280)
    assert len(set(browser.js(tops))) == 1
    browser.open(page, width=390)
    assert len(set(browser.js(tops))) == 2


def test_figures_follow_the_theme(browser, page):
    ink = "document.querySelector('[data-curves=dpo]').data.at(-1).line.color"
    browser.open(page, dark=False)
    light = browser.js(ink)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.wait_for(f"{ink} !== '{light}'")
    assert browser.js("getComputedStyle(document.documentElement).backgroundColor") == "rgb(21, 23, 26)"


def test_switches_change_the_curves(browser, page):
    browser.open(page)
    change = browser.js(FULL_RANGE)
    assert change == browser.js("document.querySelector('[data-curves=sft]').layout.yaxis.range")  # shared
    browser.js("document.querySelector('#curve-controls [value=token]').click()")
    assert browser.js(FULL_RANGE)[0] == pytest.approx(change[0] / 13, rel=1e-3)
    browser.js("document.querySelector('#curve-controls [value=value]').click()")
    assert browser.js(FULL_RANGE)[0] < -118 / 13  # log-probs themselves: random_tokens starts there
    count = len(lines(browser))
    browser.js("document.querySelector('#curve-controls [name=band]').click()")
    assert len(lines(browser)) == 2 * count


def test_legend_hides_and_shows_a_family_in_every_run_by_keyboard(browser, page):
    browser.open(page)
    browser.js("document.querySelector('[data-family=random_tokens]').focus()")
    browser.press(" ", 32, " ")
    assert "random_tokens" not in lines(browser) + lines(browser, "sft")
    assert browser.js("document.querySelector('[data-family=random_tokens]').ariaPressed") == "false"
    browser.js("document.querySelector('[data-show=main]').click()")
    assert set(lines(browser)) == {"chosen", "rejected", "argmax (chosen prefix)", "argmax (rejected prefix)"}
    browser.js("document.querySelector('[data-show=all]').click()")
    assert "random_tokens" in lines(browser)


def test_every_control_can_be_reached_by_tab(browser, page):
    browser.open(page)
    reached = set()
    name = (
        "(({ id, name, dataset: { family, place, m } }) => id || name || family || place || m)(document.activeElement)"
    )
    for _ in range(90):
        browser.press("Tab", 9)
        reached.add(browser.js(name))
    assert reached >= {"scale", "unit", "band", "chosen", "argmax (rejected prefix)"}
    assert reached >= {"text", "family", "run", "order", "finder-more", "probe-prompt", "0", "heatmap-box"}


def test_a_long_response_scrolls_in_its_own_box(browser, tmp_path):
    run = write_run(tmp_path / "run", "DPOTrainer", {"rejected": -9.0}, n_prompts=1, n_tokens=120)
    browser.open(write_report(run, tmp_path / "report.html"), width=390)
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert browser.js("document.getElementById('heatmap').getBoundingClientRect().width") > 2000


def test_hostile_text_shows_as_text_and_nothing_of_it_runs(browser, hostile, tmp_path):
    path = write_report(load_runs({HOSTILE: hostile.path}), tmp_path / "report.html", title=HOSTILE)
    browser.open(path, width=390)
    assert browser.errors == []  # an alert() or a refused load would be among them
    assert browser.js("document.querySelectorAll('img, iframe, object, embed').length") == 0
    assert browser.js("document.querySelectorAll('script').length") == 4
    assert browser.js("document.title") == HOSTILE
    assert browser.js("document.getElementById('probe-prompt').textContent") == HOSTILE
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert HOSTILE in browser.js("document.getElementById('finder-list').textContent")
    assert browser.js("document.getElementById('probe-title').textContent").startswith(f"rejected in {HOSTILE}")
    shown = browser.js("[...document.querySelectorAll('#heatmap .xtick text')].map((tick) => tick.textContent)")
    assert shown[0] == HOSTILE[:13] + "…"
    assert shown[1] == "&lt;b&gt;"
    browser.js("document.getElementById('heatmap').scrollIntoView()")
    box = browser.js("document.querySelector('#heatmap .nsewdrag').getBoundingClientRect().toJSON()")
    for x in (box["left"] + 2, box["left"] + 6):
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=box["top"] + 20)
    browser.wait_for("document.querySelector('#heatmap .hovertext')")
    assert HOSTILE in browser.js("document.querySelector('#heatmap .hovertext').textContent").replace("·", " ")
    assert browser.js("document.querySelectorAll('img').length") == 0
    assert browser.errors == []


def test_print_is_light_whatever_the_screen(browser, page):
    browser.open(page, dark=True)
    browser.js("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.js("getComputedStyle(document.documentElement).backgroundColor") == "rgb(253, 252, 250)"
    assert browser.js("document.querySelector('[data-curves=dpo]').data.at(-1).line.color") == "#55585f"
    browser.js("window.dispatchEvent(new Event('afterprint'))")
    assert browser.js("document.querySelector('[data-curves=dpo]').data.at(-1).line.color") == "#bdbcb8"
    assert browser.errors == []
