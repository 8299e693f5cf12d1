"""LBK, SignDelta and the relative stability of the kernel over real training, beside the kernel itself: [LD] App. C.

    python analysis/figures/appendix_c.py                # SmolLM2-135M-Instruct, one CPU thread
    python analysis/figures/appendix_c.py --quick        # a tiny untrained model, seconds: checks that the script runs

[LD] (Ren & Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025, arXiv 2407.10490) could not afford the kernel
of a language model and judged its stability by two proxies, LBK and SignDelta. Here the kernel is computed: SFT on the
chosen answers of the demo's pairs, then DPO on the pairs (TRL, AdamW, all weights, float32), and at some steps, between
two trained responses u (chosen and rejected of one prompt) and twelve families of observed responses o to that prompt:

- the exact token kernel T over all parameters (`token_kernel`) and the LM head's own part (`last_layer_kernel`);
- ||K_uo||_F of the V x V blocks, by random vectors (`response_block_norms`), and of their part that log-probs can see,
  A_o K_uo A_u^T (`kernel_snapshot.visible_norms`);
- LBK and SignDelta of one plain gradient step on u, taken aside (`kernel_proxies`).

Panels: (a) is sqrt(LBK) / eta below ||K_uo||_F, and how far? open: the same of the visible kernel; (b) SignDelta of a
step on chosen; (c) how far T moves from its start; (d) does the last layer rank as T does? (e) relative stability: does
the ranking of observed responses stay? (f) do the proxies rank them as the norms do?

The kernels are those of the first ten tokens of each response, so that the run stays short.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from datasets import disable_progress_bars
from kernel_runs import FULL, QUICK, TRAINED, train_and_measure
from kernel_snapshot import Snapshot, compare
from looks import BLACK, CYCLE, GREY, MARKERS, figure_arguments, heat_map, letter, new_figure, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from llm_dynamics.demo.preferences import load_preferences
from llm_dynamics.demo.smollm2 import load_smollm2
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer

TABLES = {
    "||K||": "norm",
    "standard error of ||K||": "norm_error",
    "visible norm": "visible",
    "standard error of visible norm": "visible_error",
    "sqrt(LBK) / eta": "lbk",
    "spectral bound / eta": "spectral",
    "visible bound / eta": "visible_bound",
    "SignDelta": "sign_delta",
    "measured change of log p": "moved",
    "predicted change of log p": "predicted",
}


def numbers(snapshots: Sequence[Snapshot], families: Sequence[str]) -> pd.DataFrame:
    """Return every number of the figure, one row each; `total` counts the steps of both runs."""
    rows = []
    switch = max(s.step for s in snapshots if s.stage == "sft")
    for snapshot in snapshots:
        total = snapshot.step + (switch if snapshot.stage == "dpo" else 0)
        known = {"stage": snapshot.stage, "step": snapshot.step, "total": total}
        tables = {name: getattr(snapshot, field) for name, field in TABLES.items()}
        tables["T, whole responses"] = snapshot.of_responses(snapshot.exact.values)
        tables["last layer, whole responses"] = snapshot.of_responses(snapshot.last)
        for quantity, table in tables.items():
            for o, family in enumerate(families):
                for u, trained in enumerate(TRAINED):
                    entry = {"trained": trained, "observed": family, "quantity": quantity, "value": float(table[o, u])}
                    rows.append({**known, **entry})
        rows += [
            {**known, "observed": family, "quantity": "log p", "value": float(value)}
            for family, value in zip(families, snapshot.logp, strict=True)
        ]
        rows += [
            {**known, "quantity": quantity, "value": value}
            for quantity, value in compare(snapshot, snapshots[0]).items()
        ]
    return pd.DataFrame(rows)


def draw_bound(axes: Axes, frame: pd.DataFrame) -> None:
    """Draw panel (a)."""
    keys = ["total", "trained", "observed"]
    wide = frame.pivot_table(index=keys, columns="quantity", values="value").reset_index()
    moments = sorted(wide["total"].unique())
    for total, colour, marker in zip(moments, CYCLE, MARKERS, strict=False):
        one = wide[wide["total"] == total]
        axes.loglog(one["||K||"], one["sqrt(LBK) / eta"], marker, color=colour, ms=3, label=f"step {total:g}")
        axes.loglog(one["visible norm"], one["visible bound / eta"], marker, color=colour, ms=3, mfc="none", mew=0.6)
    ends = [wide["sqrt(LBK) / eta"].min() / 3, wide["||K||"].max() * 3]
    axes.plot(ends, ends, color=BLACK, lw=0.7)
    axes.set(xlabel=r"$||K_{uo}||_F$ (open: visible, $||AKA^T||_F$)", ylabel="lower bound from a step", ylim=ends)
    axes.legend(loc="upper left", handletextpad=0.1, borderaxespad=0)


def draw_sign_delta(axes: Axes, frame: pd.DataFrame, families: Sequence[str], step_size: float) -> None:
    """Draw panel (b)."""
    chosen = frame[(frame["quantity"] == "SignDelta") & (frame["trained"] == "chosen")]
    table = chosen.pivot(index="observed", columns="total", values="value").loc[list(families)] / step_size
    heat_map(axes, table, label=r"SignDelta / $\eta$ (nats)")
    axes.tick_params(axis="y", labelsize=6)
    axes.set(xlabel="steps of training (SFT, then DPO)")


def draw_lines(axes: Axes, frame: pd.DataFrame, quantities: dict[str, str], label: str) -> None:
    """Draw quantities of whole snapshots over training, under other names."""
    for (quantity, name), colour, marker in zip(quantities.items(), CYCLE, MARKERS, strict=False):
        one = frame[frame["quantity"] == quantity].sort_values("total")
        axes.plot(one["total"], one["value"], marker=marker, color=colour, label=name)
    switch = frame.loc[frame["stage"] == "sft", "total"].max()
    axes.axvline(switch, color=GREY, lw=0.7, ls=":")
    axes.text(switch, 1.0, " DPO", transform=axes.get_xaxis_transform(), fontsize=6, va="top", color="#555555")
    axes.set(xlabel="steps of training", ylabel=label)
    axes.legend(frameon=True, framealpha=0.85, edgecolor="none")


def tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the tiny model and its tokenizer."""
    texts = [row[name][-1]["content"] for row in load_preferences("train") for name in ("prompt", *TRAINED)]
    tokenizer = build_tiny_tokenizer(texts)
    return build_tiny_model(len(tokenizer)), tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, draw the figure and write its numbers."""
    parser = figure_arguments(__doc__, "appendix_c")
    parser.add_argument("--redraw", action="store_true", help="only draw the figure again, from the numbers in its CSV")
    parser.add_argument("--keep", type=Path, help="folder of what was measured already: a run cut short goes on there")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    disable_progress_bars()
    torch.set_num_threads(1)
    sizes = QUICK if options.quick else FULL
    if options.redraw:
        frame = pd.read_csv(options.out.with_suffix(".csv"))
        save(draw(frame, sizes.step_size), frame, options.out)
        return
    snapshots, families = train_and_measure(tiny if options.quick else load_smollm2, sizes, options.seed, options.keep)
    print(f"{time.process_time():.0f} CPU seconds in all")
    frame = numbers(snapshots, families)
    save(draw(frame, sizes.step_size), frame, options.out)
    whole = frame[frame["observed"].isna()]
    print(whole.pivot(index="quantity", columns="total", values="value").to_string(float_format="%.4f"))


def draw(frame: pd.DataFrame, step_size: float) -> Figure:
    """Draw all panels from the numbers."""
    families = list(frame["observed"].dropna().unique())
    figure, axes = new_figure(3, 2, height=2.3)
    draw_bound(axes[0], frame)
    draw_sign_delta(axes[1], frame, families, step_size)
    changes = {"relative change of T": "T, tokens", "relative change of T, whole responses": "T, responses"}
    changes |= {"relative change of last layer": "last layer, tokens"}
    changes |= {"relative change of last layer, whole responses": "last layer, responses"}
    draw_lines(axes[2], frame, changes, "relative change since the start")
    ranks = {"rank correlation of last layer with T, tokens": "tokens"}
    ranks |= {"rank correlation of last layer with T, whole responses": "whole responses"}
    draw_lines(axes[3], frame, ranks, "rank correlation with T")
    stable = {
        f"relative stability of {name}, u = {u}": f"{name}, u = {trained}"
        for name in ("||K||", "visible norm", "sqrt(LBK)")
        for u, trained in enumerate(TRAINED)
    }
    draw_lines(axes[4], frame, stable, "rank correlation with the start")
    proxies = {
        f"rank correlation of {name} with {norm}": f"{name} with {norm}"
        for norm in ("||K||", "visible norm")
        for name in ("sqrt(LBK)", "|SignDelta|")
    }
    draw_lines(axes[5], frame, proxies, "rank correlation")
    letter(
        axes,
        (
            r"bounds the kernel's norm",
            "SignDelta of a step on chosen",
            "how far the kernel moves",
            "does the last layer rank as T does?",
            "does the ranking of responses stay?",
            "do the proxies rank as the kernel does?",
        ),
    )
    return figure


if __name__ == "__main__":
    main()
