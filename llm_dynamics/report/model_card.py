"""What a model card says of the learning dynamics: a section of Markdown."""

from __future__ import annotations

import pandas as pd

from llm_dynamics.frames import what_moved
from llm_dynamics.report.families import GREEDY
from llm_dynamics.report.markdown import escaped, markdown_table
from llm_dynamics.report.rollouts import question_deltas
from llm_dynamics.report.text import nats
from llm_dynamics.runlog import RunLog

HEADING = "## Learning dynamics"
SOURCE = (
    "What such curves mean: Ren and Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025, "
    "[arXiv 2407.10490](https://arxiv.org/abs/2407.10490)."
)


def model_card_section(run: RunLog) -> str:
    """Say what a run did to the responses that were watched, for its model card.

    Args:
        run: The run log, of any trainer.

    Returns:
        Markdown: a heading, where the log lies, a table of families (means over probes of the summed log-prob at the
        first and the last observation, and of its change, nats), and where it was measured the mean `lld/delta` (nats a
        step), and the paper to read. It names the log's folder, not where that lies on this machine.

    Raises:
        RunLogError: Where the log is unreadable.

    Example:
        >>> with open("runs/dpo/README.md", "a") as card:  # doctest: +SKIP
        ...     card.write(model_card_section(load_run("runs/dpo")))
    """
    parts = [HEADING, *_families(run), *_displacement(run), SOURCE]
    return "\n\n".join(parts) + "\n"


def _families(run: RunLog) -> list[str]:
    where = f"The run log is `{run.path.name}/` in the folder of the run; `llm_dynamics.load_run` reads it."
    steps = sorted(run.sequences["step"].unique())  # of what could be read
    if len(steps) < 2:
        seen = f"Responses were observed once, at step {steps[0]}" if steps else "Nothing was observed in this run"
        return [f"{seen}. {where}"]
    moved = what_moved(run)
    table = pd.DataFrame(
        {
            "family": moved["family"].replace(dict.fromkeys(GREEDY, "argmax (greedy tokens)")),
            "probes": moved["n_probes"],
            f"log-prob at step {steps[0]}": moved["start"],
            f"at step {steps[-1]}": moved["end"],
            "change": moved["delta"],
            "change per token": moved["delta_per_token"],
        }
    )
    signed = dict.fromkeys(("change", "change per token"), lambda value: nats(value, True))
    plain = dict.fromkeys((f"log-prob at step {steps[0]}", f"at step {steps[-1]}"), lambda value: nats(value))
    parts = [
        f"What steps {steps[0]} to {steps[-1]} did to the log-probability of responses that were watched: means over "
        f"probes, in nats (natural logarithm), summed over the tokens of a response unless said. {where}",
        markdown_table(table, {**signed, **plain}),
    ]
    left_out = moved[(moved["n_nonfinite"] > 0) & ~moved["family"].isin(GREEDY)]
    if len(left_out):
        said = ", ".join(
            f"{n} of {escaped(name)}" for name, n in zip(left_out["family"], left_out["n_nonfinite"], strict=True)
        )
        parts.append(f"Left out of these means, since not finite: {said}.")
    return parts


def _displacement(run: RunLog) -> list[str]:
    deltas = question_deltas(run.displacements)
    if deltas.empty:
        return []
    by_step = deltas.groupby("step")["delta"].mean()
    mean = nats(deltas["delta"].mean(), True)
    rose = int((deltas["delta"] > 0).sum())
    last = f"; the last, step {by_step.index[-1]}, by {nats(by_step.iloc[-1], True)}" if len(by_step) > 1 else ""
    return [
        f"Lazy likelihood displacement, `lld/delta`: {len(by_step)} measured step{'s' if len(by_step) != 1 else ''} "
        f"changed the log-prob of the correct responses that they were taken on by {mean} nats on average (mean over "
        f"{len(deltas)} questions with correct and wrong responses{last}). They became more likely in {rose} of them."
    ]
