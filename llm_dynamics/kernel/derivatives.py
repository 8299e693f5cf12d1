"""Response log-probs as a function of the weights: values, directional derivatives and gradients at any weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from llm_dynamics.kernel.weights import (
    PaddingRows,
    Weights,
    at_weights,
    dual_weights,
    precise,
    unpacked,
    unshared,
)
from llm_dynamics.likelihood.head import SplitModel, split_model
from llm_dynamics.likelihood.packing import Layout, TokenizedResponse, batches, lay_out, pack
from llm_dynamics.likelihood.preserve import evaluating, keeping_rope
from llm_dynamics.likelihood.scoring import DEFAULT_BATCH_TOKENS

_Read = Callable[[Layout, Tensor], Tensor]
"""From a batch, and the indices of its tokens among all, to one row per token it reads."""

_LOGITS_BYTES = 2**28
"""Bytes of float32 logits alive at a time where nothing needs to be kept for a backward pass."""


class ResponseLogps:
    """The map from weights to the log-probs of fixed responses, teacher-forced, in evaluation mode.

    With `theta` the given weights (all others stay as the model has them) and m running over all N response tokens:
    `values` is log pi_theta(y_m), `jvp` is <d log pi_theta(y_m)/d theta, u>, `gradient` is d/d theta of
    sum_m w_m log pi_theta(y_m). Computed in float32 at least (weights of lower precision are converted for the call),
    without autocast, with attention that has forward derivatives. The model's weights, modes, gradients and random
    state are left as they were.

    Args:
        model: A Hugging Face causal LM, PEFT adapters included; not wrapped in DDP.
        responses: Prompt and response ids, as for `score_responses`.
        batch_tokens: Most tokens in one forward, padding included.
        share_prompts: Let responses to one prompt stand behind one copy of it, where the model allows it.
        split: The model's halves from `split_model`, to save the check.

    Raises:
        ValueError: For no responses.
        NotImplementedError: For models that cannot be scored, see `split_model`.

    Example:
        >>> logps = ResponseLogps(model, encode_probes(probes, tokenizer))  # doctest: +SKIP
        >>> values, change = logps.jvp(weights, update)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        responses: Sequence[TokenizedResponse],
        *,
        batch_tokens: int = DEFAULT_BATCH_TOKENS,
        share_prompts: bool = True,
        split: SplitModel | None = None,
    ) -> None:
        if len(responses) == 0:
            raise ValueError("no responses given: there is nothing to differentiate")
        self.model = model
        self.responses = responses
        self._batch_tokens = batch_tokens
        if split is None:
            with evaluating(model):
                split = split_model(model)
        self.split = split
        self.lengths = torch.tensor([len(response.response_ids) for response in responses])
        # past the limit, one sequence would change the rotary frequencies of all others in its forward, and after it
        longest = max(len(response.prompt_ids) + len(response.response_ids) for response in responses)
        self._own_rope = split.rope_limit is not None and longest > split.rope_limit
        rows = pack(responses, share=share_prompts and split.shares_prompts and not self._own_rope)
        starts = [0, *accumulate(self.lengths.tolist())]
        self._layouts: list[Layout] = []
        self._places: list[Tensor] = []
        for batch in batches(rows, batch_tokens, alone=split.backbone is None or self._own_rope):
            self._layouts.append(lay_out(responses, batch, "right"))
            scored = [i for row in batch for i in row.responses]
            self._places.append(torch.cat([torch.arange(starts[i], starts[i + 1]) for i in scored]))

    @property
    def n_tokens(self) -> int:
        """N, response tokens of all responses."""
        return int(self.lengths.sum())

    @property
    def owner(self) -> Tensor:
        """Index of the response that each token belongs to, (N,), int64."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)

    def values(self, weights: Weights) -> Tensor:
        """Return log pi(y_m) at `weights`, nats, (N,), on the CPU, in the order of the responses."""
        return self._gather(self._at(weights, self._label_logps), self._places)

    def jvp(self, weights: Weights, direction: Weights) -> tuple[Tensor, Tensor]:
        """Return the log-probs and their derivative along `direction`, one forward-mode pass.

        Args:
            weights: Where to differentiate.
            direction: u, by names among those of `weights`; a name that is missing counts as zero.

        Returns:
            log pi(y_m), nats, and <d log pi(y_m)/d theta, u>, each (N,), on the CPU.
        """
        return self._dual(weights, direction, self._label_logps, self._places)

    def distributions(self, weights: Weights, tokens: Tensor) -> Tensor:
        """Return log pi(. | prefix of y_m), nats, (n, V), on the CPU, at the n response tokens with index `tokens`.

        Raises:
            ValueError: For indices that repeat or are out of range.
        """
        read, places = self._reading(tokens)
        return self._gather(self._at(weights, read), places)

    def jvp_distributions(self, weights: Weights, direction: Weights, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return `distributions` and their derivative along `direction`, each (n, V); as `jvp`."""
        read, places = self._reading(tokens)
        return self._dual(weights, direction, read, places)

    def gradient(self, weights: Weights, token_weights: Tensor) -> dict[str, Tensor]:
        """Return d/d theta of sum_m w_m log pi(y_m), one forward and backward of the responses with some w_m != 0.

        Args:
            weights: Where to differentiate; the gradient has their names and shapes.
            token_weights: w, (N,).

        Returns:
            The gradient by name, float32 at least; zero where the log-probs do not depend on a parameter.
        """
        asked = set(self.owner[token_weights != 0].tolist())
        if 0 < len(asked) < len(self.responses):
            # rows are shared by responses to one prompt: those with no weight would run along
            some = self.subset([self.responses[i] for i in sorted(asked)], self._batch_tokens)
            return some.gradient(weights, token_weights[torch.isin(self.owner, torch.tensor(sorted(asked)))])
        leaves = {name: precise(value.detach()).requires_grad_() for name, value in weights.items()}
        total: dict[str, Tensor] = {}

        def add_batch(layout: Layout, weight: Tensor) -> None:
            with torch.enable_grad():
                logps = _label_logps(self.split, layout, in_blocks=False)
                objective = (logps * weight.to(logps)).sum()
            gradients = unshared(torch.autograd.grad(objective, list(leaves.values()), allow_unused=True))
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    total[name] = total[name].add_(gradient) if name in total else gradient

        def run() -> None:
            for layout, places in zip(self._layouts, self._places, strict=True):
                if (token_weights[places] != 0).any():  # none has where all weights are zero
                    with keeping_rope(self.split.model) if self._own_rope else nullcontext():
                        add_batch(layout, token_weights[places])

        with PaddingRows(learn=True):
            at_weights(self.model, leaves, run)
        return {name: total[name] if name in total else torch.zeros_like(leaf) for name, leaf in leaves.items()}

    def subset(self, responses: Sequence[TokenizedResponse], batch_tokens: int = DEFAULT_BATCH_TOKENS) -> ResponseLogps:
        """Return the map of other responses under the same model."""
        return ResponseLogps(self.model, responses, batch_tokens=batch_tokens, split=self.split)

    def _label_logps(self, layout: Layout, places: Tensor) -> Tensor:
        return _label_logps(self.split, layout, in_blocks=True)

    def _reading(self, tokens: Tensor) -> tuple[_Read, list[Tensor]]:
        """Return what reads the distributions at `tokens`, and the place of each row it reads among `tokens`.

        Raises:
            ValueError: For indices that repeat or are out of range.
        """
        if len(tokens.unique()) != len(tokens) or ((tokens < 0) | (tokens >= self.n_tokens)).any():
            raise ValueError(f"tokens must be distinct indices in 0..{self.n_tokens - 1}; seen {tokens.tolist()}")
        rank = torch.full((self.n_tokens,), -1).index_put((tokens,), torch.arange(len(tokens)))
        wanted = [rank[places] for places in self._places]

        def read(layout: Layout, places: Tensor) -> Tensor:
            logits = _logits(self.split, _states(self.split, layout)[rank[places] >= 0])
            return logits.log_softmax(dim=1)

        return read, [ranks[ranks >= 0] for ranks in wanted]

    def _at(self, weights: Weights, read: _Read) -> list[Any]:
        batches_of_tokens = list(zip(self._layouts, self._places, strict=True))
        return at_weights(self.model, weights, lambda: [self._alone(read, *batch) for batch in batches_of_tokens])

    def _alone(self, read: _Read, layout: Layout, places: Tensor) -> Any:
        with keeping_rope(self.split.model) if self._own_rope else nullcontext():
            return read(layout, places)

    def _dual(
        self, weights: Weights, direction: Weights, read: _Read, places: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        with forward_ad.dual_level():
            dual = dual_weights(weights, direction)
            pairs = self._at(dual, lambda layout, at: unpacked(read(layout, at)))  # type: ignore[arg-type, return-value]
        values, tangents = zip(*pairs, strict=True)
        return self._gather(values, places), self._gather(tangents, places)

    @staticmethod
    def _gather(parts: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.cpu() for part in parts])[torch.cat(list(places)).argsort()]


def _states(split: SplitModel, layout: Layout) -> Tensor:
    """Return what the head needs at a batch's response tokens: hidden states (N, d), or logits (N, V) with no split."""
    states = split.logits(layout.rows) if split.backbone is None else split.hidden_states(layout.rows)
    return states[layout.at_row.to(states.device), layout.at_column.to(states.device)]


def _logits(split: SplitModel, states: Tensor) -> Tensor:
    return precise(states) if split.backbone is None else split.head(states)


def _label_logps(split: SplitModel, layout: Layout, *, in_blocks: bool) -> Tensor:
    """Return log pi(y_m) of a batch's response tokens, (N,), differentiable in every mode."""
    states = _states(split, layout)
    labels = layout.labels.to(states.device)
    block = max(1, _LOGITS_BYTES // (4 * split.vocab_size)) if in_blocks else len(labels)
    logps = []
    for some, ids in zip(states.split(block), labels.split(block), strict=True):
        logits = _logits(split, some)
        logps.append(logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(dim=1))
    return torch.cat(logps)
