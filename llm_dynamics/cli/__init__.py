"""The command line: `llm-dynamics probes | score | explain | report | compare | judge | demo`."""

from __future__ import annotations

import os

import typer
from rich.text import Text

from llm_dynamics.cli import demo, judge, models, probes, runs
from llm_dynamics.cli.show import console as console
from llm_dynamics.cli.show import errors, one_line, warnings_as_lines

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="See what post-training really does to a language model.\n\n"
    "In a training script, one line watches a run: `watch(trainer, probes)`. These commands prepare probes, "
    "score checkpoints, write reports, and show it all on a real small model.\n\n"
    "Example: `llm-dynamics demo --quick`",
    epilog="Exit status: 0 done; 1 an error, which is one line on stderr (LLM_DYNAMICS_TRACEBACK=1 in the environment "
    "shows where it came from); 2 an option that does not exist; 3 a verdict that `judge --fail-on` was to find. "
    "`--json` prints for other programs.",
)
app.add_typer(probes.app, name="probes")
for command in (models.score, models.explain, runs.report, runs.compare, judge.judge, demo.demo):
    app.command(command.__name__)(command)


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
        with warnings_as_lines():
            app()
    except (ValueError, TypeError, NotImplementedError, ModuleNotFoundError, OSError) as error:
        errors.print(Text.assemble(("error: ", "bold red"), one_line(error)), soft_wrap=True)
        raise SystemExit(1) from None
