"""SFT: the curves of all families, and what each kind of update did to each of them.

    python analysis/figures/ld_fig3.py --runs runs/demo
    python analysis/figures/ld_fig3.py --runs 'sft=runs/reproduce/seed*/sft' --out analysis/results/reproduce/ld_fig3
    python analysis/figures/ld_fig3.py --runs analysis/figures/example_log --out runs/example/ld_fig3

After Fig. 3 of Ren & Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025 (arXiv 2407.10490) [LD].

- (a) chosen and its kin, (b) rejected and its kin, (c) all other families, in SFT (run `sft`; `extend` where it is
  the only one): change of the summed log-prob since the first observation, nats, mean over probes; a band from the
  lowest to the highest seed where there are several.
- then one heat-map for each of the runs `sft`, `extend`, `dpo`, `extend_dpo` that has an account (`watch(...,
  influence=...)`): rows are types of update, columns observed families; a number is the influence accumulated over
  the explained steps, nats of the summed log-prob, mean over the family's probes and over seeds. Columns add up to
  `measured`. Types: tokens that the loss pulls up or pushes down, named after the role of their examples where it is
  one, what momentum still does of earlier such tokens, and everything else (other gradient, decay, rounding,
  remainder). A run explained by role (`split_by`) has a row per role. Runs without an account have no heat-map, and a
  line says so.

Where this differs from the paper: its influence is the change of the observed responses after separate updates on one
type of response each. Ours is the account of the steps that the run really took: all types act in the same step,
through the optimizer's own update with its momentum, and what single types did adds up to what was measured. Its run
of SFT on rejected answers has its counterpart in `extend`, where both are trained on, told apart by role. Where not
every step was explained, the heat-map is a sum over those that were; its title says how many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from accumulated import accumulated_influence, draw_accounts, height_of, steps_in_words
from family_lines import draw_families, empty_page, group_of, panel_height
from log_curves import seed_curves
from log_runs import HELP, Seeds, log_arguments, open_runs, say_seeds
from looks import letter, save

RUNS = ("sft", "extend", "dpo", "extend_dpo")
PANELS = {"chosen": "chosen and kin", "rejected": "rejected and kin", "other": "all other families"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure."""
    parser = log_arguments(__doc__, "ld_fig3")
    parser.add_argument("--runs", nargs="+", required=True, metavar="RUN", help=f"{HELP}; names: {', '.join(RUNS)}")
    options = parser.parse_args(arguments)
    try:
        runs = open_runs(options.runs, known=RUNS)
        shown = next((name for name in ("sft", "extend") if name in runs), None)
        if shown is None:
            raise ValueError(f"this figure is about SFT and needs the run sft or extend; found: {', '.join(runs)}")
    except ValueError as error:
        parser.error(str(error))
    print(say_seeds(runs))
    accounts = accounts_of(runs)
    curves = seed_curves(runs[shown], delta=True)
    if curves.empty:
        parser.error(f"{shown} has no observation with a finite log-prob: nothing to draw")
    if curves["step"].nunique() == 1:
        print(f"{shown}: one observation in common, so nothing has moved yet")

    families = list(dict.fromkeys(curves["family"]))
    parts = empty_page([panel_height(families), *([height_of(accounts)] if accounts else [])])
    panels = list(parts[0].subplots(1, 3, sharey=True))
    for panel, group in zip(panels, PANELS, strict=True):
        draw_families(panel, curves, [name for name in families if group_of(name) == group])
    panels[0].set_ylabel("change of log-prob,\nnats per response")
    titles = [f"{title}, {shown}" for title in PANELS.values()]
    if accounts:
        panels += draw_accounts(parts[1], accounts)
        titles += [
            f"{name}: influence by type of update on each family, sum over {steps_in_words(runs[name])}"
            for name in accounts
        ]
    letter(panels, titles)
    frames = [curves.assign(panel="curve", run=shown)]
    frames += [table.assign(panel="influence", run=name) for name, table in accounts.items()]
    save(parts[0].figure, tidy(frames), options.out)
    print(f"{options.out}.png, .pdf, .csv")


def accounts_of(runs: Mapping[str, Seeds]) -> dict[str, pd.DataFrame]:
    """Return the accumulated influence of every run that has one, and say which have none."""
    tables = {name: accumulated_influence(logs) for name, logs in runs.items()}
    without = [name for name, table in tables.items() if table.empty]
    if without:
        print(f"no account in {', '.join(without)}: no heat-map of it (watch the run with influence=True)")
    return {name: table for name, table in tables.items() if not table.empty}


def tidy(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return one frame of curves and influence, its `panel` telling which."""
    columns = ["panel", "run", "family", "step", "cause", "update", "mean", "low", "high", "seeds", "probes"]
    return pd.concat([frame.reindex(columns=columns).astype(object) for frame in frames], ignore_index=True)


if __name__ == "__main__":
    main()
