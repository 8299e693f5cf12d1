"""What a row of a kernel is: one response token, a span of tokens, or a whole response.

Gradients add, so a sum of tokens costs one backward, as one token does: cost is linear in rows, not in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llm_dynamics.likelihood.packing import TokenizedResponse, check_responses

Spans = Sequence[Sequence[tuple[int, int]]]
"""For each response, half-open spans (start, stop) of its response tokens; each is one row."""

RowChoice = Literal["tokens", "responses"] | Spans

Coefficients = Tensor | Sequence[Tensor] | Sequence[Sequence[float]]
"""One number per response token: flat over all responses, or one sequence per response."""


@dataclass(frozen=True)
class RowIndex:
    """Where the N rows of one side of a kernel come from.

    Attributes:
        response: Index of the response, (N,), int64, ascending.
        start: First response token of the row, (N,), int64.
        stop: One past its last response token, (N,), int64.
        responses: Number of responses, P or U; one without spans has no row.
    """

    response: Tensor
    start: Tensor
    stop: Tensor
    responses: int

    def __len__(self) -> int:
        return len(self.response)

    def of(self, response: int) -> slice:
        """Return the rows of one response.

        Raises:
            IndexError: For a response that has no row.
        """
        found = (self.response == response).nonzero()[:, 0]
        if not len(found):
            raise IndexError(f"there is no row of response {response}; {self.responses} responses were given")
        return slice(int(found[0]), int(found[-1]) + 1)


@dataclass(frozen=True)
class ResponseRows:
    """One response and the R rows that are asked of it.

    Attributes:
        ids: Prompt and response ids.
        prompt_length: Number of prompt ids.
        spans: Response tokens of each row, half-open.
        weights: Factor of each response token's log-prob in its rows.
        first: Number of its first row in the kernel.
    """

    ids: tuple[int, ...]
    prompt_length: int
    spans: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    first: int


def select_rows(
    responses: Sequence[TokenizedResponse],
    choice: RowChoice,
    vocab_size: int,
    *,
    side: str,
    coefficients: Coefficients | None = None,
) -> tuple[list[ResponseRows], RowIndex]:
    """Read a choice of rows.

    Args:
        responses: Prompt and response ids.
        choice: "tokens", "responses", or spans for each response.
        vocab_size: V; larger ids are refused.
        side: What the responses are called in messages.
        coefficients: Factor of each response token; None: 1.

    Returns:
        The rows of each response, and the index of all rows.

    Raises:
        TypeError: Where `responses` are no tokenised responses.
        ValueError: For no responses, empty ones, ids outside the vocabulary, spans outside the response, or a wrong
            number of coefficients.
    """
    check_responses(responses, side)
    if not len(responses):
        raise ValueError(f"{side} is empty: there is nothing to take a kernel of")
    if isinstance(choice, str) and choice not in ("tokens", "responses"):
        raise ValueError(f'{side}_rows is {choice!r}; allowed: "tokens", "responses", or spans for each response')
    if not isinstance(choice, str) and len(choice) != len(responses):
        raise ValueError(f"{side}_rows has spans for {len(choice)} responses, but {side} holds {len(responses)}")
    lengths = [len(r.response_ids) for r in responses]
    weights = None if coefficients is None else split_coefficients(coefficients, lengths)
    rows: list[ResponseRows] = []
    index: list[tuple[int, int, int]] = []
    for i, (response, length) in enumerate(zip(responses, lengths, strict=True)):
        if not len(response.prompt_ids) or not length:
            raise ValueError(
                f"{side}[{i}] has {len(response.prompt_ids)} prompt and {length} response tokens; both need at least "
                "one (the first response token is predicted from the last prompt token)"
            )
        ids = (*response.prompt_ids, *response.response_ids)
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ValueError(
                f"{side}[{i}] has token ids from {min(ids)} to {max(ids)}, outside the model's vocabulary of "
                f"{vocab_size}: was it tokenised with another model's tokenizer?"
            )
        spans = _spans(choice, i, length, side)
        own = (1.0,) * length if weights is None else tuple(weights[i].tolist())
        rows.append(ResponseRows(ids, len(response.prompt_ids), spans, own, first=len(index)))
        index += [(i, start, stop) for start, stop in spans]
    if not index:
        raise ValueError(f"{side}_rows holds no span at all")
    response_of, start, stop = torch.tensor(index).T
    return rows, RowIndex(response_of, start, stop, len(responses))


def split_coefficients(coefficients: Coefficients, lengths: Sequence[int]) -> list[Tensor]:
    """Return one float64 tensor per response of the given lengths.

    Raises:
        ValueError: Where the numbers do not fit the lengths.
    """
    if isinstance(coefficients, Tensor):
        if coefficients.dim() != 1 or len(coefficients) != sum(lengths):
            raise ValueError(f"coefficients have shape {tuple(coefficients.shape)}; needed: ({sum(lengths)},)")
        return list(coefficients.detach().cpu().double().split(list(lengths)))
    parts = [torch.as_tensor(part).detach().cpu().double() for part in coefficients]
    seen = [tuple(part.shape) for part in parts]
    if seen != [(length,) for length in lengths]:
        raise ValueError(f"coefficients have shapes {seen}; needed, one per response: {[(n,) for n in lengths]}")
    return parts


def _spans(choice: RowChoice, i: int, length: int, side: str) -> tuple[tuple[int, int], ...]:
    if choice == "tokens":
        return tuple((token, token + 1) for token in range(length))
    if choice == "responses":
        return ((0, length),)
    spans = tuple((int(start), int(stop)) for start, stop in choice[i])
    for start, stop in spans:
        if not 0 <= start < stop <= length:
            raise ValueError(
                f"{side}_rows[{i}] has the span ({start}, {stop}); needed: 0 <= start < stop <= {length}, the number "
                "of response tokens"
            )
    return spans
