"""What hooks see of one forward: inputs of layers, and the places of the graph where their outputs are made."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from llm_dynamics.kernel.layers import Factors, Lookup, lookup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        module: The module.
        inputs: Its input.
        version: How often the input's memory had been written then.
        output: Where in the graph its output was made; a later in-place change of the output does not move it.
    """

    module: nn.Module
    inputs: Tensor
    version: int
    output: GradientEdge

    def check(self) -> None:
        """Check that the input still is what the module saw.

        Raises:
            NotImplementedError: Where the model has written over it.
        """
        if self.inputs._version != self.version:
            raise NotImplementedError(
                f"the input of {self.module} was changed in place after the call, and is lost: make the model's "
                "operation out of place, or leave the layer out by `parameters=`"
            )


@contextmanager
def recording(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[Call]]]:
    """Record the calls of some modules.

    Args:
        modules: The modules.

    Yields:
        Their calls, in the order of the forward; calls without a gradient are left out.
    """
    calls: dict[nn.Module, list[Call]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if output.requires_grad:
            given: Tensor = (args[0] if args else next(iter(kwargs.values()))).detach()
            calls.setdefault(module, []).append(Call(module, given, given._version, get_gradient_edge(output)))

    # first of all hooks: others may change the output
    handles = [m.register_forward_hook(record, prepend=True, with_kwargs=True) for m in dict.fromkeys(modules)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def batched_grad(outputs: Tensor, inputs: Sequence[Any], cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Return gradients (R, ...) for R cotangents; row by row where some operation has no batched backward.

    Raises:
        RuntimeError: As autograd does, such as for lack of memory.
    """
    try:
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        logger.info("backward row by row, since it cannot be batched: %s", error)
        rows = [torch.autograd.grad(outputs, inputs, row, retain_graph=True, allow_unused=True) for row in cotangents]
        return tuple(None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True))


def factors_of(made: Sequence[tuple[Call, Tensor]], module: nn.Module, rows: int, length: int) -> Factors:
    """Return the gradients of R rows by a linear weight from all calls that used it.

    Args:
        made: The calls, each with the gradients (R, ..., d_out) by its output.
        module: Any linear layer with the weight.
        rows: R.
        length: Positions of the pass.

    Returns:
        The factors, the calls' positions one after another: products of two calls come with them.
    """
    d_in, d_out = widths(module)
    if not made:
        weight = module.get_parameter("weight")
        return Factors(weight.new_zeros(0, d_in), weight.new_zeros(rows, 0, d_out), nested=False)
    a = [call.inputs.reshape(-1, d_in) for call, _ in made]
    g = [grad.reshape(rows, -1, d_out) for _, grad in made]
    if len(made) == 1:
        return Factors(a[0], g[0], nested=len(a[0]) == length)
    return Factors(torch.cat(a), torch.cat(g, dim=1), nested=False)


def lookup_of(made: Sequence[tuple[Call, Tensor, float]], table: Tensor, rows: int, *, trained: bool) -> Lookup:
    """Return the gradients of R rows by an embedding table from all calls that used it.

    Args:
        made: The calls, each with the gradients (R, ..., d) by its output and its factor on what it looks up.
        table: The table.
        rows: R.
        trained: Leave the row of the padding token out, as autograd does in training.

    Returns:
        The gradients by the table's rows.
    """
    ids = [torch.zeros(0, dtype=torch.long, device=table.device)]
    gradients = [table.new_zeros(rows, 0, table.shape[1])]
    for call, g, scale in made:
        flat = call.inputs.reshape(-1)
        g = g.reshape(rows, len(flat), -1)
        if trained and call.module.padding_idx is not None:
            counted = flat != call.module.padding_idx
            flat, g = flat[counted], g[:, counted]
        ids.append(flat)
        gradients.append(g if scale == 1.0 else g * scale)
    if len(ids) == 2:
        return lookup(ids[1], gradients[1])
    return lookup(torch.cat(ids), torch.cat(gradients, dim=1))


def widths(module: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear layer, whose weight `Conv1D` keeps the other way round."""
    rows, columns = module.get_parameter("weight").shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)
