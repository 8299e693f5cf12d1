"""From a scored batch of rollouts to token advantages: groups, scores, thresholds, methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_dynamics.rollouts import Groups
from llm_dynamics.trainers.nthr import advantages as shape
from llm_dynamics.trainers.nthr.config import SCORED_METHODS, NTHRConfig
from llm_dynamics.trainers.nthr.scores import GroupScores

Scorer = Callable[[range, list[int], list[int]], GroupScores]
"""Scores a group: its range among all responses, its correct responses, and those here whose tokens are to be scored.
Scores come in the order of those responses, the tokens that count of each."""


@dataclass(frozen=True)
class ShapedBatch:
    """This process's share of a shaped batch: B responses, T positions; on the device of its mask.

    Attributes:
        before: Advantages of responses as TRL computed them, (B,).
        advantages: Of tokens, (B, T).
        mask: Which tokens count, (B, T), bool.
        scores: Token scores (THR: hidden rewards), (B, T), NaN where there is none.
        selected: Tokens whose advantage the method multiplied with eta, (B, T), bool.
        thresholds: tau of each response's group, (B,), NaN where the group is not mixed or the method has none.
        anchors: s+ of correct responses, (B,), NaN elsewhere.
        etas: eta of each response's group, (B,), NaN as for `thresholds`.
        success: p of each response's group, (B,).
        groups: The groups of all processes.
    """

    before: Tensor
    advantages: Tensor
    mask: Tensor
    scores: Tensor
    selected: Tensor
    thresholds: Tensor
    anchors: Tensor
    etas: Tensor
    success: Tensor
    groups: Groups


def shape_batch(
    config: NTHRConfig,
    groups: Groups,
    advantages: Tensor,
    mask: Tensor,
    score: Scorer,
    *,
    seed: int,
    count_selected: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> ShapedBatch:
    """Shape the advantages of a batch by the method of `config`.

    Args:
        config: Method and options.
        groups: The groups of all processes.
        advantages: A of this process's responses, (B,).
        mask: Which of their tokens count, (B, T), bool.
        score: Scores one group; called for mixed groups, and only where the method needs scores.
        seed: Of the draw of method "random".
        count_selected: Gathers (B,) counts of all processes, for method "random".

    Returns:
        The batch; groups that are all correct or all wrong keep their advantages, except under "pos_only",
        "w_reinforce" and "nsr", which need no groups.
    """
    method, length, device = config.nthr_method, mask.shape[1], mask.device
    local = {name: getattr(groups, name)[groups.local].to(device) for name in ("known", "correct", "wrong")}
    scores = torch.full(mask.shape, torch.nan, device=device)
    thresholds, anchors, etas, success = (torch.full((groups.count,), torch.nan, device=device) for _ in range(4))
    mixed = torch.zeros(groups.count, dtype=torch.bool, device=device)
    for group in groups.here():
        rows = [row for row in group if groups.first <= row < groups.first + groups.count]
        here = torch.tensor([row - groups.first for row in rows], device=device)
        success[here] = groups.success_rate(group)
        right = [row for row in group if groups.correct[row]]
        anchored = any(groups.lengths[row] for row in right)  # a correct response may be masked out: it anchors nothing
        if method not in SCORED_METHODS or not groups.is_mixed(group) or not anchored:
            continue
        mixed[here] = True
        etas[here] = config.eta(groups.success_rate(group))
        scored = [row for row in rows if groups.wrong[row] or (method == "thr" and groups.correct[row])]
        found = score(group, right, scored)
        thresholds[here] = found.threshold(config.nthr_beta)
        parts = found.tokens.to(scores).split([int(groups.lengths[row]) for row in scored])
        for row, part in zip(scored, parts, strict=True):
            scores[row - groups.first, mask[row - groups.first]] = part
        for row, anchor in zip(right, found.anchors.tolist(), strict=True):
            if row in rows:
                anchors[row - groups.first] = anchor

    plain = advantages.to(device)
    selected = torch.zeros_like(mask)
    if method in ("nthr", "random"):
        candidates = mask & (mixed & local["wrong"])[:, None]
        selected = shape.selected_tokens(plain, scores, thresholds, candidates)
        if method == "random":
            selected = _drawn(groups, selected, candidates & (plain < 0)[:, None], mask, count_selected, seed)
        shaped = shape.downweighted(plain, selected, etas)
    elif method == "thr":
        counts = mask & (mixed & local["known"])[:, None]
        shaped, scores = shape.thr(plain, scores, thresholds, local["correct"], counts, config.thr_q)
    elif method == "pos_only":
        shaped = shape.pos_only(plain, length)
    elif method in ("w_reinforce", "nsr"):
        weight = config.w_reinforce_weight if method == "w_reinforce" else 0.0
        shaped = shape.w_reinforce(local["correct"], local["known"], weight, length)
    else:
        shaped = shape.by_token(plain, length)
    return ShapedBatch(plain, shaped, mask, scores, selected, thresholds, anchors, etas, success, groups)


def _drawn(
    groups: Groups,
    selected: Tensor,
    candidates: Tensor,
    mask: Tensor,
    gather: Callable[[Tensor], Tensor],
    seed: int,
) -> Tensor:
    """Draw as many candidates of each group as were selected, the same draw on every process."""
    counts = gather(selected.sum(dim=1)).cpu()
    open_to_draw = gather(candidates.sum(dim=1)).cpu()
    drawn = torch.zeros_like(selected)
    for group in groups.here():
        lengths = open_to_draw[group.start : group.stop].tolist()
        number = int(counts[group.start : group.stop].sum())
        parts = shape.random_tokens(number, lengths, seed=seed * 1_000_003 + group.start)
        for row, part in zip(group, parts, strict=True):
            if groups.first <= row < groups.first + groups.count and len(part):
                here = row - groups.first
                drawn[here, mask[here]] = part.to(drawn.device)
    return drawn
