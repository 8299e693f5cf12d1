"""What single steps add up to over training: who pulled whom up, and the zig-zag of wrong labels; small digits.

    python analysis/figures/toy_accumulated.py              # CPU, a minute
    python analysis/figures/toy_accumulated.py --quick

The second half of the classifier experiment of Ren & Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025
(arXiv 2407.10490) [LD, Fig. 2]; `toy_one_step.py` has the first. Plain SGD, batch 20, on scikit-learn's digits.

- (a) the probability of some classes on held-out probes of one digit, while all digits are trained: the class of the
  digit that looks most like it against the class of the one that looks least like it;
- (b) the account of one run: the mean change of log p(own class) of each digit's probes, from the first step to the
  last, by the digit of the training examples that made it: every step's gradient is split by digit and carried to the
  probes by the derivative at the step's midpoint, so that the columns add up to the measured change;
- (c) the same account of the two wrong classes of (a): who raised them, who pushed them down;
- (d) another run, in which 60 of 1,200 training labels are wrong: the path of these examples between their true digit
  and the label they are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from looks import BLUE, DASHES, GREY, ORANGE, SKY, figure_arguments, heat_map, letter, new_figure, save
from matplotlib.axes import Axes
from torch import Tensor
from toy_digits import DIGITS, Classifier, Digits, Weights, alike, load, sgd, similarity

LEARNING_RATE = 0.1
STEPS = 600
WRONG, WRONG_LEARNING_RATE, WRONG_STEPS = 60, 0.3, 5000
EVERY = 20
"""Steps between points of the curves."""
PATHS = 3
"""Single examples drawn in (d)."""


@dataclass(frozen=True)
class Account:
    """What training digits did to probes over a run; log pi in nats.

    Attributes:
        shares: Accumulated change of log pi by the digit trained on, (V, O, V).
        measured: Change of log pi from start to end, (O, V).
        curve: Probabilities every `EVERY` steps, (points, O, V).
        steps: Steps done at those points.
    """

    shares: Tensor
    measured: Tensor
    curve: Tensor
    steps: list[int]


def accumulate(classifier: Classifier, train: Digits, observed: Digits, *, steps: int, seed: int) -> Account:
    """Train, and carry every step's gradient to the probes, split by the digit of its examples."""
    images = observed.images
    shares = torch.zeros(DIGITS, len(images), DIGITS, dtype=torch.float64)
    curve: list[Tensor] = []
    first: Weights = {}
    last: tuple[Weights, Digits] | None = None
    for step, weights, batch in sgd(classifier, train, steps=steps, learning_rate=LEARNING_RATE, seed=seed):
        if last is not None:
            before, trained = last
            middle = {name: (before[name] + weights[name]) / 2 for name in weights}
            shares += classifier.change_along(middle, split_step(classifier, before, trained), images)
        if step % EVERY == 0:
            curve.append(classifier.log_probs(weights, images).exp())
        first, last = first or weights, (weights, batch)
    assert last is not None
    measured = classifier.log_probs(last[0], images) - classifier.log_probs(first, images)
    return Account(shares, measured, torch.stack(curve), list(range(0, steps + 1, EVERY)))


def split_step(classifier: Classifier, weights: Weights, batch: Digits) -> Weights:
    """Return the parts of one SGD step by the digit of the examples, by name: (V, ...)."""
    of_digit = torch.nn.functional.one_hot(batch.labels, DIGITS).double().T  # (V, B)
    scale = -LEARNING_RATE / len(batch.labels)
    gradients = classifier.loss_gradients(weights, batch)
    return {name: scale * torch.tensordot(of_digit, g, dims=1) for name, g in gradients.items()}


