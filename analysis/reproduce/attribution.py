"""Why did chosen fall in DPO? The account of every step, by start, rejected responses and learning rate.

    python analysis/reproduce/attribution.py runs/reproduce --out analysis/results/reproduce

Reads the explained runs of `train.py --part cells`. RMSprop has no momentum, so a step has two causes: its chosen
tokens pull (`up`) and its rejected tokens push (`down`). Sums over the explained steps; means over the watched chosen
responses, nats. `push share` is push / (pull + push), -down / (up - down): above one half, chosen falls; above one,
the chosen tokens push down as well.

Printed as Markdown; `<out>/attribution.csv` has a row per cell and seed, `<out>/attribution_probes.csv` one per probe.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from settings import CELLS

from llm_dynamics import load_run
from llm_dynamics.runlog import RunLog

DRAWS = 2000


def of_probes(run: RunLog) -> pd.DataFrame:
    """Return what moved each chosen response of a run over its explained steps.

    Args:
        run: A run explained by probe.

    Returns:
        One row per chosen probe: `prompt_id`; `up`, `down`, `rest` (rounding, other gradient, decay and remainder) and
        `measured`, nats, summed over the explained steps; `p_chosen` and `p_rejected` of its prompt at the start,
        geometric means per token.
    """
    rows = run.influence[run.influence["family"] == "chosen"]
    shares = rows.pivot_table("share", "probe_id", "cause", aggfunc="sum")
    frame = pd.DataFrame({cause: shares.get(cause, 0.0) for cause in ("up", "down")}, index=shares.index)
    frame["measured"] = rows.drop_duplicates(["probe_id", "step"]).groupby("probe_id")["measured"].sum()
    frame["rest"] = frame["measured"] - frame["up"] - frame["down"]
    start = run.sequences[run.sequences["step"] == run.sequences["step"].min()]
    rate = np.exp(start["logp_sum"] / start["n_tokens"]).groupby([start["family"], start["prompt_id"]]).mean()
    prompts = run.probes.set_index("probe_id")["prompt_id"]
    frame.insert(0, "prompt_id", prompts.reindex(frame.index))
    for family in ("chosen", "rejected"):
        frame[f"p_{family}"] = frame["prompt_id"].map(rate[family])
    return frame.reset_index()


def of_cells(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of cells and that of probes.

    Args:
        folder: The folder that `train.py` wrote.

    Returns:
        A row per cell and seed with `push_share`, its 95% bootstrap interval over prompts, and the least explained
        share of a step; and a row per cell, seed and probe.

    Raises:
        ValueError: If no cell is finished.
    """
    cells, probes = [], []
    for part in sorted(folder.glob("seed*")):
        for number, cell in enumerate(CELLS):
            run_folder = part / "cells" / str(number)
            if not (run_folder / "finished").exists():
                continue
            run, seed = load_run(run_folder), int(part.name.removeprefix("seed"))
            own = of_probes(run)
            low, high = _interval(own)
            cells.append(
                {
                    "cell": cell.name,
                    "seed": seed,
                    "p_chosen": np.exp(np.log(own["p_chosen"]).mean()),
                    "p_rejected": np.exp(np.log(own["p_rejected"]).mean()),
                    **{name: own[name].mean() for name in ("up", "down", "rest", "measured")},
                    "push_share": push_share(own),
                    "push_low": low,
                    "push_high": high,
                    "explained": run.accounts["explained"].min(),
                    "steps": len(run.explained_steps),
                    "probes": len(own),
                }
            )
            probes.append(own.assign(cell=cell.name, seed=seed))
    if not cells:
        raise ValueError(f"{folder} has no finished cell; run analysis/reproduce/train.py --part cells")
    return pd.DataFrame(cells), pd.concat(probes, ignore_index=True)


def push_share(probes: pd.DataFrame) -> float:
    """Return -down / (up - down) of the means over probes; beyond [0, 1] where both have the same sign."""
    up, down = probes["up"].mean(), probes["down"].mean()
    return float(-down / (up - down)) if up != down else float("nan")


def _interval(probes: pd.DataFrame) -> tuple[float, float]:
    draws = np.random.default_rng(0).integers(len(probes), size=(DRAWS, len(probes)))
    up, down = (probes[name].to_numpy()[draws].mean(axis=1) for name in ("up", "down"))
    low, high = np.quantile(-down / (up - down), [0.025, 0.975])
    return float(low), float(high)


def as_markdown(cells: pd.DataFrame, probes: pd.DataFrame) -> str:
    """Return the table, and how the push on a chosen response goes with the probability of its rejected one."""
    lines = [
        "| DPO from sft, but | seed | p(rejected) | p(chosen) | chosen tokens pull | rejected tokens push | rest "
        "| measured | push share [95%] | least explained |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in cells.sort_values(["cell", "seed"], key=_in_order).itertuples():
        lines.append(
            f"| {row.cell} | {row.seed} | {row.p_rejected:.3g} | {row.p_chosen:.3g} | {row.up:+.2f} | {row.down:+.2f} "
            f"| {row.rest:+.3f} | {row.measured:+.2f} "
            f"| {row.push_share:.3f} [{row.push_low:.3f}, {row.push_high:.3f}] | {row.explained:.5f} |"
        )
    base = probes[probes["cell"] == CELLS[0].name]
    ranks = base[["p_rejected", "down"]].rank().corr().iloc[0, 1] if len(base) > 2 else float("nan")
    lines.append("")
    lines.append(
        f"Over the {len(base)} chosen responses of the base cells, rank correlation of the probability of the prompt's "
        f"own rejected response with the push on its chosen one (negative nats): {ranks:+.2f}."
    )
    return "\n".join(lines)


def _in_order(column: pd.Series) -> pd.Series:
    places = {cell.name: place for place, cell in enumerate(CELLS)}
    return column.map(places) if column.name == "cell" else column


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what train.py wrote")
    parser.add_argument("--out", type=Path, help="folder for attribution.csv and attribution_probes.csv")
    options = parser.parse_args(arguments)
    cells, probes = of_cells(options.folder)
    print(as_markdown(cells, probes))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        cells.round(6).to_csv(options.out / "attribution.csv", index=False)
        probes.round(6).to_csv(options.out / "attribution_probes.csv", index=False)


if __name__ == "__main__":
    main()
