"""Hold the paper's claims against the runs of `train.py`: what it says, what was seen, in how many seeds.

    python analysis/reproduce/claims.py runs/reproduce --out analysis/results/reproduce

`<out>/claims.csv` has one row per claim and seed with the number that decides it; `<out>/curves.csv` the curve of every
family; the table is printed as Markdown.

Every number is a mean over the watched prompts of changes of summed log-probs (nats), with a 95% bootstrap interval
over prompts (2,000 draws). A claim *holds* in a seed if the means say so; it is *reproduced* if it holds in every seed,
*not* if in none, *depends* otherwise; *unsure*, whatever the means say, where every seed's interval includes 0. Claims
are those of Ren and Sutherland (arXiv 2407.10490), sections 3.2, 3.3 and 4.3.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from llm_dynamics import load_run
from llm_dynamics.frames import family_curves, prompt_interval
from llm_dynamics.runlog import RunLog

ARGMAX = "argmax (chosen prefix)"
REPHRASES = ("chosen_semantic", "rejected_semantic", "chosen_format", "rejected_format")


class NotWatchedError(LookupError):
    """A claim is about a family that the runs do not watch."""


@dataclass(frozen=True)
class Finding:
    """What one seed says of a claim.

    Attributes:
        holds: Whether its means bear the claim out.
        seen: The numbers in words.
        value: The number that decides, nats.
        low: Lower end of its bootstrap interval over prompts.
        high: Upper end.
    """

    holds: bool
    seen: str
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, holds: bool, seen: str, values: pd.Series) -> Finding:
        """Return a finding whose number is the mean of `values`, one for each prompt."""
        interval = prompt_interval(values, pd.Series(values.index, index=values.index))
        return cls(bool(holds), seen, float(values.mean()), *interval)


class Chain:
    """The four runs of one seed."""

    def __init__(self, folder: Path) -> None:
        self.runs: dict[str, RunLog] = {
            name: load_run(folder / name) for name in ("sft", "dpo", "extend", "extend_dpo")
        }

    def changes(self, run: str, family: str, start: int = 0, end: int = -1) -> pd.Series:
        """Return the change of each prompt's probe of a family between two observations, counted as in a list."""
        frame, column = self.runs[run].sequences, "logp_sum"
        if family == ARGMAX:
            family, column = "chosen", "argmax_logp_sum"
        if not (frame["family"] == family).any():
            raise NotWatchedError(family)
        values = frame[frame["family"] == family].pivot_table(column, "prompt_id", "step")
        return values.iloc[:, end] - values.iloc[:, start]

    def families(self, run: str) -> list[str]:
        """Return the families that were watched."""
        return list(dict.fromkeys(self.runs[run].probes["family"]))

    def curve(self, run: str, family: str) -> np.ndarray:
        """Return the mean change of a family since the first observation, at each observation."""
        frame = family_curves(self.runs[run], delta=True)
        own = frame[frame["family"] == family]
        if own.empty:
            raise NotWatchedError(family)
        return own.sort_values("step")["mean"].to_numpy()


# ---- the claims -----------------------------------------------------------------------------------------------------


def _rises_throughout(chain: Chain) -> Finding:
    curve = chain.curve("sft", "chosen")
    rising = int((np.diff(curve) > 0).sum())
    seen = f"{curve[-1]:+.1f}; rose in {rising} of {len(curve) - 1} intervals"
    return Finding.of(rising == len(curve) - 1, seen, chain.changes("sft", "chosen"))


def _bell(chain: Chain, family: str) -> tuple[bool, float, float, int]:
    curve = chain.curve("sft", family)
    peak = int(curve.argmax())
    return 0 < peak < len(curve) - 1, curve[peak], curve[-1] - curve[peak], peak


def _rejected_bell(chain: Chain) -> Finding:
    holds, rise, fall, peak = _bell(chain, "rejected")
    seen = f"{rise:+.1f} up to step {chain.runs['sft'].observed_steps[peak]}, then {fall:+.1f}"
    return Finding.of(holds, seen, chain.changes("sft", "rejected", start=peak))