def wrong_paths(classifier: Classifier, train: Digits, *, wrong: int, steps: int, seed: int) -> pd.DataFrame:
    """Train with the first `wrong` labels wrong; return p(true digit) and p(given label) of those, every 5 `EVERY`."""
    shift = torch.randint(1, DIGITS, (wrong,), generator=torch.Generator().manual_seed(seed))
    given = train.labels.clone()
    given[:wrong] = (given[:wrong] + shift) % DIGITS
    frames = []
    run = sgd(classifier, Digits(train.images, given), steps=steps, learning_rate=WRONG_LEARNING_RATE, seed=seed)
    for step, weights, _ in run:
        if step % (5 * EVERY) == 0:
            with torch.no_grad():
                p = classifier.log_probs(weights, train.images[:wrong]).exp()
            columns = {
                "p_true": p.gather(1, train.labels[:wrong, None])[:, 0].numpy(),
                "p_given": p.gather(1, given[:wrong, None])[:, 0].numpy(),
            }
            frames.append(pd.DataFrame({"step": step, "example": range(wrong), **columns}))
    return pd.concat(frames, ignore_index=True)


def zigzags(paths: pd.DataFrame) -> pd.Series:
    """Tell which examples were at their true digit (p > 1/2) at some time and are at the given label in the end."""
    at_true = paths.groupby("example")["p_true"].max() > 0.5
    at_given = paths[paths["step"] == paths["step"].max()].set_index("example")["p_given"] > 0.5
    return at_true & at_given


def draw_curves(axes: Axes, account: Account, observed: Digits, digits: tuple[int, int, int]) -> list[dict]:
    """Draw panel (a)."""
    rows = []
    own, like, unlike = digits
    mean = account.curve[:, observed.of(own)].mean(1)  # (points, V)
    kinds = {own: "its own", like: "most alike", unlike: "least alike"}
    for (digit, kind), colour, dash in zip(kinds.items(), (BLUE, ORANGE, GREY), DASHES, strict=False):
        axes.semilogy(account.steps, mean[:, digit].tolist(), dash, color=colour, label=f"{digit} ({kind})")
    for step, values in zip(account.steps, mean.tolist(), strict=True):
        for class_, value in enumerate(values):
            known = {"panel": "a", "step": step, "observed": own, "class": class_, "quantity": "p"}
            rows.append({**known, "value": value})
    axes.set(xlabel="SGD step", ylabel=f"mean p(class) on probes of {own}")
    axes.legend(title="class")
    return rows


def draw_account(axes: Axes, account: Account, observed: Digits) -> list[dict]:
    """Draw panel (b)."""
    rows = []
    own = account.shares[:, torch.arange(len(observed.labels)), observed.labels]  # (V, O)
    means = torch.stack([own[:, observed.of(digit)].mean(1) for digit in range(DIGITS)], dim=1)
    measured = account.measured.gather(1, observed.labels[:, None])[:, 0]
    for o in range(DIGITS):
        whole = float(measured[observed.of(o)].mean())
        known = {"panel": "b", "observed": o, "class": o}
        rows.append({**known, "quantity": "measured change of log p", "value": whole})
        rows.append({**known, "quantity": "remainder", "value": whole - float(means[:, o].sum())})
        for u in range(DIGITS):
            share = {"trained": u, "quantity": "share of change of log p", "value": float(means[u, o])}
            rows.append({**known, **share})
    heat_map(axes, means, label="accumulated change (nats)")
    axes.set(xlabel="digit observed", ylabel="digit trained on")
    return rows


