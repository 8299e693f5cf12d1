"""How much of each explained step is explained, and prompts without the template that all share."""

import math

import pandas as pd
import pytest

from llm_dynamics.report import why_explained
from llm_dynamics.report.why import why, why_section
from llm_dynamics.report.why_explained import explained_by_step, explained_in_words
from llm_dynamics.report.why_prompts import Prompts
from llm_dynamics.runlog import RunLogs

from .accounts import account, bare_run


def accounts(*rows):
    """The accounts table: `(explained, measured_norm)` of steps 1, 2, ..."""
    return pd.DataFrame(
        {"step": step, "explained": explained, "measured_norm": norm, "explained_by_gradient": math.nan}
        for step, (explained, norm) in enumerate(rows, start=1)
    )


def curve_of(frame):
    return explained_by_step(frame, frame["measured_norm"] <= 1e-5)


def words_of(frame):
    return explained_in_words(frame, frame["measured_norm"] <= 1e-5)


# ---- the explained share ---------------------------------------------------------------------------------------------


def test_the_curve_has_every_step_with_a_finite_share_in_order():
    frame = accounts((0.99, 1.0), (math.nan, 1.0), (-0.5, 2.0), (1.0, 0.0)).iloc[::-1]
    curve = curve_of(frame)
    assert curve["steps"] == [1, 3, 4]
    assert curve["explained"] == [0.99, -0.5, 1.0]
    assert (curve["moved"], curve["hardly"]) == ([1.0, 2.0, 0.0], [False, False, True])
    assert curve["gradient"] is None
    with_gradient = curve_of(frame.assign(explained_by_gradient=[0.1, math.nan, 0.3, 0.4]))
    assert with_gradient["gradient"] == [0.4, None, 0.1]
    assert curve_of(accounts((math.nan, 1.0))) is None


def test_of_many_steps_the_lowest_that_moved_something_is_drawn(monkeypatch):
    monkeypatch.setattr(why_explained, "MAX_POINTS", 2)
    curve = curve_of(accounts((0.9, 1.0), (0.2, 1e-6), (0.8, 1.0), (0.3, 1e-6), (0.1, 1e-7)))
    assert curve["size"] == 3
    assert (curve["steps"], curve["explained"], curve["hardly"]) == ([3, 5], [0.8, 0.1], [False, True])


def test_steps_below_the_line_are_named_and_those_that_hardly_moved_are_not_counted():
    words = words_of(accounts((0.95, 1.0), (0.5, 1.0), (-0.25, 1.0), (0.1, 1e-6)))
    assert words.startswith(
        "Below 90% in 2 of 3 steps (2, 3), lowest −25% at step 3: read the shares of these as a rough"
    )
    assert "1 step moved a probe token by less than 0.00001 nats (root mean square)" in words
    many = words_of(accounts(*[(0.5, 1.0)] * 9))
    assert "in 9 of 9 steps (1, 2, 3, 4, 5, 6, …)" in many


@pytest.mark.parametrize(("lowest", "said"), [(0.93, "93%"), (0.99986, "99.986%"), (1.0, "100%")])
def test_where_no_step_is_below_the_line_the_lowest_is_told_with_its_nines(lowest, said):
    assert words_of(accounts((1.0, 1.0), (lowest, 1.0))) == f"No step is below 90%; the lowest is {said}."


def test_without_a_finite_share_nothing_is_said():
    assert words_of(accounts((math.nan, 1.0))) == ""


# ---- several runs ----------------------------------------------------------------------------------------------------


def test_runs_share_the_scale_of_a_familys_waterfall(tmp_path):
    large = account(bare_run(tmp_path / "large"), 1, {"up": 8.0, "down": -12.0})
    small = account(bare_run(tmp_path / "small"), 1, {"up": 2.0, "down": -1.0})
    bare = bare_run(tmp_path / "bare")
    section, data = why_section(RunLogs({"large": large, "bare": bare, "small": small}))
    assert section["unexplained"] == ["bare"]
    assert [run["name"] for run in section["runs"]] == ["large", "small"]
    assert len(data) == 2
    bars = [run["families"][0]["bars"][0] for run in section["runs"]]
    assert [bar["size"] for bar in bars] == pytest.approx([100 * 8 / 12, 100 * 2 / 12])  # from -4 to 8 nats
    assert [run["families"][0]["zero"] for run in section["runs"]] == pytest.approx([100 * 4 / 12] * 2)
    alone, _ = why("small", small)
    assert alone["families"][0]["bars"][0]["size"] == pytest.approx(100)


# ---- prompts ---------------------------------------------------------------------------------------------------------

BEGIN, END = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def prompts_of(*fed, probes=()):
    examples = pd.DataFrame({"prompt": list(fed)})
    return Prompts(examples, pd.DataFrame(list(probes), columns=["prompt_id", "prompt"]))


def test_what_all_prompts_begin_and_end_with_is_left_out():
    fed = [f"{BEGIN}How {asked}?{END}" for asked in ("do I cook an egg", "far is the moon", "do I swim")]
    prompts = prompts_of(*fed)
    assert [prompts.line(one, None) for one in fed] == [
        "…How do I cook an egg?", "…How far is the moon?", "…How do I swim?"
    ]  # fmt: skip


def test_a_prompt_of_a_probe_is_written_as_the_probe_set_has_it():
    fed = [f"{BEGIN}How?{END}", f"{BEGIN}Why?{END}"]
    prompts = prompts_of(*fed, probes=[("p0", '[{"role": "user", "content": "How?"}]')])
    assert prompts.line(fed[0], "p0") == "How?"
    assert prompts.line(fed[1], "p9") == "…Why?"
    assert prompts.line(None, None) == ""


def test_prompts_that_share_little_or_are_alone_are_left_whole():
    assert prompts_of("The egg", "The moon").line("The egg", None) == "The egg"
    assert prompts_of(f"{BEGIN}How?{END}").line("x\ny", None) == "x y"
    chats = ['[{"role": "user", "content": "How?"}]', '[{"role": "user", "content": "Why?"}]']
    assert [prompts_of(*chats).line(one, None) for one in chats] == ["How?", "Why?"]
