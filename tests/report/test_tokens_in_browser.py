"""The section "Which tokens?" in a real browser: find a probe, unpack its tokens, choose one."""

import math

import pytest

from llm_dynamics.report import write_report
from llm_dynamics.runlog import RunLogs, load_runs

from .synthetic import DPO_DELTA, HOSTILE, write_run, write_values
from .unpacking import unpack_block, unpack_json

TITLE = "document.getElementById('probe-title').textContent"
FOUND = "[...document.querySelectorAll('#finder-list [role=option]')]"
COUNT = "document.getElementById('finder-count').textContent"
TOKENS = "[...document.querySelectorAll('#probe-response [role=option]')]"


@pytest.fixture(scope="module")
def page(both, tmp_path_factory):
    return write_report(both, tmp_path_factory.mktemp("page") / "report.html")


def find(browser, **wanted):
    """Fill in the form as a user would, and wait until the list follows."""
    sets = "".join(f"form.elements.{name}.value = {value!r};" for name, value in wanted.items())
    form = "const form = document.getElementById('finder');"
    browser.js(f"(() => {{ {form} {sets} form.dispatchEvent(new Event('input')); }})()")
    browser.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def families_found(browser):
    return browser.js(f"{FOUND}.map((option) => option.querySelector('.found-family').textContent)")


def changes_found(browser):
    texts = browser.js(f"{FOUND}.map((option) => option.querySelector('.change').textContent)")
    return [float(text.replace("−", "-").removesuffix(" nats")) for text in texts if text != "not finite"]


def test_all_probes_are_listed_those_first_that_moved_most(browser, page):
    browser.open(page)
    assert browser.js(COUNT) == "288 probes; the first 50 are listed."
    assert browser.js(f"{FOUND}.length") == 50
    sizes = [abs(change) for change in changes_found(browser)]
    assert sizes == sorted(sizes, reverse=True)
    browser.js("document.getElementById('finder-more').click()")
    assert browser.js(f"{FOUND}.length") == 100
    assert browser.js(f"document.activeElement === {FOUND}[50]")


def test_probes_are_found_by_family_run_text_and_order(browser, page, both):
    browser.open(page)
    find(browser, family="rejected_format", order="rose")
    assert browser.js(COUNT) == "24 of 288 probes."
    assert set(families_found(browser)) == {"rejected_format"}
    changes = changes_found(browser)
    assert changes == sorted(changes, reverse=True)
    find(browser, run="dpo", order="fell")
    assert browser.js(COUNT) == "12 of 288 probes."
    assert changes_found(browser) == sorted(changes_found(browser))
    assert set(browser.js(f"{FOUND}.map((option) => option.querySelector('.found-run').textContent)")) == {"dpo"}
    find(browser, family="", text="BOIL AN egg")  # of the prompt; in the response it reads "gently boil"
    assert browser.js(COUNT) == "12 of 288 probes."
    assert browser.js(f"{FOUND}[0].querySelector('mark').textContent") == "boil an egg"
    find(browser, text="ten  minutes in")  # runs of blanks count as one
    assert browser.js(COUNT) == "144 of 288 probes; the first 50 are listed."
    find(browser, text="no such text")
    assert browser.js(COUNT) == "0 of 288 probes."
    assert browser.js(f"{FOUND}.length") == 0
    assert browser.errors == []


def test_a_probe_that_is_not_finite_comes_last(browser, page):
    browser.open(page)
    find(browser, family="other_test", run="dpo", order="fell")
    assert browser.js(f"{FOUND}.at(-1).querySelector('.change').textContent") == "not finite"
    assert len(changes_found(browser)) == 11


def test_a_probe_is_chosen_by_keyboard_alone(browser, page):
    browser.open(page)
    find(browser, family="chosen", run="sft")
    browser.js("document.getElementById('finder').elements.text.focus()")
    browser.press("ArrowDown", 40)
    assert browser.js(f"document.activeElement === {FOUND}[0]")
    browser.press("ArrowDown", 40)
    browser.press("End", 35)
    browser.press("ArrowUp", 38)
    assert browser.js(f"document.activeElement === {FOUND}[10]")
    browser.press("Home", 36)
    before = browser.js(TITLE)
    browser.press("Enter", 13)
    browser.wait_for(f"{TITLE} !== {before!r}")
    assert browser.js(TITLE).startswith("chosen in sft+")
    assert browser.js(f"{FOUND}.map((option) => option.ariaSelected)").count("true") == 1
    assert browser.js(f"document.activeElement === {FOUND}[0]")  # the place in the list is kept


