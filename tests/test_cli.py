import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings

import pandas as pd
import pytest
from typer.testing import CliRunner

from llm_dynamics import cli, compare
from llm_dynamics.cli import models
from llm_dynamics.cli.show import PlainConsole, name_text
from llm_dynamics.probes import ProbeSet
from llm_dynamics.runlog import load_run, load_runs

from .frames.logs import random_log
from .runlog.logs import new_log, observe

COMMANDS = [[], ["probes"], ["probes", "build"], ["probes", "show"], ["report"], ["demo"]]
COMMANDS += [["score"], ["explain"], ["compare"]]
TEST_ROWS = [
    {"prompt": "When does the next train leave?", "chosen": "The next one leaves at nine.", "rejected": "No idea."},
    {"prompt": "Where is the station?", "chosen": "It is behind the old town hall.", "rejected": "Look around."},
]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line as the console script does; returns exit status, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llm-dynamics", *map(str, arguments)])
        monkeypatch.setattr(cli.console, "width", 80)
        monkeypatch.setattr(cli.errors, "width", 80)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path, preference_rows):
    return write_jsonl(tmp_path / "pairs.jsonl", preference_rows)


def refused(result):
    """The message of an expected error: status 1, one line on stderr, no traceback."""
    status, _, err = result
    assert status == 1, err
    assert "Traceback" not in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


def fits(text, width=80):
    return all(len(line) <= width for line in text.splitlines())


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches_with_an_example(command):
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    assert "Example: llm-dynamics " + " ".join(command[:1]) in text
    assert "Raises" not in text
    assert fits(result.output)


def test_exit_codes_and_json_are_in_the_help(run):
    help_text = " ".join(CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "80", "TERM": "dumb"}).output.split())
    assert "Exit status: 0 done; 1 an error" in help_text
    assert run("probes", "show", "--no-such-option")[0] == 2


@pytest.mark.parametrize("command", [[], ["probes"]], ids=" ".join)
def test_a_group_without_a_command_shows_its_help(command):
    result = CliRunner().invoke(cli.app, command)
    assert "Example:" in result.output


# ---- probes ----------------------------------------------------------------------------------------------------------


def test_build_takes_the_families_that_the_rows_allow(run, pairs, tmp_path):
    status, out, _ = run("probes", "build", pairs, tmp_path / "probes.parquet")
    assert status == 0
    probes = ProbeSet.load(tmp_path / "probes.parquet")
    assert probes.families == ("chosen", "rejected", "other_train", "ungrammatical")
    assert len(probes.prompt_ids) == 6
    assert "24 probes in" in out
    assert fits(out.rsplit("24 probes in", 1)[0])


def test_build_with_held_out_rows_columns_and_a_tokenizer(run, tmp_path, preference_rows, tokenizer):
    # the first row has no rephrase: what columns there are is not for the first row to say
    rows = [{"question": row.pop("prompt"), **row} for row in map(dict, preference_rows)]
    for row in rows[1:]:
        row |= {"better": "Other words for it.", "human_random": "The ferry left late."}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    status, out, _ = run(
        "probes", "build", write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out" / "probes.parquet",
        "--held-out", write_jsonl(tmp_path / "test.jsonl", [{"question": r["prompt"], **r} for r in TEST_ROWS]),
        "--column", "chosen_semantic=better", "--column", "prompt=question",
        "--tokenizer", tmp_path / "tokenizer", "--prompts", "4", "--seed", "3",
    )  # fmt: skip
    assert status == 0
    probes = ProbeSet.load(tmp_path / "out" / "probes.parquet")
    assert set(probes.families) == {
        "chosen", "rejected", "chosen_semantic", "human_random", "other_train", "other_test", "ungrammatical", "random",
        "random_tokens",
    }  # fmt: skip
    assert len(probes.prompt_ids) == 4
    assert probes.metadata["seed"] == 3
    assert {probe.response for probe in probes if probe.family == "other_test"} <= {row["chosen"] for row in TEST_ROWS}
    assert "chosen_semantic" in out


