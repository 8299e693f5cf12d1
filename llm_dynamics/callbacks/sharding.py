"""Probes over processes: each scores a share, all see the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor

from llm_dynamics.probes import EncodedProbe


def share_of(encoded: Sequence[EncodedProbe], rank: int, world_size: int) -> list[int]:
    """Return the indices of the probes that process `rank` scores.

    Probes of one prompt stay together, since they share its forward; prompts go, longest first, to the process with the
    fewest tokens so far.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, probe in enumerate(encoded):
        groups.setdefault(probe.prompt_ids, []).append(i)

    def cost(members: list[int]) -> int:
        return len(encoded[members[0]].prompt_ids) + sum(len(encoded[i].response_ids) for i in members)

    loads = [0] * world_size
    share: list[int] = []
    for members in sorted(groups.values(), key=lambda members: (-cost(members), members[0])):
        lightest = loads.index(min(loads))
        loads[lightest] += cost(members)
        if lightest == rank:
            share += members
    return sorted(share)


class PeerFailed(RuntimeError):
    """Another process failed where this one waits for it.

    Attributes:
        trace: Its traceback.
    """

    def __init__(self, process: int, said: str, trace: str) -> None:
        super().__init__(f"process {process}: {said}")
        self.trace = trace


def on_every_process(value: Any) -> list[Any]:
    """Return the values of all processes, in their order, on every process.

    Raises:
        PeerFailed: Where a process called `announce_failure` in place of this.
    """
    gathered: list[tuple[Any, Any]] = gather_object([(None, value)])
    for failure, _ in gathered:
        if failure is not None:
            raise PeerFailed(*failure)
    return [value for _, value in gathered]


def announce_failure(said: str, trace: str) -> None:
    """Join the exchange that the other processes are in, or come to next, with the news that this one failed."""
    state = PartialState()
    if state.num_processes > 1:
        gather_object([((state.process_index, said, trace), None)])


def agree() -> None:
    """Wait until every process is here, or hear that one failed: `PeerFailed`."""
    if PartialState().num_processes > 1:
        on_every_process(None)


def gather_frames(frame: pd.DataFrame, order: str) -> pd.DataFrame:
    """Stack the frames of all processes on every process, sorted by the column `order`, which is dropped."""
    # rows keep their order within a probe: the sort is stable and a probe lies on one process
    merged = pd.concat(on_every_process(frame), ignore_index=True)
    return merged.sort_values(order, kind="stable", ignore_index=True).drop(columns=order)


def broadcast(value: Any) -> Any:
    """Return the main process's `value` on every process."""
    return on_every_process(value if PartialState().is_main_process else None)[0]


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """Return the sum of the processes' arrays (float64), in the order of the processes, on every process."""
    return np.sum(on_every_process(values), axis=0)


def union_over_processes(names: Iterable[str]) -> list[str]:
    """Return the names that any process has, sorted, on every process."""
    return sorted({name for some in on_every_process(sorted(names)) for name in some})


def average_weights(accelerator: Accelerator, parts: dict[str, dict[str, Tensor]], like: Mapping[str, Tensor]) -> None:
    """Average gradient parts over processes, in place; a part that a process lacks counts as zero there.

    Args:
        accelerator: The trainer's.
        parts: Tensors by label and parameter name.
        like: The parameters, by name, in the same order on every process.
    """
    if accelerator.num_processes == 1:
        return
    labels = union_over_processes(parts)
    for label in labels:
        mine = parts.setdefault(label, {})
        for name, weight in like.items():
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            if name not in mine:
                mine[name] = torch.zeros_like(weight, dtype=wide)
    agree()  # what can fail has been done: from here on every process reduces every part
    for label in labels:
        for name in like:
            parts[label][name] = accelerator.reduce(parts[label][name], reduction="mean")
