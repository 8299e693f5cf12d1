"""The section "Did correct answers rise, and which tokens were spared?" of the page."""

import math
import re
from html import unescape

import numpy as np
import pandas as pd
import pytest

from llm_dynamics.report import write_report
from llm_dynamics.report.rollout_sentences import MAX_TOKENS, MAX_WRONG, ranked_completions, sentences
from llm_dynamics.report.rollouts import question_deltas, reading, rollout_views
from llm_dynamics.runlog import RunLogs, RunLogWriter, load_run, load_runs

from .reinforced import QUESTIONS, rows, write_rollouts
from .synthetic import HOSTILE, write_values
from .test_page import QUESTIONS as HEADINGS
from .test_page import Outline, embedded

HEADING = "Did correct answers rise, and which tokens were spared?"
NAME = f"{HOSTILE}<i>&lt;</i>"  # plotly reads a subset of HTML


def bare(folder):
    return write_values(folder / "dynamics", {"chosen-1": [-9.0, -8.0], "rejected-1": [-9.0, -12.0]}, steps=(0, 40))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reinforced")
    made = {
        "grpo": {"method": "none", "seed": 1},
        "nthr": {"method": "nthr", "seed": 2, "shift": -0.3},
        "thr": {"method": "thr", "seed": 3},
        "random": {"method": "random", "seed": 4},
    }
    for name, choice in made.items():
        write_rollouts(bare(folder / name), **choice)
    return load_runs({name: folder / name for name in made})


@pytest.fixture(scope="module")
def path(runs, tmp_path_factory):
    return write_report(runs, tmp_path_factory.mktemp("page") / "r.html")


@pytest.fixture(scope="module")
def hostile_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    write_rollouts(bare(folder), hostile=f"{HOSTILE}\u202e")
    runs = load_runs({"other": folder, NAME: folder})  # the last line lies on top
    return write_report(runs, folder / "r.html")


def section(text):
    return text.split('<section id="rollouts"')[1].split("</section>")[0]


def table(text):
    """The cells of the table by run, as numbers; a dash is NaN."""
    body = section(text).split('class="rollout-table"')[1].split("<tbody>")[1].split("</tbody>")[0]
    found = {}
    for row in re.findall(r"<tr>(.*?)</tr>", body, re.S):
        cells = re.findall(r"<td[^>]*>([^<]*)</td>", row)
        numbers = [cell.replace("−", "-").replace("%", "").replace("–", "nan") for cell in cells]
        found[unescape(re.search(r"</svg>\s*([^<]+)</th>", row)[1])] = [float(number) for number in numbers]
    return found


def answers(text):
    """The completions as a browser would show them."""
    found = re.findall(r'<p class="answered" dir="auto">(.*?)</p>', section(text), re.S)
    return [unescape(re.sub(r"<[^>]+>", "", answer)) for answer in found]


def page_of(run, folder):
    return write_report(run, folder / "report.html").read_text("utf-8")


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_the_table_equals_a_recomputation_with_pandas(runs, path):
    shown = table(path.read_text("utf-8"))
    assert list(shown) == list(runs.runs)
    for name, run in runs.runs.items():
        rollouts, moved = run.rollouts, run.displacements
        change = moved["logp_after"] - moved["logp_before"]
        per_question = change.groupby([moved["step"], moved["question"]]).mean()
        scored = rollouts.query("correct == False and threshold == threshold")
        selected, wrong = scored["n_selected"].sum(), scored["n_tokens"].sum()
        expected = [
            len(rollouts), rollouts.query("step == 1")["reward"].mean(), rollouts.query("step == 31")["reward"].mean(),
            per_question.mean(), 100 * (change < 0).mean(), len(per_question),
            *((selected, wrong, 100 * selected / wrong) if wrong else (math.nan,) * 3),
        ]  # fmt: skip
        assert shown[name] == pytest.approx(expected, abs=0.0501, nan_ok=True)
        assert shown[name][1:4] == pytest.approx(expected[1:4], abs=0.00501)
        assert shown[name][3] == pytest.approx(expected[3], abs=0.000501)
    assert shown["nthr"][6] == runs["nthr"].nthr_tokens["selected"].sum() > 0
    assert shown["thr"][6] == 0 < shown["thr"][7]
    assert math.isnan(shown["grpo"][6])