def test_build_takes_the_families_asked_for(run, pairs, tmp_path):
    status, *_ = run("probes", "build", pairs, tmp_path / "p.parquet", "--family", "rejected", "--family", "chosen")
    assert status == 0
    assert ProbeSet.load(tmp_path / "p.parquet").families == ("chosen", "rejected")


def test_several_columns_of_one_family_are_all_taken(run, tmp_path, preference_rows):
    rows = [{**row, "one": "A first text.", "two": "A second text."} for row in preference_rows]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    column = ["--column", "human_random=one", "--column", "human_random=two"]
    assert run("probes", "build", source, tmp_path / "p.parquet", *column)[0] == 0
    texts = {probe.response for probe in ProbeSet.load(tmp_path / "p.parquet") if probe.family == "human_random"}
    assert texts == {"A first text.", "A second text."}


def test_build_takes_rows_that_are_not_rejected(run, tmp_path, preference_rows):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows]
    status, *_ = run("probes", "build", write_jsonl(tmp_path / "r.jsonl", rows), tmp_path / "p.parquet")
    assert status == 0
    probes = ProbeSet.load(tmp_path / "p.parquet")
    assert probes.families == ("chosen", "other_train", "ungrammatical")
    assert {probe.response for probe in probes if probe.family == "chosen"} == {row["completion"] for row in rows}


@pytest.mark.parametrize("flag", ["--as-chat", "--as_chat"])
def test_build_makes_chat_of_labelled_rows(run, tmp_path, preference_rows, flag):
    rows = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in preference_rows
        for name in ("chosen", "rejected")
    ]
    assert run("probes", "build", write_jsonl(tmp_path / "r.jsonl", rows), tmp_path / "p.parquet", flag)[0] == 0
    probes = ProbeSet.load(tmp_path / "p.parquet")
    assert probes.families == ("chosen", "rejected", "other_train", "ungrammatical")
    assert {p.response for p in probes if p.family == "rejected"} == {row["rejected"] for row in preference_rows}
    assert probes[0].prompt == ({"role": "user", "content": preference_rows[0]["prompt"]},)


@pytest.mark.parametrize("column", ["messages", "text"])
def test_build_takes_whole_conversations(run, tmp_path, preference_rows, column):
    turns = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}]
        for r in preference_rows
    ]
    rows = [{column: turn if column == "messages" else f"{turn[0]['content']} {turn[1]['content']}"} for turn in turns]
    assert run("probes", "build", write_jsonl(tmp_path / "r.jsonl", rows), tmp_path / "p.parquet")[0] == 0
    probes = ProbeSet.load(tmp_path / "p.parquet")
    assert probes.families == ("chosen", "other_train", "ungrammatical")
    if column == "messages":
        assert {p.response for p in probes if p.family == "chosen"} == {row["chosen"] for row in preference_rows}


def test_build_prints_its_summary_for_other_programs(run, pairs, tmp_path):
    status, out, _ = run("probes", "build", pairs, tmp_path / "p.parquet", "--json")
    assert status == 0
    said = json.loads(out)
    assert (said["path"], said["probes"], said["prompts"]) == (str(tmp_path / "p.parquet"), 24, 6)
    assert [row["family"] for row in said["families"]] == ["chosen", "rejected", "other_train", "ungrammatical"]
    assert all(row["n"] == 6 for row in said["families"])


def test_what_was_dropped_is_said_on_one_line_and_shown(run, tmp_path, preference_rows):
    rows = [*preference_rows[:3], {**preference_rows[3], "rejected": "  "}]
    status, out, err = run("probes", "build", write_jsonl(tmp_path / "r.jsonl", rows), tmp_path / "p.parquet")
    assert status == 0
    assert err == "warning: 1 probes dropped (rejected: 1 x empty response); `llm-dynamics probes show` says why\n"
    assert "why dropped" in out
    assert "empty response: 1" in re.sub(r"\s+", " ", out.replace("│", " "))
    _, shown, _ = run("probes", "show", tmp_path / "p.parquet")
    assert "why dropped" in shown


