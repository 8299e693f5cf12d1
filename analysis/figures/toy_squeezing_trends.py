"""Which of the squeezing effect's trends are theorems, and which fail; what repeated negative steps do.

    python analysis/figures/toy_squeezing_trends.py         # seconds

[LD, Sec. 3.3 and App. E] (Ren & Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025, arXiv 2407.10490) states
two guarantees of a negative step on label y (p(y) falls; p(y*) rises, y* the most likely other token) and three trends:
the rich get richer, a peakier context squeezes more, a smaller p(y) squeezes more. Here y takes a share p(y) of the
context and the other tokens share the rest in fixed proportions q, flat, mild or peaky (`toy_softmax.py`), V = 50:

- (a) the probability that one step moves into y*, over p(y): it does *not* grow as p(y) falls;
- (b) the mean change of log p of the tokens other than y and y*: that does fall as p(y) falls;
- (c) the probability moved into y* over how peaked q is: rises, then has nothing left to move;
- (d) the number of risers over the same: 49 to 1, yet not monotone in general;
- (e) p(y*) and p(y) over repeated steps, with and without momentum;
- (f) repeated steps until p(y*) > 0.9, over p(y).

The CSV also holds how often each statement held for random contexts, and a counterexample to "peakier: fewer rise"
(`toy_squeezing_statements.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from looks import BLUE, CYCLE, DASHES, GREY, ORANGE, figure_arguments, letter, new_figure, save
from matplotlib.axes import Axes
from torch import Tensor
from toy_softmax import TEMPERATURES, V, negative_step, repeated, rest, with_label
from toy_squeezing_statements import STRENGTH, counterexample, how_often

from llm_dynamics import squeezing_stats

SHARES = (*(10 ** (exponent / 8) for exponent in range(-40, 0)), 0.8, 0.85, 0.9, 0.95)
"""p(y), from 1e-5."""
SPREADS = tuple(10 ** (exponent / 16) for exponent in range(-16, 25))
"""Temperatures of q, peaky to flat, for (c) and (d)."""
COLLAPSE = 0.9
REPEATED_STRENGTH = 0.5
MANY = 1000


def sweep_label(q: Tensor) -> pd.DataFrame:
    """Return, for every p(y) with the others in proportion to q, what one step does."""
    rows = []
    for share in SHARES:
        setting = with_label(q, share)
        stats = squeezing_stats(setting.logp[None], torch.tensor([0]), strength=STRENGTH)
        change = negative_step(setting.logp, 0, STRENGTH) - setting.logp
        rows.append({
            "p(y)": share,
            "moved into y*": float(stats.moved_to_other),
            "change of log p(y*)": float(change[1]),
            "mean change of log p of the others": float(change[2:].mean()),
            "change of log odds y* : others": float(change[1] - change[2:].mean()),
        })  # fmt: skip
    return pd.DataFrame(rows)


def sweep_spread(seed: int, share: float) -> pd.DataFrame:
    """Return, for every temperature of q, what one step does."""
    rows = []
    for spread in SPREADS:
        q = rest(seed, spread)
        stats = squeezing_stats(with_label(q, share).logp[None], torch.tensor([0]), strength=STRENGTH)
        moved, count = float(stats.moved_to_other), int(stats.riser_count)
        rows.append({"temperature": spread, "largest q": float(q[0]), "moved into y*": moved, "risers": count})
    return pd.DataFrame(rows)


def steps_to_collapse(q: Tensor, share: float, momentum: float) -> int:
    """Return how many negative steps it takes until p(y*) exceeds `COLLAPSE`; -1 where `MANY` do not."""
    path = repeated(with_label(q, share), REPEATED_STRENGTH, MANY, momentum)
    above = (path[:, 1].exp() > COLLAPSE).nonzero()
    return int(above[0]) if len(above) else -1


def draw_label_sweeps(axes: Sequence[Axes], spreads: dict[str, Tensor]) -> list[dict]:
    """Draw panels (a) and (b)."""
    rows = []
    shown = {"moved into y*": axes[0], "mean change of log p of the others": axes[1]}
    for (name, q), colour, dash in zip(spreads.items(), CYCLE, DASHES, strict=False):
        sweep = sweep_label(q)
        for quantity, panel in shown.items():
            panel.semilogx(sweep["p(y)"], sweep[quantity], dash, color=colour, label=name)
        long = sweep.melt("p(y)", var_name="quantity", value_name="value")
        rows += [{"panel": "a, b", "q": name, **row} for row in long.to_dict("records")]
    axes[0].set(xlabel="p(y) before the step", ylabel="probability moved into y*")
    axes[1].set(xlabel="p(y) before the step", ylabel=r"mean $\Delta\log p$ of others (nats)")
    axes[1].axhline(0, color="black", lw=0.5)
    axes[0].legend(title="the others are")
    return rows


def draw_spread_sweeps(axes: Sequence[Axes], seed: int) -> list[dict]:
    """Draw panels (c) and (d)."""
    rows = []
    for share, colour, dash in zip((0.2, 0.02, 1e-4), CYCLE, DASHES, strict=False):
        sweep = sweep_spread(seed, share)
        for quantity, panel in zip(("moved into y*", "risers"), axes, strict=True):
            panel.plot(sweep["largest q"], sweep[quantity], dash, color=colour, label=f"p(y) = {share:g}")
            panel.set(xlabel="share of y* among the others")
        long = sweep.melt(["temperature", "largest q"], var_name="quantity", value_name="value")
        rows += [{"panel": "c, d", "p(y)": share, **row} for row in long.to_dict("records")]
    axes[0].set(ylabel="probability moved into y*")
    axes[1].set(ylabel=f"tokens that rise, of {V}")
    axes[1].legend()
    return rows


def draw_repeated(axes: Sequence[Axes], spreads: dict[str, Tensor]) -> list[dict]:
    """Draw panels (e) and (f)."""
    rows = []
    for name, colour in (("flat", BLUE), ("peaky", ORANGE)):
        for momentum, dash in ((0.0, "-"), (0.9, "--")):
            path = repeated(with_label(spreads[name], 1 / V), REPEATED_STRENGTH, MANY, momentum)
            steps = sorted({int(1.12**k) for k in range(52)} | {0})
            label = f"{name}" + (f", momentum {momentum}" if momentum else "")
            p_star = path[steps, 1].exp()
            axes[0].semilogx([step + 1 for step in steps], p_star.tolist(), dash, color=colour, label=label)
            for quantity, values in {"p(y*)": p_star, "log p(y)": path[steps, 0]}.items():
                known = {"panel": "e", "q": name, "momentum": momentum, "quantity": quantity}
                rows += [{**known, "step": t, "value": float(v)} for t, v in zip(steps, values, strict=True)]
    axes[0].set(xlabel="1 + negative steps done", ylabel="p(y*)", xlim=(0.9, 700))
    axes[0].legend(loc="center left", bbox_to_anchor=(0, 0.45))
    shares = SHARES[::4]
    for (name, q), colour in zip(spreads.items(), (BLUE, GREY, ORANGE), strict=False):
        for momentum, dash in ((0.0, "-"), (0.9, "--")):
            counts = [steps_to_collapse(q, share, momentum) for share in shares]
            axes[1].loglog(shares, counts, dash, color=colour, label=name if momentum == 0 else None)
            known = {"panel": "f", "q": name, "momentum": momentum, "quantity": f"steps until p(y*) > {COLLAPSE}"}
            rows += [{**known, "p(y)": p, "value": n} for p, n in zip(shares, counts, strict=True)]
    axes[1].set(xlabel="p(y) before the first step", ylabel=f"steps until p(y*) > {COLLAPSE}")
    axes[1].set_ylim(top=2000)  # room for the legend
    axes[1].legend(title="dashed: momentum 0.9", ncols=3, loc="upper left")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure and write its numbers."""
    options = figure_arguments(__doc__, "toy_squeezing_trends").parse_args(arguments)
    torch.set_num_threads(1)
    spreads = {name: rest(options.seed, temperature) for name, temperature in TEMPERATURES.items()}
    figure, axes = new_figure(3, 2, height=2.2)
    rows = draw_label_sweeps(axes[:2], spreads)
    rows += draw_spread_sweeps(axes[2:4], options.seed)
    rows += draw_repeated(axes[4:], spreads)
    rows += counterexample()
    often = how_often(options.seed, 2000 if options.quick else 100_000)
    rows += [{"panel": "how often", "quantity": name, "value": value} for name, value in often.items()]
    letter(
        axes,
        (
            f"smaller p(y): not more into y* (e = {STRENGTH:g})",
            "smaller p(y): the others fall more",
            "peakier: more into y*, then less",
            "peakier: fewer rise",
            f"repeated steps (e = {REPEATED_STRENGTH:g}, p(y) = 1/{V})",
            "how soon it collapses",
        ),
    )
    frame = pd.DataFrame(rows)
    save(figure, frame, options.out)
    print("how often, of random contexts")
    print("\n".join(f"{value:8.4f}  {name}" for name, value in often.items()))
    print(frame[frame["panel"] == "counterexample"].pivot(index="quantity", columns="q", values="value").to_string())


if __name__ == "__main__":
    main()
