"""The groups of a batch of rollouts: which responses answer one question, which are correct, which lie elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The responses of all processes, in the order of processes; groups are consecutive.

    Attributes:
        size: G, responses to one question.
        first: Index of this process's first response among all.
        count: B, this process's responses.
        rewards: Of all responses, (B x processes,), NaN where there is none; on the CPU.
        lengths: Tokens of all responses that the loss counts, as `rewards`.
        correct_from: Reward from which on a response is correct.
    """

    size: int
    first: int
    count: int
    rewards: Tensor
    lengths: Tensor
    correct_from: float

    @property
    def known(self) -> Tensor:
        """Which responses have a reward, (B x processes,), bool."""
        return ~self.rewards.isnan()

    @property
    def correct(self) -> Tensor:
        """Which responses are correct, (B x processes,), bool."""
        return self.rewards >= self.correct_from  # NaN is not

    @property
    def wrong(self) -> Tensor:
        """Which responses are wrong, (B x processes,), bool; without a reward a response is neither."""
        return self.known & ~self.correct

    @property
    def local(self) -> slice:
        """This process's responses among all."""
        return slice(self.first, self.first + self.count)

    def here(self) -> Iterator[range]:
        """Yield the responses of each group that has a response on this process."""
        for group in range(self.first // self.size, -(-(self.first + self.count) // self.size)):
            yield range(group * self.size, min((group + 1) * self.size, len(self.rewards)))

    def straddle(self) -> Tensor:
        """Tell which responses, of all, are in groups that lie on several processes, (B x processes,), bool."""
        process = torch.arange(len(self.rewards)) // self.count
        lowest, highest = (process.view(-1, self.size).aminmax(dim=1)) if len(process) else (process, process)
        return (lowest != highest).repeat_interleave(self.size)

    def success_rate(self, group: range) -> float:
        """Return p, the share of correct responses among those with a reward; NaN where none has one."""
        known = int(self.known[group.start : group.stop].sum())
        return int(self.correct[group.start : group.stop].sum()) / known if known else float("nan")

    def is_mixed(self, group: range) -> bool:
        """Tell whether a group has correct and wrong responses."""
        of_group = slice(group.start, group.stop)
        return bool(self.correct[of_group].any() and self.wrong[of_group].any())
