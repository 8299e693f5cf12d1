"""DPO: how far every family falls or rises, the greedy tokens, and the margin.

    python analysis/figures/ld_fig4.py --runs runs/demo
    python analysis/figures/ld_fig4.py --runs 'dpo=runs/reproduce/seed*/dpo' --out analysis/results/reproduce/ld_fig4
    python analysis/figures/ld_fig4.py --runs analysis/figures/example_log --out runs/example/ld_fig4

After Fig. 4 of Ren & Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025 (arXiv 2407.10490) [LD]. Of the run
`dpo`, means over probes of the summed log-prob, nats; a band from the lowest to the highest seed where there are
several:

- (a) chosen and its kin, (b) rejected and its kin, (c) all other families: change since the first observation;
- (d) chosen, rejected, and the greedy tokens along the prefixes of each: the log-prob itself. If greedy rises while the
  rest falls, probability gathers on what is likely already: the squeezing effect;
- (e) the margin chosen - rejected, over the prompts that have both: it grows whether chosen rises or falls;
- (f) how far each family moved from the first to the last observation; a bar from the lowest to the highest seed.

Where this differs from the paper: (a) to (c) show changes, so that long and short responses share an axis; the greedy
tokens of (d) are told for the prefixes of chosen and of rejected; (f) is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from family_lines import draw_curve, draw_families, empty_page, group_of, line_of, panel_height, step_axis
from log_curves import seed_curves, seed_margins
from log_runs import HELP, log_arguments, open_runs, say_seeds
from looks import GREY, letter, save
from matplotlib.axes import Axes

from llm_dynamics.frames import argmax_of

PANELS = {"chosen": "chosen and kin", "rejected": "rejected and kin", "other": "all other families"}
PAIR = ("chosen", "rejected", argmax_of("chosen"), argmax_of("rejected"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure."""
    parser = log_arguments(__doc__, "ld_fig4")
    parser.add_argument("--runs", nargs="+", required=True, metavar="RUN", help=f"{HELP}; name: dpo")
    options = parser.parse_args(arguments)
    try:
        runs = open_runs(options.runs, known=["dpo"], needed=["dpo"])
    except ValueError as error:
        parser.error(str(error))
    print(say_seeds(runs))
    logs = runs["dpo"]
    changes, values, margins = seed_curves(logs, delta=True), seed_curves(logs), seed_margins(logs)
    if values.empty:
        parser.error("dpo has no observation with a finite log-prob: nothing to draw")
    if values["step"].nunique() == 1:
        print("one observation in common, so nothing has moved yet")

    families = list(dict.fromkeys(values["family"]))
    parts = empty_page([panel_height(families), 2.75])
    panels = [*parts[0].subplots(1, 3, sharey=True), *parts[1].subplots(1, 3)]
    for panel, group in zip(panels, PANELS, strict=False):
        draw_families(panel, changes, [name for name in families if group_of(name) == group])
    draw_families(panels[3], values, [name for name in (*PAIR, "argmax") if name in families])
    draw_margin(panels[4], margins)
    draw_moved(panels[5], last(changes))
    panels[0].set_ylabel("change of log-prob,\nnats per response")
    panels[3].set_ylabel("log-prob, nats per response")
    letter(panels, [*PANELS.values(), "the pair, and greedy tokens", "margin", "first to last observation"])
    named = {"change": changes, "value": values, "margin": margins}
    frame = pd.concat([part.assign(panel=name) for name, part in named.items() if len(part)], ignore_index=True)
    save(parts[0].figure, frame[["panel", *(name for name in frame if name != "panel")]], options.out)
    for row in last(changes).itertuples():
        print(f"{row.family:24} {row.mean:+9.2f} nats")
    print(f"{options.out}.png, .pdf, .csv")


def last(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the last row of every family, in their order."""
    return curves.groupby("family", sort=False).tail(1)


def draw_margin(axes: Axes, margins: pd.DataFrame) -> None:
    """Draw the margin; says so where no prompt has both sides."""
    if margins.empty:
        axes.text(
            0.5, 0.5, "no prompt has both\nchosen and rejected", ha="center", va="center", transform=axes.transAxes
        )
    else:
        draw_curve(axes, margins, color="black", marker="o", markersize=3.2)
    step_axis(axes)
    axes.set_ylabel("chosen − rejected, nats")


def draw_moved(axes: Axes, ends: pd.DataFrame) -> None:
    """Draw a point per family, the first on top, and the range over seeds."""
    places = np.arange(len(ends))[::-1]
    for place, row in zip(places, ends.itertuples(), strict=True):
        style = line_of(row.family)
        axes.hlines(place, row.low, row.high, color=style["color"], linewidth=3, alpha=0.3)
        axes.plot(row.mean, place, **(style | {"linestyle": "none", "markersize": 4.5}))
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    axes.set_yticks(places, [name.replace(" (", ", ").rstrip(")") for name in ends["family"]], fontsize=6)
    axes.set_xlabel("change of log-prob, nats")


if __name__ == "__main__":
    main()
