"""The two halves of a causal language model: the backbone, and the head that turns hidden states into logits.

Scoring needs them apart, so that only response positions meet the vocabulary. How a model post-processes its logits
(scale, soft-capping) is a convention of each architecture; the split is therefore checked against the model's own
forward before it is used.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llm_dynamics.likelihood.packing import SHARED_ROW_TOKENS, TokenRows, single_row
from llm_dynamics.likelihood.preserve import active_adapters
from llm_dynamics.likelihood.sharded import gathered, partitions_gathered

logger = logging.getLogger(__name__)

_HEAD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float16: 0.002}
_CHECKED_LENGTH = 8
_CHECK_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class SplitModel:
    """A causal LM as backbone and head.

    Attributes:
        model: The Hugging Face model, unwrapped from PEFT and from parallel wrappers.
        backbone: Maps token ids (B, T) to hidden states (B, T, d); None where the split does not reproduce the
            model's own logits, and whole forwards are used in its place.
        scale: Factor on the logits.
        softcap: Cap c of `c tanh(z / c)`, or None.
        takes_positions: Whether the model accepts `position_ids`.
        shares_prompts: Whether several responses can stand behind one copy of their prompt in a row, kept apart by a
            four-dimensional attention mask; checked on a row of the width in use.
        rope_limit: Longest sequence whose rotary frequencies do not depend on its length; None: all.
        max_positions: Longest sequence that the model has positions for, where they come from a table; None: no end.
    """

    model: nn.Module
    backbone: nn.Module | None
    scale: float
    softcap: float | None
    takes_positions: bool
    shares_prompts: bool = False
    rope_limit: int | None = None
    max_positions: int | None = None

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings, where token ids must lie."""
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator]
        return weight.device

    @property
    def vocab_size(self) -> int:
        """V, the number of logits."""
        weight: Tensor = self.model.get_output_embeddings().weight  # type: ignore[operator]
        return int(getattr(weight, "ds_shape", weight.shape)[0])  # ZeRO-3 leaves an empty tensor in its place

    def misfit(self, ids: Sequence[int]) -> str | None:
        """Say why the model cannot read a sequence: ids that it does not have, or no positions; None where it can."""
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator]
        known = min(self.vocab_size, int(getattr(weight, "ds_shape", weight.shape)[0]))
        if not 0 <= min(ids) <= max(ids) < known:
            wrong = max(ids) if max(ids) >= known else min(ids)
            return f"token id {wrong} is outside the model's vocabulary of {known}"
        if self.max_positions is not None and len(ids) > self.max_positions:
            return f"it is longer than the {self.max_positions} positions of the model"
        return None

    def hidden_states(self, rows: TokenRows) -> Tensor:
        """Run the backbone on B rows of T tokens: the head's input (B, T, d)."""
        assert self.backbone is not None, "a model without a usable split has only `logits`"
        return self.backbone(**self._inputs(rows)).last_hidden_state

    def logits(self, rows: TokenRows) -> Tensor:
        """Run the model's own forward on B rows of T tokens: logits (B, T, V)."""
        return self.model(**self._inputs(rows)).logits

    def head(self, hidden: Tensor) -> Tensor:
        """Turn hidden states (N, d) into logits (N, V), float32 at least; scaled and capped as the model does."""
        lm_head = self.model.get_output_embeddings()  # type: ignore[operator]
        logits = lm_head(hidden.to(lm_head.weight.device))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if logits.dtype == torch.float64 else logits.float()

    def _inputs(self, rows: TokenRows) -> dict[str, Any]:
        rows = rows.to(self.device)
        inputs: dict[str, Any] = {"input_ids": rows.ids, "use_cache": False}
        if self.takes_positions:
            # without them a left-padded row would be scored at shifted positions
            inputs["position_ids"] = rows.positions
        if rows.is_packed:
            weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator]
            hidden = ~rows.visible()[:, None]  # (B, 1, T, T)
            # additive and finite: understood by eager and SDPA attention alike, and no NaN where a row is all padding
            mask = torch.zeros_like(hidden, dtype=weight.dtype)
            inputs["attention_mask"] = mask.masked_fill_(hidden, torch.finfo(weight.dtype).min)
        else:
            inputs["attention_mask"] = (rows.segments >= 0).long()
        return inputs


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside DDP, DeepSpeed, `torch.compile` and PEFT wrappers.

    Raises:
        NotImplementedError: For PEFT methods that change the input rather than the weights (prompt learning).
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__module__.startswith("deepspeed."):  # an engine, such as TRL makes of a reference model
            model = model.module  # type: ignore[assignment]
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            config = model.peft_config[active_adapters(model)[0]]  # type: ignore[index]
            if getattr(config, "is_prompt_learning", False):
                raise NotImplementedError(
                    f"{type(config).__name__} is a prompt-learning adapter: it prepends virtual tokens, which are not "
                    "part of any response. Adapters that change weights (LoRA, DoRA, IA3, VeRA...) can be scored."
                )
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


