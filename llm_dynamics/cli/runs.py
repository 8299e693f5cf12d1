"""`llm-dynamics report | compare`: what run logs say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from llm_dynamics.cli.show import console, print_json


def report(
    runs: Annotated[list[str], typer.Argument(help="Run folders (a trainer's output_dir), or `name=folder`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "What moved in training",
) -> None:
    """Write one self-contained HTML page about one or several runs.

    Example: `llm-dynamics report sft=runs/sft dpo=runs/dpo -o report.html`
    """
    from llm_dynamics.report import write_report
    from llm_dynamics.runlog import load_runs

    page = write_report(load_runs(_named_runs(runs)), output, title=title)
    console.print(Text.assemble("report: ", (str(page), "bold")), soft_wrap=True)


def compare(
    runs: Annotated[list[str], typer.Argument(help="Run folders (a trainer's output_dir), or `name=folder`.")],
    per_token: Annotated[bool, typer.Option("--per-token", help="Nats per token rather than per response.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")] = False,
) -> None:
    """Set runs side by side: how far each family moved from the first to the last observation.

    Example: `llm-dynamics compare sft=runs/sft dpo=runs/dpo extend=runs/extend_dpo`
    """
    import pandas as pd

    from llm_dynamics.report import what_moved
    from llm_dynamics.runlog import load_runs

    loaded = load_runs(_named_runs(runs))
    moved = pd.concat([what_moved(run).assign(run=name) for name, run in loaded.runs.items()], ignore_index=True)
    if as_json:
        print_json(moved[["run", *(name for name in moved.columns if name != "run")]])
        return
    value = "delta_per_token" if per_token else "delta"
    table = Table(
        title=f"Change of log-prob, nats per {'token' if per_token else 'response'}, first to last observation"
    )
    table.add_column("family", style="bold", no_wrap=True)
    for name in loaded.runs:
        table.add_column(name, justify="right")
    for family, rows in moved.groupby("family", sort=False):
        by_run = rows.set_index("run")[value]
        table.add_row(str(family), *(_signed(by_run.get(name), 2 if per_token else 1) for name in loaded.runs))
    console.print(table)


def _signed(value: float | None, digits: int) -> Text:
    if value is None or value != value:
        return Text("–")
    return Text(f"{value:+.{digits}f}", "green" if value > 0 else "red")


def _named_runs(runs: Sequence[str]) -> dict[str, str]:
    """Return the run folders by name: the one given, else the run's own.

    Raises:
        ValueError: Where two runs have the same name.
    """
    from llm_dynamics.runlog import load_run

    named: dict[str, str] = {}
    for run in runs:
        name, found, path = run.partition("=")
        if not found or Path(run).exists():  # a folder may be called `lr=1e-4`
            name, path = load_run(run).name, run
        if name in named:
            raise ValueError(f"two runs are called {name!r}; name them: {name}-1={named[name]} {name}-2={path}")
        named[name] = path
    return named
