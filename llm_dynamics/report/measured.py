"""How a run was measured, as rows for people: what the tables show, then what `meta.json` says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_dynamics.frames.numbers import percent, seconds
from llm_dynamics.report.families import ordered
from llm_dynamics.runlog import RunLog

_FIRST = (
    "model",
    "adapter",
    "dtype",
    "device",
    "world_size",
    "tokenizer",
    "forms",
    "trainer",
    "trained_on",
    "max_steps",
    "arguments",
    "seed",
    "every",
    "squeeze_strength",
    "truncation",
    "packages",
)
"""Keys of meta.json that are shown up front, where they exist and say something; all others follow in a fold."""
_LONGEST = 600


def measured(run: RunLog) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the rows (name, value) to show at once, and those to show on demand.

    Any key of `meta.json` may be missing.
    """
    meta = run.meta
    first = [key for key in _FIRST if meta.get(key) not in (None, {}, [])]
    shown = [(key.replace("_", " "), _written(meta[key])) for key in first]
    rest = [(key, _written(meta[key])) for key in meta if key not in (*first, "failures")]
    return [*shown, *_from_tables(run)], rest


def _from_tables(run: RunLog) -> list[tuple[str, str]]:
    failures = [failure for failure in run.meta.get("failures", []) if isinstance(failure, Mapping)]
    rows = [
        ("watching failed", f"{of.get('part')} at step {of.get('step')}, off from there on: {of.get('error')}")
        for of in failures
    ]
    probes, steps, sequences = run.probes, run.steps, run.sequences
    counts = probes["family"].value_counts()
    per_family = ", ".join(f"{family} {counts[family]}" for family in ordered(counts.index))
    rows.append(("probes", f"{len(probes)} of {probes['prompt_id'].nunique()} prompts: {per_family}"))
    if not sequences.empty:
        observed = sorted(sequences["step"].unique())
        shown = observed if len(observed) <= 12 else [*observed[:6], "…", *observed[-3:]]
        rows.append(("observations", f"{len(observed)}, at steps {', '.join(map(str, shown))}"))
        tokens = sequences[sequences["step"] == observed[-1]]["n_tokens"].sum()
        rows.append(("response tokens", f"{tokens:,} at each observation"))
        bad = sequences.loc[~np.isfinite(sequences["logp_sum"]), "probe_id"].nunique()
        rows.append(("not finite", f"{bad} of the probes, at some observation; left out there" if bad else "none"))
    cut = probes["n_cut"].fillna(0)
    removed = f"{int((cut > 0).sum())} of the probes, {int(cut.sum())} tokens removed"
    rows.append(("truncated", removed if cut.any() else "none"))
    if not steps.empty:
        rows.append(("cost of watching", _cost(run)))
    return rows


def _cost(run: RunLog) -> str:
    """Say what observing and explaining took, and that sum against the training, which is counted without both."""
    observing, training = (float(run.steps[f"seconds_{name}"].sum()) for name in ("observing", "training"))
    explaining = float(run.accounts["seconds"].sum())
    parts = f"observing {seconds(observing)}" + (f" + explaining {seconds(explaining)}" if explaining else "")
    watching = observing + explaining
    share = f", {percent(watching / training)} of the {seconds(training)} of training" if training else ""
    return f"{seconds(watching)} ({parts}){share}"


def _written(value: Any) -> str:
    if isinstance(value, Mapping) and not any(isinstance(part, Mapping) for part in value.values()):
        text = ", ".join(f"{key} {_plain(part)}" for key, part in value.items() if part is not None)
    else:
        text = _plain(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"


def _plain(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
