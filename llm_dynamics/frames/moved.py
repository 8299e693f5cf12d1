"""How far each family moved over one run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from llm_dynamics.frames.order import ARGMAX, argmax_of, ordered
from llm_dynamics.frames.statistics import read_sums
from llm_dynamics.runlog import RunLog

MOVED_COLUMNS = ("family", "n_probes", "start", "end", "delta", "delta_per_token", "n_nonfinite")


def what_moved(run: RunLog) -> pd.DataFrame:
    """Tell how far each family moved from the first to the last observation.

    Args:
        run: The run log.

    Returns:
        One row per family in canonical order and a last row of the greedy tokens, named as in `family_curves`:
        `argmax (chosen prefix)` along the prefixes of the chosen probes, `argmax` of all probes where no family is
        called chosen. Columns: `family`; `n_probes`, probes of the family; `start`, `end` and `delta`, means over
        probes of the summed log-prob (nats) at the first observation, at the last, and of the change;
        `delta_per_token`, mean over probes of change / tokens (nats per token); `n_nonfinite`, probes whose start or
        end is NaN, infinite or missing. Those are left out of the means. Empty where nothing was observed.
    """
    rows = [moved_row(family, probes) for family, probes in moved_probes(read_sums(run, ["logp", "argmax_logp"]))]
    return pd.DataFrame(rows, columns=list(MOVED_COLUMNS))


def moved_probes(sequences: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the probes of each family, in canonical order and then the greedy tokens, with their first and last values.

    Args:
        sequences: Columns `step`, `probe_id`, `prompt_id`, `family`, `n_tokens`, `logp_sum` and `argmax_logp_sum`.

    Yields:
        The family, and a frame by `probe_id` of every probe that was ever seen: `prompt_id`, `n_tokens`, `start`,
        `end` (nats, NaN where the probe is missing there), `change` and `kept`: whether both are finite.
    """
    if sequences.empty:
        return
    columns = ["logp_sum", "argmax_logp_sum"]
    by_probe = sequences.sort_values("step").set_index("probe_id")
    start = by_probe.loc[by_probe["step"] == by_probe["step"].min(), columns].add_suffix("_start")
    end = by_probe.loc[by_probe["step"] == by_probe["step"].max(), columns].add_suffix("_end")
    # every probe that was ever seen has a row, so that one that is missing at an end is counted as left out
    probes = by_probe.groupby(level=0)[["family", "prompt_id", "n_tokens"]].first().join([start, end])

    def ends(own: pd.DataFrame, column: str) -> pd.DataFrame:
        frame = own[["prompt_id", "n_tokens"]].assign(start=own[f"{column}_start"], end=own[f"{column}_end"])
        kept = np.isfinite(frame["start"]) & np.isfinite(frame["end"])
        return frame.assign(change=frame["end"] - frame["start"], kept=kept)

    label, greedy = ends(probes, "logp_sum"), ends(probes, "argmax_logp_sum")
    for family in ordered(probes["family"]):
        yield family, label[probes["family"] == family]
    chosen = probes["family"] == "chosen"
    yield (argmax_of("chosen"), greedy[chosen]) if chosen.any() else (ARGMAX, greedy)


def moved_row(family: str, probes: pd.DataFrame) -> tuple[str, int, float, float, float, float, int]:
    """Return the row of `what_moved` of one family; see `MOVED_COLUMNS` and `moved_probes`."""
    kept = probes[probes["kept"]]
    return (
        family,
        len(probes),
        float(kept["start"].mean()),
        float(kept["end"].mean()),
        float(kept["change"].mean()),
        float((kept["change"] / kept["n_tokens"]).mean()),
        len(probes) - len(kept),
    )


def margin_path(run: RunLog) -> tuple[float, float]:
    """Return the margin chosen - rejected at the first and last observation.

    Returns:
        Mean over prompts of the mean summed log-prob of chosen minus that of rejected, nats, as `probe/margin`; over
        the prompts whose margin is finite at both ends, so that the two can be compared.
    """
    frame = read_sums(run, ["logp"])
    pairs = frame[frame["family"].isin(["chosen", "rejected"])]
    values = pairs.assign(logp_sum=pairs["logp_sum"].where(np.isfinite(pairs["logp_sum"])))
    values = values.drop_duplicates(["probe_id", "step"])
    by_probe = values.set_index(["family", "prompt_id", "probe_id", "step"])["logp_sum"].unstack("step")
    ends = by_probe.reindex(columns=[frame["step"].min(), frame["step"].max()]).dropna()
    sides = ends.groupby(["family", "prompt_id"]).mean()
    chosen, rejected = (sides[sides.index.get_level_values("family") == family] for family in ("chosen", "rejected"))
    margins = (chosen.droplevel("family") - rejected.droplevel("family")).dropna().to_numpy()  # (Q, 2)
    if not len(margins):
        return float("nan"), float("nan")
    before, after = margins.mean(axis=0)
    return float(before), float(after)
