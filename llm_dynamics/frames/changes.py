"""The change of each probe against its own value: at the start, at a step, or in another run."""

from __future__ import annotations

import numpy as np
import pandas as pd

from llm_dynamics.frames.alignment import align
from llm_dynamics.frames.matching import Sharing
from llm_dynamics.frames.runs import Runs, is_single, named_chains, one_row_per_probe, stacked
from llm_dynamics.frames.statistics import sum_column
from llm_dynamics.runlog import RunLog

FIRST = "first"


def delta(
    runs: Runs | pd.DataFrame,
    baseline: str | float | RunLog = FIRST,
    *,
    statistic: str = "logp",
    probes: Sharing = "same",
) -> pd.DataFrame:
    """Return the change of each probe against its own value.

    `delta = value - baseline`, both sums over the tokens of the response: of log-probs, nats; > 0 means likelier than
    the baseline.

    Args:
        runs: One run, several, chains (see `align`), or a frame that `align` returned.
        baseline: What is subtracted from a probe's value:

            - "first": its value at the first observation of the same run (of the first stage, in a chain);
            - a number: its value at that step of the same run (in an aligned frame, at that position);
            - the name of one of the runs, or another `RunLog`: its value in that run at the same step; of logs, only
              the steps that both observed are kept. The baseline's own rows are left out.
        statistic: A name in `frames.STATISTICS`.
        probes: As for `align`, where the baseline is another run.

    Returns:
        One row per observation and probe: `step` (or `at`, of an aligned frame), `probe_id`, `prompt_id`, `family`,
        `n_tokens`, `value`, `baseline`, `delta`, and `delta_per_token`, delta / n_tokens; a leading `run` where `runs`
        is not a single run log. A probe without a value at the baseline, or with one that is NaN, has a NaN delta;
        infinities are kept. Take means over what is finite.

    Raises:
        ValueError: Where the baseline is no step or run of these, naming those that there are; and as `align` does.

    Example:
        >>> change = delta(load_run("runs/dpo"))  # doctest: +SKIP
        >>> change.groupby(["step", "family"])["delta_per_token"].mean().unstack()  # doctest: +SKIP
    """
    column = sum_column(statistic)
    if isinstance(runs, pd.DataFrame):
        return _of_frame(_checked(runs, column), baseline, column, "at")
    names = list(named_chains(runs))
    if isinstance(baseline, RunLog):
        if not is_single(runs):
            raise ValueError(f"baseline is a RunLog; of several runs, give the name of one: {', '.join(names)}")
        pair = align({"run": runs, "baseline": baseline}, statistic=statistic, probes=probes)
        return _of_frame(pair, "baseline", column, "at").rename(columns={"at": "step"}).drop(columns="run")
    if _names_a_run(baseline, names):
        aligned = align(runs, statistic=statistic, probes=probes)
        return _of_frame(aligned, baseline, column, "at").rename(columns={"at": "step"})
    frame = stacked({name: chain.observations([statistic]) for name, chain in named_chains(runs).items()})
    for name, own in frame.groupby("run", sort=False):
        one_row_per_probe(str(name), own)
    changed = _of_frame(frame, baseline, column, "step")
    return changed.drop(columns="run") if is_single(runs) else changed


def _names_a_run(baseline: str | float | RunLog, names: list[str]) -> bool:
    """Tell whether the baseline is the name of a run rather than a place in each.

    Raises:
        ValueError: For a name that no run has, and where a run is called "first".
    """
    if not isinstance(baseline, str):
        return False
    if baseline == FIRST and baseline in names:
        raise ValueError(f'a run is called {FIRST!r}, which as a baseline means "the first observation"; rename it')
    if baseline != FIRST and baseline not in names:
        raise ValueError(f"baseline is {baseline!r}; allowed: {FIRST!r}, a step, or a run: {', '.join(names)}")
    return baseline != FIRST


def _checked(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    missing = [name for name in ("run", "at", "probe_id", "n_tokens", column) if name not in frame.columns]
    if missing:
        raise ValueError(f"the frame lacks {', '.join(missing)}: `align` did not return it for this statistic")
    return frame


def _of_frame(frame: pd.DataFrame, baseline: str | float | RunLog, column: str, position: str) -> pd.DataFrame:
    names = [str(name) for name in frame["run"].unique()]
    keys = ["run", "probe_id"]
    if _names_a_run(baseline, names):
        base, keys = frame[frame["run"] == baseline], [position, "probe_id"]
        frame = frame[frame["run"] != baseline]
    elif baseline == FIRST:
        base = frame[frame[position] == frame.groupby("run")[position].transform("min")]
    else:
        base = frame[frame[position] == baseline]
        unseen = [name for name in names if not (base["run"] == name).any()]
        if unseen:
            seen = ", ".join(f"{place:g}" for place in frame.loc[frame["run"] == unseen[0], position].unique()[:20])
            raise ValueError(f"run {unseen[0]!r} was not observed at {position} {baseline}; observed: {seen}")
    base = base[[*keys, column]].rename(columns={column: "baseline"})
    merged = frame.rename(columns={column: "value"}).merge(base, on=keys, how="left", validate="many_to_one")
    with np.errstate(invalid="ignore"):
        merged["delta"] = merged["value"] - merged["baseline"]
    merged["delta_per_token"] = merged["delta"] / merged["n_tokens"]
    about = ["run", position, "probe_id", "prompt_id", "family", "n_tokens"]
    return merged[[*about, "value", "baseline", "delta", "delta_per_token"]]