def draw_wrong_classes(axes: Axes, account: Account, observed: Digits, digits: tuple[int, int, int]) -> list[dict]:
    """Draw panel (c)."""
    rows = []
    own, like, unlike = digits
    for place, (class_, kind, colour) in enumerate(((like, "most alike", ORANGE), (unlike, "least alike", GREY))):
        shares = account.shares[:, observed.of(own), class_].mean(1)
        measured = float(account.measured[observed.of(own), class_].mean())
        label = f"log p({class_}), {kind}: {measured:+.1f}"
        where = [digit + 0.4 * (place - 0.5) for digit in range(DIGITS)]
        axes.bar(where, shares.tolist(), 0.38, color=colour, label=label)
        known = {"panel": "c", "observed": own, "class": class_}
        rows.append({**known, "quantity": "measured change of log p", "value": measured})
        rows.append({**known, "quantity": "remainder", "value": measured - float(shares.sum())})
        for u in range(DIGITS):
            share = {"trained": u, "quantity": "share of change of log p", "value": float(shares[u])}
            rows.append({**known, **share})
    axes.axhline(0, color="black", lw=0.5)
    axes.set_xticks(range(DIGITS))
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="digit trained on", ylabel="accumulated change (nats)")
    axes.legend(title=f"on probes of {own}")
    return rows


def draw_paths(axes: Axes, paths: pd.DataFrame) -> list[dict]:
    """Draw panel (d)."""
    turned = zigzags(paths)
    single = list(turned[turned].index[:PATHS]) or [0]
    for example in single:
        one = paths[paths["example"] == example]
        axes.plot(one["p_true"], one["p_given"], color=SKY, lw=0.7, alpha=0.9)
    mean = paths.groupby("step")[["p_true", "p_given"]].mean()
    axes.plot(mean["p_true"], mean["p_given"], color=BLUE, lw=1.8, label=f"mean of {paths['example'].nunique()}")
    axes.plot([], [], color=SKY, lw=0.7, label=f"{len(single)} of the {int(turned.sum())} that turned round")
    for step in sorted({0, *mean.index[:: max(1, len(mean) // 5)], mean.index[-1]}):
        axes.plot(*mean.loc[step], "o", color=BLUE, ms=3)
        axes.annotate(f"{step}", mean.loc[step], xytext=(3, 3), textcoords="offset points", fontsize=6)
    axes.set(xlabel="p(true digit)", ylabel="p(label given)", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    axes.legend(loc="upper right")
    rows = [
        {"panel": "d", "step": step, "quantity": f"mean {name}", "value": value}
        for step, values in mean.iterrows()
        for name, value in values.items()
    ]
    rows += [
        {"panel": "d", "step": row.step, "example": example, "quantity": name, "value": getattr(row, name)}
        for example in single
        for row in paths[paths["example"] == example].itertuples()
        for name in ("p_true", "p_given")
    ]
    counts = {"examples": paths["example"].nunique(), "turned round": int(turned.sum())}
    counts["were at the true digit"] = int((paths.groupby("example")["p_true"].max() > 0.5).sum())
    return rows + [{"panel": "d", "quantity": name, "value": value} for name, value in counts.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure and write its numbers."""
    options = figure_arguments(__doc__, "toy_accumulated").parse_args(arguments)
    torch.set_num_threads(1)
    train, held_out = load(options.seed)
    observed = held_out.some_of_each(2 if options.quick else 12)
    classifier = Classifier(options.seed, hidden=16 if options.quick else 64)
    account = accumulate(classifier, train, observed, steps=60 if options.quick else STEPS, seed=options.seed)
    paths = wrong_paths(classifier, train, wrong=WRONG, steps=300 if options.quick else WRONG_STEPS, seed=options.seed)
    digits = alike(similarity(train))
    figure, axes = new_figure(2, 2, height=2.5)
    rows = draw_curves(axes[0], account, observed, digits)
    rows += draw_account(axes[1], account, observed)
    rows += draw_wrong_classes(axes[2], account, observed, digits)
    rows += draw_paths(axes[3], paths)
    letter(axes, ("classes on one digit", "who moved log p(own class)", "who moved two wrong classes", "wrong labels"))
    frame = pd.DataFrame(rows)
    save(figure, frame, options.out)
    told = frame["quantity"].isin(["measured change of log p", "remainder", "examples", "turned round"])
    print(frame[told | (frame["quantity"] == "were at the true digit")].to_string(index=False))


if __name__ == "__main__":
    main()