def test_each_question_counts_once_whatever_its_number_of_correct_responses():
    moved = pd.DataFrame(
        {"step": [1, 1, 1, 1, 2], "question": [0, 0, 0, 1, 0], "logp_before": [-9.0, -9, -9, -9, -9],
         "logp_after": [-8.0, -8, -8, -13, -math.inf]}
    )  # fmt: skip
    deltas = question_deltas(moved)
    assert deltas["delta"].tolist() == [1.0, -4.0]  # the one that is not finite is left out
    assert deltas["n"].tolist() == [3, 1]
    assert deltas["n_fell"].tolist() == [0, 1]


def test_curves_are_means_by_step(runs, path):
    curves = {(curve["run"], curve["panel"]): curve for curve in embedded(Outline(path.read_text("utf-8")))["rollouts"]}
    assert ("grpo", "selected") not in curves
    rollouts = runs["nthr"].rollouts
    reward = curves["nthr", "reward"]
    assert reward["steps"] == [1, 11, 21, 31]
    assert reward["mean"] == pytest.approx(rollouts.groupby("step")["reward"].mean().tolist(), rel=1e-4)
    questions = rollouts.groupby(["step", "question"])["reward"].mean()
    half = 1.96 * questions.groupby("step").std() / math.sqrt(3)
    assert np.subtract(reward["high"], reward["mean"]) == pytest.approx(half.to_numpy(), abs=1e-4)
    wrong = rollouts[~rollouts["correct"].astype(bool)].groupby("step")[["n_selected", "n_tokens"]].sum()
    share = (wrong["n_selected"] / wrong["n_tokens"]).tolist()
    assert curves["nthr", "selected"]["mean"] == pytest.approx(share, rel=1e-4)
    assert curves["nthr", "selected"]["low"] == [None] * 4


def test_runs_are_told_apart_by_dash_and_marker_as_well_as_by_colour(runs):
    _, curves = rollout_views(runs)
    looks = {curve["run"]: (curve["light"], curve["dash"], curve["symbol"]) for curve in curves}
    assert all(len(set(column)) == len(runs.runs) for column in zip(*looks.values(), strict=True))


def test_the_reading_says_what_the_numbers_say():
    row = {"name": "nthr", "delta": 0.41, "fell": 0.05, "n_selected": 1200, "n_wrong": 8000}
    assert reading([row]) == (
        "Correct responses rose by 0.410 nats a step on average (5% of them fell). "
        "In scored groups, 1,200 of 8,000 wrong tokens were selected (15%)."
    )
    other = {"name": "grpo", "delta": -0.2, "fell": 1.0, "n_selected": 0, "n_wrong": 0}
    assert reading([row, other]) == (
        "Correct responses rose by 0.410 nats a step on average under nthr (5% of them fell) and fell by 0.200 "
        "under grpo (100% fell). "
        "In scored groups, 1,200 of 8,000 wrong tokens were selected under nthr (15%)."
    )
    assert reading([other | {"delta": math.nan}]) == "No change of a correct response was measured."


def test_only_runs_that_are_compared_are_said_not_to_be_paired(runs, path, tmp_path):
    assert "not paired" in path.read_text("utf-8")
    assert "not paired" not in page_of(runs["nthr"], tmp_path)


# ---- sentences -------------------------------------------------------------------------------------------------------


def expected_order(run, limit):
    """The completions to be shown, found the slow way."""
    found = []
    for row in run.rollouts.to_dict("records"):
        if row["correct"] is not False:
            continue
        own = run.nthr_tokens.query(f"step == {row['step']} and example == {row['example']} and selected")
        if len(own):
            found.append(((own["score"] - own["threshold"]).max(), row))
    chosen, seen = [], dict.fromkeys(QUESTIONS, 0)
    for _, row in sorted(found, key=lambda one: -one[0]):
        seen[row["prompt"]] += 1
        if seen[row["prompt"]] <= 3:
            chosen.append(row)
    return chosen[:limit]


