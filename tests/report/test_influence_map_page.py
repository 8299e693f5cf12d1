"""Which training tokens moved this token? In a real browser."""

import re
from html import unescape

import pytest

from llm_dynamics.frames.numbers import nats
from llm_dynamics.report import influence_map, influence_map_data, write_report
from llm_dynamics.report.influence_map import influence_maps
from llm_dynamics.runlog import load_runs
from tests.callbacks.explained import explain, short_probes
from tests.conftest import FIRST
from tests.training import save_tiny_model

from .accounts import account, add_maps, bare_run
from .synthetic import DPO_DELTA, HOSTILE, write_accounts, write_run

FAMILIES = {name: DPO_DELTA[name] for name in ("chosen", "rejected")}
HINT = 'influence={"map_probes": "auto"}'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = write_run(
        tmp_path_factory.mktemp("maps") / "dynamics", "DPOTrainer", FAMILIES, steps=(0, 6), n_prompts=2, keep_tokens=2
    )
    return add_maps(write_accounts(run, steps=range(1, 7)))


@pytest.fixture(scope="module")
def path(run, tmp_path_factory):
    return write_report(load_runs({"dpo": run.path}), tmp_path_factory.mktemp("page") / "r.html")


def text(browser, selector):
    return browser.js(f"document.querySelector('{selector}').textContent")


def pick(browser, which, value):
    browser.js(
        f"(() => {{ const pick = document.querySelector('[data-pick={which}]'); pick.value = '{value}';"
        "pick.dispatchEvent(new Event('change')); })()"
    )


def choose(browser, row):
    browser.js(f"document.querySelectorAll('.map-row')[{row}].click()")


def number(words):
    return float(words.replace("−", "-"))


def told(browser):
    """What the panel of the chosen token says moved it: nats by cause."""
    rows = browser.js(
        "[...document.querySelectorAll('.map-sums tr')].map((row) => [...row.children].map((one) => one.textContent))"
    )
    return {cause: number(nats) for cause, nats in rows}


def shares(run, step, probe, m):
    """The row of a map, from the table: share by training token."""
    maps = run.influence_maps
    rows = maps[(maps["step"] == step) & (maps["probe_id"] == probe) & (maps["m"] == m)]
    return dict(zip(rows["l"].tolist(), rows["share"].tolist(), strict=True))


# ---- without maps ----------------------------------------------------------------------------------------------------


def test_a_run_without_maps_says_in_one_line_how_to_get_them(explained, tmp_path):
    page = unescape(write_report(explained, tmp_path / "r.html").read_text("utf-8"))
    assert page.count(HINT) == 1
    assert "data-map=" not in page


def test_a_run_without_accounts_says_how_to_get_them(sft, tmp_path):
    page = unescape(write_report(sft, tmp_path / "r.html").read_text("utf-8"))
    assert "No optimizer step was explained" in page
    assert page.count("watch(trainer, probes, influence=True)") == 1
    assert HINT not in page


def test_a_run_without_training_tokens_says_how_to_get_them(tmp_path):
    run = account(bare_run(tmp_path / "run"), 1, {"up": 1.0})
    page = unescape(write_report(run, tmp_path / "r.html").read_text("utf-8"))
    assert 'influence={"training_tokens": ["chosen", "rejected"]}' in page


def test_what_a_map_does_not_hold_is_said(path):
    words = re.sub(r"\s+", " ", path.read_text("utf-8"))
    assert "A map holds one watched response against one training response" in words
    assert "Momentum and the step’s other training responses are not in it" in words


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_the_map_renders_without_errors_or_sideways_scrolling(browser, path, width, dark):
    browser.open(path, width=width, dark=dark)
    choose(browser, 2)
    assert browser.errors == []
    assert browser.js("document.documentElement.scrollWidth") == width
    assert browser.js("document.querySelectorAll('.map-row').length") == 6
    assert browser.js("document.querySelectorAll('.map-label').length") == 18
    labels = browser.js("[...document.querySelectorAll('.map-row code')].map((one) => one.textContent)")
    assert labels == ["About", "·ten", "·minutes", "·in", "·gently", "·boil"]


def test_clicking_a_token_lists_the_training_tokens_that_moved_it_and_sums_are_the_tables(browser, path, run):
    browser.open(path)
    causes = run.influence_tokens.set_index(["step", "probe_id", "position", "cause"]).sort_index()
    for m in (4, 1):
        choose(browser, m)
        row = shares(run, 6, "chosen-0", m)
        assert f"token {m + 1} of 6?" in text(browser, ".map-chosen")
        said = told(browser)
        pushes = causes.loc[(6, "chosen-0", m)]
        assert said["this training response"] == pytest.approx(sum(row.values()), abs=0.006)
        others = pushes.loc["up", "share"] + pushes.loc["down", "share"] - sum(row.values())
        assert said["the step’s 5 other training responses"] == pytest.approx(others, abs=0.006)
        assert said["momentum"] == pytest.approx(pushes.loc["momentum", "share"], abs=0.006)
        assert said["measured change of this token"] == pytest.approx(pushes["measured"].iloc[0], abs=0.006)
        for place, sign in ((0, -1), (1, 1)):
            listed = f"document.querySelectorAll('.map-list')[{place}]"
            own = sorted((share for share in row.values() if sign * share > 0), key=abs, reverse=True)
            title = browser.js(f"{listed}.querySelector('h6').textContent")
            heading = re.search(r": ([+−][\d.]+) nats by (\d+) token", title)
            assert number(heading[1]) == pytest.approx(sum(own), abs=0.006)
            assert int(heading[2]) == len(own)
            nats = browser.js(f"[...{listed}.querySelectorAll('.strong strong')].map((one) => one.textContent)")
            assert [number(one.split()[0]) for one in nats] == pytest.approx(own[:8], abs=0.006)


