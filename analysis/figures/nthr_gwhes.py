"""Does GWHES find, before the step, the questions that GRPO will do least for?

    python analysis/figures/nthr_gwhes.py                          # from analysis/results/lld.csv
    python analysis/figures/nthr_gwhes.py --csv my_lld.csv --low 0.1

GWHES is the group-weighted hidden embedding score of Deng et al. (arXiv 2505.18830) [NTHR],
`llm_dynamics.kernel.gwhes`: computed from the LM head's inputs and outputs of a question's answers, without a step.
The paper uses it to find the questions with the lowest Delta(x), the change of the correct answers' summed log-prob
by one GRPO update. From the CSV of `analysis/lld.py`:

- (a) the rank of each question by GWHES (1 = highest) against its rank by Delta (1 = lowest); a perfect predictor has
  all questions on the diagonal; the square holds the questions that both put among the lowest;
- (b) for every n, how many of the n questions with the lowest Delta are among the n with the highest GWHES, against
  chance, n^2 / N, and the 95% range of a random order (hypergeometric).

Where this differs from the paper: other models and questions. The committed CSV is of SmolLM2-135M-Instruct on products
of digits, questions of all seeds ranked together; there "lowest" means least raised, since no Delta is negative.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from lld_table import CSV, read_lld
from log_runs import DEFAULT_OUT
from looks import BLUE, CYCLE, GREY, MARKERS, letter, new_figure, save
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

LOWEST = 0.25


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=CSV, help="file of analysis/lld.py (analysis/results/lld.csv)")
    parser.add_argument("--low", type=float, default=LOWEST, help=f"share of questions called lowest ({LOWEST})")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT / "nthr_gwhes", help="path without a suffix")
    options = parser.parse_args(arguments)
    if not 0 < options.low <= 1:
        parser.error(f"--low is {options.low}; allowed: above 0, up to 1")
    try:
        ranks = ranked(read_lld(options.csv, columns=("gwhes",)))
    except ValueError as error:
        parser.error(str(error))
    found = overlaps(ranks)
    low = max(1, round(options.low * len(ranks)))
    at = found.iloc[low - 1]
    print(
        f"rank correlation of GWHES with Delta: {correlation(ranks):+.2f} (a perfect predictor: -1); the {low} "
        f"questions with the highest GWHES hold {at['found']:.0f} of the {low} with the lowest Delta "
        f"(chance: {at['chance']:.1f})"
    )
    figure, panels = new_figure(1, 2, height=2.8, ratios=[1, 1.25])
    draw_ranks(panels[0], ranks, low)
    draw_overlaps(panels[1], found, low)
    letter(panels, ["rank by rank", "overlap of the n lowest"])
    frame = pd.concat([ranks.assign(panel="rank"), found.assign(panel="overlap")], ignore_index=True)
    save(figure, frame[["panel", *(name for name in frame if name != "panel")]], options.out)
    print(f"{options.out}.png, .pdf, .csv")


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per question under GRPO: `seed`, `question`, `gwhes`, `delta` and their ranks.

    `gwhes_rank` is 1 for the highest score, `delta_rank` 1 for the lowest Delta.

    Raises:
        ValueError: Where fewer than two questions have both numbers.
    """
    frame = table.loc[table["arm"] == "grpo", ["seed", "question", "gwhes", "delta"]]
    frame = frame[np.isfinite(frame["gwhes"]) & np.isfinite(frame["delta"])].reset_index(drop=True)
    if len(frame) < 2:
        raise ValueError(f"{len(frame)} questions have both GWHES and Delta under GRPO; ranking takes two or more")
    return frame.assign(
        gwhes_rank=frame["gwhes"].rank(method="first", ascending=False).astype(int),
        delta_rank=frame["delta"].rank(method="first").astype(int),
    )


def correlation(ranks: pd.DataFrame) -> float:
    """Return the rank correlation (Spearman) of GWHES with Delta; -1: the higher GWHES, the lower Delta."""
    return float(ranks["gwhes"].rank().corr(ranks["delta"].rank()))


def overlaps(ranks: pd.DataFrame) -> pd.DataFrame:
    """Return, for n = 1 to N: `n`, `found` (questions in both of the n first), `chance` n^2 / N, `low`, `high`: 95%."""
    total = len(ranks)
    both = ranks[["gwhes_rank", "delta_rank"]].max(axis=1)
    rows = []
    for n in range(1, total + 1):
        low, high = random_range(n, total)
        rows.append({"n": n, "found": int((both <= n).sum()), "chance": n * n / total, "low": low, "high": high})
    return pd.DataFrame(rows)


def random_range(n: int, total: int) -> tuple[int, int]:
    """Return the 2.5% and 97.5% quantiles of how many of n marked items a random n of `total` hold."""
    ways = [math.comb(n, k) * math.comb(total - n, n - k) for k in range(n + 1)]  # n - k > total - n: 0 ways
    below = np.cumsum(np.array(ways, dtype=object)) / math.comb(total, n)
    return tuple(int(np.argmax(below.astype(float) >= level - 1e-12)) for level in (0.025, 0.975))  # type: ignore[return-value]


def draw_ranks(axes: Axes, ranks: pd.DataFrame, low: int) -> None:
    """Draw rank against rank, a marker per seed."""
    total = len(ranks)
    axes.plot([1, total], [1, total], color=GREY, linewidth=0.8, zorder=0)
    axes.add_patch(Rectangle((0.5, 0.5), low, low, facecolor="#e9f1f8", edgecolor=BLUE, linewidth=0.7, zorder=0))
    for place, (seed, own) in enumerate(ranks.groupby("seed")):
        look = {"color": CYCLE[place % len(CYCLE)], "marker": MARKERS[place % len(MARKERS)]}
        axes.plot(own["gwhes_rank"], own["delta_rank"], linestyle="none", markersize=3, label=f"seed {seed}", **look)
    axes.set_xlabel("rank by GWHES, 1 = highest")
    axes.set_ylabel("rank by Δ(x) under GRPO, 1 = lowest")
    axes.legend(loc="lower right", handletextpad=0.1)


def draw_overlaps(axes: Axes, found: pd.DataFrame, low: int) -> None:
    """Draw the overlap by n against a perfect and a random order."""
    axes.plot(found["n"], found["n"], color=GREY, linestyle=":", label="perfect")
    axes.plot(found["n"], found["found"], color=BLUE, label="GWHES")
    axes.plot(found["n"], found["chance"], color=GREY, linestyle="--", label="chance, 95% range")
    axes.fill_between(found["n"], found["low"], found["high"], color=GREY, alpha=0.2, linewidth=0)
    at = found.iloc[low - 1]
    axes.plot(at["n"], at["found"], marker="o", color=BLUE, markersize=5)
    axes.annotate(
        f"{at['found']:.0f} of {low} (chance {at['chance']:.1f})",
        (at["n"], at["found"]),
        xytext=(0.98, 0.05),
        textcoords="axes fraction",
        fontsize=7,
        ha="right",
        arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7},
    )
    axes.set_xlabel("n")
    axes.set_ylabel("questions in both of the n first")
    axes.legend(loc="upper left")


if __name__ == "__main__":
    main()
