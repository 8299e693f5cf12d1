"""Parameters that lie in pieces on several processes: FSDP2, and DeepSpeed ZeRO-3.

FSDP2's blocks of layers gather their own pieces when they run. What belongs to the outermost module (embedding, last
norm, LM head) is gathered by that module's forward alone; scoring calls the backbone and the head by themselves, so
these pieces are gathered here. Every process must run the same number of forwards, or all wait for each other.

ZeRO-3 fetches the weights of a module when it runs, by hooks that exist from the first step on and that learn the order
of training's forwards. Scoring is another order, and begins before the first step: so all weights are gathered here,
and the hooks are silent meanwhile. Each process then holds the whole model, as it does when TRL generates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a model's parameters lie in pieces on several processes."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()) or any(
        isinstance(module, FSDPModule) for module in model.modules()
    )


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather what scoring needs of sharded parameters, and give it back at the end.

    That is what FSDP2 keeps with the outermost module, and all that ZeRO-3 partitions. All processes must enter
    together. A model that is not sharded is left alone.

    Args:
        model: The model, in whatever wrapper.

    Yields:
        None.
    """
    roots = _outermost(model)
    for root in roots:
        root.unshard()
    try:
        with partitions_gathered(model):
            yield
    finally:
        for root in roots:
            root.reshard()


@contextmanager
def partitions_gathered(model: nn.Module) -> Iterator[None]:
    """Gather all parameters that DeepSpeed ZeRO-3 partitions, its hooks silent meanwhile, and part them at the end.

    Parameters that are whole already, as within another such context, are left alone. All processes must enter
    together.

    Args:
        model: The model, in whatever wrapper.

    Yields:
        None.
    """
    partitioned: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    # some may be whole still, from the last step
    missing = [p for p in partitioned if p.ds_status.name == "NOT_AVAILABLE"]
    with deepspeed.zero.GatheredParameters(missing), _deepspeed_hooks_off(model):
        yield


@contextmanager
def _deepspeed_hooks_off(model: nn.Module) -> Iterator[None]:
    """Take DeepSpeed's own hooks off every module, and put them back in their order."""
    kept: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if any(_is_deepspeeds(hook) for hook in hooks.values()):
                kept.append((hooks, dict(hooks)))
                for key in [key for key, hook in hooks.items() if _is_deepspeeds(hook)]:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)


def _is_deepspeeds(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("deepspeed.")


def _outermost(module: nn.Module) -> list[FSDPModule]:
    if isinstance(module, FSDPModule):
        return [module]
    return [root for child in module.children() for root in _outermost(child)]
