"""`llm-dynamics judge`: what it prints, and the exit status that a pipeline acts on."""

import json
import sys
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from llm_dynamics import cli
from llm_dynamics.rules import RULE_NAMES, judge
from llm_dynamics.runlog import load_run
from tests.report.synthetic import DPO_DELTA, SFT_DELTA, write_run, write_values


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Logs of an SFT run and of a DPO run that squeezes, displaces and starts in a valley."""
    folder = tmp_path_factory.mktemp("judged")
    write_run(folder / "sft" / "dynamics", "SFTTrainer", SFT_DELTA, steps=(0, 5, 10))
    write_run(folder / "dpo" / "dynamics", "DPOTrainer", DPO_DELTA, steps=(0, 5, 10))
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command as the console script does; returns exit status, stdout and stderr."""

    def run(*arguments, width=80):
        monkeypatch.setattr(sys, "argv", ["llm-dynamics", "judge", *map(str, arguments)])
        monkeypatch.setattr(cli.console, "width", width)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


def words(text):
    return " ".join(text.split())


def test_help_teaches_with_an_example_and_every_exit_status():
    result = CliRunner().invoke(cli.app, ["judge", "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    text = words(result.output)
    assert "Example: llm-dynamics judge runs/dpo --fail-on squeezing" in text
    assert "Exit status: 0, or 3 where something of --fail-on (repeatable) was found; 1 where a run cannot be" in text
    assert "Raises" not in text
    assert all(len(line) <= 80 for line in result.output.splitlines())


def test_every_verdict_of_every_run_is_printed_with_remedies_for_what_is_found(run, folders):
    status, out, err = run(folders / "sft", f"mine={folders / 'dpo'}")
    assert (status, err) == (0, "")
    first, second = words(out).split("mine (DPOTrainer, steps 0 to 10): ")
    for name, text in (("sft", first), ("dpo", second)):
        verdicts = judge(load_run(folders / name))
        for own in verdicts:
            said = {
                "fault": {"found": "found", "clear": "clear", "unknown": "not told"},
                "hope": {"found": "as hoped", "clear": "not so", "unknown": "not told"},
                "course": {"found": "yes", "clear": "no", "unknown": "not told"},
            }[own.kind][own.status]
            assert f"{said} {own.name}: {own.evidence}" in text
            fault = own.kind == "fault" and own.status == "found"
            assert (f"limit: {own.threshold} remedy: {own.remedy}" in text) is fault
    assert first.startswith("sft (SFTTrainer, steps 0 to 10): 1 found, 4 clear, 3 not told ")
    assert second.startswith("3 found, 2 clear, 3 not told ")
    assert all(len(line) <= 80 for line in out.splitlines())


def test_json_is_all_that_stdout_has(run, folders):
    status, out, _ = run(folders / "dpo", "--json")
    assert status == 0
    assert json.loads(out) == [{"run": "dpo", **asdict(own)} for own in judge(load_run(folders / "dpo"))]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], 0),
        (["--fail-on", "found"], 3),
        (["--fail-on", "squeezing"], 3),
        (["--fail-on", "Likelihood-Displacement"], 3),
        (["--fail-on", "first-order account"], 0),  # not told by this run
        (["--fail-on", "probes and log"], 0),  # clear
        (["--fail-on", "probes-and-log", "--fail-on", "valley"], 3),
        (["--fail-on", "squeezing", "--json"], 3),
    ],
)
def test_the_exit_status_is_3_where_what_is_named_was_found(run, folders, options, expected):
    faults = [own for own in judge(load_run(folders / "dpo")) if own.kind == "fault"]
    found = {own.name for own in faults if own.status == "found"}
    assert found == {"likelihood displacement", "squeezing", "valley"}
    status, out, _ = run(folders / "dpo", *options)
    assert status == expected
    assert "squeezing" in out  # what was found is printed in any case


def test_one_run_of_several_is_enough(run, folders):
    assert run(folders / "sft", "--fail-on", "squeezing")[0] == 0
    assert run(folders / "sft", folders / "dpo", "--fail-on", "squeezing")[0] == 3


def test_a_run_that_cannot_be_read_is_an_error_and_no_verdict(run, tmp_path):
    status, out, err = run(tmp_path / "nowhere", "--fail-on", "squeezing")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert "nowhere" in err


def test_a_rule_that_does_not_exist_is_refused_before_a_run_is_read(run, tmp_path):
    status, _, err = run(tmp_path / "nowhere", "--fail-on", "squeeze")
    assert status == 1
    assert f"--fail-on is 'squeeze'; allowed: found, {', '.join(RULE_NAMES)}" in words(err)


def test_names_of_families_are_printed_as_they_stand(run, tmp_path):
    write_values(tmp_path / "r" / "dynamics", {"[red]x\x1b[31m-1": [-1.0, -2.0]}, steps=(0, 1))
    _, out, _ = run(f"[bold]={tmp_path / 'r'}", width=200)
    assert "\x1b[31m" not in out
    assert "[red]x\\x1b[31m" in out
    assert "[bold] (DPOTrainer" in out
