"""How the figures of this folder look, and how they are saved: a picture, a vector file and the numbers behind it.

No figure uses pyplot: nothing global is open after a script, and no display is needed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMN, PAGE = 3.35, 6.9
"""Widths in inches: one column of a two-column page, and both."""
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, BLACK, GREY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#b8a800",
    "#000000",
    "#8a8a8a",
)
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, BLACK)
"""Colours that people with any colour vision tell apart (Okabe and Ito's), in the order of use."""
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DIVERGING, SEQUENTIAL = "RdBu_r", "viridis"
RESULTS = Path(__file__).parents[1] / "results"
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "image.interpolation": "nearest",
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "llm_dynamics",
}


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = PAGE, height: float = 2.4, ratios: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """Return a figure in the common style and its axes, row by row.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        width: Of the figure, inches; `COLUMN` or `PAGE`.
        height: Of one row, inches.
        ratios: Relative widths of the columns; None: equal.
    """
    mpl.rcParams.update(STYLE)
    mpl.rcParams["axes.prop_cycle"] = mpl.cycler(color=CYCLE)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, width_ratios=ratios)
    return figure, list(grid.flat)


def heat_map(axes: Axes, values: object, *, label: str, limit: float | None = None, rows: Sequence[str] = ()) -> None:
    """Draw a matrix with a colour scale that is white at zero; `limit` is the value of the strongest colour."""
    table = pd.DataFrame(values)
    bound = float(table.abs().max().max()) if limit is None else limit
    image = axes.imshow(table.to_numpy(), cmap=DIVERGING, vmin=-bound, vmax=bound, aspect="auto")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(table.shape[1]), [str(name) for name in table.columns])
    axes.set_yticks(range(table.shape[0]), [str(name) for name in (rows or table.index)])
    axes.get_figure().colorbar(image, ax=axes, label=label, pad=0.02)  # type: ignore[union-attr]


def letter(axes: Sequence[Axes], titles: Sequence[str]) -> None:
    """Give every panel a title that begins with its letter."""
    for panel, name, title in zip(axes, "abcdefghijkl", titles, strict=False):
        panel.set_title(f"({name}) {title}")


def save(figure: Figure, frame: pd.DataFrame, out: Path) -> None:
    """Write `out`.png, `out`.pdf and `out`.csv: the figure and every number that it shows.

    Args:
        figure: What to draw.
        frame: The numbers, one row each; written with six significant digits.
        out: Path without a suffix; its folder is made.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out.with_suffix(".png"), metadata={"Software": None})
    figure.savefig(out.with_suffix(".pdf"), metadata={"CreationDate": None})  # the same bytes for the same numbers
    frame.to_csv(out.with_suffix(".csv"), index=False, float_format="%.6g")


def figure_arguments(description: str, name: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all figures share: `--out`, `--seed`, `--quick`.

    Args:
        description: The script's docstring; its first line is shown.
        name: File name of the figure, without a suffix; `--out` then defaults to it in `analysis/results`.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    default = RESULTS / name
    parser.add_argument("--out", type=Path, default=default, help="path without a suffix: .png, .pdf, .csv are added")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="smaller, in seconds: checks that the script runs")
    return parser
