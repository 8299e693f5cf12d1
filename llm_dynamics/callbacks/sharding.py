"""Probes over processes: each scores a share, all see the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from accelerate.utils import broadcast_object_list, gather_object

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


def gather_frames(frame: pd.DataFrame, order: str) -> pd.DataFrame:
    """Stack the frames of all processes on every process, sorted by the column `order`, which is dropped."""
    # rows keep their order within a probe: the sort is stable and a probe lies on one process
    merged = pd.concat(gather_object([frame]), ignore_index=True)
    return merged.sort_values(order, kind="stable", ignore_index=True).drop(columns=order)


def broadcast(value: Any) -> Any:
    """Return the main process's `value` on every process."""
    return broadcast_object_list([value])[0]
