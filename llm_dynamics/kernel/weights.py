"""A model at other weights than its own: in float32 at least, with kernels that have forward derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from llm_dynamics.likelihood.preserve import evaluating

Weights = Mapping[str, Tensor]
"""Tensors by parameter name, as `model.named_parameters()` has them."""


def dual_weights(weights: Weights, direction: Weights) -> dict[str, Tensor]:
    """Return `weights` as dual numbers with tangent `direction`, float32 at least; inside `forward_ad.dual_level`."""
    return {
        name: forward_ad.make_dual(precise(value), direction[name].to(precise(value))) if name in direction else value
        for name, value in weights.items()
    }


def unpacked(dual: Tensor) -> tuple[Tensor, Tensor]:
    """Return the value of a dual number and its tangent, zero where it has none."""
    value, tangent = forward_ad.unpack_dual(dual)
    return value, torch.zeros_like(value) if tangent is None else tangent


def unshared(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return gradients that can be written to, each in memory of its own.

    Autograd hands the same tensor to two parameters that are added up, and an expanded one to a parameter that is
    broadcast.
    """
    seen: set[int] = set()
    own: list[Tensor | None] = []
    for gradient in gradients:
        if gradient is not None:
            storage = gradient.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() < gradient.numel() * gradient.element_size():
                gradient = gradient.clone(memory_format=torch.contiguous_format)
            seen.add(storage.data_ptr())
        own.append(gradient)
    return own


def precise(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 where its floating type is of lower precision."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def at_weights(model: nn.Module, weights: Weights, function: Callable[[], Any], *, evaluate: bool = True) -> Any:
    """Call `function` while `model` has `weights` in place of its own, in float32 at least.

    Args:
        model: The model that `function` calls.
        weights: Tensors that stand in for parameters, by name; tied parameters follow.
        function: What to call; gradients that it takes must be taken inside.
        evaluate: In evaluation mode; else in the modes that the model's modules have.

    Returns:
        What `function` returned.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    converted = {
        name: precise(tensor.detach())
        for name, tensor in named
        if name not in weights and tensor.dtype in (torch.bfloat16, torch.float16)
    }
    given = {name: precise(tensor) for name, tensor in weights.items()}
    stand_ins = {f"model.{name}": tensor for name, tensor in {**converted, **given}.items()}
    with torch.autocast(next(model.parameters()).device.type, enabled=False), _differentiable_kernels(model):
        if not evaluate:
            with torch.no_grad():
                return torch.func.functional_call(_Holder(model), stand_ins, (function,))
        with evaluating(model):
            return torch.func.functional_call(_Holder(model), stand_ins, (function,))


class _Holder(nn.Module):
    """Lets `functional_call` put weights in place around any function."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.training = model.training
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


class PaddingRows(TorchFunctionMode):
    """While it is open, chooses whether the embedding of the padding token has a derivative.

    Autograd leaves it out (`padding_idx`), forward mode does not, and log-probs do depend on it wherever the padding
    token stands in a text, as where it is also the end of a turn.

    Args:
        learn: True: it has one, as any other token; False: it has none, in forward mode either, as in training.
    """

    def __init__(self, *, learn: bool) -> None:
        super().__init__()
        self.learn = learn

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look up embeddings as chosen; call all other functions as they are."""
        if func is not torch.nn.functional.embedding:
            return func(*args, **(kwargs or {}))
        names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        padding = given.get("padding_idx")
        if padding is None or self.learn:
            return func(**given | {"padding_idx": None})
        rows = func(**given)
        is_padding = given["input"] == padding % len(given["weight"])
        return torch.where(is_padding[..., None], forward_ad.unpack_dual(rows).primal, rows)


@contextmanager
def _differentiable_kernels(model: nn.Module) -> Iterator[None]:
    """Choose attention and experts that have forward derivatives: fused and grouped kernels have none."""
    configs: list[Any] = list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())
    before = []
    for name, differentiable, instead in (
        ("_attn_implementation", (None, "sdpa", "eager"), "sdpa"),
        ("_experts_implementation", (None, "eager"), "eager"),
    ):
        used = [(config, getattr(config, name, None)) for config in configs]
        before += [(config, name, value, instead) for config, value in used if value not in differentiable]
    try:
        for config, name, _, instead in before:
            setattr(config, name, instead)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for config, name, value, _ in before:
            setattr(config, name, value)
