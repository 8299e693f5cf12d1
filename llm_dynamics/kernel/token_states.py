"""What meets the LM head at each response token: as plain values, and as a function of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from llm_dynamics.kernel.output_head import BLOCK_BYTES, BLOCK_BYTES_ON_CPU, OutputHead, output_head
from llm_dynamics.kernel.weights import PaddingRows, Weights, at_weights, dual_weights, precise, unpacked
from llm_dynamics.likelihood.head import SplitModel, split_model
from llm_dynamics.likelihood.packing import Layout, TokenizedResponse, batches, lay_out, pack
from llm_dynamics.likelihood.preserve import evaluating, keeping_rope
from llm_dynamics.likelihood.scoring import DEFAULT_BATCH_TOKENS


@dataclass(frozen=True)
class HeadTokens:
    """N response tokens as the LM head sees them, in the order of their responses.

    Attributes:
        hidden: h, the head's input at the position that predicts each token, (N, d).
        labels: y, the tokens, (N,), int64.
        lengths: Tokens of each response, (P,), int64; they sum to N.
    """

    hidden: Tensor
    labels: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        n = len(self.hidden)
        if self.hidden.ndim != 2 or self.labels.shape != (n,) or int(self.lengths.sum()) != n:
            raise ValueError(
                "hidden must be (N, d), labels (N,) and lengths must sum to N; seen "
                f"{tuple(self.hidden.shape)}, {tuple(self.labels.shape)} and a sum of {int(self.lengths.sum())}"
            )

    @property
    def owner(self) -> Tensor:
        """Index of the response that each token belongs to, (N,), int64."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths.cpu())

    def of_response(self, response: int) -> HeadTokens:
        """Return the tokens of one response."""
        stop = int(self.lengths[: response + 1].sum())
        start = stop - int(self.lengths[response])
        return HeadTokens(self.hidden[start:stop], self.labels[start:stop], self.lengths[response : response + 1])


