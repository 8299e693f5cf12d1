"""Lazy likelihood displacement: what one update does to the correct answers of each question, by each method.

    python analysis/figures/nthr_fig1.py                                       # from analysis/results/lld.csv
    python analysis/figures/nthr_fig1.py --csv my_lld.csv --out runs/figures/my_lld
    python analysis/figures/nthr_fig1.py --runs grpo=runs/demo-grpo/grpo nthr=runs/demo-grpo/nthr

After Fig. 1 of Deng et al., *On the Effect of Negative Gradient in Group Relative Deep Reinforcement Optimization*
(arXiv 2505.18830) [NTHR]. Delta(x) is the mean over the correct answers of question x of the change of their summed
log-prob, nats.

From a CSV of `analysis/lld.py` (one update on one question, every method on the same answers from the same weights):

- (a) Delta(x) of every question, sorted by that of GRPO, for GRPO, NTHR, Random (as many wrong tokens spared) and
  Pos-Only (no penalties);
- (b) what NTHR and Random add to GRPO, question by question in the same order; (c) what Pos-Only adds: the most that
  sparing wrong tokens can give. Means are dashed.

From run logs (`displacements`, one name per run): Delta(x) of the questions whose steps were measured, each run
sorted by itself. These runs part after their first step, so their questions are no pairs; a step takes all questions
of its batch, so that one question's Delta also has what the others did to it; and several runs of one name are
pooled.

Where this differs from the paper: other models and questions; the committed CSV is of SmolLM2-135M-Instruct on products
of digits, where no question is displaced (Delta < 0).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from lld_table import CSV, displacements, read_lld
from log_runs import DEFAULT_OUT, open_runs, say_seeds
from looks import BLACK, BLUE, COLUMN, CYCLE, GREEN, GREY, MARKERS, ORANGE, PAGE, letter, new_figure, save
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LOOKS = {
    "grpo": ("GRPO", {"color": BLACK, "marker": "o"}),
    "pos_only": ("Pos-Only", {"color": GREEN, "marker": "^"}),
    "nthr": ("NTHR", {"color": BLUE, "marker": "s"}),
    "random": ("Random", {"color": ORANGE, "marker": "D"}),
}
"""Name and marker of each arm of `analysis/lld.py`."""
TIE = 1e-5
"""Nats up to which two methods count as equal: the rounding of float32 log-probs."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--csv", type=Path, default=CSV, help="file of analysis/lld.py (analysis/results/lld.csv)")
    source.add_argument("--runs", nargs="+", metavar="NAME=FOLDER", help="run logs of GRPO trainers, under any names")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT / "nthr_fig1", help="path without a suffix")
    options = parser.parse_args(arguments)
    try:
        figure, frame = of_runs(options.runs) if options.runs else of_table(read_lld(options.csv))
    except ValueError as error:
        parser.error(str(error))
    save(figure, frame, options.out)
    print(f"{options.out}.png, .pdf, .csv")