def test_show_prints_prompts_with_all_their_responses(run, pairs, tmp_path):
    run("probes", "build", pairs, tmp_path / "p.parquet")
    status, out, _ = run("probes", "show", tmp_path / "p.parquet", "--prompts", "2")
    assert status == 0
    assert "24 probes on 6 prompts" in out
    assert "How long should I boil an egg?" in out
    assert "Figure it out yourself; eggs are not that hard." in out
    assert "Why is the sky blue?" in out
    assert "Name the capital of France." not in out.split("Why is the sky blue?")[1]
    assert fits(out)


def test_responses_are_shown_as_they_stand(run, tmp_path):
    hostile = "[red]x[/] [/nothing] \\[ \x1b[31m\x07 " + "w" * 200
    rows = [{"prompt": f"{number} {hostile}", "chosen": f"{number} {hostile}", "rejected": "[bold]"} for number in "12"]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    status, built, _ = run("probes", "build", source, tmp_path / "[b]p.parquet")
    assert status == 0
    assert "[b]p.parquet" in built
    status, out, _ = run("probes", "show", tmp_path / "[b]p.parquet")
    assert status == 0
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "[red]x[/] [/nothing] \\[ \\x1b[31m\\x07" in out
    assert out.count("w") >= 2 * 200  # nothing is cut off
    assert fits(out)


# ---- errors are one clear line ---------------------------------------------------------------------------------------


def test_a_missing_file_is_named(run, tmp_path):
    message = refused(run("probes", "build", tmp_path / "none.jsonl", tmp_path / "p.parquet"))
    assert message == f"error: {tmp_path / 'none.jsonl'}: No such file or directory\n"
    assert "none.parquet" in refused(run("probes", "show", tmp_path / "none.parquet"))
    assert "nowhere" in refused(run("report", tmp_path / "nowhere", "-o", tmp_path / "r.html"))


def test_a_missing_column_is_named_with_those_seen_and_the_way_out(run, tmp_path, pairs, preference_rows):
    message = refused(run("probes", "build", pairs, tmp_path / "p.parquet", "--column", "chosen_format=formal"))
    assert "no column 'formal'; seen: 'prompt', 'chosen', 'rejected'" in message
    assert "--column chosen_format=" in message
    rows = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in preference_rows]
    message = refused(run("probes", "build", write_jsonl(tmp_path / "r.jsonl", rows), tmp_path / "p.parquet"))
    assert "no column 'chosen'; seen: 'prompt', 'answer'" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--family", "nonsense"], "Unknown family 'nonsense'; known: chosen, rejected"),
        (["--family", "argmax"], "greedy token"),
        (["--family", "argmax"], "Leave it out of the `--family` options"),
        (["--family", "other_test"], "pass its rows as `--held-out FILE`"),
        (["--family", "random_tokens"], "name the model's tokenizer with `--tokenizer`"),
        (["--family", "chosen_semantic"], "map it to a column of the data (`--column chosen_semantic=NAME`)"),
        (["--family", "human_random"], "`--column"),
        (["--column", "nonsense=chosen"], "Unknown family 'nonsense'"),
        (["--column", "chosen"], "--column is 'chosen'; write family=column"),
        (["--column", "=chosen"], "write family=column"),
        (["--column", "chosen="], "write family=column"),
        (["--column", "prompt=prompt", "--column", "prompt=chosen"], "several columns for the prompt"),
        (["--prompts", "7"], "--prompts is 7 and there are 6 prompts; ask for fewer, or leave it out for all"),
        (["--prompts", "0"], "--prompts is 0; allowed: 1, 2, ... or None"),
        (["--tokenizer", "/no/such/folder"], "no tokenizer at '/no/such/folder'"),
    ],
)
def test_bad_options_are_explained_by_their_flags(run, pairs, tmp_path, options, said):
    message = refused(run("probes", "build", pairs, tmp_path / "p.parquet", *options))
    assert said in message
    for argument in ("n_prompts", "held_out=", "tokenizer=", "columns=", "`columns`", "`families`"):
        assert argument not in message
    assert not (tmp_path / "p.parquet").exists()