_SAID: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that were warned of: they are split at attach and again when training begins."""


def split_model(model: nn.Module) -> SplitModel:
    """Split a causal LM into backbone and head, and check the split on a short input, given as plain token ids.

    Args:
        model: Any Hugging Face causal LM, with or without PEFT, DDP, `torch.compile` or TRL's fused head. It should be
            in evaluation mode and under `torch.no_grad()`; its mode is left alone.

    Returns:
        The split. Where it does not reproduce the logits of the plain forward (an architecture that post-processes
        them, or numbers its positions otherwise), `backbone` is None and a warning names the model: whole forwards are
        then used, one sequence at a time, which is slower and right.

    Raises:
        NotImplementedError: For encoder-decoder models, prompt-learning adapters, models without an LM head or whose
            weights are not loaded, and those whose logits see later tokens.
    """
    base = unwrap_model(model)
    empty = next((name for name, weight in base.named_parameters() if weight.device.type == "meta"), None)
    if empty is not None:
        raise NotImplementedError(
            f"{type(base).__name__} is not loaded: {empty} is on the meta device (built without its weights, or "
            "offloaded to disk). Load the whole model."
        )
    config = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"{type(base).__name__} is an encoder-decoder model; only causal LMs are scored")
    get_head = getattr(base, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is None:
        raise NotImplementedError(
            f"{type(base).__name__} has no language-model head (get_output_embeddings() gives none); "
            "load it with AutoModelForCausalLM"
        )
    text_config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    scale, softcap = _logit_rule(text_config)
    backbone = getattr(base, "base_model", None)
    takes_positions = "position_ids" in inspect.signature(type(base).forward).parameters
    split = SplitModel(
        base,
        None if backbone is base else backbone,
        scale,
        softcap,
        takes_positions,
        rope_limit=_rope_limit(text_config),
        max_positions=_end_of_positions(base, text_config),
    )
    with partitions_gathered(base):
        theirs = _plain_logits(split)  # first: FSDP2 takes the module that runs first for the outermost one
        _refuse_if_seeing_ahead(split, theirs)
        usable = split.backbone is not None and _reproduces(split, theirs)
        shares = usable and _keeps_responses_apart(split, text_config)
    if not usable:
        told = base in _SAID
        _SAID.add(base)
        logger.log(
            logging.DEBUG if told else logging.WARNING,
            "the logits of %s are not those of its backbone and its head at positions 0, 1, ...: scoring runs its "
            "whole forward, one sequence at a time (slower; the numbers are the model's own)",
            type(base).__name__,
        )
        return replace(split, backbone=None, scale=1.0, softcap=None, takes_positions=False)
    return replace(split, shares_prompts=shares)


def _logit_rule(config: Any) -> tuple[float, float | None]:
    """Return (scale, softcap) from the names that the architectures use; the check catches what this misses."""
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale), softcap
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        return (float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)), softcap
    return 1.0, softcap


def _rope_limit(config: Any) -> int | None:
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = (
        [given] if {"rope_type", "type"} & given.keys() else [kind for kind in given.values() if isinstance(kind, dict)]
    )
    for kind in kinds:
        if kind.get("rope_type", kind.get("type")) in ("dynamic", "longrope", "su"):
            limits = (kind, "original_max_position_embeddings"), (vars(config), "original_max_position_embeddings")
            named = [int(where[name]) for where, name in limits if where.get(name)]
            return min([*named, int(config.max_position_embeddings)])
    return None


def _end_of_positions(model: nn.Module, config: Any) -> int | None:
    """Return how many positions a model has in a table, beyond which its forward is an index error; None without one.

    Such a table is a parameter or buffer of positions with a row for each of those that the config names, and maybe
    some before the first. Tables that grow with the text (`make_weights`) and functions of the position have no end.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    stated = [given for name in names if isinstance(given := getattr(config, name, None), int)]
    vocabulary = {id(embedding.weight) for embedding in _embeddings(model)}
    ends = stated if getattr(config, "model_type", None) == "mpt" else []  # its slopes are laid out for so many
    for name, module in model.named_modules():
        tables = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for table_name, table in tables:
            place = f"{name}.{table_name}".lower()
            is_table = any(word in place for word in ("pos", "wpe")) and table.ndim == 2 and id(table) not in vocabulary
            if not is_table or hasattr(module, "make_weights"):
                continue
            padding = getattr(module, "padding_idx", None)
            first = int(getattr(module, "offset", 0 if padding is None else padding + 1))
            rows = int(getattr(table, "ds_shape", table.shape)[0])
            if {rows, rows - first} & set(stated):
                ends.append(rows - first)
    return min(ends, default=None)


