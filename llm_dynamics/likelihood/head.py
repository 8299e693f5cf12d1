"""The two halves of a causal language model: the backbone, and the head that turns hidden states into logits.

Scoring needs them apart, so that only response positions meet the vocabulary. How a model post-processes its logits
(scale, soft-capping) is a convention of each architecture; the split is therefore checked against the model's own
forward before it is used.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

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
    """

    model: nn.Module
    backbone: nn.Module | None
    scale: float
    softcap: float | None
    takes_positions: bool

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings, where token ids must lie."""
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator]
        return weight.device

    @property
    def vocab_size(self) -> int:
        """V, the number of logits."""
        return int(self.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the backbone: (B, T) ids and mask, padding on either side, to the head's input (B, T, d)."""
        assert self.backbone is not None, "a model without a usable split has only `logits`"
        return self.backbone(**self._inputs(input_ids, attention_mask)).last_hidden_state

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the model's own forward: (B, T) ids and mask to logits (B, T, V)."""
        return self.model(**self._inputs(input_ids, attention_mask)).logits

    def head(self, hidden: Tensor) -> Tensor:
        """Turn hidden states (N, d) into logits (N, V), float32 at least; scaled and capped as the model does."""
        lm_head = self.model.get_output_embeddings()  # type: ignore[operator]
        logits = lm_head(hidden.to(lm_head.weight.device))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if logits.dtype == torch.float64 else logits.float()

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.takes_positions:
            # without them a left-padded row would be scored at shifted positions
            inputs["position_ids"] = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
        return inputs


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside DDP, `torch.compile` and PEFT wrappers.

    Raises:
        NotImplementedError: For PEFT methods that change the input rather than the weights (prompt learning).
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            config = model.peft_config[model.active_adapter]  # type: ignore[index]
            if getattr(config, "is_prompt_learning", False):
                raise NotImplementedError(
                    f"{type(config).__name__} is a prompt-learning adapter: it prepends virtual tokens, which are not "
                    "part of any response. Adapters that change weights (LoRA, DoRA, IA3, VeRA...) can be scored."
                )
            model = model.get_base_model()  # type: ignore[operator]
        else:
            return model


def split_model(model: nn.Module) -> SplitModel:
    """Split a causal LM into backbone and head, and check the split on a short input.

    Args:
        model: Any Hugging Face causal LM, with or without PEFT, DDP, `torch.compile` or TRL's fused head. It should be
            in evaluation mode and under `torch.no_grad()`; its mode is left alone.

    Returns:
        The split. Where it does not reproduce the model's own logits (an architecture with an unknown
        post-processing), `backbone` is None and a warning names the model: whole forwards are then used, one sequence
        at a time, which is slower and right.

    Raises:
        NotImplementedError: For encoder-decoder models, prompt-learning adapters, and models without an LM head.
    """
    base = unwrap_model(model)
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
    split = SplitModel(base, None if backbone is base else backbone, scale, softcap, takes_positions)
    if split.backbone is None or not _reproduces_logits(split):
        logger.warning(
            "%s post-processes its logits in a way that llm_dynamics does not know: scoring runs its whole forward, "
            "one sequence at a time (slower; the numbers are the model's own)",
            type(base).__name__,
        )
        return SplitModel(base, None, 1.0, None, takes_positions)
    return split


def _logit_rule(config: Any) -> tuple[float, float | None]:
    """Return (scale, softcap) from the names that the architectures use; the check catches what this misses."""
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale), softcap
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        return (float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)), softcap
    return 1.0, softcap


def _reproduces_logits(split: SplitModel) -> bool:
    ids = torch.arange(1, 5, device=split.device).remainder(split.vocab_size)[None]  # (1, 4): any tokens do
    mask = torch.ones_like(ids)
    try:
        ours = split.head(split.hidden_states(ids, mask)[0])
    except (AttributeError, TypeError, RuntimeError) as error:
        logger.debug("no usable split of %s: %s", type(split.model).__name__, error)
        return False
    theirs = split.logits(ids, mask)[0]
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.to(theirs.device).log_softmax(-1), theirs.to(ours.dtype).log_softmax(-1)
    tolerance = _CHECK_TOLERANCE.get(split.model.get_output_embeddings().weight.dtype, 0.1)  # type: ignore[operator]
    return bool(torch.allclose(ours, theirs, atol=tolerance, rtol=tolerance, equal_nan=True))