@pytest.mark.parametrize(("content", "said"), [("", "is empty (zero rows)"), ("{", "line 1"), ("[1]", "line 1")])
def test_a_file_that_holds_no_rows_is_named(run, tmp_path, content, said):
    (tmp_path / "rows.jsonl").write_text(content)
    message = refused(run("probes", "build", tmp_path / "rows.jsonl", tmp_path / "p.parquet"))
    assert "rows.jsonl" in message
    assert said in message


def test_held_out_rows_that_are_trained_on_are_refused(run, pairs, tmp_path):
    refused(run("probes", "build", pairs, tmp_path / "p.parquet", "--held-out", pairs))


def test_a_family_without_texts_is_null_in_json(run, tmp_path):
    rows = [{"prompt": f"Number {n}?", "chosen": "Yes.", "rejected": " "} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, _ = run("probes", "build", tmp_path / "rows.jsonl", tmp_path / "p.parquet", "--json")
    assert status == 0
    assert json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert "null" in out


def test_files_that_are_no_text_and_folders_are_named(run, pairs, tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "né"}'.encode("latin-1"))
    assert "latin.jsonl is not UTF-8 text" in refused(run("probes", "build", tmp_path / "latin.jsonl", tmp_path / "p"))
    (tmp_path / "folder").mkdir()
    assert "folder is a folder; give the file to write" in refused(run("probes", "build", pairs, tmp_path / "folder"))


def test_a_file_that_is_no_probe_set_is_named(run, pairs):
    assert "pairs.jsonl is not a readable Parquet file" in refused(run("probes", "show", pairs))


def test_the_traceback_is_there_when_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_DYNAMICS_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["llm-dynamics", "probes", "show", str(tmp_path / "none.parquet")])
    with pytest.raises(FileNotFoundError):
        cli.main()


# ---- report ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_runs(tmp_path):
    for name in ("lr=1e-4", "dpo"):
        writer = new_log(tmp_path / name / "dynamics")
        observe(writer, 0, (-10.0, -20.0))
        observe(writer, 5, (-12.0, -30.0))
    return tmp_path / "lr=1e-4", tmp_path / "dpo"


def test_report_writes_one_page_about_several_runs(run, two_runs, tmp_path):
    first, second = two_runs
    status, out, _ = run("report", first, f"mine={second}", "-o", tmp_path / "out" / "r.html", "--title", "Two runs")
    assert status == 0
    assert str(tmp_path / "out" / "r.html") in out
    page = (tmp_path / "out" / "r.html").read_text(encoding="utf-8")
    assert "Two runs" in page
    assert "lr=1e-4" in page
    assert "mine" in page


def test_two_runs_of_one_name_are_refused_with_the_way_out(run, two_runs, tmp_path):
    message = refused(run("report", two_runs[1], two_runs[1] / "dynamics", "-o", tmp_path / "r.html"))
    assert f"dpo-1={two_runs[1]}" in message