def _embeddings(model: Any) -> list[Any]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def _plain_logits(split: SplitModel) -> Tensor:
    """Return the logits (2, 8, V) of the model's own forward, given ids alone: two rows that begin alike."""
    return split.model(input_ids=torch.tensor(_checked_rows(split), device=split.device), use_cache=False).logits


def _checked_rows(split: SplitModel) -> tuple[list[int], list[int]]:
    """Return two short rows of ids that differ in their second half; padding, which has no position, is left out."""
    padding = getattr(split.model.config, "pad_token_id", None)
    known = [i for i in range(split.vocab_size) if i != padding]
    first = [known[(i + 1) % len(known)] for i in range(_CHECKED_LENGTH)]
    second = [
        known[(i + 1 + _CHECKED_LENGTH * (2 * i >= _CHECKED_LENGTH)) % len(known)] for i in range(_CHECKED_LENGTH)
    ]
    return first, second


def _refuse_if_seeing_ahead(split: SplitModel, plain: Tensor) -> None:
    early = plain[:, : _CHECKED_LENGTH // 2]
    if not early.isnan().any() and not _agree(early[0], early[1], split):
        raise NotImplementedError(
            f"{type(split.model).__name__} is no causal model as it is set up: a later token changes the predictions "
            "of earlier ones, so they are no log-probs of a response. Load a model that was trained as a causal LM "
            "with AutoModelForCausalLM (of BERT's kind: with is_decoder=True in its config)"
        )


def _reproduces(split: SplitModel, plain: Tensor) -> bool:
    try:
        with gathered(split.model):
            ours = split.head(split.hidden_states(single_row(_checked_rows(split)[0]))[0])
    except (AttributeError, TypeError, RuntimeError) as error:
        logger.debug("no usable split of %s: %s", type(split.model).__name__, error)
        return False
    return ours.shape == plain[0].shape and _agree(ours, plain[0], split)


def _agree(ours: Tensor, theirs: Tensor, split: SplitModel) -> bool:
    """Tell whether logits differ by rounding alone, relative to the largest: the same products of the same numbers."""
    ours, theirs = ours.double(), theirs.to(ours.device).double()
    tolerance = _HEAD_TOLERANCE.get(_precision(split), 0.01) * theirs.abs().nan_to_num(posinf=0.0).max()
    differ = (ours - theirs).abs() > tolerance  # not where both are -inf, as of a masked vocabulary, or NaN
    return not bool(differ.any()) and torch.equal(ours.isnan(), theirs.isnan())


def _keeps_responses_apart(split: SplitModel, config: Any) -> bool:
    """Check that two responses behind one prompt are scored as if each stood there alone."""
    if not split.takes_positions or _limits_attention(config):
        return False
    # as wide as shared rows get: a window that counts columns of the row rather than positions must show
    tokens = [(7 * i) % (split.vocab_size - 1) + 1 for i in range(SHARED_ROW_TOKENS)]
    prompt, *responses = (tokens[i : i + 8] for i in range(0, SHARED_ROW_TOKENS, 8))
    with gathered(split.model):
        try:
            packed = split.hidden_states(single_row(prompt, *responses))[0]
        except Exception as error:  # an attention kernel without such masks may fail in any way
            logger.debug("%s does not take four-dimensional masks: %s", type(split.model).__name__, error)
            return False
        for k in (1, len(responses)):
            alone = split.hidden_states(single_row(prompt, responses[k - 1]))[0, 8:]
            if not _close(split.head(packed[8 * k : 8 * k + 8]), split.head(alone), split):
                return False
    return True


def _limits_attention(config: Any) -> bool:
    """Tell whether some layer attends to a window only, which a mask of ours would overrule."""
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds:
        return bool(kinds - {"full_attention"})
    names = ("sliding_window", "attention_chunk_size", "window_size", "keep_window_size", "attention_types")
    windows = (getattr(config, name, None) for name in names)
    return any(window is not None for window in windows)


def _precision(split: SplitModel) -> torch.dtype:
    weight: Tensor = split.model.get_output_embeddings().weight  # type: ignore[operator]
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _close(ours: Tensor, theirs: Tensor, split: SplitModel) -> bool:
    ours, theirs = ours.double().log_softmax(-1), theirs.to(ours.device).double().log_softmax(-1)
    tolerance = _CHECK_TOLERANCE.get(_precision(split), 0.1)
    return bool(torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance, equal_nan=True))
