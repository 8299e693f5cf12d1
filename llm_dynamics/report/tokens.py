"""Token detail of a few probes, read part by part so that a long run's token table never lies in memory whole."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from llm_dynamics.report.families import ordered
from llm_dynamics.runlog import RunLog, schema

_COLUMNS = ["step", "probe_id", "position", "token", "logp", "rank", "greedy_token"]


@dataclass(frozen=True)
class TokenHistory:
    """The tokens of one probe over the observations that kept them; S steps, M tokens.

    Attributes:
        probe_id: The probe.
        family: Its family.
        prompt_id: Its prompt's id.
        prompt: Its prompt, as kept in the run log.
        steps: The observed steps, ascending (S,).
        tokens: The response tokens, decoded (M,).
        logp: Their log-probs (S, M), nats; NaN where not finite or not kept.
        rank: Their ranks (S, M), 1 = most likely; 0 where undefined.
        greedy: The most likely token at each prefix (S, M).
    """

    probe_id: str
    family: str
    prompt_id: str
    prompt: str
    steps: list[int]
    tokens: list[str]
    logp: np.ndarray
    rank: np.ndarray
    greedy: list[list[str]]

    @property
    def change(self) -> np.ndarray:
        """Change of each log-prob since the first kept observation (S, M), nats."""
        return self.logp - self.logp[:1]

    @property
    def limit(self) -> float:
        """End of a symmetric colour scale: the 98th percentile of |change|; one token shall not bleach the rest."""
        sizes = np.abs(self.change[np.isfinite(self.change)])
        return float(max(np.quantile(sizes, 0.98), 1e-6)) if sizes.size else 1.0


def read_tokens(run: RunLog, probe_ids: Collection[str]) -> pd.DataFrame:
    """Read the token rows of some probes.

    Args:
        run: The run log; a bad part raises or is left out with a warning, as its `errors` says.
        probe_ids: The probes wanted.

    Returns:
        Rows of the tokens table of these probes, sorted by probe, step and position.

    Raises:
        RunLogError: Where a part is unreadable and the run was opened with `errors="raise"`.
    """
    wanted = pa.array(list(probe_ids), type=pa.string())
    parts = [
        table.filter(pc.is_in(table["probe_id"], value_set=wanted)) for table in run.parts("tokens", columns=_COLUMNS)
    ]
    frame = pa.concat_tables(parts).to_pandas() if parts else schema.TOKENS.empty_table().select(_COLUMNS).to_pandas()
    return frame.sort_values(["probe_id", "step", "position"], ignore_index=True)


def token_histories(run: RunLog, probe_ids: Sequence[str]) -> list[TokenHistory]:
    """Return the token history of each of `probe_ids` that kept tokens, in that order."""
    rows = dict(list(read_tokens(run, probe_ids).groupby("probe_id")))
    about = {row["probe_id"]: row for row in run.probes.to_dict("records")}
    return [_history(about[name], rows[name]) for name in probe_ids if name in rows]


def probes_with_tokens(run: RunLog) -> pd.DataFrame:
    """Return the probes that kept tokens, largest change first.

    Returns:
        Columns `probe_id`, `prompt_id`, `family` and `change` (nats, of the summed log-prob from first to last
        observation; NaN where not finite, and then last).
    """
    newest = next(run.parts("tokens", reversed(run.observed_steps), ["probe_id"]), None)
    kept = set() if newest is None else set(newest["probe_id"].to_pylist())
    frame = run.delta_from_start()
    last = frame[(frame["step"] == frame["step"].max()) & frame["probe_id"].isin(kept)]
    change = last["delta_logp_sum"].where(np.isfinite(last["delta_logp_sum"]))
    probes = last[["probe_id", "prompt_id", "family"]].assign(change=change)
    return probes.sort_values("change", key=np.abs, ascending=False, na_position="last", ignore_index=True)


def pick_heatmap_probe(run: RunLog) -> str | None:
    """Return the probe to show first: the rejected one with tokens kept whose change is largest.

    Where no rejected probe kept tokens, a chosen one; else any; None where no tokens were kept.
    """
    probes = probes_with_tokens(run)
    for family in ("rejected", "chosen"):
        own = probes[probes["family"] == family]
        if not own.empty:
            return str(own["probe_id"].iloc[0])
    return None if probes.empty else str(probes["probe_id"].iloc[0])


def pick_heatmap_probes(run: RunLog, n: int) -> list[str]:
    """Return up to `n` probes worth a look, of different families and prompts, `pick_heatmap_probe` first.

    First every family of that probe's prompt, then one probe of each family still missing, then rejected and chosen
    of the prompts that moved most.
    """
    first = pick_heatmap_probe(run)
    if first is None or n < 1:
        return []
    probes = probes_with_tokens(run)
    prompt = probes.loc[probes["probe_id"] == first, "prompt_id"].iloc[0]
    of_prompt = probes[probes["prompt_id"] == prompt].drop_duplicates("family")
    missing = probes[~probes["family"].isin(of_prompt["family"])].drop_duplicates("family")
    pairs = probes[probes["family"].isin(["chosen", "rejected"])].copy()
    pairs["prompt_rank"] = pairs.groupby("prompt_id")["change"].transform(lambda change: change.abs().max())
    pairs = pairs.sort_values(["prompt_rank", "prompt_id"], ascending=False, na_position="last")
    queue = [first]
    for group in (of_prompt, missing):
        by_family = group.set_index("family")["probe_id"]
        queue += [str(by_family[family]) for family in ordered(by_family.index)]
    queue += [str(name) for name in pairs["probe_id"]] + [str(name) for name in probes["probe_id"]]
    return list(dict.fromkeys(queue))[:n]


def _history(about: Mapping[Hashable, Any], rows: pd.DataFrame) -> TokenHistory:
    table = rows.pivot(index="step", columns="position", values=["logp", "rank", "greedy_token"])
    logp = table["logp"].to_numpy(dtype=float)
    named = rows.drop_duplicates("position").sort_values("position")["token"]
    return TokenHistory(
        probe_id=str(about["probe_id"]),
        family=str(about["family"]),
        prompt_id=str(about["prompt_id"]),
        prompt=str(about["prompt"]),
        steps=[int(step) for step in table.index],
        tokens=[str(token) for token in named],
        logp=np.where(np.isfinite(logp), logp, np.nan),
        rank=np.maximum(table["rank"].fillna(0).to_numpy(dtype=int), 0),
        greedy=table["greedy_token"].fillna("").astype(str).to_numpy().tolist(),
    )
