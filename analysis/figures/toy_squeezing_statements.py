"""What [LD] says of one negative step, tried on random contexts, and a counterexample.

[LD, Sec. 3.3 and App. E] is Ren & Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025 (arXiv 2407.10490). With
`tau` the riser threshold of `llm_dynamics.likelihood.squeezing`, Delta log p_i = e (p_i - tau) for every i != y, so

- Delta log p_i grows with p_i: the rich get richer, exactly;
- log p_i - log p_j changes by e (p_i - p_j), whatever y is: the odds of y* do not know which token was pushed down;
- in one context, tau = (1/e) log(sum_j p_j exp(e p_j) - p_y exp(e p_y) (1 - exp(-e))) falls as p_y grows: pushing a
  *less* likely token down leaves every other token lower, y* included. So a smaller p(y) makes the others fall more, as
  [LD] says, and y* rise *less*, against what [LD] says.

`how_often` looks at the second comparison that can be meant, too: p(y) itself made smaller. Used by
`toy_squeezing_trends.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from toy_softmax import V, negative_step, with_label

from llm_dynamics import squeezing_stats

STRENGTH = 1.0
"""e of the step, in logits."""
MORE_RISERS = ((0.26, 0.24, *(0.5 / 47,) * 47), (0.2, *(0.8 / 48,) * 48))
"""Two q of 49 tokens: the first is peakier by collision, entropy and largest, yet more tokens rise from it."""


def how_often(seed: int, contexts: int) -> dict[str, float]:
    """Return the share of random contexts in which each statement of [LD] holds for one step.

    Contexts are drawn from symmetric Dirichlet distributions over V tokens with parameters 0.03 to 3; token 0 is y.

    - "smaller p(y)": p(y) halved, the others kept in proportion; of the contexts with p(y) > 1e-6, below which rounding
      would decide;
    - "another y": the same context, the less likely of two labels, neither of them y*, against the likelier one;
    - "peakier": the others at half the temperature (their probabilities squared), p(y) kept.

    Args:
        seed: Of the contexts.
        contexts: How many.
    """
    generator = torch.Generator().manual_seed(seed)
    alpha = 10 ** (torch.rand(contexts, generator=generator, dtype=torch.float64) * 2 - 1.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        p = torch.distributions.Dirichlet(alpha[:, None].expand(-1, V)).sample().clamp(min=1e-30)
    p /= p.sum(1, keepdim=True)
    label = torch.zeros(contexts, dtype=torch.long)
    star = p[:, 1:].argmax(1, keepdim=True) + 1
    second = torch.where(star[:, 0] == 1, 2, 1)  # another token than y and y*
    pair = torch.stack([label, second], dim=1)
    by_share = p.gather(1, pair).argsort(dim=1)
    unlikely, likely = pair.gather(1, by_share).unbind(1)
    both = {"less": _change(p, unlikely), "more": _change(p, likely)}
    kept = torch.ones_like(p, dtype=torch.bool).scatter(1, pair, False)
    lower = both["less"] <= both["more"] + 1e-9
    of_star = {name: change.gather(1, star)[:, 0] for name, change in both.items()}
    halved = p.clone()
    halved[:, 0] /= 2
    halved[:, 1:] *= ((1 - halved[:, 0]) / (1 - p[:, 0]))[:, None]
    sharper = p.square()
    sharper[:, 1:] *= ((1 - p[:, 0]) / sharper[:, 1:].sum(1))[:, None]
    sharper[:, 0] = p[:, 0]
    of = {name: _outcome(values, label, star) for name, values in (("", p), ("halved", halved), ("sharper", sharper))}
    plain, less, peakier = of[""], of["halved"], of["sharper"]
    rich = torch.sort(p[:, 1:], dim=1).indices
    grown = _change(p, label)[:, 1:].gather(1, rich)
    holds = {
        "p(y) falls": plain["change of y"] < 0,
        "p(y*) rises": plain["change of y*"] > 0,
        "log p of a likelier token rises more": (grown.diff(dim=1) >= -1e-9).all(1),
        "all but y* fall": plain["risers"] == 1,
        "smaller p(y): more moves into y*": less["moved"] > plain["moved"],
        "smaller p(y): log p(y*) rises more": less["change of y*"] > plain["change of y*"],
        "smaller p(y): the others fall more": less["change of others"] < plain["change of others"],
        "smaller p(y): odds y* : others rise more": less["odds"] > plain["odds"],
        "another y, less likely: y* rises more": of_star["less"] > of_star["more"],
        "another y, less likely: all other tokens end lower": (lower | ~kept).all(1),
        "peakier: more moves into y*": peakier["moved"] > plain["moved"],
        "peakier: no more risers": peakier["risers"] <= plain["risers"],
    }
    rare = p[:, 0] < 0.2
    holds["smaller p(y), below 0.2: more moves into y*"] = holds["smaller p(y): more moves into y*"]
    told = {name: p[:, 0] > 1e-6 if "smaller" in name else torch.ones_like(rare) for name in holds}
    told["smaller p(y), below 0.2: more moves into y*"] &= rare
    return {name: float(values[told[name]].double().mean()) for name, values in holds.items()}


def _change(p: Tensor, label: Tensor) -> Tensor:
    """Return the change of log p by one step, (N, V)."""
    return negative_step(p.log(), label, STRENGTH) - p.log()


def _outcome(p: Tensor, label: Tensor, star: Tensor) -> dict[str, Tensor]:
    """Return what one step does to contexts p (N, V) with label 0."""
    change = _change(p, label)
    stats = squeezing_stats(p.log(), label, strength=STRENGTH)
    of_star = change.gather(1, star)[:, 0]
    others = (change[:, 1:].sum(1) - of_star) / (p.shape[1] - 2)
    return {
        "change of y": change[:, 0],
        "change of y*": of_star,
        "change of others": others,
        "odds": of_star - others,
        "moved": stats.moved_to_other,
        "risers": stats.riser_count,
    }


def counterexample() -> list[dict]:
    """Return the numbers of the pair `MORE_RISERS`."""
    rows = []
    for name, values in zip(("peakier", "flatter"), MORE_RISERS, strict=True):
        setting = with_label(torch.tensor(values, dtype=torch.float64), 1e-4)
        stats = squeezing_stats(setting.logp[None], torch.tensor([0]), strength=STRENGTH)
        counted = int((negative_step(setting.logp, 0, STRENGTH) > setting.logp).sum())
        found = {"collision": float(stats.collision), "risers": int(stats.riser_count), "risers counted": counted}
        found["entropy"] = float(-(setting.logp.exp() * setting.logp).sum())
        rows += [
            {"panel": "counterexample", "q": name, "quantity": quantity, "value": v} for quantity, v in found.items()
        ]
    return rows
