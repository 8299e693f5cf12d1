"""Extend, then DPO, against SFT, then DPO: does training on both answers first make DPO gentler?

    python analysis/figures/ld_fig5.py --runs 'runs/reproduce' --out analysis/results/reproduce/ld_fig5
    python analysis/figures/ld_fig5.py --runs dpo=runs/dpo extend_dpo=runs/dpo_after_extend   # without the stage before
    python analysis/figures/ld_fig5.py --runs analysis/figures/example_log --out runs/example/ld_fig5

After Fig. 5 of Ren & Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025 (arXiv 2407.10490) [LD]. Two
pipelines on one axis: plain (`sft`, then `dpo`) and extended (`extend`, which is SFT on chosen and rejected answers,
then `extend_dpo`). The axis counts optimizer steps from the start of DPO: what lies left of 0 is the stage before.
Each panel is one family, the mean over probes of the summed log-prob, nats (not its change: the pipelines start alike
and part); one is the margin chosen - rejected. A band goes from the lowest to the highest seed where there are
several. The gap between the last point left of 0 and the first of DPO is nil where DPO starts from just that model.

Printed, and in the CSV: the change over DPO alone, by family and pipeline.

Where this differs from the paper: steps instead of epochs (the extended stage has twice the data, so at equal epochs
twice the steps); the greedy tokens are those along chosen's prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from family_lines import draw_curve, empty_page, step_axis
from log_curves import MARGIN, SEED_COLUMNS, seed_curves, seed_margins
from log_runs import HELP, Seeds, log_arguments, open_runs, say_seeds
from looks import BLUE, GREY, ORANGE, letter, save
from matplotlib.axes import Axes

from llm_dynamics.frames import argmax_of, ordered

RUNS = ("sft", "dpo", "extend", "extend_dpo")
PIPELINES = {"plain": ("sft", "dpo"), "extended": ("extend", "extend_dpo")}
LOOKS = {
    "plain": {"color": BLUE, "linestyle": "-", "marker": "o"},
    "extended": {"color": ORANGE, "linestyle": "--", "marker": "s"},
}
FIRST = ("chosen", "rejected", MARGIN, argmax_of("chosen"), "chosen_semantic", "rejected_semantic", "other_train")
"""Families shown before others."""
MOST, COLUMNS = 6, 3
"""Panels, and panels in a row."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure."""
    parser = log_arguments(__doc__, "ld_fig5")
    parser.add_argument("--runs", nargs="+", required=True, metavar="RUN", help=f"{HELP}; names: {', '.join(RUNS)}")
    parser.add_argument("--families", nargs="+", help=f"families to show; default: the first {MOST} watched")
    options = parser.parse_args(arguments)
    try:
        runs = open_runs(options.runs, known=RUNS, needed=("dpo", "extend_dpo"))
        curves = pd.concat([pipeline(name, runs) for name in PIPELINES], ignore_index=True)
        shown = families_shown(curves, options.families)
    except ValueError as error:
        parser.error(str(error))
    print(say_seeds(runs))
    for stage in ("sft", "extend"):
        if stage not in runs:
            print(f"no run {stage}: its pipeline begins with DPO")

    n_rows = -(-len(shown) // COLUMNS)
    parts = empty_page([1.75] * n_rows + [0.25])
    panels: list[Axes] = []
    for part in parts[:-1]:
        panels += list(part.subplots(1, COLUMNS))
    for panel, family in zip(panels, shown, strict=False):
        draw_family(panel, curves[curves["family"] == family])
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    for panel in panels[::COLUMNS]:
        panel.set_ylabel("log-prob,\nnats per response")
    names = {name: " then ".join(stage for stage in stages if stage in runs) for name, stages in PIPELINES.items()}
    lines = panels[0].get_lines()
    handles = {line.get_label(): line for line in lines}
    known = [name for name in PIPELINES if name in handles]
    parts[-1].legend(
        [handles[name] for name in known],
        [f"{name}: {names[name]}" for name in known],
        loc="center",
        ncols=2,
        handlelength=3,
    )
    letter(panels, ["margin: chosen − rejected" if name == MARGIN else name for name in shown])
    moved = dpo_changes(curves)
    print(moved.pivot(index="family", columns="pipeline", values="mean").reindex(ordered_with_margin(curves)).round(2))
    frame = pd.concat([curves.assign(panel="curve"), moved.assign(panel="change over dpo")], ignore_index=True)
    save(parts[0].figure, frame[["panel", "pipeline", "stage", *SEED_COLUMNS, "x"]], options.out)
    print(f"{options.out}.png, .pdf, .csv")


def pipeline(name: str, runs: dict[str, Seeds]) -> pd.DataFrame:
    """Return the curves of a pipeline's stages: the columns of `seed_curves`, `pipeline`, `stage`, and `x`.

    Args:
        name: In `PIPELINES`.
        runs: The logs by run; the stage before DPO may be missing.

    Returns:
        `x` counts optimizer steps from the start of DPO; the stage before ends at 0.

    Raises:
        ValueError: Where DPO has no observation with a finite log-prob.
    """
    frames = []
    before, dpo = PIPELINES[name]
    for stage in (before, dpo):
        if stage not in runs:
            continue
        curves = pd.concat(
            [part for part in (seed_curves(runs[stage]), seed_margins(runs[stage])) if len(part)]
            or [pd.DataFrame(columns=list(SEED_COLUMNS))]
        )
        if curves.empty:
            raise ValueError(f"{stage} has no observation with a finite log-prob: nothing to draw")
        end = curves["step"].max() if stage == before else 0
        frames.append(curves.assign(stage=stage, x=curves["step"] - end))
    return pd.concat(frames, ignore_index=True).assign(pipeline=name)


def ordered_with_margin(curves: pd.DataFrame) -> list[str]:
    """Return the families in canonical order, the margin last."""
    return [name for name in [*ordered(set(curves["family"]) - {MARGIN}), MARGIN] if name in set(curves["family"])]


def families_shown(curves: pd.DataFrame, asked: Sequence[str] | None) -> list[str]:
    """Return the families that have panels: those asked for, else the first few that some DPO run watched.

    Raises:
        ValueError: Where one that was asked for was not watched.
    """
    watched = ordered_with_margin(curves)
    if asked is None:
        preferred = [name for name in FIRST if name in watched]
        return [*preferred, *(name for name in watched if name not in preferred)][:MOST]
    if unknown := [name for name in asked if name not in watched]:
        raise ValueError(f"--families: {', '.join(unknown)} not watched in these runs; those that are: {watched}")
    return list(asked)


def draw_family(axes: Axes, curves: pd.DataFrame) -> None:
    """Draw one family through both pipelines."""
    for name, look in LOOKS.items():
        own = curves[curves["pipeline"] == name]
        for place, (_, stage) in enumerate(own.groupby("stage", sort=False)):
            draw_curve(axes, stage, x="x", label=name if not place else "_", markersize=3, **look)
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)
    step_axis(axes, "step, from the start of DPO")


def dpo_changes(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the change of each family over DPO, by pipeline: `mean`, last minus first observation, nats."""
    dpo = curves[curves["stage"].isin([stages[1] for stages in PIPELINES.values()])].sort_values("step", kind="stable")
    grouped = dpo.groupby(["pipeline", "stage", "family"], sort=False)
    ends = grouped.agg(
        mean=("mean", "last"),
        first=("mean", "first"),
        step=("step", "last"),
        seeds=("seeds", "last"),
        probes=("probes", "last"),
    )
    return ends.assign(mean=ends["mean"] - ends["first"]).drop(columns="first").reset_index()


if __name__ == "__main__":
    main()
