"""`llm-dynamics score | explain`: what checkpoints say of responses, after the fact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llm_dynamics.cli.show import console, errors, moved_table, name_text, print_json, shortened

Dtype = Annotated[str, typer.Option(help="Precision of the weights: float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1...; default: a GPU where there is one.")]
TokenizerName = Annotated[str | None, typer.Option(help="Tokenizer (hub id or folder); default: the model's.")]
CAPTION = "kernel > 0: they rise together; < 0: one pushes the other down (nats per unit of step size)"
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust_remote_code", help="Run the Python code that a model brings. Only where you trust it.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


def score(
    probes: Annotated[Path, typer.Argument(help="Probe set written by `probes build` or `ProbeSet.save`.")],
    checkpoints: Annotated[list[str], typer.Argument(help="Models in order: folders (checkpoint-500 ...) or hub ids.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the run log.")] = Path("runs/score"),
    reference: Annotated[str | None, typer.Option(help="Model whose log-probs stand beside (ref_logp).")] = None,
    tokenizer: TokenizerName = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision: float32, bfloat16, float16; default: the run's, else float32.")
    ] = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Score saved checkpoints on a probe set, as `watch` would have during training.

    Checkpoints in the folder of a watched run are scored as its log says: truncation, chat template, tools, precision.
    Elsewhere a warning says what is not known.

    Log-probs are in nats, summed over the tokens of a response. Writes a run log that `report`, `compare` and
    `load_run` read: names that end in numbers (checkpoint-500) are its steps. Needs no training script.

    Example: `llm-dynamics score probes.parquet runs/dpo/checkpoint-* -o runs/dpo-scored`
    """
    from llm_dynamics.posthoc import score_checkpoints
    from llm_dynamics.probes import ProbeSet
    from llm_dynamics.report import what_moved

    with _bars() as bars:
        tasks = {name: bars.add_task(name_text(Path(name).name or name).plain, total=None) for name in checkpoints}
        run = score_checkpoints(
            checkpoints,
            ProbeSet.load(probes),
            output,
            tokenizer=tokenizer,
            reference=reference,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            on_progress=lambda name, done, total: bars.update(tasks[name], completed=done, total=total),
        )
    if as_json:
        print_json(run.sequences[["step", "probe_id", "prompt_id", "family", "n_tokens", "logp_sum", "ref_logp_sum"]])
        return
    console.print(moved_table("Mean log-prob of a response, nats: first and last checkpoint", what_moved(run)))
    console.print(Text("run log: ") + name_text(run.path, "bold"), soft_wrap=True)


def explain(
    model: Annotated[str, typer.Argument(help="Checkpoint: a folder or a hub id.")],
    train: Annotated[Path, typer.Argument(help="JSONL of training rows: prompt, and response, completion or chosen.")],
    probes: Annotated[Path, typer.Argument(help="JSONL of probe rows, the same.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Parquet file for the whole table.")] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="One row per token pair rather than per response pair.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="How many pairs to print.")] = 10,
    tokenizer: TokenizerName = None,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    memory_mb: Annotated[float, typer.Option(help="Megabytes for gradients in flight.")] = 2048,
    as_json: AsJson = False,
) -> None:
    """Tell how a gradient step on each training response would move each probe: the exact token kernel of two files.

    A plain gradient step of size eta that raises log pi(train) by its own gradient moves log pi(probe) by eta times the
    kernel, in nats: positive pairs rise together, negative ones push each other down. The time is one backward pass for
    each response of both files (with `--tokens`, for each token). `-o` keeps all pairs; the strongest are printed.

    Example: `llm-dynamics explain runs/dpo/checkpoint-500 train.jsonl probes.jsonl -o kernel.parquet`
    """
    from llm_dynamics.posthoc import kernel_of_files
    from llm_dynamics.probes.rows import as_records, read_jsonl

    with _bars() as bars:
        task = bars.add_task("backward passes", total=None)
        table, _ = kernel_of_files(
            model,
            as_records(read_jsonl(train), str(train)),
            as_records(read_jsonl(probes), str(probes)),
            rows="tokens" if tokens else "responses",
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            memory_budget_mb=memory_mb,
            on_progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(output, index=False)
    if as_json:
        print_json(table)
        return
    strongest = table.reindex(table["kernel"].abs().sort_values(ascending=False, kind="stable").index).head(top)
    kind = "token pairs" if tokens else "pairs of responses"
    shown = Table(title=f"The {len(strongest)} strongest of {len(table)} {kind}", caption=CAPTION)
    for name in strongest.columns:
        shown.add_column(name, justify="left" if name.endswith(("token", "text")) else "right", overflow="fold")
    width = max(12, (console.width - 40) // 2)
    for row in strongest.to_dict("records"):
        shown.add_row(*(_cell(shortened(v, width) if str(name).endswith("text") else v) for name, v in row.items()))
    console.print(shown)
    if output is not None:
        console.print(Text("table: ") + name_text(output, "bold"), soft_wrap=True)


def _cell(value: object) -> Text:
    if isinstance(value, float):
        return Text(f"{value:+.4g}", "green" if value > 0 else "red")
    return Text(repr(value) if isinstance(value, str) else str(value))


def _bars() -> Progress:
    """Return bars on stderr that count, and tell how long it will take."""
    named = TextColumn("{task.description}", style="progress.description", markup=False)
    columns = (named, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=errors, transient=True)