def test_the_sentences_furthest_above_the_threshold_come_first_and_at_most_three_of_a_question(runs, tmp_path):
    text = page_of(runs["nthr"], tmp_path)
    wrong, correct = section(text).split("Correct completions of the same questions")
    expected = expected_order(runs["nthr"], MAX_WRONG)
    assert len(expected) == 9 < len(ranked_completions(runs["nthr"]))
    shown = [answer.replace("↵", "") for answer in answers(f'<section id="rollouts"{wrong}</section>')]
    assert shown == [row["completion"] for row in expected]
    assert re.findall(r"<dt>step</dt><dd>(\d+)</dd>", wrong) == [str(row["step"]) for row in expected]
    right = runs["nthr"].rollouts.query("correct == True")
    keys = {(row["step"], row["question"]) for row in expected}
    possible = {row["completion"] for row in right.to_dict("records") if (row["step"], row["question"]) in keys}
    plain = answers(f'<section id="rollouts"{correct}</section>')
    assert len(plain) == 4
    assert set(plain) <= possible
    assert "<mark" not in correct


def test_places_are_shared_by_the_runs_that_select(runs):
    view, _ = rollout_views(runs)
    shown = {text["name"]: len(text.get("wrong", [])) for text in view["texts"]}
    assert shown == {"grpo": 0, "nthr": 6, "thr": 0, "random": 6}


def test_marked_are_the_selected_tokens_each_with_its_numbers(runs, tmp_path):
    text = section(page_of(runs["nthr"], tmp_path))
    first = expected_order(runs["nthr"], 1)[0]
    tokens = runs["nthr"].nthr_tokens.query(f"step == {first['step']} and example == {first['example']}")
    card = text.split('class="rollout-card"')[1]
    spans = re.findall(r'<(mark|span) class="token(?: against)?" style="--s:([\d.]+)" title="([^"]*)">', card)
    assert [tag == "mark" for tag, _, _ in spans] == tokens["selected"].tolist()
    for (_, strength, title), token in zip(spans, tokens.to_dict("records"), strict=True):
        assert float(strength) == pytest.approx(min(abs(token["score"] / token["threshold"]) / 2, 1), abs=0.00501)
        numbers = [token["score"], token["threshold"], token["advantage_before"], token["advantage"]]
        shown = re.search(r"token (\d+) · score (\S+) · threshold (\S+) · advantage (\S+) → (\S+)", unescape(title))
        assert int(shown[1]) == token["token_id"]
        assert [float(one.replace("−", "-")) for one in shown.groups()[1:]] == pytest.approx(numbers, rel=6e-3)
    facts = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", card.split("</dl>")[0]))
    assert facts["reward"] == "0"
    assert float(facts["success rate p"]) == pytest.approx(first["success_rate"], rel=6e-3)
    assert facts["η"] == "0.5"


def one_card(tmp_path, length=40, **columns):
    """The first card of a run whose first wrong completion has these token columns."""
    run = bare(tmp_path)
    made = rows(1, n_questions=1, length=length)
    mine = made["nthr_tokens"]["example"] == 0
    made["nthr_tokens"].loc[~mine, "selected"] = False
    made["nthr_tokens"] = made["nthr_tokens"].astype({"score": float})
    for name, values in columns.items():
        made["nthr_tokens"].loc[mine, name] = values
    RunLogWriter(run.path).write_rollouts(1, made)
    run = load_run(run.path)
    page_of(run, tmp_path)
    return sentences(run, ranked_completions(run), 12, 4)["wrong"][0]


def test_of_a_long_completion_the_surroundings_of_selected_tokens_are_shown(tmp_path):
    selected = np.isin(np.arange(3000), (5, 1500))
    card = one_card(tmp_path, 3000, token_id=np.arange(3000), selected=selected, score=np.where(selected, 0.5, 0.0))
    ids = [token["id"] for token in card["tokens"]]
    assert ids == [*range(5 + 16), *range(1500 - 16, 1500 + 16)]
    assert [token["id"] for token in card["tokens"] if token["cut"]] == [1484]
    assert not card["ends"]
    assert one_card(tmp_path / "all", MAX_TOKENS, selected=True)["ends"]