def test_a_broken_run_log_is_named(run, two_runs, tmp_path):
    part = two_runs[1] / "dynamics" / "sequences" / "step_000000005.parquet"
    part.write_bytes(b"broken")
    assert str(part) in refused(run("report", two_runs[1], "-o", tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


# ---- compare ---------------------------------------------------------------------------------------------------------


def test_compare_shows_changes_and_the_paired_difference_to_the_first_run(run, two_runs):
    first, second = two_runs
    writer = new_log(second.parent / "third" / "dynamics")
    observe(writer, 0, (-10.0, -20.0))
    observe(writer, 5, (-11.0, -20.0))
    status, out, _ = run("compare", first, f"mine={second}", f"third={second.parent / 'third'}")
    assert status == 0
    assert fits(out)
    changes, gaps = out.split("Minus lr=1e-4")
    cells = [re.findall(r"[-+]\d+\.\d", line) for line in changes.splitlines() if " chosen " in line]
    assert cells == [["-2.0", "-2.0", "-1.0"]]
    cells = [re.findall(r"[-+]\d+\.\d", line) for line in gaps.splitlines() if "rejected" in line]
    assert cells == [["+0.0", "+10.0"]]  # a single prompt: no interval


def test_compare_prints_intervals_where_there_are_prompts_enough(run, tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        random_log(tmp_path / name, seed=seed, n_prompts=4)
    status, out, _ = run("compare", f"[b]a={tmp_path / 'a'}", tmp_path / "b", "--per-token")
    assert status == 0
    assert fits(out)
    row = compare(load_runs([tmp_path / "a", tmp_path / "b"]), per_token=True).query("run == 'b'").iloc[0]
    low, high = row["difference_low"], row["difference_high"]
    assert "Minus [b]a" in out
    assert f"{row['difference']:+.2f} [{low:+.2f}, {high:+.2f}]" in out


def test_compare_says_of_how_many_probes_a_difference_is(run, tmp_path):
    random_log(tmp_path / "a", n_prompts=4)
    random_log(tmp_path / "b", n_prompts=3)
    _, out, _ = run("compare", tmp_path / "b", tmp_path / "a")
    assert "a: 9 of its 12 probes" in out


def test_compare_says_where_there_is_nothing_to_compare_yet(run, two_runs, tmp_path):
    observe(new_log(tmp_path / "killed" / "dynamics"), 0, (-10.0, -20.0))
    status, out, err = run("compare", two_runs[0], tmp_path / "killed", "--json")
    assert status == 0
    assert json.loads(out)
    assert "warning: killed has one observation, of step 0" in err


def test_compare_names_a_run_without_any_observation(run, two_runs, tmp_path):
    new_log(tmp_path / "begun" / "dynamics")
    assert "begun has no observation yet" in refused(run("compare", two_runs[0], tmp_path / "begun"))


def test_compare_of_runs_without_shared_probes_shows_changes_alone(run, tmp_path):
    random_log(tmp_path / "a", families=("chosen",))
    random_log(tmp_path / "b", families=("rejected",))
    status, out, _ = run("compare", tmp_path / "a", tmp_path / "b")
    assert status == 0
    assert "Change of log-prob" in out
    assert "Minus" not in out


def test_compare_gives_other_programs_all_columns(run, two_runs):
    frame = compare(load_runs(two_runs))
    status, out, err = run("compare", *two_runs, "--csv")
    assert (status, err) == (0, "")
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(out)), frame)
    status, out, _ = run("compare", *two_runs, "--json")
    rows = json.loads(out)
    assert list(rows[0]) == list(frame)
    assert [row["delta"] for row in rows[:4]] == [-2.0, -2.0, -10.0, -10.0]
    assert rows[0]["difference"] is None
    assert rows[1]["difference"] == 0.0
    assert "--json and --csv were both given" in refused(run("compare", *two_runs, "--json", "--csv"))


# ---- demo ------------------------------------------------------------------------------------------------------------


def test_the_quick_demo_runs_end_to_end(tmp_path):
    # one thread: on a tiny model the second gains nothing, and costs tenfold where the cores are busy
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "llm_dynamics.cli", "demo", "--quick", "--output", tmp_path / "demo"],
        capture_output=True, text=True, env=environment, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "demo" / "report.html").stat().st_size > 1_000_000
    assert str(tmp_path / "demo" / "report.html") in done.stdout
    for name in ("sft", "dpo"):
        run = load_run(tmp_path / "demo" / name)
        assert run.observed_steps[0] == 0
        assert len(run.observed_steps) >= 13
        assert run.probes["family"].nunique() >= 8
        assert (run.sequences["n_nonfinite"] == 0).all()
        assert f"What moved in {name.upper()}" in done.stdout
    for heading in ("family", "start", "end", "change per token", "argmax"):
        assert heading in done.stdout
    assert fits(done.stdout.split("Done in")[0])


def test_the_quick_demo_of_reinforcement_runs_end_to_end(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "llm_dynamics.cli", "demo", "--grpo", "--quick", "--output", tmp_path / "demo"],
        capture_output=True, text=True, env=environment, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "which tokens were spared" in page
    for name in ("grpo", "nthr"):
        run = load_run(tmp_path / "demo" / name)
        assert run.meta["arguments"]["nthr_method"] == {"grpo": "none", "nthr": "nthr"}[name]
        assert run.observed_steps == [0, 2, 4, 6, 8]
        assert len(run.displacements)
        assert len(run.rollouts) == 4 * 16
        assert f"What moved in {name.upper()}" in done.stdout
    assert load_run(tmp_path / "demo" / "nthr").nthr_tokens["selected"].any()
    assert "tokens" in done.stdout
    assert fits(done.stdout.split("Done in")[0])