class TokenStates:
    """The map from weights to the head's input at every response token, teacher-forced, in evaluation mode.

    Derivatives are computed as in `derivatives.at_weights`: float32 at least, without autocast, with attention that has
    forward derivatives. The model's weights, modes, gradients and random state are left as they were.

    Args:
        model: A Hugging Face causal LM, PEFT adapters included.
        responses: Prompt and response ids, as for `score_responses`.
        batch_tokens: Most tokens in one forward, padding included.
        split: The model's halves from `split_model`, to save the check.

    Raises:
        ValueError: For no responses, an empty prompt or response, or a token id outside the vocabulary.
        NotImplementedError: For models that cannot be split into backbone and head.
    """

    def __init__(
        self,
        model: nn.Module,
        responses: Sequence[TokenizedResponse],
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        split: SplitModel | None = None,
    ) -> None:
        if split is None:
            with evaluating(model):
                split = split_model(model)
        if split.backbone is None:
            raise NotImplementedError(
                f"the hidden states of {type(split.model).__name__} do not give its logits through a head that is "
                "scaled or capped: llm_dynamics does not know how it post-processes them"
            )
        _check(responses, split.vocab_size)
        self.model, self.split, self.responses = model, split, responses
        self.lengths = torch.tensor([len(response.response_ids) for response in responses])
        self.labels = torch.tensor([token for response in responses for token in response.response_ids])
        longest = max(len(r.prompt_ids) + len(r.response_ids) for r in responses)
        # past the limit, one sequence would change the rotary frequencies of all others in its forward
        self._own_rope = split.rope_limit is not None and longest > split.rope_limit
        starts = [0, *accumulate(self.lengths.tolist())]
        rows = pack(responses, share=split.shares_prompts and not self._own_rope)
        self._layouts: list[Layout] = []
        places: list[Tensor] = []
        for batch in batches(rows, batch_tokens, alone=self._own_rope):
            self._layouts.append(lay_out(responses, batch, "right"))
            places += [torch.arange(starts[i], starts[i + 1]) for row in batch for i in row.responses]
        self._order = torch.cat(places).argsort()

    @property
    def owner(self) -> Tensor:
        """Index of the response that each token belongs to, (N,), int64."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    def values(self) -> HeadTokens:
        """Return the tokens under the model's own weights, in its own precision and the caller's autocast."""
        with evaluating(self.model):
            parts = [self._hidden(layout) for layout in self._layouts]
        hidden = torch.cat(parts)
        return HeadTokens(hidden[self._order.to(hidden.device)], self.labels.to(hidden.device), self.lengths)

    def head_and_values(self, weights: Weights) -> tuple[OutputHead, HeadTokens]:
        """Return the LM head and the tokens at `weights`, in float32 at least."""

        def read() -> tuple[OutputHead, HeadTokens]:
            return output_head(self.split), self.values()

        return at_weights(self.model, {name: precise(value.detach()) for name, value in weights.items()}, read)

    def gradient(
        self, weights: Weights, response: int, objective: Callable[[Tensor], Tensor], *, trained: bool = False
    ) -> dict[str, Tensor]:
        """Return d/d theta of `objective(hidden)`, one forward and backward of one response.

        Args:
            weights: Where to differentiate; the gradient has their names and shapes.
            response: Index of the response.
            objective: Maps its hidden states (L, d) to a scalar; it may call `split.head`.
            trained: Leave out what autograd leaves out in training: the embedding of the padding token.

        Returns:
            The gradient by name, float32 at least; a parameter that the objective does not depend on is missing.
        """
        leaves = {name: precise(value.detach()).requires_grad_() for name, value in weights.items()}
        chosen = self.responses[response]
        (row,) = pack([chosen], share=False)
        layout = lay_out([chosen], [row], "right")

        def run() -> tuple[Tensor | None, ...]:
            with torch.enable_grad():
                value = objective(self._hidden(layout))
            return torch.autograd.grad(value, list(leaves.values()), allow_unused=True)

        with PaddingRows(learn=not trained):
            gradients = at_weights(self.model, leaves, run)
        return {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}

    def jvp(
        self,
        weights: Weights,
        direction: Weights,
        output: Callable[[Tensor], Tensor],
        reduce: Callable[[Tensor], Tensor],
        *,
        trained: bool = False,
    ) -> Tensor:
        """Return `reduce` of the derivative of `output(hidden)` along `direction`, one forward-mode pass.

        Args:
            weights: Where to differentiate.
            direction: Tangent, by names among those of `weights`; a name that is missing counts as zero.
            output: Maps hidden states (n, d) to (n, ...); called on blocks of tokens, so that (n, V) stays bounded.
            reduce: Maps the tangents (n, ...) of a block to the (n, k) that is kept.
            trained: As for `gradient`.

        Returns:
            (N, k), on the CPU, in the order of the responses.
        """

        def tangents(layout: Layout) -> Tensor:
            hidden = self._hidden(layout)
            block_bytes = BLOCK_BYTES_ON_CPU if hidden.device.type == "cpu" else BLOCK_BYTES
            rows = max(1, block_bytes // (hidden.element_size() * self.split.vocab_size))
            kept = []
            for block in hidden.split(rows):
                kept.append(reduce(unpacked(output(block))[1]).cpu())
            return torch.cat(kept)

        with forward_ad.dual_level(), PaddingRows(learn=not trained):
            duals = dual_weights(weights, direction)
            parts = at_weights(self.model, duals, lambda: [tangents(layout) for layout in self._layouts])
        return torch.cat(parts)[self._order]

    def _hidden(self, layout: Layout) -> Tensor:
        with keeping_rope(self.split.model) if self._own_rope else nullcontext():
            states = self.split.hidden_states(layout.rows)
        return states[layout.at_row.to(states.device), layout.at_column.to(states.device)]


def units_of(states: TokenStates) -> Iterator[tuple[int, int]]:
    """Yield (response, place within it) of every response token, in order."""
    for response, length in enumerate(states.lengths.tolist()):
        for place in range(length):
            yield response, place


def trainable_weights(model: nn.Module, weights: Weights | None) -> Weights:
    """Return `weights`, or all parameters of `model` that require a gradient.

    Args:
        model: The model.
        weights: Tensors by parameter name, or None.

    Returns:
        At least one tensor by parameter name.

    Raises:
        ValueError: Where nothing is left to differentiate.
    """
    chosen = weights if weights is not None else {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not chosen:
        raise ValueError(
            f"no weights to differentiate: no parameter of {type(model).__name__} requires a gradient; pass "
            "`weights`, for example dict(model.named_parameters())"
        )
    return chosen


def _check(responses: Sequence[TokenizedResponse], vocab_size: int) -> None:
    if len(responses) == 0:
        raise ValueError("no responses given: there is nothing to compute")
    for i, response in enumerate(responses):
        if not len(response.prompt_ids) or not len(response.response_ids):
            raise ValueError(
                f"response {i} has {len(response.prompt_ids)} prompt and {len(response.response_ids)} response tokens; "
                "both need at least one (the first response token is predicted from the last prompt token)"
            )
        largest = max(*response.prompt_ids, *response.response_ids)
        if largest >= vocab_size:
            raise ValueError(
                f"token id {largest} of response {i} is outside the model's vocabulary of {vocab_size}: was it "
                "tokenised with another model's tokenizer?"
            )