def test_the_training_response_is_shown_in_its_sentence_with_role_prompt_and_step(browser, path, run):
    browser.open(path)
    (one,) = [one for one in influence_maps(run, 10**6) if (one.step, one.probe_id) == (6, "chosen-0")]
    sentence = "[...document.querySelector('.map-token .sentence').childNodes].filter((one) => one.nodeName !== 'SUP')"
    assert browser.js(f"{sentence}.map((one) => one.textContent).join('')") == "".join(one.told["token"])
    assert text(browser, ".map-token .sentence-head").startswith("step 6 · rejected response to How long should I boil")
    words = text(browser, ".map-words")
    assert f"most in step 6: {nats(one.total, sign=True)} nats".replace("-", "−") in words
    assert "the step’s 5 other training responses: " in words


def test_probe_and_step_are_picked_and_the_token_stays(browser, path, run):
    browser.open(path)
    choose(browser, 3)
    pick(browser, "map-step", 4)
    row = shares(run, 4, "chosen-0", 3)
    assert told(browser)["this training response"] == pytest.approx(sum(row.values()), abs=0.006)
    pick(browser, "map-probe", 1)
    assert "the watched rejected response" in text(browser, ".map-words")
    assert text(browser, "[data-pick=map-step]").startswith("4 (")
    assert browser.js("document.querySelector('[data-pick=map-step]').value") == "4"
    own = browser.js("Number(document.querySelector('.map-row[aria-selected=true]').dataset.row)")
    row = shares(run, 4, "rejected-0", own)
    assert told(browser)["this training response"] == pytest.approx(sum(row.values()), abs=0.006)


def test_the_map_can_be_walked_by_keyboard(browser, path, run):
    browser.open(path)
    choose(browser, 0)
    browser.press("ArrowDown", 40)
    browser.press("Enter", 13, "\r")
    assert "token 2 of 6?" in text(browser, ".map-chosen")
    for _ in range(3):
        browser.press("ArrowRight", 39)
    tip = text(browser, ".map-tip")
    share = shares(run, 6, "chosen-0", 1)[2]
    assert number(tip.split(" nats")[0]) == pytest.approx(share, rel=0.06)
    assert "training token ·fine (3)" in tip
    assert "on watched token ·ten (2)" in tip
    browser.press("Escape", 27)
    assert browser.js("document.querySelector('.map-tip').hidden")


def test_pointing_at_a_cell_tells_both_tokens_and_clicking_it_chooses_the_row(browser, path, run):
    browser.open(path)
    browser.js("document.querySelector('.map-frame').scrollIntoView()")
    box = browser.js("document.querySelector('.map-cells canvas').getBoundingClientRect().toJSON()")
    at = {"x": box["left"] + 5 * 20 + 8, "y": box["top"] + 2 * 22 + 9}
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
    browser.wait_for("!document.querySelector('.map-tip').hidden")
    tip = text(browser, ".map-tip")
    assert number(tip.split(" nats")[0]) == pytest.approx(shares(run, 6, "chosen-0", 2)[5], rel=0.06)
    assert "·minutes (3)" in tip
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
    assert "token 3 of 6?" in text(browser, ".map-chosen")


def test_colours_are_symmetric_follow_the_sign_and_the_theme(browser, path, run):
    (one,) = [one for one in influence_maps(run, 10**6) if (one.step, one.probe_id) == (6, "chosen-0")]
    places = [divmod(int(place), one.shares.shape[1]) for place in (one.shares.argmin(), one.shares.argmax())]

    def ends(dark):
        browser.open(path, dark=dark)
        return [
            browser.js(
                "[...document.querySelector('.map-cells canvas').getContext('2d')"
                f".getImageData({20 * column + 9}, {22 * row + 9}, 1, 1).data]"
            )
            for row, column in places
        ]

    assert ends(dark=False) == [[0xB9, 0x3A, 0x06, 255], [0x0B, 0x5C, 0xAD, 255]]
    assert ends(dark=True) == [[0xFF, 0x8A, 0x5B, 255], [0x6D, 0xB3, 0xF2, 255]]


