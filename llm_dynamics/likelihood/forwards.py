"""The forwards that scoring takes: which responses go together, and what the head needs of each batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from llm_dynamics.likelihood.head import SplitModel
from llm_dynamics.likelihood.packing import Row, TokenizedResponse, batches, lay_out, pack, single_row
from llm_dynamics.likelihood.preserve import evaluating
from llm_dynamics.likelihood.sharded import gathered

Autocast = Callable[[], AbstractContextManager[object]]
"""Makes a context for forwards, such as `accelerator.autocast`."""

DEFAULT_BATCH_TOKENS = 2048


def count_forwards(
    split: SplitModel, responses: Sequence[TokenizedResponse], batch_tokens: int = DEFAULT_BATCH_TOKENS
) -> int:
    """Return how many forwards `score_responses` takes for some responses, so that processes can agree on a number."""
    return len(plan(responses, split, batch_tokens, share_prompts=True)) if responses else 0


def idle_forwards(model: nn.Module, split: SplitModel, count: int, autocast: Autocast | None = None) -> None:
    """Take part in `count` forwards of a sharded model, on a process that has nothing to score.

    Args:
        model: The model.
        split: Its halves.
        count: What the other processes give as `forwards`.
        autocast: As for `score_responses`.
    """
    with evaluating(model), gathered(split.model):
        run_idle(split, count, autocast)


def run_idle(split: SplitModel, count: int, autocast: Autocast | None) -> None:
    """Run `count` forwards over two tokens; the caller has gathered what is sharded."""
    rows = single_row([0, 0])
    for _ in range(count):
        with (autocast or nullcontext)():
            _ = split.logits(rows) if split.backbone is None else split.hidden_states(rows)


def plan(
    responses: Sequence[TokenizedResponse], split: SplitModel, batch_tokens: int, share_prompts: bool
) -> list[list[Row]]:
    """Return the batches of rows that responses are scored in."""
    own_rope = sees_own_rope(responses, split)
    rows = pack(responses, share=share_prompts and split.shares_prompts and not own_rope)
    return [list(batch) for batch in batches(rows, batch_tokens, alone=split.backbone is None or own_rope)]


def sees_own_rope(responses: Sequence[TokenizedResponse], split: SplitModel) -> bool:
    """Tell whether some sequence would change the rotary frequencies of all others in its forward, and after it."""
    longest = max(len(response.prompt_ids) + len(response.response_ids) for response in responses)
    return split.rope_limit is not None and longest > split.rope_limit


def response_states(
    split: SplitModel,
    responses: Sequence[TokenizedResponse],
    batch: Sequence[Row],
    padding_side: str,
    autocast: Autocast | None,
    *,
    alone: bool,
) -> tuple[Tensor, Tensor]:
    """Return what the head needs at every response token of a batch of rows, and the labels (N,).

    The first is the hidden states (N, d) or, for a model without a usable split, its logits (N, V). With `alone`, a
    batch with NaN is taken again response by response, at the price of forwards that other processes do not run.
    """
    laid = lay_out(responses, batch, padding_side)
    with (autocast or nullcontext)():
        states = split.logits(laid.rows) if split.backbone is None else split.hidden_states(laid.rows)
    states = states[laid.at_row.to(states.device), laid.at_column.to(states.device)]
    single = [
        Row(len(responses[i].prompt_ids) + len(responses[i].response_ids), (i,)) for row in batch for i in row.responses
    ]
    if alone and len(single) > 1 and not states.isfinite().all():
        # a NaN reaches even what may not attend to it, since zero attention times NaN is NaN: by itself, each
        # response shows its own
        parts = [response_states(split, responses, [row], padding_side, autocast, alone=True)[0] for row in single]
        states = torch.cat(parts)
    return states, laid.labels
