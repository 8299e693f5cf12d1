"""Where the mass goes when one token is pushed down: the squeezing effect on a softmax of 50, and who rises.

    python analysis/figures/toy_squeezing.py                # seconds

[LD, Sec. 3.3 and App. E] (Ren & Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025, arXiv 2407.10490). One
negative step of strength e on label y, from three contexts:

- (a) flat: all tokens about equally likely; (b) peaky, y a likely token beside the peak; (c) valley: the same peaky
  context, y a token of probability 1e-4. Every token's probability before and after, and tau, the probability above
  which a token rises, by `llm_dynamics.squeezing_stats`;
- (d) how many tokens rise as the step grows, from contexts of three shapes with p(y) = 1/50 or 1e-4: lines by the
  threshold, markers by counting after the step itself.

Left out: which of the paper's trends hold, and repeated steps; see `toy_squeezing_trends.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import pandas as pd
import torch
from looks import BLUE, CYCLE, GREY, MARKERS, ORANGE, RED, figure_arguments, letter, new_figure, save
from matplotlib.axes import Axes
from toy_softmax import TEMPERATURES, Setting, V, negative_step, rest, with_label

from llm_dynamics import squeezing_stats

STRENGTH = 5.0
"""e of panels (a) to (c), in logits: large, so that the eye sees it."""
STRENGTHS = tuple(10 ** (exponent / 4) for exponent in range(-8, 13))
LABELS = {"flat": 1 / V, "peaky": 0.15, "valley": 1e-4}


def settings(seed: int) -> dict[str, Setting]:
    """Return the three contexts."""
    spread = {"flat": TEMPERATURES["flat"], "peaky": TEMPERATURES["peaky"], "valley": TEMPERATURES["peaky"]}
    return {name: with_label(rest(seed, spread[name]), p_label) for name, p_label in LABELS.items()}


def shapes(seed: int) -> dict[str, Setting]:
    """Return the contexts of panel (d)."""
    names = (("flat", 1 / V), ("mild", 1 / V), ("mild", 1e-4), ("peaky", 1 / V))
    return {f"{name}, p(y) = {p:.4g}": with_label(rest(seed, TEMPERATURES[name]), p) for name, p in names}


def draw_tokens(axes: Axes, name: str, setting: Setting) -> list[dict]:
    """Draw one of panels (a) to (c)."""
    after = negative_step(setting.logp, setting.label, STRENGTH).exp()
    before = setting.logp.exp()
    stats = squeezing_stats(setting.logp[None], torch.tensor([setting.label]), strength=STRENGTH)
    order = before.argsort(descending=True)
    x = torch.arange(V).numpy()
    place = int((order == setting.label).nonzero())
    old, new = before[order].numpy(), after[order].numpy()
    rises = new > old
    axes.vlines(x, old, new, color=GREY, lw=0.6)
    axes.semilogy(x, old, "_", color="black", ms=4, label="before")
    axes.plot(x[rises], new[rises], "^", color=BLUE, ms=3, label=f"after: {rises.sum()} rise")
    axes.plot(x[~rises], new[~rises], "v", color=ORANGE, ms=3, label=f"after: {(~rises).sum()} fall")
    axes.plot([place], [float(after[setting.label])], "v", color=RED, ms=5, label="the label y")
    if stats.tau > 0:
        axes.axhline(float(stats.tau), color="black", lw=0.7, ls=":")
        axes.annotate(r"$\tau$", (V - 1, float(stats.tau)), xytext=(0, 2), textcoords="offset points", fontsize=7)
    axes.set(xlabel="tokens, most likely first", ylabel="probability")
    axes.set_ylim(bottom=float(after.min()) / (8 if name == "flat" else 400))  # room for the legend
    axes.legend(ncols=2, loc="lower left", handletextpad=0.1, columnspacing=0.6)
    known = {"panel": name, "strength": STRENGTH}
    rows = [
        {**known, "token": token, "quantity": quantity, "value": float(values[token])}
        for quantity, values in (("p before", before), ("p after", after))
        for token in range(V)
    ]
    return rows + [
        {**known, "quantity": field.name, "value": float(getattr(stats, field.name))} for field in fields(stats)
    ]


def draw_risers(axes: Axes, contexts: dict[str, Setting]) -> list[dict]:
    """Draw panel (d)."""
    rows = []
    for (name, setting), colour, marker in zip(contexts.items(), CYCLE, MARKERS, strict=False):
        label = torch.tensor([setting.label])
        by_threshold, counted = [], []
        for strength in STRENGTHS:
            by_threshold.append(int(squeezing_stats(setting.logp[None], label, strength=strength).riser_count))
            counted.append(int((negative_step(setting.logp, setting.label, strength) > setting.logp).sum()))
            known = {"panel": "risers", "setting": name, "strength": strength}
            rows.append({**known, "quantity": "risers by threshold", "value": by_threshold[-1]})
            rows.append({**known, "quantity": "risers counted", "value": counted[-1]})
        axes.semilogx(STRENGTHS, by_threshold, color=colour, lw=1)
        axes.semilogx(STRENGTHS, counted, marker, color=colour, ms=3, label=name)
    axes.set(xlabel="strength e of the step (logits)", ylabel=f"tokens that rise, of {V}")
    axes.legend()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure and write its numbers."""
    options = figure_arguments(__doc__, "toy_squeezing").parse_args(arguments)
    contexts = settings(options.seed)
    figure, axes = new_figure(2, 2, height=2.4)
    rows = []
    for panel, (name, setting) in zip(axes, contexts.items(), strict=False):
        rows += draw_tokens(panel, name, setting)
    rows += draw_risers(axes[3], shapes(options.seed))
    titles = [f"{name}: p(y) = {p:.4g}, e = {STRENGTH:g}" for name, p in LABELS.items()]
    letter(axes, (*titles, "who rises as the step grows"))
    frame = pd.DataFrame(rows)
    save(figure, frame, options.out)
    stats = frame[frame["token"].isna() & frame["setting"].isna()]
    print(stats.pivot(index="quantity", columns="panel", values="value").to_string(float_format="%.4g"))


if __name__ == "__main__":
    main()