def of_table(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Draw the table of `analysis/lld.py`, and print the means.

    Returns:
        The figure, and one row per seed and question in the order of the x axis: `place`, `seed`, `question`, and Delta
        of every arm, nats.
    """
    wide = table.pivot(index=["seed", "question"], columns="arm", values="delta")
    arms = [arm for arm in LOOKS if arm in wide] + [arm for arm in wide if arm not in LOOKS]
    wide = wide[arms].sort_values("grpo", kind="stable")
    others = [arm for arm in arms if arm != "grpo"]
    groups = [
        names
        for names in ([arm for arm in others if arm != "pos_only"], ["pos_only"])
        if set(names) <= set(arms) and names
    ]
    figure, panels = new_figure(1, 1 + len(groups), width=PAGE if groups else COLUMN, height=2.6)
    place = np.arange(1, len(wide) + 1)
    for arm in [*others, "grpo"]:
        line = {"linestyle": "-", "linewidth": 1, "zorder": 3} if arm == "grpo" else {}
        panels[0].plot(place, wide[arm], **(_points(arm, arms) | line), markersize=2.2 if line else 2.6)
    for panel, names in zip(panels[1:], groups, strict=True):
        for arm in names:
            gain = wide[arm] - wide["grpo"]
            look = _points(arm, arms)
            panel.plot(place, gain, **look, markersize=2.6)
            panel.axhline(gain.mean(), color=look["color"], linestyle="--", linewidth=0.9)
    for panel in panels:
        panel.axhline(0, color=GREY, linewidth=0.8, zorder=0)
        panel.set_xlabel("question, by Δ of GRPO")
        panel.margins(y=0.08)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(arms), handletextpad=0.3, markerscale=1.4)
    panels[0].set_ylabel("Δ(x), nats")
    for panel in panels[1:]:
        panel.set_ylabel("Δ(x) minus GRPO's, nats")
    gains = [", ".join(_points(arm, arms)["label"] for arm in names) + " over GRPO" for names in groups]
    letter(panels, ["one update on one question", *gains])
    for arm in arms:
        gain = wide[arm] - wide["grpo"]
        above = "" if arm == "grpo" else f", {gain.mean():+.4f} to GRPO, above it in {(gain > TIE).sum()}"
        print(f"{arm}: mean Delta {wide[arm].mean():+.4f} nats over {len(wide)} questions{above}")
    return figure, wide.reset_index().assign(place=place)[["place", "seed", "question", *arms]]


def of_runs(given: Sequence[str]) -> tuple[Figure, pd.DataFrame]:
    """Draw the displacements of run logs, and print their means.

    Returns:
        The figure, and the rows of `displacements` with `share`, the place of a question on the x axis.

    Raises:
        ValueError: As `open_runs` and `displacements` do.
    """
    names = [value.partition("=")[0] for value in given]
    if unnamed := [value for value in given if "=" not in value]:
        raise ValueError(f"--runs takes NAME=FOLDER here, such as grpo=runs/demo-grpo/grpo; seen {', '.join(unnamed)}")
    runs = open_runs(given, known=list(dict.fromkeys(names)))
    print(say_seeds(runs))
    table = displacements(runs)
    table["share"] = (table.groupby("run")["delta"].rank(method="first") - 0.5) / table.groupby("run")[
        "delta"
    ].transform("size")
    table = table.sort_values(
        ["run", "share"],
        key=lambda column: column.map(list(runs).index) if column.name == "run" else column,
        ignore_index=True,
    )
    figure, (axes,) = new_figure(width=COLUMN, height=2.6)
    for name, own in table.groupby("run", sort=False):
        _sorted_curve(axes, str(name), own, list(runs))
        fell = (own["delta"] < 0).sum()
        print(f"{name}: mean Delta {own['delta'].mean():+.4f} nats over {len(own)} questions, {fell} fell")
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    axes.set_xlabel("share of the run's questions, by Δ")
    axes.set_ylabel("Δ(x) in a training step, nats")
    axes.legend(loc="upper left")
    axes.margins(y=0.12)
    return figure, table


def _sorted_curve(axes: Axes, name: str, own: pd.DataFrame, names: Sequence[str]) -> None:
    look = _points(name, names)
    axes.plot(100 * own["share"], own["delta"], **(look | {"linestyle": "-", "linewidth": 0.9}), markersize=2.6)
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter("{x:.0f}%")


def _points(arm: str, arms: Sequence[str]) -> dict:
    """Return the keyword arguments of an arm's points; a name that is not known gets a colour by its place."""
    place = list(arms).index(arm)
    label, look = LOOKS.get(arm, (arm, {"color": CYCLE[place % len(CYCLE)], "marker": MARKERS[place % len(MARKERS)]}))
    return {"label": label, "linestyle": "none", **look}


if __name__ == "__main__":
    main()
