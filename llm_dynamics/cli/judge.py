"""`llm-dynamics judge`: is this run normal? For people, and for the next job of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from llm_dynamics.cli.runs import _named_runs
from llm_dynamics.cli.show import console, name_text, print_json

if TYPE_CHECKING:
    from llm_dynamics.rules import Verdict
    from llm_dynamics.runlog import RunLog

EXIT_FOUND = 3
"""Exit status where a verdict of `--fail-on` was found; 1 is an error, 2 a wrong use of the command line."""
ANY = "found"
_MARKS = {
    "fault": {"found": ("found", "bold red"), "clear": ("clear", "green"), "unknown": ("not told", "dim")},
    "hope": {"found": ("as hoped", "green"), "clear": ("not so", "bold"), "unknown": ("not told", "dim")},
    "course": {"found": ("yes", ""), "clear": ("no", ""), "unknown": ("not told", "dim")},
}


def judge(
    runs: Annotated[list[str], typer.Argument(help="Run folders (a trainer's output_dir), or `name=folder`.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 3 where this is found: a rule's name such as squeezing, or `found` for any."),
    ] = None,
) -> None:
    """Judge runs by named rules: likelihood displacement, squeezing, valley and more.

    Each fault is found, clear, or not told by this run, with the numbers that decide, the limit and a remedy; then
    what one hopes for, and what is usual in such runs. "Unsure": resampling the prompts often decides otherwise.

    Exit status: 0, or 3 where something of --fail-on (repeatable) was found; 1 where a run cannot be read. What a run
    does not tell is not found.

    Example: `llm-dynamics judge runs/dpo --fail-on squeezing --fail-on "likelihood displacement"`
    """
    from llm_dynamics.rules import judge as judged
    from llm_dynamics.runlog import load_runs

    stops = _rules_named(fail_on or [])
    loaded = load_runs(_named_runs(runs)).runs
    verdicts = {name: judged(run) for name, run in loaded.items()}
    if as_json:
        print_json([{"run": name, **asdict(own)} for name, of_run in verdicts.items() for own in of_run])
    else:
        for name, of_run in verdicts.items():
            console.print(_heading(name, loaded[name], of_run), soft_wrap=True)
            console.print(_lines(of_run))
    _exit_where_found(stops, [own for of_run in verdicts.values() for own in of_run])


def _exit_where_found(stops: set[str], verdicts: Sequence[Verdict]) -> None:
    """End the command with `EXIT_FOUND` where a verdict of `stops` was found.

    Raises:
        Exit: Where one was.
    """
    if any(own.status == "found" and own.name in stops for own in verdicts):
        raise typer.Exit(EXIT_FOUND)


def _rules_named(given: Sequence[str]) -> set[str]:
    """Return the rules that `--fail-on` names; a hyphen may stand for a space.

    Raises:
        ValueError: For a name that is none.
    """
    from llm_dynamics.rules import RULE_NAMES

    by_key = {name.replace("-", " "): name for name in RULE_NAMES}
    named: set[str] = set()
    for text in given:
        key = text.strip().lower().replace("-", " ")
        if key != ANY and key not in by_key:
            raise ValueError(f"--fail-on is {text!r}; allowed: {ANY}, {', '.join(RULE_NAMES)}")
        named |= set(RULE_NAMES) if key == ANY else {by_key[key]}
    return named


def _heading(name: str, run: RunLog, verdicts: Sequence[Verdict]) -> Text:
    faults: list[str] = [own.status for own in verdicts if own.kind == "fault"]
    counts = [f"{faults.count(status)} {text}" for status, (text, _) in _MARKS["fault"].items()]
    steps = run.observed_steps
    span = f", steps {steps[0]} to {steps[-1]}" if steps else ""
    trainer = name_text(f" ({run.meta.get('trainer') or 'unknown trainer'}{span}): ")
    return Text.assemble(name_text(name, "bold"), trainer, ", ".join(counts))


def _lines(verdicts: Sequence[Verdict]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column()
    for own in sorted(verdicts, key=lambda one: [*_MARKS].index(one.kind)):
        text, style = _MARKS[own.kind][own.status]
        table.add_row(Text(f"  {text}", style), Text.assemble((own.name, "bold"), ": ", own.evidence))
        if own.status == "found" and own.kind == "fault":
            table.add_row("", Text.assemble(("limit: ", "dim"), own.threshold))
            table.add_row("", Text.assemble(("remedy: ", "dim"), own.remedy))
    return table
