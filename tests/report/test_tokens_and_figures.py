import numpy as np
import pytest

from llm_dynamics.report.figures import PANELS, curves_figure, squeezing_figure, token_heatmap
from llm_dynamics.report.text import for_plotly, json_for_script, prompt_text, token_label, visible
from llm_dynamics.report.tokens import pick_heatmap_probe, pick_heatmap_probes, read_tokens, token_histories
from llm_dynamics.runlog import RunLogError, RunLogs, load_run, schema

from .synthetic import DPO_DELTA, FAMILIES, HOSTILE, WORDS, write_run


def means(figure):
    return [trace for trace in figure.data if trace.meta["role"] == "mean"]


def test_curves_have_one_panel_per_run_and_share_y_only_for_changes(both):
    assert {trace.xaxis for trace in curves_figure(both).data} == {"x", "x2"}
    assert curves_figure(both, delta=True).layout.yaxis2.matches == "y"
    assert curves_figure(both, delta=False).layout.yaxis2.matches is None


def test_bands_are_off_and_each_family_is_named_once(both):
    figure = curves_figure(both)
    assert all(trace.visible is False for trace in figure.data if trace.meta["role"] == "band")
    named = [trace.name for trace in figure.data if trace.showlegend]
    assert sorted(named) == sorted([*FAMILIES, "argmax (chosen prefix)", "argmax (rejected prefix)"])


def test_the_greedy_line_is_dashed_and_black(both):
    (greedy,) = [trace for trace in means(curves_figure(both))[:14] if trace.name == "argmax (chosen prefix)"]
    assert greedy.line.dash == "dash"
    assert greedy.line.color == "#16181d"


def test_lines_break_where_no_probe_is_finite(tmp_path):
    run = write_run(tmp_path / "run", "DPOTrainer", {"chosen": -1.0}, n_prompts=1, nan_probe="chosen-0", keep_tokens=0)
    (line, *_) = [trace for trace in means(curves_figure(RunLogs({"a": run}))) if trace.name == "chosen"]
    assert line.y[0] == 0
    assert set(line.y[1:]) == {None}


def test_squeezing_shows_chosen_and_rejected_of_every_run(both):
    figure = squeezing_figure(both)
    assert len(figure.data) == 2 * 2 * len(PANELS)
    assert {trace.name for trace in figure.data} == {"chosen", "rejected"}


def test_heatmap_shows_the_change_since_the_first_observation(dpo):
    figure = token_heatmap(dpo, "rejected-0")
    rows = dpo.tokens.query("probe_id == 'rejected-0'").pivot(index="step", columns="position", values="logp")
    change = np.array(figure.data[0].z, dtype=float)
    np.testing.assert_allclose(change, (rows - rows.iloc[0]).to_numpy(), atol=1e-5)
    assert figure.data[0].zmin == -figure.data[0].zmax
    assert list(figure.layout.xaxis.ticktext) == [word.replace(" ", "·") for word in WORDS]
    assert list(figure.data[0].y) == [str(step) for step in dpo.observed_steps]


def test_heatmap_of_a_probe_without_tokens_says_so(dpo):
    with pytest.raises(ValueError, match="keeps no tokens of probe 'rejected-11'"):
        token_heatmap(dpo, "rejected-11")


def test_the_rejected_probe_that_moved_most_is_shown_first(dpo):
    last = dpo.delta_from_start().query("step == 60").set_index("probe_id")["delta_logp_sum"]
    kept = last[[f"rejected-{number}" for number in range(4)]]
    assert pick_heatmap_probe(dpo) == kept.abs().idxmax()


@pytest.mark.parametrize(("families", "first"), [(["chosen", "random"], "chosen"), (["random"], "random")])
def test_without_rejected_tokens_another_family_is_shown_first(tmp_path, families, first):
    run = write_run(tmp_path / "run", "SFTTrainer", dict.fromkeys(families, -5.0), n_prompts=2)
    assert pick_heatmap_probe(run).startswith(first)


def test_without_tokens_there_is_nothing_to_pick(tmp_path):
    run = write_run(tmp_path / "run", "DPOTrainer", {"rejected": -5.0}, n_prompts=2, keep_tokens=0)
    assert pick_heatmap_probe(run) is None
    assert pick_heatmap_probes(run, 5) == []


def test_picked_probes_cover_every_family_and_several_prompts(dpo):
    picked = pick_heatmap_probes(dpo, 24)
    assert len(set(picked)) == 24
    assert {probe.rsplit("-")[0] for probe in picked} == set(FAMILIES)
    assert len({probe.rsplit("-")[1] for probe in picked}) > 1
    assert picked[0] == pick_heatmap_probe(dpo)


def test_only_the_wanted_probes_are_read(dpo):
    rows = read_tokens(dpo, ["chosen-0", "not there"])
    assert set(rows["probe_id"]) == {"chosen-0"}
    assert len(rows) == len(dpo.observed_steps) * len(WORDS)


def test_a_bad_token_part_raises_or_is_left_out_as_the_run_was_opened(tmp_path):
    run = write_run(tmp_path / "run", "DPOTrainer", {"rejected": -5.0}, n_prompts=2, steps=(0, 5, 10))
    (run.path / "tokens" / schema.part_name(5)).write_bytes(b"cut")
    with pytest.raises(RunLogError, match="000000005"):
        token_histories(run, ["rejected-0"])
    with pytest.warns(UserWarning, match="000000005"):
        (history,) = token_histories(load_run(run.path, errors="warn"), ["rejected-0"])
    assert history.steps == [0, 10]


def test_json_cannot_leave_its_script_element():
    text = json_for_script({"a": f"{HOSTILE}&<!--\u2028\u2029"})
    assert not set("<>&\u2028\u2029") & set(text)
    with pytest.raises(ValueError):
        json_for_script([float("nan")])


def test_plotly_sees_no_markup():
    assert for_plotly("<b>&lt;") == "&lt;b&gt;&amp;lt;"


def test_what_would_act_is_made_visible():
    assert visible("a\u202eb\x00c\nd") == "a\\u202eb\\u0000c\nd"
    assert token_label(" a\n") == "·a↵"
    assert token_label("x" * 40) == "x" * 13 + "…"


def test_prompts_are_read_as_chat_where_they_are_chat():
    assert prompt_text('[{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": [1]}]') == (
        "user: Hi <b>\nassistant: [1]"
    )
    for plain in ("Hi", "[1, 2]", "[]", "{", '{"role": "user"}', "[" * 100_000):
        assert prompt_text(plain) == plain


def test_curves_of_an_unknown_family_are_drawn(tmp_path):
    run = write_run(tmp_path / "run", "DPOTrainer", {**DPO_DELTA, "my_own": -2.0}, n_prompts=1, keep_tokens=0)
    assert "my_own" in {trace.name for trace in curves_figure(RunLogs({"a": run})).data}