def test_the_heat_map_shows_the_log(browser, page, dpo):
    browser.open(page)
    assert browser.js("page.showProbe('dpo', 'chosen-2')")
    assert browser.js(TITLE).startswith("chosen in dpo")
    tokens = dpo.tokens.query("probe_id == 'chosen-2'")
    wide = tokens.pivot(index="step", columns="position", values="logp")
    seen = browser.js("document.getElementById('heatmap').data[0].z")
    assert len(seen) == len(wide)
    for row, wanted in zip(seen, (wide - wide.iloc[0]).to_numpy().tolist(), strict=True):
        assert row == pytest.approx(wanted, abs=0.0021)  # twice half of the resolution
    assert browser.js("document.getElementById('heatmap').data[0].y") == [str(step) for step in wide.index]
    assert browser.js("document.getElementById('heatmap').data[0].customdata[3][2].slice(2, 4)") == ["4", "·the"]
    assert browser.js("document.getElementById('probe-response').textContent") == "".join(tokens["token"].iloc[:13])
    assert "kept to 0.002 nats" in browser.js("document.getElementById('probe-note').textContent")


def test_the_browser_unpacks_what_the_slow_twin_does(browser, tmp_path):
    run = write_run(tmp_path / "run", "DPOTrainer", {"rejected": -9.0, "chosen": 2.0}, n_prompts=2, jitter=0.3)
    path = write_report(RunLogs({"a": run}), tmp_path / "report.html")
    index, *blocks = path.read_text("utf-8").split('id="token-data">')[1].split("</script>")[0].split("\n")
    strings = unpack_json(index)["strings"]
    browser.open(path)
    unpacking = (
        "page.unpack.index().then((index) => Promise.all(index.probes.map((p) => page.unpack.tokens(index, p))))"
    )
    for probe in browser.js(unpacking):
        twin = next(
            block for block in (unpack_block(text, strings) for text in blocks)
            if block["logp"][0] == pytest.approx([row[0] for row in probe["logp"]], abs=1e-9)
        )  # fmt: skip
        assert [*map(list, zip(*probe["rank"], strict=True))] == twin["rank"]
        assert [*map(list, zip(*probe["greedy"], strict=True))] == twin["greedy"]
        assert [*map(list, zip(*probe["logp"], strict=True))] == [pytest.approx(row, abs=1e-9) for row in twin["logp"]]
        assert (probe["tokens"], probe["positions"]) == (twin["tokens"], twin["positions"])


def test_a_probe_can_be_shown_from_elsewhere_at_one_of_its_tokens(browser, page):
    browser.open(page)
    browser.js("document.addEventListener('probe', (event) => { window.last = event.detail; })")
    assert browser.js("page.showProbe('sft', 'rejected-1', 4)")
    assert browser.js("window.last") == {"run": "sft", "probeId": "rejected-1", "position": 4}
    assert browser.js("document.activeElement.id") == "probe-title"
    assert 0 <= browser.js("document.getElementById('probe').getBoundingClientRect().top") < 100
    assert browser.js("page.showProbe('sft', 'not there')") is False
    assert browser.js("page.showProbe('sft', 'rejected-1', 99)") is True  # no such token: the probe alone
    assert browser.errors == []


def test_choosing_a_token_tells_its_numbers_and_the_other_sections(browser, page, dpo):
    browser.open(page)
    browser.js("document.addEventListener('probe', (event) => { (window.told ??= []).push(event.detail); })")
    browser.js("page.showProbe('dpo', 'rejected-0')")
    browser.js(f"{TOKENS}[0].focus()")
    browser.press("ArrowRight", 39)
    browser.press("ArrowRight", 39)
    browser.press(" ", 32, " ")
    assert browser.js("window.told") == [{"run": "dpo", "probeId": "rejected-0", "position": 2}]
    assert browser.js(f"{TOKENS}.map((option) => option.ariaSelected).indexOf('true')") == 2
    assert browser.js("document.getElementById('heatmap').layout.shapes[0].x0") == 1.5
    token = dpo.tokens.query("probe_id == 'rejected-0' and position == 2")["logp"]
    detail = browser.js("document.getElementById('token-detail').textContent").replace("−", "-")
    assert "·minutes token 3 of 13" in detail
    assert f"{token.iloc[-1]:.1f}" in detail
    assert browser.js("document.querySelectorAll('#token-detail tbody tr').length") == 13
    # a click on a cell of the heat-map does the same
    browser.js("document.getElementById('heatmap').scrollIntoView()")
    box = browser.js("document.querySelector('#heatmap .nsewdrag').getBoundingClientRect().toJSON()")
    x = box["left"] + box["width"] * 7.5 / 13
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=box["top"] + 30)
    browser.wait_for("document.querySelector('#heatmap .hovertext')")
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=box["top"] + 30, button="left", clickCount=1)
    browser.wait_for("window.told.length === 2")
    assert browser.js("window.told[1]") == {"run": "dpo", "probeId": "rejected-0", "position": 7}


