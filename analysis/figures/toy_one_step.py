"""What one step on one digit does to all others, measured and by the exact eNTK: [LD] Fig. 1 and 2 on small digits.

    python analysis/figures/toy_one_step.py                 # CPU, half a minute
    python analysis/figures/toy_one_step.py --quick

[LD] is Ren & Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025 (arXiv 2407.10490). A network is trained for
two epochs on scikit-learn's digits (8 x 8; MNIST is not shipped), then takes one plain gradient step on one training
example, from the same weights for every example. Observed: the log-probs of all ten classes on held-out probes.

- (a) the mean change of every class's probability, for probes of the digit trained on, of the digit that looks most
  like it and of the one that looks least like it (by correlation of the mean images);
- (b) the probability of the trained digit's class on probes of every digit: who is pulled up with it;
- (c) the log-prob of the probes' own class: what the step costs the other digits;
- (d) the first-order prediction - eta A K G with the exact kernel K against the measured change of log pi;
- (e) how the remainder shrinks with eta: by slope 2, at three moments of training;
- (f) whether likeness of pixels tells the pull-up of (b), and whether ||K||_F does.

Left out: what accumulates over training, see `toy_accumulated.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from looks import BLUE, GREY, MARKERS, ORANGE, figure_arguments, heat_map, letter, new_figure, save
from matplotlib.axes import Axes
from torch import Tensor
from toy_digits import DIGITS, Classifier, Digits, Weights, alike, first_order, kernel, load, sgd, similarity

LEARNING_RATE = 0.1
STAGES = (0, 120, 900)
"""Steps of training done before the one step: none, two epochs, fifteen. The middle one is what most panels show."""
SHOWN = STAGES[1]
ETA = 0.02
"""Of the one step, for all panels but (e)."""
ETAS = tuple(10 ** (exponent / 2) for exponent in range(-8, 3))
POINTS = 1500
"""Of the scatter."""


@dataclass(frozen=True)
class Stage:
    """What a step from one point of training does: measured and predicted changes of log pi, (U, O, V), by eta."""

    step: int
    before: Tensor
    measured: dict[float, Tensor]
    per_eta: Tensor
    kernel_norm: Tensor

    def explained(self, eta: float) -> float:
        """Return 1 - |measured - predicted|^2 / |measured|^2 over all pairs and classes."""
        return 1 - (self.error(eta) / self.size(eta)) ** 2

    def error(self, eta: float) -> float:
        """Return the root mean square of measured minus predicted, nats."""
        return float((self.measured[eta] - eta * self.per_eta).square().mean().sqrt())

    def size(self, eta: float) -> float:
        """Return the root mean square of the measured change, nats."""
        return float(self.measured[eta].square().mean().sqrt())

    def moved(self, eta: float) -> Tensor:
        """Return the change of the probabilities, (U, O, V)."""
        return (self.before + self.measured[eta]).exp() - self.before.exp()


def one_step(
    classifier: Classifier, weights: Weights, trained: Digits, observed: Digits, step: int, etas: Sequence[float]
) -> Stage:
    """Take one step on each trained example alone, from the same weights, at every learning rate."""
    gradients = classifier.loss_gradients(weights, trained)
    before = classifier.log_probs(weights, observed.images)
    measured = {}
    for eta in etas:
        after = [
            classifier.log_probs({name: w - eta * gradients[name][u] for name, w in weights.items()}, observed.images)
            for u in range(len(trained.labels))
        ]
        measured[eta] = torch.stack(after) - before
    k = kernel(classifier.jacobian(weights, observed.images), classifier.jacobian(weights, trained.images))
    predicted = first_order(k, before, classifier.log_probs(weights, trained.images), trained.labels)
    return Stage(step, before, measured, predicted, k.square().sum((2, 3)).sqrt().T)


def by_digit(values: Tensor, trained: Digits, observed: Digits) -> Tensor:
    """Return the means of (U, O) over pairs of digits, (V, V): digit trained on by digit observed."""
    rows = torch.stack([values[trained.of(digit)].mean(0) for digit in range(DIGITS)])
    return torch.stack([rows[:, observed.of(digit)].mean(1) for digit in range(DIGITS)], dim=1)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation over the pairs of different digits of two (V, V) tables."""
    other = ~torch.eye(DIGITS, dtype=torch.bool)
    return float(pd.Series(a[other].numpy()).corr(pd.Series(b[other].numpy()), method="spearman"))


