"""`llm-dynamics probes build | show`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from llm_dynamics.cli.show import console, name_text, print_json, warnings_as_lines

_AS_FLAGS = (
    (r"n_prompts is (-?\d+)", r"--prompts is \1"),
    (r", or None for all", ", or leave it out for all"),
    (r"`held_out=\.\.\.`", "`--held-out FILE`"),
    (r"pass the trainer's tokenizer \(`tokenizer=\.\.\.`\)", "name the model's tokenizer with `--tokenizer`"),
    (r"`columns=\{'(\w+)': \.\.\.\}`", r"`--column \1=NAME`"),
    (r"map it to its column in `columns`", "name its column with `--column FAMILY=NAME`"),
    (r"Add it to `columns`, or pass join='as_is'", "Name it: `--column chosen=NAME`"),
    (r", or pass `rephraser=\.\.\.`", "; in Python, a model writes it: `rephraser=...`"),
    (r"Name the right one in `columns`", "Name the right one with `--column FAMILY=NAME`"),
    (r"Name the right one with `prompt=\.\.\.`", "Name the right one with `--column prompt=NAME`"),
    (r"Leave it out of `families`", "Leave it out of the `--family` options"),
    (r"`ProbeSet\.dropped` names each", "`llm-dynamics probes show` says why"),
)
"""What messages of `ProbeSet` call things, and what the command line calls them."""

app = typer.Typer(
    no_args_is_help=True,
    help="Build and look at probe sets: the prompts and responses that are watched.\n\n"
    "Example: `llm-dynamics probes build pairs.jsonl probes.parquet`",
)


@app.command("build")
def build_probes(
    source: Annotated[Path, typer.Argument(help="JSONL file of rows that TRL trains on.")],
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
    as_chat: Annotated[
        bool,
        typer.Option("--as-chat", "--as_chat", help="Make plain text chat messages, as recipes do with --as_chat."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")] = False,
) -> None:
    """Build a probe set from preference rows (prompt, chosen, rejected) and save it.

    A prompt and its responses are texts, or chat messages. Any other rows that TRL trains on do, too: prompt and
    completion (with KTO's label, too), messages, conversations, text. The file goes to `watch(trainer, probes)`,
    `--watch_probes` of the recipes, and `llm-dynamics score`.

    Example: `llm-dynamics probes build pairs.jsonl probes.parquet --prompts 50 --held-out test.jsonl`
    """
    from llm_dynamics.probes import ProbeSet
    from llm_dynamics.probes.families import FAMILIES
    from llm_dynamics.probes.forms import RowForm

    rows = _read_rows(source)
    columns = _parse_columns(column or [])
    seen = dict.fromkeys(name for row in rows for name in row)
    prompt = columns.pop("prompt", ["prompt"])[0]
    form = RowForm.of(rows, {"prompt": prompt} | {name: names[0] for name, names in columns.items() if len(names) == 1})
    pair = {"chosen": ["chosen"]} | ({"rejected": ["rejected"]} if form.rejected or form.label else {})
    _check_columns(columns | ({} if prompt == "prompt" else {"prompt": [prompt]}), seen, source)
    columns = pair | columns
    if family is None:
        written = [name for name in FAMILIES if FAMILIES[name].needs == "writer" and name in seen]
        offline = ["other_train", "ungrammatical"]
        offline += ["other_test", "random"] if held_out else []
        offline += ["random_tokens"] if tokenizer else []
        family = [*columns, *written, *offline]
        family = list(dict.fromkeys(family))
    with warnings_as_lines(_as_flags), _naming_flags():
        probes = ProbeSet.from_records(
            rows,
            source={"kind": "preference dataset" if "rejected" in columns else "prompt-completion dataset"},
            families=family,
            columns={name: own[0] if len(own) == 1 else own for name, own in columns.items()},
            n_prompts=prompts,
            seed=seed,
            held_out=_read_rows(held_out) if held_out else None,
            tokenizer=_tokenizer(tokenizer),
            prompt=prompt,
            as_chat=as_chat,
        )
    path = probes.save(output)
    if as_json:
        summary = probes.summary().reset_index(names="family").to_dict("records")
        print_json({"path": str(path), "probes": len(probes), "prompts": len(probes.prompt_ids), "families": summary})
        return
    _show_summary(probes)
    console.print(Text(f"{len(probes)} probes in ") + name_text(path, "bold"), soft_wrap=True)


@app.command("show")
def show_probes(
    path: Annotated[Path, typer.Argument(help="Probe set written by `probes build` or `ProbeSet.save`.")],
    prompts: Annotated[int, typer.Option(min=0, help="How many prompts to print with all their responses.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print all probes as JSON, and nothing else.")] = False,
) -> None:
    """Show what a probe set holds: families, counts, drops, and a few prompts with their responses.

    Example: `llm-dynamics probes show probes.parquet --prompts 3`
    """
    from llm_dynamics.probes import ProbeSet
    from llm_dynamics.probes.probe import prompt_as_text
    from llm_dynamics.probes.storage import probe_record

    probes = ProbeSet.load(path)
    if as_json:
        print_json([probe_record(probe) for probe in probes])
        return
    _show_summary(probes)
    for prompt_id in probes.prompt_ids[:prompts]:
        members = [probe for probe in probes if probe.prompt_id == prompt_id]
        table = Table(title=prompt_as_text(members[0].prompt), title_justify="left", show_lines=True)
        table.add_column("family", style="bold", no_wrap=True)
        table.add_column("response", overflow="fold")
        for probe in members:
            table.add_row(probe.family, probe.response)
        console.print(table)


@contextmanager
def _naming_flags() -> Iterator[None]:
    """Let an expected error name flags rather than arguments of Python."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(_as_flags(str(error))) from error


def _as_flags(message: str) -> str:
    for said, flag in _AS_FLAGS:
        message = re.sub(said, flag, message)
    return message


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
    from llm_dynamics.posthoc.loading import load_tokenizer

    return load_tokenizer(name)


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
        table.add_row(str(family), *counts, *(row[name] for name in texts))
    console.print(table)
