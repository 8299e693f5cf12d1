"""The hidden states of rollouts, where TRL's own pass does not give them: a pass of our own through the policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm_dynamics import _trl
from llm_dynamics.likelihood.sharded import is_sharded
from llm_dynamics.rollouts import Groups


def completion_states(
    policy: nn.Module, backbone: nn.Module, batch: dict[str, Any], groups: Groups, *, size: int
) -> Tensor:
    """Run the policy over the rollouts of mixed groups, without its head's vocabulary.

    Responses of like length go together, without the padding behind the longest of them. Where parameters are sharded,
    all responses run, in as many forwards on every process.

    Args:
        policy: The model, in evaluation mode and under `torch.no_grad()`.
        backbone: The part of it whose output the LM head takes.
        batch: The local tensors of a generation: `prompt_ids`, `prompt_mask`, `completion_ids`, `completion_mask`.
        groups: What lies where among all responses.
        size: Responses in one forward.

    Returns:
        (B, T, d), the head's input where it predicts each completion token; zeros in groups that are not mixed and
        behind the longest response of a forward.
    """
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)  # (B, P + T)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].shape[1]
    lengths = batch["completion_mask"].sum(dim=1).cpu()
    mixed = [row - groups.first for group in groups.here() if groups.is_mixed(group) for row in group]
    needed = torch.tensor(mixed, dtype=torch.int64)
    needed = needed[(needed >= 0) & (needed < groups.count)]
    if not len(needed):
        needed = torch.zeros(1, dtype=torch.int64)  # another process has the mixed groups: states of the same kind
    if is_sharded(policy):
        needed, lengths = torch.arange(groups.count), lengths.fill_(length)  # as many forwards on every process
    width = batch["prompt_ids"].shape[1]
    states: Tensor | None = None
    for rows in needed[lengths[needed].argsort(stable=True)].split(size):
        longest = max(1, int(lengths[rows].max()))
        rows = rows.to(ids.device)
        some, seen = ids[rows, : width + longest], mask[rows, : width + longest]
        with _trl.completion_states(backbone, longest) as found:
            policy(input_ids=some, attention_mask=seen, logits_to_keep=1, use_cache=False)
        if states is None:
            states = found[0].new_zeros(groups.count, length, found[0].shape[2])
        states[rows, :longest] = found[0]
    assert states is not None, "there is a response at least"
    return states


def has_dropout(model: nn.Module) -> bool:
    """Tell whether a pass in training mode draws random numbers: any dropout above zero, under any name, or noise."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return True
        for name, value in vars(module).items():
            random = any(word in name for word in ("drop", "jitter", "neftune"))
            if random and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                return True
    return False