def slope(etas: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of a straight line through log values over log etas, least squares."""
    x, y = (torch.tensor(series, dtype=torch.float64).log() for series in (etas, values))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def table(rows: list[dict[str, object]], panel: str, quantity: str, values: Tensor, **known: object) -> None:
    """Add a row per entry of a (V, V) table of trained by observed digit."""
    for u in range(DIGITS):
        for o in range(DIGITS):
            entry = {"trained": u, "observed": o, "quantity": quantity, "value": float(values[u, o])}
            rows.append({"panel": panel, **known, **entry})


def draw_bars(axes: Axes, stage: Stage, trained: Digits, observed: Digits, rows: list[dict[str, object]]) -> None:
    """Draw panel (a)."""
    first, second, third = alike(similarity(trained))
    moved = stage.moved(ETA)[trained.of(first)].mean(0)  # (O, V)
    names = {first: "the same", second: "most alike", third: "least alike"}
    for place, (digit, name) in enumerate(names.items()):
        change = moved[observed.of(digit)].mean(0)
        where = torch.arange(DIGITS) + 0.27 * (place - 1)
        colour = (BLUE, ORANGE, GREY)[place]
        axes.bar(where.numpy(), change.numpy(), 0.25, color=colour, label=f"{digit} ({name})")
        for class_, value in enumerate(change.tolist()):
            known = {"panel": "a", "step": stage.step, "eta": ETA, "trained": first, "observed": digit}
            rows.append({**known, "class": class_, "quantity": "change of p", "value": value})
    axes.set_xticks(range(DIGITS))
    axes.set(xlabel="class", ylabel="mean change of p")
    axes.axhline(0, color="black", lw=0.5)
    axes.legend(title=f"step on a {first}; probes of", loc="upper right")
    axes.grid(visible=False, axis="x")


def draw_scatter(axes: Axes, stage: Stage, rows: list[dict[str, object]]) -> None:
    """Draw panel (d): a seeded sample of all entries."""
    measured, predicted = stage.measured[ETA].flatten(), (ETA * stage.per_eta).flatten()
    some = torch.randperm(len(measured), generator=torch.Generator().manual_seed(0))[:POINTS]
    axes.plot(predicted[some].numpy(), measured[some].numpy(), ".", ms=2, color=BLUE, alpha=0.5)
    bound = [float(predicted[some].min()), float(predicted[some].max())]
    axes.plot(bound, bound, color="black", lw=0.7)
    axes.set(xlabel=r"predicted, $-\eta A K G$ (nats)", ylabel=r"measured $\Delta\log\pi$ (nats)")
    axes.text(0.04, 0.9, f"explained {stage.explained(ETA):.4f}", transform=axes.transAxes, fontsize=7)
    for x, y in zip(predicted[some].tolist(), measured[some].tolist(), strict=True):
        known = {"panel": "d", "step": stage.step, "eta": ETA, "quantity": "change of log p"}
        rows.append({**known, "value": y, "predicted": x})


def draw_orders(axes: Axes, stages: Sequence[Stage], rows: list[dict[str, object]]) -> None:
    """Draw panel (e): size of the change and of its remainder over eta."""
    for stage, marker, colour in zip(stages, MARKERS, (GREY, BLUE, ORANGE), strict=False):
        etas = list(stage.measured)
        errors, sizes = [stage.error(eta) for eta in etas], [stage.size(eta) for eta in etas]
        axes.loglog(etas, sizes, "--", color=colour, lw=0.8)
        axes.loglog(etas, errors, marker=marker, color=colour, label=f"after {stage.step} steps")
        for eta, error, size in zip(etas, errors, sizes, strict=True):
            known = {"panel": "e", "step": stage.step, "eta": eta}
            rows.append({**known, "quantity": "remainder", "value": error})
            rows.append({**known, "quantity": "change of log p", "value": size})
            rows.append({**known, "quantity": "explained", "value": stage.explained(eta)})
        small = [eta for eta in etas if eta <= 1e-3]
        fits = {"slope of remainder": stage.error, "slope of change of log p": stage.size}
        for name, values in fits.items():
            fitted = slope(small, [values(eta) for eta in small])
            rows.append({"panel": "e", "step": stage.step, "quantity": name, "value": fitted})
    axes.set(xlabel=r"learning rate $\eta$ of the step", ylabel="root mean square (nats)")
    axes.legend(title="remainder (dashed: change)", loc="lower right", borderaxespad=0)


def draw_likeness(
    axes: Axes, stage: Stage, trained: Digits, observed: Digits, like: Tensor, rows: list[dict[str, object]]
) -> None:
    """Draw panel (f): pull-up of every pair of different digits over likeness of pixels."""
    label = trained.labels[:, None, None].expand(-1, len(observed.labels), 1)
    pulled = by_digit(stage.moved(ETA).gather(2, label)[..., 0], trained, observed)
    pulled_log = by_digit(stage.measured[ETA].gather(2, label)[..., 0], trained, observed)
    norm = by_digit(stage.kernel_norm, trained, observed)
    other = ~torch.eye(DIGITS, dtype=torch.bool)
    axes.plot(like[other].numpy(), pulled[other].numpy(), "o", color=BLUE, ms=3, alpha=0.8)
    axes.set(xlabel="correlation of mean images", ylabel="mean change of p(trained class)")
    axes.text(
        0.04, 0.9, f"rank correlation {rank_correlation(like, pulled):+.2f}", transform=axes.transAxes, fontsize=7
    )
    table(rows, "f", "correlation of mean images", like)
    table(rows, "f", "||K||_F", norm, step=stage.step)
    pairs = {"p": pulled, "log p": pulled_log}
    for name, values in pairs.items():
        for cause, measure in {"likeness": like, "||K||_F": norm}.items():
            quantity = f"rank correlation of {cause} with change of {name} of the trained class"
            known = {"panel": "f", "step": stage.step, "eta": ETA}
            rows.append({**known, "quantity": quantity, "value": rank_correlation(measure, values)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure and write its numbers."""
    options = figure_arguments(__doc__, "toy_one_step").parse_args(arguments)
    torch.set_num_threads(1)
    train, held_out = load(options.seed)
    trained, observed = (part.some_of_each(2 if options.quick else 12) for part in (train, held_out))
    classifier = Classifier(options.seed, hidden=16 if options.quick else 64)
    path = sgd(classifier, train, steps=STAGES[-1], learning_rate=LEARNING_RATE, seed=options.seed)
    stages = [
        one_step(classifier, weights, trained, observed, step, sorted({*ETAS, ETA}))
        for step, weights, _ in path
        if step in STAGES
    ]
    shown = stages[STAGES.index(SHOWN)]
    like = similarity(train)
    rows: list[dict[str, object]] = []

    figure, axes = new_figure(3, 2, height=2.35)
    draw_bars(axes[0], shown, trained, observed, rows)
    own = shown.measured[ETA][:, torch.arange(len(observed.labels)), observed.labels]
    label = trained.labels[:, None, None].expand(-1, len(observed.labels), 1)
    pulled = shown.moved(ETA).gather(2, label)[..., 0]
    maps = (
        ("b", "change of p of the trained class", pulled, "mean change of p"),
        ("c", "change of log p of the own class", own, "mean change (nats)"),
    )
    for panel, (name, quantity, values, unit) in zip(axes[1:3], maps, strict=True):
        means = by_digit(values, trained, observed)
        heat_map(panel, means, label=unit)
        panel.set(xlabel="digit observed", ylabel="digit trained on")
        table(rows, name, quantity, means, step=shown.step, eta=ETA)
    draw_scatter(axes[3], shown, rows)
    draw_orders(axes[4], stages, rows)
    draw_likeness(axes[5], shown, trained, observed, like, rows)
    letter(
        axes,
        (
            "one step, all classes",
            "p(trained class) on other digits",
            "log p(own class)",
            rf"first order, $\eta$ = {ETA}",
            "the remainder is of second order",
            "do like digits pull each other up?",
        ),
    )
    frame = pd.DataFrame(rows)
    save(figure, frame, options.out)
    print(summary(frame))


def summary(frame: pd.DataFrame) -> str:
    """Return the lines that the results page quotes."""
    explained = frame[frame["quantity"] == "explained"].pivot(index="eta", columns="step", values="value")
    lines = frame[frame["quantity"].str.startswith(("slope", "rank"), na=False)][["step", "quantity", "value"]]
    parts = [explained.to_string(float_format="%.6f"), lines.to_string(index=False)]
    return "explained share by eta and steps of training\n" + "\n".join(parts)


if __name__ == "__main__":
    main()