# ---- text that is not trusted ----------------------------------------------------------------------------------------

HOSTILE = {
    "no markup": "x[/x]",
    "markup": "[bold]x",
    "escape": "x\x1b[2J",
    "control sequence introducer": "x\x9b2J",
    "bidi override": "x\u202ey",
    "newline": "x\nerror: all is lost",
    "carriage return": "x\rerror",
    "bell": "x\x07",
    "emoji": ":smile:",
    "lone surrogate": "x\udc80",
    "tag": "x\U000e0041",
}


def harmless(text):
    """The text has nothing that drives a terminal, but its ends of lines."""
    return not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0041]", text)


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_names_and_paths_are_printed_as_they_stand(run, tmp_path, name):
    for run_name in ("a", "b"):
        log = new_log(tmp_path / run_name / "dynamics")
        observe(log, 0)
        observe(log, 1)
    results = [
        run("compare", f"{name}={tmp_path / 'a'}", f"b={tmp_path / 'b'}"),
        run("compare", f"b={tmp_path / 'a'}", f"{name}={tmp_path / 'b'}"),
        run("compare", f"{name}={tmp_path / 'a'}", f"{name}={tmp_path / 'b'}"),
        run("judge", f"{name}={tmp_path / 'a'}"),
        run("judge", tmp_path / name),
        run("score", tmp_path / "probes", name),
        run("compare", tmp_path / "a", "--csv"),
        run("compare", f"{name}={tmp_path / 'a'}", "--csv"),
    ]
    if "\udc80" not in name:  # which no column of text holds: an error, as harmless as the others
        assert [status for status, *_ in results] == [0, 0, 1, 0, 1, 1, 0, 0]
    for _, out, err in results:
        assert harmless(out)
        assert harmless(err)
        assert not any(line.startswith("error: all is lost") for line in (out + err).splitlines()) or "," in out
    assert [err for status, _, err in results if status and err.strip().count("\n")] == []
    if "\udc80" in name:
        return
    assert name.encode("unicode_escape").decode() in results[1][1]
    _, out, _ = run("compare", f"{name}={tmp_path / 'a'}", "--json")
    assert harmless(out)
    assert {row["run"] for row in json.loads(out)} == {name}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_texts_of_probes_are_printed_as_they_stand(run, tmp_path, text):
    if "\udc80" in text:
        return  # no file of probes holds one
    probes = ProbeSet.from_preference_dataset([{"prompt": text, "chosen": f"a {text}", "rejected": text}])
    path = probes.save(tmp_path / "probes.parquet")
    status, out, _ = run("probes", "show", path)
    assert (status, harmless(out)) == (0, True)
    status, out, _ = run("probes", "show", path, "--json")
    assert (status, harmless(out)) == (0, True)
    assert json.loads(out)[0]["response"] == f"a {text}"
    probes = tmp_path / "pairs.jsonl"
    probes.write_text(json.dumps({"prompt": "p", text: "x"}))
    assert harmless(refused(run("probes", "build", probes, tmp_path / "out.parquet")))


def test_what_is_warned_of_is_one_harmless_line(monkeypatch, capsys):
    def warns():
        warnings.warn("x[/x]\x1b[2J\ny", stacklevel=1)
        logging.getLogger("llm_dynamics.anything").warning("%s", "[/x]\x9b")

    monkeypatch.setattr(cli, "app", warns)
    monkeypatch.setattr(cli.errors, "width", 80)
    cli.main()
    assert capsys.readouterr().err == "warning: x[/x]\\x1b[2J y\nwarning: [/x]\\x9b\n"


def test_bars_of_checkpoints_take_any_name(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(models, "errors", PlainConsole(file=written, force_terminal=True, width=80))
    with models._bars() as bars:
        for name in HOSTILE.values():
            bars.add_task(name_text(name).plain, total=None)
        bars.refresh()
    assert "x[/x]" in written.getvalue()
    assert "\x1b[2J" not in written.getvalue()