def _rephrases_bell(chain: Chain) -> Finding:
    present = [family for family in REPHRASES if family in chain.families("sft")]
    if not present:
        raise NotWatchedError("rephrases")
    bells = {family: _bell(chain, family) for family in present}
    n_bells = sum(bell[0] for bell in bells.values())
    seen = f"{n_bells} of {len(present)}: " + ", ".join(
        f"{family} {rise:+.1f} then {fall:+.1f}" for family, (_, rise, fall, _) in bells.items()
    )
    falls = [chain.changes("sft", family, start=bell[3]) for family, bell in bells.items()]
    return Finding.of(n_bells == len(present), seen, sum(falls) / len(falls))


def _moves(run: str, family: str, sign: int) -> Callable[[Chain], Finding]:
    def claim(chain: Chain) -> Finding:
        changes = chain.changes(run, family)
        return Finding.of(sign * changes.mean() > 0, f"{changes.mean():+.1f}", changes)

    return claim


def _falls_fastest(chain: Chain) -> Finding:
    means = {family: chain.changes("dpo", family).mean() for family in chain.families("dpo")}
    rejected = means.pop("rejected")
    next_one = min(means, key=lambda family: means[family])
    seen = f"{rejected:+.1f}; next {next_one} {means[next_one]:+.1f}"
    gap = chain.changes("dpo", "rejected") - chain.changes("dpo", next_one)
    return Finding.of(rejected < min(0.0, means[next_one]), seen, gap)


def _most_fall(chain: Chain) -> Finding:
    others = [family for family in chain.families("dpo") if family not in ("chosen", "rejected")]
    changes = [chain.changes("dpo", family) for family in others]
    fell = sum(own.mean() < 0 for own in changes)
    return Finding.of(
        fell >= 0.8 * len(others), f"{fell} of {len(others)} other families fell", sum(changes) / len(others)
    )


def _chosen_falls_more_slowly(chain: Chain) -> Finding:
    chosen, rejected = (chain.changes("dpo", family) for family in ("chosen", "rejected"))
    seen = f"chosen {chosen.mean():+.1f}, rejected {rejected.mean():+.1f}"
    return Finding.of(rejected.mean() < chosen.mean() < 0, seen, chosen)


def _only_argmax_rises(chain: Chain) -> Finding:
    greedy = chain.changes("dpo", ARGMAX)
    rose = [family for family in chain.families("dpo") if chain.changes("dpo", family).mean() > 0]
    seen = f"argmax {greedy.mean():+.1f}; families that rose: {', '.join(rose) or 'none'}"
    return Finding.of(greedy.mean() > 0 and not rose, seen, greedy)


def _smaller_drops(chain: Chain) -> Finding:
    families = chain.families("dpo")
    gains = {family: chain.changes("extend_dpo", family) - chain.changes("dpo", family) for family in families}
    smaller = sum(gain.mean() > 0 for gain in gains.values())
    seen = f"{smaller} of {len(families)} families fall less or rise more; " + ", ".join(
        f"{family} {chain.changes('dpo', family).mean():+.1f} against {chain.changes('extend_dpo', family).mean():+.1f}"
        for family in ("chosen", "rejected")
    )
    return Finding.of(smaller == len(families), seen, sum(gains.values()) / len(families))


def _argmax_rises_less(chain: Chain) -> Finding:
    plain, extended = (chain.changes(run, ARGMAX) for run in ("dpo", "extend_dpo"))
    return Finding.of(
        extended.mean() < plain.mean(), f"{plain.mean():+.1f} against {extended.mean():+.1f}", extended - plain
    )


def _extend_lifts_rejected(chain: Chain) -> Finding:
    plain, extended = (chain.changes(run, "rejected") for run in ("sft", "extend"))
    seen = f"{plain.mean():+.1f} in SFT, {extended.mean():+.1f} in extended SFT"
    return Finding.of(extended.mean() > plain.mean(), seen, extended - plain)


