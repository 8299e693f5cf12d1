"""How families are drawn with matplotlib: the colours, dashes and order of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
from looks import PAGE, STYLE
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from llm_dynamics.report.families import style_of

_DASHES: dict[str, Any] = {"solid": "-", "dash": (0, (4, 1.5)), "dot": ":", "dashdot": "-.", "longdash": (0, (8, 2))}
_MARKERS = {
    "circle": "o",
    "circle-open": "o",
    "square": "s",
    "square-open": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "star-diamond": "*",
    "star": "*",
    "cross": "P",
    "x": "X",
    "pentagon": "p",
    "hexagon": "h",
    "bowtie": "<",
    "hourglass": ">",
    "diamond-tall": "d",
    "diamond-wide": "D",
    "hexagram": "H",
}
GROUPS = {
    "chosen": ("chosen", "chosen_initial", "chosen_semantic", "chosen_format", "chosen_selfr"),
    "rejected": ("rejected", "rejected_semantic", "rejected_format"),
}
"""Families of the panels of the pair; the others go to a third."""
BELOW = 0.43
"""Inches from the x axis down to a legend below it."""


def is_greedy(family: str) -> bool:
    """Tell whether a name is a pseudo-family of greedy tokens."""
    return family.startswith("argmax")


def group_of(family: str) -> str:
    """Return the panel of a family: "chosen", "rejected", "argmax" or "other"."""
    if is_greedy(family):
        return "argmax"
    return next((group for group, members in GROUPS.items() if family in members), "other")


def line_of(family: str) -> dict[str, Any]:
    """Return matplotlib's keyword arguments of a family's line."""
    style = style_of(family)
    return {
        "color": style.light,
        "linestyle": _DASHES[style.dash],
        "marker": _MARKERS[style.symbol],
        "markerfacecolor": "white" if style.symbol.endswith("-open") else style.light,
        "markersize": 3.2,
        "linewidth": 0.6 * style.width,
    }


def draw_curve(axes: Axes, curve: pd.DataFrame, *, x: str = "step", label: str = "", **line: Any) -> None:
    """Draw one curve of `seed_curves`, its band where there are several seeds."""
    axes.plot(curve[x], curve["mean"], label=label, **line)
    band = curve.dropna(subset=["low", "high"])
    if len(band):
        axes.fill_between(band[x], band["low"], band["high"], color=line.get("color"), alpha=0.15, linewidth=0)


def draw_families(axes: Axes, curves: pd.DataFrame, families: Sequence[str]) -> None:
    """Draw the curves of some families, and a legend below the panel; says so where none of them was watched."""
    for family in families:
        draw_curve(axes, curves[curves["family"] == family], label=family, **line_of(family))
    if not families:
        axes.text(0.5, 0.5, "not watched", ha="center", va="center", transform=axes.transAxes)
    step_axis(axes)
    legend_below(axes)


def panel_height(families: Sequence[str]) -> float:
    """Return the height that a row of three panels needs for these families and the legends below, inches."""
    groups = [group_of(family) for family in families]
    return 2.2 + 0.125 * max((groups.count(group) for group in set(groups)), default=0)


def step_axis(axes: Axes, label: str = "optimizer step") -> None:
    """Label the x axis with whole steps."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def legend_below(axes: Axes, columns: int = 1) -> None:
    """Put the legend of a panel below its axis label, so that it hides no curve."""
    if axes.get_legend_handles_labels()[0]:
        below = ScaledTranslation(0, -BELOW, axes.get_figure(root=True).dpi_scale_trans)
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(0, 0),
            bbox_transform=axes.transAxes + below,
            ncols=columns,
            handlelength=2.6,
            borderaxespad=0,
            borderpad=0,
            fontsize=6.5,
        )


def empty_page(heights: Sequence[float], *, width: float = PAGE) -> list[SubFigure]:
    """Return the parts of an empty figure in the common style, one below the other, each with margins of its own.

    Args:
        heights: Of the parts, inches.
        width: Of the figure, inches.
    """
    mpl.rcParams.update(STYLE)
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    return list(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat)
