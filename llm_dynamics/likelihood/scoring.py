"""How likely is every response now? Teacher-forced statistics of each response token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llm_dynamics.likelihood.forwards import DEFAULT_BATCH_TOKENS as DEFAULT_BATCH_TOKENS
from llm_dynamics.likelihood.forwards import Autocast, plan, response_states, run_idle, sees_own_rope
from llm_dynamics.likelihood.head import SplitModel, split_model
from llm_dynamics.likelihood.packing import TokenizedResponse, check_responses
from llm_dynamics.likelihood.preserve import adapter_off, evaluating, has_adapter, keeping_rope
from llm_dynamics.likelihood.sharded import gathered, is_sharded
from llm_dynamics.likelihood.squeezing import SqueezingStats, squeezing_stats

DEFAULT_CHUNK = 128
STATISTICS_ROWS_ON_CPU = 16
"""Rows of logits whose statistics are taken at a time on a CPU: work buffers then stay in cache (3x faster)."""


@dataclass(frozen=True)
class TokenScores:
    """Statistics of N response tokens, in the order of the probes; every field is (N,), on the CPU.

    All are taken under the model at temperature 1, at the token's own prefix: the prompt and the probe's own response
    up to this token. Floats are float32, or float64 for a float64 model; log-probs and entropy in nats.

    Attributes:
        token_id: y_m, int64.
        logp: log pi(y_m).
        entropy: H(pi_m) = - sum_v pi_v log pi_v.
        greedy_id: argmax_v pi_v, int64; -1 where the model gave NaN.
        greedy_logp: max_v log pi_v.
        other_logp: log pi(y*), y* = `squeezing.other_id`, the most likely token other than y_m.
        rank: 1 + number of tokens more likely than y_m, int64; -1 where the model gave NaN.
        squeezing: Statistics of a negative step on y_m.
    """

    token_id: Tensor
    logp: Tensor
    entropy: Tensor
    greedy_id: Tensor
    greedy_logp: Tensor
    other_logp: Tensor
    rank: Tensor
    squeezing: SqueezingStats

    @property
    def finite(self) -> Tensor:
        """Whether log-prob and entropy are finite numbers, (N,), bool."""
        return self.logp.isfinite() & self.entropy.isfinite()


@dataclass(frozen=True)
class ResponseScores:
    """Scores of P responses.

    Attributes:
        lengths: M of each response, (P,), int64.
        tokens: Statistics of all response tokens, the first response's first; N = lengths.sum().
        ref_logp: log pi_ref(y_m), (N,), where a reference was given.
    """

    lengths: Tensor
    tokens: TokenScores
    ref_logp: Tensor | None = None

    def sum_by_response(self, values: Tensor) -> Tensor:
        """Sum a token statistic (N,) over each response: (P,), float64; a NaN or infinity stays visible."""
        owner = torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)
        return torch.zeros(len(self.lengths), dtype=torch.float64).index_add_(0, owner, values.double())

    @property
    def logp_sum(self) -> Tensor:
        """Log pi(y | x) = sum_m log pi(y_m), nats, (P,), float64."""
        return self.sum_by_response(self.tokens.logp)


def score_responses(
    model: nn.Module,
    responses: Sequence[TokenizedResponse],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    chunk: int = DEFAULT_CHUNK,
    padding_side: str = "right",
    share_prompts: bool = True,
    squeeze_strength: float = 1.0,
    reference: nn.Module | Literal["adapter_off"] | None = None,
    autocast: Autocast | None = None,
    split: SplitModel | None = None,
    forwards: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ResponseScores:
    """Score every response token under `model`: teacher-forced, no gradient.

    Only positions that predict a response token meet the LM head, `chunk` of them at a time, so that one float32 block
    of `chunk * V` logits is alive, with at most three work buffers of its size. The model's modes and the random state
    are left as they were, also after an error.

    Args:
        model: Any Hugging Face causal LM (PEFT weight adapters, DDP and TRL's fused head included).
        responses: Prompt and response ids, P of them; both non-empty.
        batch_tokens: Most tokens in one forward, padding included; a longer sequence goes alone. Sequences are sorted
            by length first.
        chunk: Positions that meet the LM head at a time.
        padding_side: "right" or "left". The numbers do not depend on it.
        share_prompts: Let responses to the same prompt stand behind one copy of it, kept apart by the attention mask,
            where the model is seen to allow it; saves most of the forward when many families share a prompt. The
            numbers do not depend on it.
        squeeze_strength: e of the negative step in `squeezing_stats`.
        reference: Model whose label log-probs stand beside (`ref_logp`): another model, or "adapter_off" for a PEFT
            model without its adapter. None: none.
        autocast: Makes the context of the forwards, such as `trainer.accelerator.autocast`; log-softmax is outside it.
            None: the weights' own precision.
        split: The model's halves from `split_model`, to save the check on repeated calls.
        forwards: Of a sharded model, run this many forwards, as all processes must (see `count_forwards`).
        on_progress: Called after every forward with the number of responses it scored.

    Returns:
        The scores, in the order of `responses`, on the CPU.

    Raises:
        ValueError: For no responses, an empty prompt or response, a token id outside the vocabulary, or arguments out
            of range.
        TypeError: Where `model` is no module or `responses` are no tokenised responses.
        NotImplementedError: For models that cannot be scored, see `split_model`.

    Example:
        >>> scores = score_responses(model, encode_probes(probes, tokenizer))  # doctest: +SKIP
        >>> scores.logp_sum  # nats per response  # doctest: +SKIP
    """
    if reference is not None and not isinstance(reference, nn.Module):
        if reference != "adapter_off":
            raise ValueError(f'reference is {reference!r}; allowed: a model, "adapter_off", None')
        if not has_adapter(model):
            raise ValueError(f'reference="adapter_off" needs a model with an adapter; seen {type(model).__name__}')
    columns = _score(
        model,
        responses,
        lambda logits, labels: _flatten(_token_scores(logits, labels, squeeze_strength)),
        batch_tokens=batch_tokens,
        chunk=chunk,
        padding_side=padding_side,
        share_prompts=share_prompts,
        autocast=autocast,
        split=split,
        forwards=forwards,
        on_progress=on_progress,
    )
    ref_logp = None
    if reference is not None:
        options: dict[str, Any] = {
            "batch_tokens": batch_tokens,
            "chunk": chunk,
            "autocast": autocast,
            "forwards": forwards,
        }
        if isinstance(reference, nn.Module):
            ref_logp = score_logps(reference, responses, **options)
        else:
            with adapter_off(model):
                ref_logp = score_logps(model, responses, **options)
    return ResponseScores(torch.tensor([len(r.response_ids) for r in responses]), _unflatten(columns), ref_logp)


def score_logps(
    model: nn.Module,
    responses: Sequence[TokenizedResponse],
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    chunk: int = DEFAULT_CHUNK,
    autocast: Autocast | None = None,
    split: SplitModel | None = None,
    forwards: int | None = None,
) -> Tensor:
    """Score label log-probs only, as `score_responses` does: what a reference model is asked for.

    Args:
        model: As for `score_responses`; for a PEFT model's base, call it inside `model.disable_adapter()`.
        responses: As for `score_responses`.
        batch_tokens: As for `score_responses`.
        chunk: As for `score_responses`.
        autocast: As for `score_responses`.
        split: As for `score_responses`.
        forwards: As for `score_responses`.

    Returns:
        log pi(y_m), nats, (N,), all response tokens in the order of `responses`, on the CPU.

    Raises:
        ValueError: As for `score_responses`.
        NotImplementedError: As for `score_responses`.
    """
    (logp,) = _score(
        model,
        responses,
        _label_logps,
        batch_tokens=batch_tokens,
        chunk=chunk,
        autocast=autocast,
        split=split,
        forwards=forwards,
    )
    return logp


def _score(
    model: nn.Module,
    responses: Sequence[TokenizedResponse],
    statistics: Callable[[Tensor, Tensor], list[Tensor]],
    *,
    batch_tokens: int,
    chunk: int,
    padding_side: str = "right",
    share_prompts: bool = True,
    autocast: Autocast | None,
    split: SplitModel | None = None,
    forwards: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Apply `statistics` (logits (n, V) it may overwrite, labels (n,) -> columns (n,)) to every response token.

    Returns:
        The columns over all N tokens in the order of `responses`, on the CPU.
    """
    _check(responses, batch_tokens, chunk, padding_side)
    lengths = [len(r.response_ids) for r in responses]
    starts = [0, *accumulate(lengths)]
    scored: list[list[Tensor]] = []
    places: list[int] = []
    with evaluating(model):
        sharded = is_sharded(model)
        with (autocast or nullcontext)():
            split = split or split_model(model)
        _check_fit(responses, split)
        planned = plan(responses, split, batch_tokens, share_prompts)
        own_rope = sees_own_rope(responses, split)
    with evaluating(model), gathered(split.model):
        for batch in planned:
            with keeping_rope(split.model) if own_rope else nullcontext():
                states, labels = response_states(split, responses, batch, padding_side, autocast, alone=not sharded)
            for block, ids in zip(states.split(chunk), labels.split(chunk), strict=True):
                logits = _logits(split, block, autocast)
                rows_at_once = STATISTICS_ROWS_ON_CPU if logits.device.type == "cpu" else chunk
                for some, labels_of_some in zip(
                    logits.split(rows_at_once), ids.to(logits.device).split(rows_at_once), strict=True
                ):
                    scored.append(statistics(some, labels_of_some))
            scored_here = [i for row in batch for i in row.responses]
            places.extend(place for i in scored_here for place in range(starts[i], starts[i + 1]))
            if on_progress is not None:
                on_progress(len(scored_here))
        run_idle(split, (forwards or 0) - len(planned), autocast)
    order = torch.tensor(places).argsort()
    return [torch.cat(column).cpu()[order] for column in zip(*scored, strict=True)]


def _check(responses: Sequence[TokenizedResponse], batch_tokens: int, chunk: int, padding_side: str) -> None:
    check_responses(responses, "responses")
    if len(responses) == 0:
        raise ValueError("there is nothing to score: no responses given")
    if batch_tokens < 1 or chunk < 1:
        raise ValueError(f"batch_tokens and chunk must be at least 1; seen {batch_tokens} and {chunk}")
    if padding_side not in ("left", "right"):
        raise ValueError(f'padding_side is {padding_side!r}; allowed: "left", "right"')
    for i, response in enumerate(responses):
        if not len(response.prompt_ids) or not len(response.response_ids):
            raise ValueError(
                f"response {i} has {len(response.prompt_ids)} prompt and {len(response.response_ids)} response tokens; "
                "both need at least one (the first response token is predicted from the last prompt token)"
            )


def _check_fit(responses: Sequence[TokenizedResponse], split: SplitModel) -> None:
    for i, response in enumerate(responses):
        reason = split.misfit([*response.prompt_ids, *response.response_ids])
        if reason is not None:
            raise ValueError(
                f"response {i}: {reason}; was it tokenised with another model's tokenizer, or not truncated?"
            )


def _logits(split: SplitModel, states: Tensor, autocast: Autocast | None) -> Tensor:
    if split.backbone is None:
        return states if states.dtype == torch.float64 else states.float()
    with (autocast or nullcontext)():
        return split.head(states)


def _label_logps(logits: Tensor, labels: Tensor) -> list[Tensor]:
    return [logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(dim=1)]


def _token_scores(logits: Tensor, labels: Tensor, strength: float) -> TokenScores:
    logp = logits.sub_(logits.logsumexp(dim=1, keepdim=True))
    label_logp = logp.gather(1, labels[:, None])[:, 0]
    greedy_logp, greedy_id = logp.max(dim=1)
    squeezing = squeezing_stats(logp, labels, strength=strength)
    broken = squeezing.other_id < 0
    other_logp = logp.gather(1, squeezing.other_id.clamp(min=0)[:, None])[:, 0]
    rank = 1 + (logp > label_logp[:, None]).sum(dim=1)
    entropy = -torch.linalg.vecdot(logp.exp(), logp)
    impossible = entropy.isnan() & ~broken  # 0 * -inf: a token of probability zero adds nothing to the entropy
    if impossible.any():
        entropy[impossible] = torch.special.entr(logp[impossible].exp()).sum(dim=1)
    return TokenScores(
        token_id=labels,
        logp=label_logp,
        entropy=entropy,
        greedy_id=greedy_id.masked_fill(broken, -1),
        greedy_logp=greedy_logp,
        other_logp=torch.where(broken, torch.nan, other_logp),
        rank=rank.masked_fill(broken, -1),
        squeezing=squeezing,
    )


_COLUMNS = [field.name for field in fields(TokenScores) if field.name != "squeezing"]
_SQUEEZING_COLUMNS = [field.name for field in fields(SqueezingStats)]


def _flatten(scores: TokenScores) -> list[Tensor]:
    return [getattr(scores, name) for name in _COLUMNS] + [
        getattr(scores.squeezing, name) for name in _SQUEEZING_COLUMNS
    ]


def _unflatten(columns: Sequence[Tensor]) -> TokenScores:
    n = len(_COLUMNS)
    squeezing = SqueezingStats(**dict(zip(_SQUEEZING_COLUMNS, columns[n:], strict=True)))
    return TokenScores(**dict(zip(_COLUMNS, columns[:n], strict=True)), squeezing=squeezing)
