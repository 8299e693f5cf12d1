"""The tokens that a process needs to score its groups: its own, and those of correct responses elsewhere."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from llm_dynamics.kernel.token_states import HeadTokens
from llm_dynamics.rollouts import Groups


class TokenPool:
    """The tokens of this process's responses, and those that its groups need from other processes.

    Where groups straddle processes, the head's inputs at the tokens of *correct* responses of those groups are
    gathered, and the ids of all their tokens: each process receives d x (bytes per number) + 32 bytes for each such
    correct token, and 16 for each other, padded to the largest share. Where G divides the responses of a process
    nothing is sent.

    Args:
        states: Inputs of the LM head, (B, T, d).
        labels: Token ids, (B, T).
        mask: Which tokens count, (B, T), bool.
        groups: The groups.
        accelerator: Gathers; None where there is one process.
    """

    def __init__(
        self, states: Tensor, labels: Tensor, mask: Tensor, groups: Groups, accelerator: Accelerator | None = None
    ) -> None:
        self._states, self._labels, self._mask, self._groups = states, labels, mask, groups
        straddle = groups.straddle()
        self._far: dict[str, Tensor] = {}
        if not bool(straddle.any()) or accelerator is None:
            return
        row = torch.arange(groups.first, groups.first + groups.count, device=mask.device)[:, None].expand_as(mask)
        shared = mask & straddle[groups.local].to(mask.device)[:, None]
        anchors = shared & groups.correct[groups.local].to(mask.device)[:, None]

        def gather(values: Tensor, padding: int = 0) -> Tensor:
            padded = accelerator.pad_across_processes(values.contiguous(), dim=0, pad_index=padding)
            return accelerator.gather(padded)

        token_row, anchor_row = gather(row[shared], -1), gather(row[anchors], -1)
        self._far = {
            "token_row": token_row[token_row >= 0],
            "token_label": gather(labels[shared])[token_row >= 0],
            "anchor_row": anchor_row[anchor_row >= 0],
            "anchor_label": gather(labels[anchors])[anchor_row >= 0],
            "anchor_state": gather(states[anchors])[anchor_row >= 0],
        }

    def tokens(self, rows: list[int]) -> HeadTokens:
        """Return the tokens of some of this process's responses (indices among all), or of gathered correct ones."""
        states, labels = [], []
        for row in rows:
            here = row - self._groups.first
            if 0 <= here < self._groups.count:
                counted = self._mask[here]
                states.append(self._states[here][counted])
                labels.append(self._labels[here][counted])
            else:
                its = self._far["anchor_row"] == row
                states.append(self._far["anchor_state"][its])
                labels.append(self._far["anchor_label"][its])
        if not rows:
            return HeadTokens(self._states[0, :0], self._labels[0, :0], torch.zeros(0, dtype=torch.int64))
        return HeadTokens(torch.cat(states), torch.cat(labels), torch.tensor([len(ids) for ids in labels]))

    def vocabulary(self, group: range) -> Tensor:
        """Return the distinct token ids of a group's responses, ascending."""
        first, count = self._groups.first, self._groups.count
        here = slice(max(group.start - first, 0), min(group.stop - first, count))
        ids = [self._labels[here][self._mask[here]]]
        if self._far:
            row = self._far["token_row"]
            ids.append(self._far["token_label"][(row >= group.start) & (row < group.stop)])
        return torch.cat(ids).unique()
