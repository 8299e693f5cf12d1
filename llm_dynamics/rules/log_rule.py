"""The rule that asks whether a run's curves can be trusted, and what to do where they cannot."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llm_dynamics.frames.numbers import counted
from llm_dynamics.rules.terms import THRESHOLDS, Finding, Outcome, RunTables, finite_values


def find_log_problems(run: RunTables, moved: pd.DataFrame) -> Outcome:
    """Find what makes the curves of this log untrustworthy."""
    problems = [said for said, _ in _log_problems(run)]
    observed = run.sequences["step"].nunique()
    told = "; ".join(problems) or f"{counted(len(run.probes), 'probe')}, {observed} observations, all finite"
    return Finding(np.array([bool(problems)]), told)


def mend_log(run: RunTables) -> str:
    """Return what to do about the problems of a log, or about all that it could have where it has none."""
    return " ".join(remedy for _, remedy in _log_problems(run)) or " ".join(_LOG_REMEDIES.values())


_LOG_REMEDIES = {
    "NaN": "NaN: look for what overflows (--learning_rate, float16).",
    "truncated": "Truncated: raise --max_length.",
    "few": "Few probes: watch more prompts, where the data has them (recipes: --watch_prompts 50; else n_prompts=50).",
    "form": "Other form: build the probes from rows like the trainer's, chat messages for chat messages.",
    "one": "One observation: watch more often (--watch_every; watch(..., every=)).",
}


def _log_problems(run: RunTables) -> list[tuple[str, str]]:
    """Return what is wrong with a log, each with its remedy."""
    sequences, probes = run.sequences, run.probes
    problems: list[tuple[str, str]] = []
    broken = sequences[(finite_values(sequences["n_nonfinite"]) > 0) | finite_values(sequences["logp_sum"]).isna()]
    if len(broken):
        where = ", ".join(f"{count} of {family}" for family, count in
                          broken.drop_duplicates("probe_id")["family"].value_counts(sort=False).items())  # fmt: skip
        told = (
            f"{counted(broken['probe_id'].nunique(), 'probe')} with NaN or infinite tokens, from step "
            f"{broken['step'].min()} on ({where})"
        )
        problems.append((told, _LOG_REMEDIES["NaN"]))
    cut = int((finite_values(probes["n_cut"]) > 0).sum())
    if len(probes) and cut / len(probes) > THRESHOLDS["truncated_share"]:
        problems.append((f"{cut} of {counted(len(probes), 'probe')} truncated", _LOG_REMEDIES["truncated"]))
    counts = probes.groupby("family", sort=False)["prompt_id"].nunique()
    few = counts[counts < THRESHOLDS["fewest_prompts"]]
    if len(few):
        named = f" ({', '.join(map(str, few.index))})" if len(few) < len(counts) or len(few) <= 3 else ""
        told = (
            f"fewer than {THRESHOLDS['fewest_prompts']:g} prompts in {len(few)} of "
            f"{counted(len(counts), 'family', 'families')}{named}: {few.min()} in the smallest"
        )
        problems.append((told, _LOG_REMEDIES["few"]))
    form = run.meta.get("forms") or {}
    if form.get("rows") and form.get("prompts") not in ("both", form["rows"]):
        told = f"the training rows are {form['rows']}, and the prompts of the probes {form.get('prompts')}"
        problems.append((told, _LOG_REMEDIES["form"]))
    steps = sequences["step"].nunique()
    if steps < 2:
        problems.append((f"{'one' if steps else 'no'} observation: nothing to compare", _LOG_REMEDIES["one"]))
    return problems
