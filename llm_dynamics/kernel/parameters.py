"""Which parameters a kernel runs over, and by which rule each is taken."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from llm_dynamics.likelihood.head import SplitModel

ParameterChoice = Collection[str] | Callable[[str, nn.Parameter], bool] | None
"""Names, a predicate of name and parameter, or None: all that are trainable."""


def choose_parameters(model: nn.Module, choice: ParameterChoice) -> dict[str, nn.Parameter]:
    """Return the chosen parameters by name; a tied one appears once.

    Raises:
        ValueError: For unknown names, or where nothing is chosen.
        NotImplementedError: For parameters that are sharded, or not floating-point numbers.
    """
    if isinstance(choice, str):
        raise ValueError(f"parameters is the text {choice!r}; give a list of names, or a predicate")
    named = dict(model.named_parameters(remove_duplicate=False))
    if choice is None:
        names = [name for name, parameter in named.items() if parameter.requires_grad]
    elif callable(choice):
        names = [name for name, parameter in named.items() if choice(name, parameter)]
    else:
        unknown = sorted(set(choice) - named.keys())
        if unknown:
            raise ValueError(f"no parameters are named {unknown}; names look like {list(named)[:3]}")
        names = [name for name in named if name in choice]
    if not names:
        raise ValueError("no parameters are chosen: is everything frozen? Name them by `parameters=`")
    chosen: dict[int, str] = {}
    for name in names:
        chosen.setdefault(id(named[name]), name)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise NotImplementedError("the model is wrapped by FSDP: a kernel needs whole weights, in one process")
    for name in chosen.values():
        _check_parameter(name, named[name])
    return {name: named[name] for name in chosen.values()}


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or hasattr(parameter, "_is_flat_param"):
        raise NotImplementedError(
            f"{name} is sharded ({type(parameter).__name__}: FSDP, tensor parallel or ZeRO-3): a kernel needs whole "
            "weights. Gather them, or load the checkpoint in one process."
        )
    if not parameter.is_floating_point():
        raise NotImplementedError(
            f"{name} is {parameter.dtype}, a quantised weight, and has no gradient. Choose the adapters alone, or load "
            "the model without quantisation."
        )


@dataclass(frozen=True)
class Rules:
    """By which rule each chosen parameter is taken.

    Attributes:
        linear: Weights of linear layers (`nn.Linear`, `Conv1D`), with the modules that use each.
        lookup: Embedding tables, with the modules that use each and the factor on what they look up.
        dense: All others, which are materialised row by row.
        head_weight: Name of the LM head's weight where the closed form covers it.
        head_bias: Whether the closed form covers the head's bias.
        closed_head: Whether the head stays out of the graph.
    """

    linear: dict[str, list[nn.Module]] = field(default_factory=dict)
    lookup: dict[str, list[tuple[nn.Module, float]]] = field(default_factory=dict)
    dense: dict[str, nn.Parameter] = field(default_factory=dict)
    head_weight: str | None = None
    head_bias: bool = False
    closed_head: bool = True

    @property
    def hooked(self) -> list[nn.Module]:
        """Modules whose inputs and output gradients are needed."""
        modules = [module for users in self.linear.values() for module in users]
        return modules + [module for users in self.lookup.values() for module, _ in users]


def assign_rules(split: SplitModel, chosen: dict[str, nn.Parameter]) -> Rules:
    """Assign the rules by how modules own the parameters; `verify_rules` compares with a graph.

    Args:
        split: The model's halves.
        chosen: The chosen parameters by name.

    Returns:
        The rules.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in split.model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, attribute))
    head: nn.Module = split.model.get_output_embeddings()  # type: ignore[operator]
    closed = split.backbone is not None and _is_plain(head, nn.Linear)
    if closed:
        tied = [module for module, _ in owners[id(head.weight)] if module is not head]
        if any(parameter is head.weight for parameter in chosen.values()):
            # the cross terms of the matrix's two roles are known for embeddings only
            closed = all(_scale_of_lookup(module) is not None for module in tied)
    rules = Rules(closed_head=closed)
    for name, parameter in chosen.items():
        users = owners.get(id(parameter), [])
        if closed and parameter is head.weight:
            rules = _with(rules, head_weight=name)
            users = [(module, attribute) for module, attribute in users if module is not head]
        elif closed and parameter is head.bias:
            rules = _with(rules, head_bias=True)
            continue
        scales = [_scale_of_lookup(module) for module, _ in users]
        if users and all(_is_plain(module, nn.Linear, Conv1D) and at == "weight" for module, at in users):
            rules.linear[name] = [module for module, _ in users]
        elif users and all(scale is not None for scale in scales):
            rules.lookup[name] = [(m, float(s)) for (m, _), s in zip(users, scales, strict=True) if s is not None]
        elif users or name != rules.head_weight:
            rules.dense[name] = parameter
    return rules


def verify_rules(rules: Rules, chosen: dict[str, nn.Parameter], outputs: Tensor, calls: dict[nn.Module, int]) -> Rules:
    """Move to `dense` each parameter that the graph uses otherwise than through calls of its modules.

    A module's weight may be read directly (`F.linear(x, self.proj.weight)`), past every hook. Each use is one edge into
    the parameter's node, so edges that outnumber calls give it away.

    Args:
        rules: The rules assigned.
        chosen: The chosen parameters by name.
        outputs: A tensor of the model whose graph is read.
        calls: How often each hooked module was called in it.

    Returns:
        The rules that hold.

    Raises:
        NotImplementedError: For a tied embedding that is used in such a way.
    """
    edges = _edges_into_leaves(outputs)
    linear, lookup, dense = dict(rules.linear), dict(rules.lookup), dict(rules.dense)
    for name, users in [*rules.linear.items(), *((n, [m for m, _ in us]) for n, us in rules.lookup.items())]:
        if edges.get(id(chosen[name]), 0) <= sum(calls.get(module, 0) for module in set(users)):
            continue
        if name == rules.head_weight:
            raise NotImplementedError(
                f"{name} is tied to the LM head and read by code outside its embedding module; leave it out by "
                "`parameters=`"
            )
        linear.pop(name, None)
        lookup.pop(name, None)
        dense[name] = chosen[name]
    return _with(rules, linear=linear, lookup=lookup, dense=dense)


def _with(rules: Rules, **changes: object) -> Rules:
    return replace(rules, **changes)  # type: ignore[arg-type]


def _is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Tell whether a module computes what its class computes: subclasses (quantised, scaled...) may not."""
    if "forward" in vars(module):  # replaced on the instance
        return False
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def _scale_of_lookup(module: nn.Module) -> float | None:
    """Return s where the module computes s * weight[ids], or None where it does something else."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None or module.scale_grad_by_freq:
        return None
    if _is_plain(module, nn.Embedding):
        return 1.0
    scale = getattr(module, "embed_scale", None)
    if scale is None or (isinstance(scale, Tensor) and scale.numel() != 1):
        return None
    ids = torch.arange(min(8, module.num_embeddings), device=module.weight.device)
    try:
        looked_up = module(ids)
    except Exception:  # takes other inputs: no plain lookup
        return None
    return float(scale) if torch.equal(looked_up, module.weight[ids] * scale) else None


def _edges_into_leaves(outputs: Tensor) -> dict[int, int]:
    edges: dict[int, int] = {}
    seen, waiting = set(), [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            leaf = getattr(following, "variable", None)
            if leaf is not None:
                edges[id(leaf)] = edges.get(id(leaf), 0) + 1
            else:
                waiting.append(following)
    return edges