@pytest.mark.parametrize(
    "columns",
    [
        {"threshold": -math.inf}, {"threshold": 0.0}, {"score": math.nan}, {"score": None}, {"token": ""},
        {"threshold": math.nan}, {"advantage": math.nan},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_are_none_are_shown_as_such(tmp_path, columns):
    card = one_card(tmp_path, selected=True, **columns)
    assert card["n_selected"] == len(card["tokens"]) == 40
    ((name, value),) = columns.items()
    if name != "token":
        shown = {token[name] for token in card["tokens"]}
        assert shown == {"–" if value is None or math.isnan(value) else "−∞" if math.isinf(value) else "0"}
        assert {token["strength"] for token in card["tokens"]} == {"0.00"} or name == "advantage"


def test_a_selected_line_break_is_seen(tmp_path):
    assert one_card(tmp_path, token="\n", selected=True)["tokens"][0]["text"] == "↵\n"
    assert one_card(tmp_path / "other", token=" x", selected=True)["tokens"][0]["text"] == "x"


# ---- what is missing -------------------------------------------------------------------------------------------------


def test_a_page_without_such_tables_carries_nothing_of_it(tmp_path):
    run = bare(tmp_path)
    text = page_of(run, tmp_path)
    assert Outline(text).headings == HEADINGS
    assert "rollout" not in text.replace(Outline(text).scripts[1], "")
    empty = {name: frame.head(0) for name, frame in rows(1).items()}
    RunLogWriter(run.path).write_rollouts(1, empty)
    assert page_of(load_run(run.path), tmp_path) == text  # tables without a row are no tables


def test_the_section_has_its_place_and_its_link(path):
    text = path.read_text("utf-8")
    place = HEADINGS.index("Where did the mass go?")
    assert Outline(text).headings == [*HEADINGS[:place], HEADING, *HEADINGS[place:]]
    assert '<a href="#rollouts">' in text
    assert Outline(text).tags.count("script") == 4


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("pos_only", "The method of this run scores no tokens and selects no tokens."),
        ("none", "The method of this run scores no tokens and selects no tokens."),
        (
            "thr",
            "No wrong token was selected: none was above its threshold, or the method weights all and selects none.",
        ),
    ],
)
def test_a_method_that_selects_no_tokens_says_so(tmp_path, method, says):
    text = section(page_of(write_rollouts(bare(tmp_path), method=method), tmp_path))
    assert says in text
    assert "rollout-card" not in text
    assert "Outlined and bold" not in text


def test_questions_that_are_all_wrong_leave_nothing_to_select(tmp_path):
    run, made = bare(tmp_path), rows(1, method="none")
    made["rollouts"] = made["rollouts"].assign(correct=False, reward=0.0, success_rate=0.0)
    RunLogWriter(run.path).write_rollouts(1, {"rollouts": made["rollouts"], "nthr_tokens": made["nthr_tokens"]})
    text = section(page_of(load_run(run.path), tmp_path))
    assert "No question had both correct and wrong completions" in text
    assert "No change of a correct response was measured." in text


def test_a_run_with_displacements_alone_shows_these(tmp_path):
    text = page_of(write_rollouts(bare(tmp_path), tables=("displacements",)), tmp_path)
    assert "This run logged no rollouts" in section(text)
    assert re.findall(r'data-rollouts="(\w+)"', section(text)) == ["delta"]
    (cells,) = table(text).values()
    assert cells[0] == 0
    assert cells[3] > 0
    assert np.isnan([*cells[1:3], *cells[6:]]).all()


def test_a_run_whose_tokens_were_not_kept_says_so(tmp_path):
    text = page_of(write_rollouts(bare(tmp_path), tables=("rollouts",)), tmp_path)
    assert "This run kept no tokens" in section(text)
    assert re.findall(r'data-rollouts="(\w+)"', section(text)) == ["reward", "selected"]


def test_rollouts_without_a_reward_and_displacements_that_are_not_finite_are_left_out(tmp_path):
    run, made = bare(tmp_path), rows(1)
    unknown = {"reward": None, "correct": None, "success_rate": None, "threshold": None, "eta": None, "n_selected": 0}
    made["rollouts"] = made["rollouts"].astype(object)
    made["rollouts"].loc[made["rollouts"]["question"] == 0, list(unknown)] = list(unknown.values())
    made["displacements"].loc[0, "logp_after"] = -math.inf
    made["displacements"].loc[1, "logp_before"] = math.nan
    RunLogWriter(run.path).write_rollouts(1, made)
    run = load_run(run.path)
    text = page_of(run, tmp_path)
    assert "2 correct responses left out" in text
    (cells,) = table(text).values()
    assert cells[1] == pytest.approx(run.rollouts["reward"].mean(), abs=0.005)
    assert cells[7] == run.rollouts.query("correct == False and question > 0")["n_tokens"].sum()