CLAIMS: tuple[tuple[str, str, Callable[[Chain], Finding]], ...] = (
    ("SFT", "chosen rises throughout", _rises_throughout),
    ("SFT", "rejected first rises, then falls", _rejected_bell),
    ("SFT", "rephrases first rise, then fall", _rephrases_bell),
    ("SFT", "other_train rises", _moves("sft", "other_train", +1)),
    ("SFT", "human_random falls", _moves("sft", "human_random", -1)),
    ("SFT", "ungrammatical falls", _moves("sft", "ungrammatical", -1)),
    ("SFT", "random falls", _moves("sft", "random", -1)),
    ("DPO", "rejected falls fastest", _falls_fastest),
    ("DPO", "nearly all others fall", _most_fall),
    ("DPO", "chosen falls too, more slowly", _chosen_falls_more_slowly),
    ("DPO", "only argmax rises", _only_argmax_rises),
    ("extend", "SFT on both lifts rejected more", _extend_lifts_rejected),
    ("extend", "all drops of DPO are smaller after it", _smaller_drops),
    ("extend", "argmax rises less after it", _argmax_rises_less),
)
"""Stage, the paper's statement, and how it is decided."""


def judge_claims(folder: Path) -> pd.DataFrame:
    """Return one row per claim and seed.

    Args:
        folder: The folder that `train.py` wrote, with `seed<n>` folders.

    Returns:
        Columns `stage`, `claim`, `seed`, `holds`, `value`, `low`, `high` (nats) and `seen`. A claim about a family that
        is not watched is left out.

    Raises:
        ValueError: If there is no finished chain in the folder.
    """
    rows = []
    for seed, chain in chains(folder).items():
        for stage, claim, decide in CLAIMS:
            try:
                finding = decide(chain)
            except NotWatchedError:
                continue
            rows.append({"stage": stage, "claim": claim, "seed": seed, **vars(finding)})
    return pd.DataFrame(rows)


def chains(folder: Path) -> dict[int, Chain]:
    """Return the finished chains by seed.

    Raises:
        ValueError: If there is none.
    """
    found = {
        int(part.name.removeprefix("seed")): Chain(part)
        for part in sorted(folder.glob("seed*"))
        if (part / "extend_dpo" / "finished").exists()
    }
    if not found:
        raise ValueError(
            f"{folder} has no finished chain (seed<n>/extend_dpo/finished); run analysis/reproduce/train.py"
        )
    return found


def verdict(holds: Sequence[bool], clear: Sequence[bool]) -> str:
    """Return what all seeds together say: whether the claim holds in each, and whether its direction is clear there."""
    if not any(clear):
        return "unsure"
    return "reproduced" if all(holds) else "depends" if any(holds) else "not"


def is_clear(frame: pd.DataFrame) -> pd.Series:
    """Tell of each row whether the interval of its number leaves no doubt of the direction: it does not include 0."""
    return (frame["low"] > 0) | (frame["high"] < 0)


def as_markdown(frame: pd.DataFrame) -> str:
    """Return the table of claims."""
    lines = [
        "| | the paper says | seen, by seed (nats) | the number that decides [95%], by seed | verdict |",
        "|---|---|---|---|---|",
    ]
    for (stage, claim), rows in frame.groupby(["stage", "claim"], sort=False):
        seen = "; ".join(f"{row.seed}: {row.seen}" for row in rows.itertuples())
        numbers = "; ".join(f"{row.value:+.1f} [{row.low:+.1f}, {row.high:+.1f}]" for row in rows.itertuples())
        clear = is_clear(rows)
        counts = f"holds in {rows['holds'].sum()} of {len(rows)}, clear in {clear.sum()}"
        said = f"**{verdict(rows['holds'], clear)}** ({counts})"
        lines.append(f"| {stage} | {claim} | {seen} | {numbers} | {said} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="what train.py wrote")
    parser.add_argument("--out", type=Path, help="folder for claims.csv and curves.csv")
    options = parser.parse_args(arguments)
    frame = judge_claims(options.folder)
    print(as_markdown(frame))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        frame.round(4).to_csv(options.out / "claims.csv", index=False)
        curves = [
            family_curves(run, delta=delta).assign(seed=seed, run=name, kind=kind)
            for seed, chain in chains(options.folder).items()
            for name, run in chain.runs.items()
            for kind, delta in (("log-prob", False), ("change", True))
        ]
        pd.concat(curves).round(4).to_csv(options.out / "curves.csv", index=False)


if __name__ == "__main__":
    main()