def test_another_probe_of_the_prompt_and_the_same_in_the_other_run_are_one_click_away(browser, page):
    browser.open(page)
    browser.js("page.showProbe('dpo', 'rejected-3')")
    kin = "[...document.querySelectorAll('#probe-kin button')]"
    assert browser.js(f"{kin}.length") == 12 + 1
    browser.js(f"{kin}.at(-1).click()")
    browser.wait_for(f"{TITLE}.startsWith('rejected in sft')")
    browser.js(f"{kin}.find((button) => button.textContent.startsWith('random_tokens')).click()")
    browser.wait_for(f"{TITLE}.startsWith('random_tokens in sft')")
    assert browser.js("document.querySelector('#probe-kin [aria-current]').textContent").startswith("random_tokens")


def test_a_probe_without_tokens_shows_its_text_and_says_so(browser, page):
    browser.open(page)
    browser.js("page.showProbe('dpo', 'chosen-7')")
    assert browser.js("document.getElementById('heatmap-box').hidden")
    assert browser.js("document.getElementById('probe-response').textContent").startswith("About ten minutes")
    assert "not in this page" in browser.js("document.getElementById('probe-note').textContent")
    assert browser.js(f"{TOKENS}.length") == 0
    browser.js("page.showProbe('dpo', 'chosen-1')")
    assert browser.js("document.getElementById('heatmap-box').hidden") is False
    assert browser.errors == []


def test_runs_without_tokens_or_observations_can_be_searched(browser, tmp_path):
    for place, values in enumerate(({"chosen-1": [-1, -2, -4], "rejected-1": [-1, -1, math.nan]}, {"chosen-1": []})):
        run = write_values(tmp_path / f"run{place}", values, steps=(0, 10, 20) if place == 0 else ())
        browser.open(write_report(run, tmp_path / "report.html"))
        assert browser.errors == []
        assert browser.js(f"{FOUND}.length") == len(values)
        assert browser.js("document.querySelector('#finder [name=run]')") is None  # one run needs no choice


def test_on_paper_a_long_response_is_no_wider_than_a_page(browser, tmp_path):
    run = write_run(tmp_path / "run", "DPOTrainer", {"rejected": -9.0}, n_prompts=1, n_tokens=120)
    browser.open(write_report(run, tmp_path / "report.html"))
    width = "document.getElementById('heatmap').getBoundingClientRect().width"
    ticks = "document.querySelectorAll('#heatmap .xtick').length"
    assert browser.js(width) > 2000
    assert browser.js(ticks) == 120
    browser.js("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.js(width) <= 660
    assert browser.js("document.getElementById('heatmap').data[0].z[0].length") == 120
    assert browser.js(ticks) == 40
    browser.js("window.dispatchEvent(new Event('afterprint'))")
    assert browser.js(width) > 2000


def test_hostile_probes_are_found_and_chosen_as_text(browser, hostile, tmp_path):
    browser.open(write_report(load_runs({HOSTILE: hostile.path}), tmp_path / "report.html", title=HOSTILE))
    find(browser, text="</SCRIPT><img", family=HOSTILE)
    assert browser.js(COUNT) == "2 of 6 probes."
    assert browser.js(f"{FOUND}[0].querySelector('mark').textContent") == "</script><img"
    browser.js(f"{FOUND}[0].click()")
    browser.wait_for(f"{TITLE}.startsWith({HOSTILE!r})")
    browser.js(f"{TOKENS}[0].click()")
    assert HOSTILE.replace(" ", "·") in browser.js("document.getElementById('token-detail').textContent")
    assert browser.js("document.querySelectorAll('img, iframe, object, embed').length") == 0
    assert browser.errors == []


def test_a_browser_that_cannot_unpack_is_told_so(browser, page):
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    try:
        browser.open(page)
        assert "DecompressionStream" in browser.js("document.getElementById('tokens-failed').textContent")
        assert browser.js("document.getElementById('tokens-failed').hidden") is False
        assert browser.js("document.getElementById('token-section').hidden")
        assert browser.js("document.querySelectorAll('[data-curves] .plot-container').length") == 2  # the rest works
        assert browser.errors == []
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])


def test_thousands_of_probes_stay_searchable(browser, tmp_path):
    run = write_run(tmp_path / "run", "DPOTrainer", DPO_DELTA, steps=(0, 5), n_prompts=584, keep_tokens=1)
    path = write_report(RunLogs({"many": run}), tmp_path / "report.html")
    browser.open(path)
    assert browser.js(COUNT) == "7,008 probes; the first 50 are listed."
    assert browser.js(f"{FOUND}.length") == 50
    find(browser, text="question 583")
    assert browser.js(COUNT) == "12 of 7,008 probes."
    assert path.stat().st_size < 8e6