def test_the_page_of_many_tokens_stays_small(tmp_path):
    run = bare(tmp_path)
    before = len(page_of(run, tmp_path))
    run = write_rollouts(run, length=300, threshold=-1.0)
    assert len(run.nthr_tokens) > 10_000
    assert len(page_of(run, tmp_path)) - before < 700_000


# ---- untrusted text --------------------------------------------------------------------------------------------------


def test_hostile_text_is_never_markup(hostile_path):
    text = hostile_path.read_text("utf-8")
    outline = Outline(text)
    assert HOSTILE not in text
    assert "<img" not in text.replace(outline.scripts[1], "")
    assert not outline.handlers
    assert outline.tags.count("script") == 4
    assert HOSTILE in answers(text)[0]
    assert "\u202e" not in section(text)
    assert NAME in {curve["run"] for curve in embedded(outline)["rollouts"]}


def test_hostile_text_shows_as_text_and_nothing_of_it_runs(browser, hostile_path):
    browser.open(hostile_path, width=390)
    assert browser.errors == []
    assert browser.js("document.querySelectorAll('img, iframe, object, embed').length") == 0
    assert browser.js("document.documentElement.scrollWidth") == 390
    assert HOSTILE in browser.js("document.querySelector('#rollouts .answered').textContent")
    assert HOSTILE in browser.js("document.querySelector('#rollouts .asked').textContent")
    plot = "document.querySelector('[data-rollouts=reward]')"
    browser.js(f"{plot}.scrollIntoView()")
    box = browser.js(f"{plot}.querySelector('.point').getBoundingClientRect().toJSON()")
    for x in (0, 1):
        browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=box["x"] + x + 3, y=box["y"] + 3)
    browser.wait_for(f"{plot}.querySelector('.hovertext')")
    assert NAME in browser.js(f"{plot}.querySelector('.hoverlayer').textContent")
    assert browser.js("document.querySelectorAll('img').length") == 0
    assert browser.errors == []


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_section_renders_without_errors_or_sideways_scrolling(browser, path, width, dark):
    browser.open(path, width=width, dark=dark)
    assert browser.errors == []
    assert browser.js("document.documentElement.scrollWidth") == width
    drawn = "[...document.querySelectorAll('[data-rollouts]')].map((plot) => plot.querySelectorAll('.js-line').length)"
    assert browser.js(drawn) == [8, 8, 3]  # four lines and four bands; grpo selects nothing
    font = "getComputedStyle(document.querySelector('#rollouts .answered mark')).fontWeight"
    assert browser.js(font) == "700"
    outline = "getComputedStyle(document.querySelector('#rollouts .answered mark')).outlineStyle"
    assert browser.js(outline) == "solid"


def test_lines_follow_the_theme_and_paper_is_light(browser, path):
    colour = "document.querySelector('[data-rollouts=delta]').data.at(-1).line.color"
    browser.open(path, dark=True)
    assert browser.js(colour) == "#cf9ce6"
    browser.js("window.dispatchEvent(new Event('beforeprint'))")
    assert browser.js(colour) == "#7f3f98"


def test_numbers_of_selected_tokens_can_be_reached_by_keyboard(browser, path):
    browser.open(path)
    browser.js("document.querySelector('#rollouts details summary').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.js("document.querySelector('#rollouts details').open")
    browser.press("Tab", 9)
    assert browser.js("document.activeElement.ariaLabel") == "Selected tokens in numbers"
    assert browser.js("document.querySelectorAll('#rollouts details[open] tbody tr').length") > 0


def test_one_run_of_several_names_only_those_with_tables(runs, sft):
    view, curves = rollout_views(RunLogs({"sft": sft, "nthr": runs["nthr"]}))
    assert [row["name"] for row in view["rows"]] == ["nthr"]
    assert {curve["run"] for curve in curves} == {"nthr"}
    assert rollout_views(RunLogs({"sft": sft})) is None
