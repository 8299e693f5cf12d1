"""Parameters that lie in pieces on several processes: FSDP2, and DeepSpeed ZeRO-3.

Blocks of layers gather their own pieces when they run. What belongs to the outermost module (embedding, last norm, LM
head) is gathered by that module's forward alone; scoring calls the backbone and the head by themselves, so these pieces
are gathered here. Every process must run the same number of forwards, or all wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    """Gather the pieces that FSDP2 keeps with the outermost module, and give them back at the end.

    All processes must enter together. A model that is not sharded is left alone.

    Args:
        model: The model, in whatever wrapper.

    Yields:
        None.
    """
    roots = _outermost(model)
    for root in roots:
        root.unshard()
    try:
        yield
    finally:
        for root in roots:
            root.reshard()


def _outermost(module: nn.Module) -> list[FSDPModule]:
    if isinstance(module, FSDPModule):
        return [module]
    return [root for child in module.children() for root in _outermost(child)]
