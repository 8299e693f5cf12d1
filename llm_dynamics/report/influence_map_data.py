"""The influence maps of a run for the page: for the template, and as plain JSON types for the script."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from llm_dynamics.report.causes import cause_names, waterfall_order
from llm_dynamics.report.influence_map import MAX_SIDE, InfluenceMap, influence_maps, is_of_tokens, map_steps
from llm_dynamics.report.text import prompt_line, rounded, visible
from llm_dynamics.report.why_prompts import Prompts
from llm_dynamics.report.why_tokens import shown_token
from llm_dynamics.runlog import RunLog

MAX_CELLS = 240_000
"""Cells embedded over all runs: 1.3 MB."""


class Maps(NamedTuple):
    """The maps of a run.

    Attributes:
        view: What the template says of them.
        data: What `influence_map.js` draws from.
    """

    view: dict[str, Any]
    data: dict[str, Any]


def map_data(run: RunLog, max_cells: int = MAX_CELLS) -> Maps:
    """Return the influence maps of a run, within a size.

    Args:
        run: A run with accounts.
        max_cells: Cells over all maps at most; one map is embedded whatever its size.

    Returns:
        The maps. Cells are little-endian float32 in base64, row by row, NaN where not finite.
    """
    maps = influence_maps(run, max_cells)
    by_probe: dict[str, list[InfluenceMap]] = {}
    for one in maps:
        by_probe.setdefault(one.probe_id, []).append(one)
    logged = [str(probe) for probe in _asked_for(run)]
    probe_ids = sorted(by_probe, key=lambda probe: logged.index(probe) if probe in logged else len(logged))
    tokens = probe_tokens(run, {probe: max(int(one.rows[-1]) + 1 for one in own) for probe, own in by_probe.items()})
    about = {row["probe_id"]: row for row in run.probes.to_dict("records")}
    examples = {(row["step"], row["example"]): row for row in run.training_examples.to_dict("records")} if maps else {}
    prompts, names = Prompts(run.training_examples, run.probes), cause_names(run)
    probes = [_probe(probe, about.get(probe, {}), tokens[probe]) for probe in probe_ids]
    data = [
        {"probe": place, **_map(one, examples.get((one.step, one.example), {}), about.get(probe, {}), prompts, names)}
        for place, probe in enumerate(probe_ids)
        for one in by_probe[probe]
    ]
    steps = sorted({one.step for one in maps})
    view = {
        "probes": [{"place": place, "label": probe["label"]} for place, probe in enumerate(probes)],
        "n_maps": len(maps),
        "n_steps": len(steps),
        "n_steps_kept": len(map_steps(run)),
        "n_probes_left_out": len(set(logged) - set(by_probe)),
        "max_side": MAX_SIDE,
        "cropped": any(len(one.rows) < one.n_rows or len(one.columns) < one.n_columns for one in maps),
    }
    return Maps(view, {"probes": probes, "maps": data})


def probe_tokens(run: RunLog, wanted: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the tokens of some probes as text.

    Args:
        run: The run log.
        wanted: How many tokens each probe has.

    Returns:
        The tokens by probe. Where the run log kept no token table of a probe, the text of its token ids is looked up in
        the other tables; a token whose text is nowhere in the log is "#" and its id.
    """
    kept: dict[tuple[str, int], str] = {}
    texts: dict[int, str] = {}
    columns = ["probe_id", "position", "token_id", "token"]
    for part in _first(run.parts("tokens", reversed(run.observed_steps), columns)) if wanted else ():
        for probe, position, token_id, token in zip(*(part[name].to_pylist() for name in columns), strict=True):
            if token is not None:
                texts[token_id] = token
                kept[probe, position] = token
    if any((probe, m) not in kept for probe, n in wanted.items() for m in range(n)):
        for part in run.parts("training_tokens", map_steps(run), ["token_id", "token"]):
            named = part.to_pandas().drop_duplicates().dropna()
            texts |= dict(zip(named["token_id"].tolist(), named["token"].tolist(), strict=True))
    ids = dict(zip(run.probes["probe_id"], run.probes["response_ids"], strict=True))

    def text(probe: str, m: int) -> str:
        if (probe, m) in kept:
            return kept[probe, m]
        named = ids.get(probe)
        token_id = int(named[m]) if named is not None and m < len(named) else None
        return f"#{m}" if token_id is None else texts.get(token_id) or f"#{token_id}"

    return {probe: [text(probe, m) for m in range(n)] for probe, n in wanted.items()}


def _first(parts: Iterable[Any]) -> list[Any]:
    part = next(iter(parts), None)
    return [] if part is None else [part]


def _asked_for(run: RunLog) -> list[Any]:
    settings = run.meta.get("influence")
    asked = settings.get("map_probes") if isinstance(settings, dict) else None
    return asked if isinstance(asked, list) else []


def _probe(probe_id: str, about: Mapping[Any, Any], tokens: list[str]) -> dict[str, Any]:
    prompt = about.get("prompt")
    family = visible(str(about.get("family") or probe_id))
    return {
        "id": probe_id,
        "family": family,
        "label": f"{family}: {prompt_line(prompt, 50)}" if isinstance(prompt, str) else family,
        "prompt": prompt_line(prompt) if isinstance(prompt, str) else "",
        "tokens": [shown_token(token) for token in tokens],
    }


def _map(
    one: InfluenceMap, example: Mapping[Any, Any], probe: Mapping[Any, Any], prompts: Prompts, names: Mapping[str, str]
) -> dict[str, Any]:
    role, prompt_id = example.get("role"), example.get("prompt_id")
    everything = one.all_training_tokens
    return {
        "step": one.step,
        "role": visible(role) if isinstance(role, str) else "",
        "prompt": prompts.line(example.get("prompt"), prompt_id),
        "own": isinstance(prompt_id, str) and prompt_id == probe.get("prompt_id"),
        "nRows": one.n_rows,
        "nColumns": one.n_columns,
        "rows": one.rows.tolist(),
        "columns": one.columns.tolist(),
        "tokens": [shown_token(token) if isinstance(token, str) else "?" for token in one.told["token"]],
        "c": _numbers(one.told["c"]),
        "logp": _numbers(one.told["logp"]),
        "cells": base64.b64encode(one.shares.astype("<f4").tobytes()).decode("ascii"),
        "limit": rounded(_limit(one.shares)),
        "rowSums": _numbers(one.row_sums),
        "columnSums": _numbers(one.column_sums),
        "total": rounded(one.total, 6),
        "leftOut": one.n_nonfinite,
        "others": rounded(one.others, 6),
        "nOthers": one.n_others,
        "training": None if everything is None else _numbers(everything),
        "causes": [
            {"name": visible(names.get(cause, cause)), "shares": _numbers(one.causes[cause])}
            for cause in waterfall_order(one.causes)
            if not is_of_tokens(cause) and np.any(one.causes[cause])
        ],
        "measured": None if one.measured is None else _numbers(one.measured),
    }


def _limit(shares: np.ndarray) -> float:
    """Return the end of the colour scale: the strongest 2 % of cells share the end colours."""
    sizes = np.abs(shares[np.isfinite(shares)])
    end = float(np.quantile(sizes, 0.98)) if sizes.size else 0.0
    return end or float(sizes.max(initial=0.0)) or 1.0


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [rounded(float(value), 6) if math.isfinite(value) else None for value in values]
