"""`llm-dynamics report | compare`: what run logs say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from llm_dynamics.cli.show import console, name_text, print_json, printable, warn

if TYPE_CHECKING:
    import pandas as pd

    from llm_dynamics.runlog import RunLogs


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
    console.print(Text("report: ") + name_text(page, "bold"), soft_wrap=True)


def compare(
    runs: Annotated[list[str], typer.Argument(help="Run folders (a trainer's output_dir), or `name=folder`.")],
    per_token: Annotated[bool, typer.Option("--per-token", help="Nats per token rather than per response.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV on stdout, and nothing else there.")] = False,
) -> None:
    """Set runs side by side: how far each family moved from the first to the last observation.

    Then how much further than in the first run, over the probes that both watch, with 95% intervals over prompts.

    Example: `llm-dynamics compare sft=runs/sft dpo=runs/dpo extend=runs/extend_dpo`
    """
    from llm_dynamics import frames
    from llm_dynamics.runlog import load_runs

    _only_one(as_json, as_csv)
    logs = load_runs(_named_runs(runs))
    _check_observed(logs)
    compared = frames.compare(logs, per_token=per_token)
    if as_json:
        print_json(compared)
    elif as_csv:
        print(printable(compared.to_csv(index=False)), end="")
    else:
        for table in _compared_tables(compared, per_token):
            console.print(table)


def _check_observed(logs: RunLogs) -> None:
    """Refuse a log that has no observation, and say which have only one.

    Raises:
        ValueError: For the first without any.
    """
    for name, log in logs.runs.items():
        steps = log.observed_steps
        if not steps:
            raise ValueError(f"{name} has no observation yet: {log.path}")
        if len(steps) == 1:
            warn(f"{name} has one observation, of step {steps[0]}: its changes are 0 for want of a second")


def _only_one(as_json: bool, as_csv: bool) -> None:
    """Refuse two forms of output at once.

    Raises:
        ValueError: Where both are asked for.
    """
    if as_json and as_csv:
        raise ValueError("--json and --csv were both given; stdout takes one of them")


def _compared_tables(compared: pd.DataFrame, per_token: bool) -> Iterator[Table | Text]:
    """Yield the changes of all runs and, where probes are shared with the first run, the differences to it."""
    unit, digits = ("token", 2) if per_token else ("response", 1)
    names = list(dict.fromkeys(compared["run"]))
    changes = Table(title=f"Change of log-prob, nats per {unit}, first to last observation")
    gaps = Table(
        title=Text("Minus ", "table.title") + name_text(names[0]),
        caption=f"nats per {unit}, paired by probe (n: how many); 95% intervals over prompts",
    )
    changes.add_column("family", style="bold", no_wrap=True)
    gaps.add_column("family", style="bold", no_wrap=True)
    paired = [name for name in names[1:] if compared.loc[compared["run"] == name, "n_paired"].any()]
    for table, columns in ((changes, names), (gaps, paired)):
        for name in columns:
            table.add_column(name_text(name), justify="right")
    for family, rows in compared.groupby("family", sort=False):
        by_run = rows.set_index("run")
        moved = by_run["delta_per_token" if per_token else "delta"]
        changes.add_row(name_text(family), *(_signed(moved.get(name), digits) for name in names))
        gaps.add_row(name_text(family), *(_gap(by_run, name, digits) for name in paired))
    yield changes
    if paired:
        yield gaps
        note = _shared_note(compared, paired)
        if note:
            yield Text(note)


def _gap(by_run: pd.DataFrame, name: str, digits: int) -> Text:
    if name not in by_run.index:
        return Text("–")
    gap, low, high = (float(by_run[column][name]) for column in ("difference", "difference_low", "difference_high"))
    interval = "" if low != low else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return Text.assemble(_signed(gap, digits), interval, (f" n={int(by_run['n_paired'][name])}", "dim"))


def _shared_note(compared: pd.DataFrame, paired: list[str]) -> str | None:
    """Say of how many probes the differences are, where not of all."""
    from llm_dynamics.frames import GREEDY

    probes = compared[~compared["family"].isin(GREEDY)]
    counts = probes.groupby("run", sort=False)[["n_paired", "n_probes"]].sum()
    told = [f"{name}: {n} of its {all_} probes" for name, n, all_ in counts.loc[paired].itertuples() if n < all_]
    return f"Probes in the differences: {'; '.join(told)}" if told else None


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