def test_a_token_chosen_elsewhere_is_followed_and_a_way_there_and_back_is_offered(browser, path, run):
    browser.open(path)
    detail = "{ run: 'dpo', probeId: 'rejected-0', position: 2 }"
    browser.js(f"document.dispatchEvent(new CustomEvent('probe', {{ detail: {detail} }}))")
    assert "the watched rejected response" in text(browser, ".map-words")
    assert "token 3 of 6?" in text(browser, ".map-chosen")
    row = shares(run, 6, "rejected-0", 2)
    assert told(browser)["this training response"] == pytest.approx(sum(row.values()), abs=0.006)
    browser.js("document.querySelector('.map-token .map-over').click()")
    browser.wait_for("document.querySelector('#probe-title').textContent.includes('rejected in dpo')")
    browser.wait_for("document.querySelector('#token-detail .map-over')")
    browser.js("document.querySelector('#token-detail .map-over').click()")
    assert browser.js("document.activeElement.matches('.map-row[aria-selected=true]')")
    elsewhere = detail.replace("rejected-0", "rejected-1")
    browser.js(f"document.dispatchEvent(new CustomEvent('probe', {{ detail: {elsewhere} }}))")
    assert "the watched rejected response" in text(browser, ".map-words")  # it has no map: nothing changes
    assert browser.errors == []


def test_hostile_tokens_show_as_text_and_nothing_of_them_runs(browser, tmp_path):
    answers = {"chosen": f"{HOSTILE} \u202e x", "rejected": f"a {HOSTILE} b"}
    run = write_run(
        tmp_path / "run", f"DPOTrainer{HOSTILE}", FAMILIES, steps=(0, 2), n_prompts=1, words=[HOSTILE, "\u202e"],
        prompt=HOSTILE,
    )  # fmt: skip
    run = add_maps(write_accounts(run, steps=(1, 2), answers=answers, prompt=HOSTILE))
    browser.open(write_report(load_runs({HOSTILE: run.path}), tmp_path / "r.html"), width=390)
    for row in (1, 0):
        choose(browser, row)
        browser.press("ArrowRight", 39)
    assert browser.errors == []
    assert browser.js("document.querySelectorAll('img, iframe, object, embed').length") == 0
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert HOSTILE.replace(" ", "·")[:20] in text(browser, ".map-tip")
    assert HOSTILE.split(" ")[0] in text(browser, ".map-token .sentence")
    assert "\u202e" not in text(browser, "#why")


def test_cells_that_are_not_finite_are_crossed_out_and_counted(browser, tmp_path):
    run = write_run(tmp_path / "run", "DPOTrainer", FAMILIES, steps=(0, 2), n_prompts=1)
    run = add_maps(write_accounts(run, steps=(1, 2)), scale=float("nan"))
    browser.open(write_report(run, tmp_path / "r.html"))
    choose(browser, 0)
    browser.press("ArrowRight", 39)
    assert text(browser, ".map-tip").startswith("not finite")
    assert text(browser, ".map-left-out").startswith("108 cells crossed out and left out of the sums")
    assert browser.errors == []


def test_of_long_responses_the_page_says_what_is_left_out_and_on_paper_the_map_shrinks(browser, tmp_path, monkeypatch):
    for module in (influence_map, influence_map_data):
        monkeypatch.setattr(module, "MAX_SIDE", 40)
    run = write_run(tmp_path / "run", "DPOTrainer", FAMILIES, steps=(0, 2), n_prompts=1)
    answers = {"chosen": "yes", "rejected": " ".join(f"word{place}" for place in range(60))}
    run = add_maps(write_accounts(run, steps=(1, 2), answers=answers))
    browser.open(write_report(run, tmp_path / "r.html"), width=700)
    assert "Of long responses the 40 strongest tokens are shown" in text(browser, "#why")
    assert text(browser, ".map-left-out") == "40 of the 60 training tokens are shown."
    choose(browser, 0)
    row = sum(shares(run, 2, "chosen-0", 0).values())  # the others count
    assert told(browser)["this training response"] == pytest.approx(row, abs=0.006)
    assert text(browser, ".map-token .sentence").count("…") > 5
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.js("document.querySelector('.map-cells').getBoundingClientRect().right") < 700
    browser.call("Emulation.setEmulatedMedia", media="")
    assert browser.js("document.querySelector('.map-cells').getBoundingClientRect().right") > 700


def test_a_real_run_keeps_maps_that_the_page_shows(browser, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    _, run = explain("dpo", folder, tmp_path / "out", probes=short_probes(1), influence={"map_probes": 1}, max_steps=2)
    browser.open(write_report(run, tmp_path / "r.html"))
    for row in range(browser.js("document.querySelectorAll('.map-row').length")):
        choose(browser, row)
        said = told(browser)
        mine = sum(shares(run, 2, f"{FIRST}/chosen", row).values())
        assert said["this training response"] == pytest.approx(mine, rel=0.05, abs=1e-4)
        parts = sum(share for cause, share in said.items() if cause != "measured change of this token")
        assert parts == pytest.approx(said["measured change of this token"], abs=0.02)
    assert row > 3
    assert browser.errors == []
