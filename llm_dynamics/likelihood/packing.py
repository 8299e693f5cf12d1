"""How responses are laid out for a forward: rows of a prompt and its responses, batches of rows, padding.

Responses to one prompt can stand behind one copy of it, told apart by segment numbers from which the attention mask
follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SHARED_ROW_TOKENS = 512
"""Widest row that several responses share: what `split_model` checks; wider rows would cost more attention, too."""


class TokenizedResponse(Protocol):
    """What is scored: the ids of a prompt and of its response (`probes.EncodedProbe` is one)."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """Token ids before the response; at least one."""

    @property
    def response_ids(self) -> Sequence[int]:
        """Token ids of the response; at least one."""


def check_responses(responses: object, name: str) -> None:
    """Check that an argument is a sequence of tokenised responses.

    Raises:
        TypeError: Where it is not, naming it.
    """
    wanted = "give a sequence of tokenised responses, such as `encode_probes` returns"
    if isinstance(responses, str | bytes) or not isinstance(responses, Sequence):
        raise TypeError(f"{name} is a {type(responses).__name__}; {wanted}")
    for index, response in enumerate(responses):
        if not (hasattr(response, "prompt_ids") and hasattr(response, "response_ids")):
            raise TypeError(f"{name}[{index}] is a {type(response).__name__}; {wanted}")


@dataclass(frozen=True)
class TokenRows:
    """B rows of T tokens, each a prompt followed by one or more responses to it, padded on either side.

    Attributes:
        ids: Token ids (B, T), int64.
        positions: Position of each token in its own sequence, prompt and one response, (B, T), int64.
        segments: 0 for the prompt, k for the k-th response, -1 for padding, (B, T), int64.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor

    def to(self, device: torch.device) -> TokenRows:
        """Return the rows on `device`."""
        return TokenRows(self.ids.to(device), self.positions.to(device), self.segments.to(device))

    @property
    def is_packed(self) -> bool:
        """Whether any row holds more than one response."""
        return bool((self.segments > 1).any())

    def visible(self) -> Tensor:
        """Which tokens (last axis) each token attends to: itself and those before it in its own sequence, (B, T, T)."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        order = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (order[:, None] >= order[None, :]) & (key >= 0) & ((key == 0) | (key == query))


def single_row(*segments: list[int]) -> TokenRows:
    """Return one row: a prompt and its responses."""
    prompt, *responses = segments
    places = [list(range(len(prompt))), *(range(len(prompt), len(prompt) + len(r)) for r in responses)]
    return TokenRows(
        ids=torch.tensor([[token for segment in segments for token in segment]]),
        positions=torch.tensor([[place for segment in places for place in segment]]),
        segments=torch.tensor([[k for k, segment in enumerate(segments) for _ in segment]]),
    )


@dataclass(frozen=True)
class Row:
    """A prompt and the responses (by index) that stand behind it in one row of `width` tokens."""

    width: int
    responses: tuple[int, ...]


def pack(responses: Sequence[TokenizedResponse], *, share: bool) -> list[Row]:
    """Group responses to the same prompt into rows, longest row first."""
    if not share:
        rows = [Row(len(r.prompt_ids) + len(r.response_ids), (i,)) for i, r in enumerate(responses)]
        return sorted(rows, key=lambda row: (-row.width, row.responses))
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, r in enumerate(responses):
        groups.setdefault(tuple(r.prompt_ids), []).append(i)
    rows = []
    for prompt, members in groups.items():
        width, row = len(prompt), list[int]()
        for i in sorted(members, key=lambda i: (-len(responses[i].response_ids), i)):
            size = len(responses[i].response_ids)
            if row and width + size > SHARED_ROW_TOKENS:
                rows.append(Row(width, tuple(row)))
                width, row = len(prompt), []
            width += size
            row.append(i)
        rows.append(Row(width, tuple(row)))
    return sorted(rows, key=lambda row: (-row.width, row.responses))


def batches(rows: Sequence[Row], budget: int, *, alone: bool) -> Iterator[Sequence[Row]]:
    """Yield so many rows that rows x widest <= budget (a single row may exceed it)."""
    start = 0
    while start < len(rows):
        count = 1 if alone else max(1, budget // rows[start].width)
        yield rows[start : start + count]
        start += count


@dataclass(frozen=True)
class Layout:
    """A batch of rows, and where its N response tokens are predicted.

    Attributes:
        rows: The tokens of the batch.
        at_row: Row of the position that predicts each response token, (N,), int64.
        at_column: Its column, (N,), int64.
        labels: The response tokens, (N,), int64, in the order of the rows' responses.
    """

    rows: TokenRows
    at_row: Tensor
    at_column: Tensor
    labels: Tensor


def lay_out(responses: Sequence[TokenizedResponse], batch: Sequence[Row], padding_side: str) -> Layout:
    """Write a batch of rows, the widest first, into tensors padded on `padding_side`."""
    width = batch[0].width
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    segments = torch.full_like(ids, -1)
    at_row: list[int] = []
    at_column: list[int] = []
    labels: list[int] = []
    for b, row in enumerate(batch):
        place = width - row.width if padding_side == "left" else 0
        prompt = responses[row.responses[0]].prompt_ids
        last = place + len(prompt) - 1  # the last prompt token predicts the first token of every response
        for k, piece in enumerate([prompt, *(responses[i].response_ids for i in row.responses)]):
            window = slice(place, place + len(piece))
            first = 0 if k == 0 else len(prompt)
            ids[b, window] = torch.tensor(piece)
            positions[b, window] = torch.arange(first, first + len(piece))
            segments[b, window] = k
            if k > 0:
                at_row += [b] * len(piece)
                at_column += [last, *range(place, place + len(piece) - 1)]
                labels += piece
            place += len(piece)
    return Layout(
        TokenRows(ids, positions, segments), torch.tensor(at_row), torch.tensor(at_column), torch.tensor(labels)
    )
