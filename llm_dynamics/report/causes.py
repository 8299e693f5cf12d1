"""Why a family moved: the causes of its change, added up over the explained optimizer steps."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from llm_dynamics.report.families import ordered
from llm_dynamics.runlog import RunLog

REST = "rest"
UNACCOUNTED = "unaccounted"
"""What is missing where the shares of a log do not add up to the measured change."""
NEGLIGIBLE = 0.005
"""Causes below this part of the largest one share a bar."""

OWN, OTHERS = "own", "others"
"""Parts of a cause that came from training examples with the probe's own prompt, and with other prompts."""

Names = Mapping[str, str]
"""Names for people by cause: what `cause_names` returns."""

_FIRST = ("up", "down", "momentum", "momentum_up", "momentum_down")
_LAST = ("other", "precision", "decay", "rounding", "step", "remainder")


@dataclass(frozen=True, eq=False)
class Cause:
    """One bar of a waterfall.

    Attributes:
        name: The cause as logged, such as `down`; `rest` where several negligible ones were gathered.
        part: `own` or `others` where the cause is split by prompt, else empty.
        share: Its share of the change, nats: summed over the explained steps, mean over the family's probes.
        by_step: The same for each explained step (S,).
        gathered: The causes gathered in `rest`.
    """

    name: str
    part: str
    share: float
    by_step: np.ndarray
    gathered: tuple[Cause, ...] = ()


@dataclass(frozen=True, eq=False)
class FamilyAccount:
    """The account of one family over the explained steps; S steps.

    Attributes:
        family: The family.
        steps: The explained steps whose numbers are finite, ascending (S,).
        measured: Change of the summed log-prob over these steps, nats, mean over probes; the causes add up to it.
        measured_by_step: The change in each step (S,).
        causes: Its causes in the order of a waterfall, negligible ones gathered at the end.
        n_probes: Probes that the means are taken over, at most.
        n_probes_left_out: Probes left out of the mean at some step because a number of theirs is not finite, at most.
        n_left_out: Explained steps left out because a number is not finite.
    """

    family: str
    steps: list[int]
    measured: float
    measured_by_step: np.ndarray
    causes: list[Cause]
    n_probes: int
    n_probes_left_out: int
    n_left_out: int

    def merged(self) -> dict[str, list[Cause]]:
        """Return the causes by name, with the parts of each that is split by prompt; gathered ones apart."""
        single = [one for cause in self.causes for one in cause.gathered or (cause,)]
        return {
            name: [cause for cause in single if cause.name == name] for name in dict.fromkeys(c.name for c in single)
        }


def family_accounts(run: RunLog) -> dict[str, FamilyAccount]:
    """Add up the causes of every family over the explained steps.

    A cause with a finite `own_share` in all of them becomes two: from examples with the probe's own prompt, and from
    others. Causes that stay below 0.5 % of the largest, in sum and step by step, are gathered as `rest`.

    Args:
        run: The run log.

    Returns:
        The accounts by family, in canonical order; a family without one finite step is left out. Empty where the run
        has none.
    """
    frame = run.family_influence()
    accounts = ((family, _account(family, frame[frame["family"] == family])) for family in ordered(frame["family"]))
    return {family: account for family, account in accounts if account is not None}


def waterfall_order(causes: Iterable[str]) -> list[str]:
    """Sort causes: pushes by tokens first, momentum, then what is no push; unknown ones between, as they come."""
    known = {cause: place for place, cause in enumerate(_FIRST)}
    known |= {cause: 1000 + place for place, cause in enumerate(_LAST)}
    return sorted(dict.fromkeys(causes), key=lambda cause: known.get(cause, 500))


def cause_names(run: RunLog) -> dict[str, str]:
    """Name the causes for people.

    In DPO all tokens that are pulled up are the chosen responses', so `up` is called after them; where a sign does not
    coincide with one role, it is "tokens pulled up" or "tokens pushed down".

    Args:
        run: The run log.

    Returns:
        Names by cause, for every cause of the run and `rest`.
    """
    examples = run.training_examples
    roles = {
        "up": set(examples.loc[examples["c_sum"] < 0, "role"]),
        "down": set(examples.loc[examples["c_sum"] > 0, "role"]),
    }
    names = {"up": "tokens pulled up", "down": "tokens pushed down"}
    for cause, opposite in (("up", "down"), ("down", "up")):
        if len(roles[cause]) == 1 and not roles[cause] & roles[opposite]:
            names[cause] = f"{next(iter(roles[cause]))} tokens"
    names |= {role: f"{role} tokens" for role in set(examples["role"].dropna()) - names.keys()}
    names |= {f"momentum_{label}": f"momentum of {name}" for label, name in names.items()}
    names |= {
        "momentum": "momentum",
        "decay": "weight decay",
        "other": "other gradient",
        "precision": "precision of the gradient",
        "step": "the whole update",
        UNACCOUNTED: "not accounted for",
        REST: REST,
    }
    return {cause: names.get(cause, cause.replace("_", " ")) for cause in {*run.influence["cause"], *names}}


def _account(family: str, rows: pd.DataFrame) -> FamilyAccount | None:
    bad = ~(np.isfinite(rows["share"]) & np.isfinite(rows["measured"]))
    left_out = set(rows.loc[bad, "step"])
    rows = rows[~rows["step"].isin(left_out)]
    if rows.empty:
        return None
    measured = rows.groupby("step")["measured"].first()
    shares = _by_cause(rows, "share")
    own = _by_cause(rows.dropna(subset=["own_share"]), "own_share")
    measured_in = rows.groupby("cause")["own_share"].agg(lambda values: bool(values.notna().all()))
    causes = []
    for name in waterfall_order(map(str, shares.columns)):
        if measured_in[name]:
            causes += [_cause(name, OWN, own[name]), _cause(name, OTHERS, shares[name] - own[name])]
        else:
            causes.append(_cause(name, "", shares[name]))
    missing = measured - shares.sum(axis=1)
    if missing.abs().max() > 1e-6 * max(shares.abs().max(axis=None), measured.abs().max()):
        causes.append(_cause(UNACCOUNTED, "", missing))
    return FamilyAccount(
        family=family,
        steps=[int(step) for step in measured.index],
        measured=float(measured.sum()),
        measured_by_step=measured.to_numpy(dtype=float),
        causes=_gathered([cause for cause in causes if np.any(cause.by_step)]),
        n_probes=int(rows["n_probes"].fillna(0).max()),
        n_probes_left_out=int(rows["n_nonfinite"].max()),
        n_left_out=len(left_out),
    )


def _by_cause(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """Return a frame of steps by causes; 0 where a cause does not occur in a step."""
    return rows.pivot(index="step", columns="cause", values=value).sort_index().fillna(0.0)


def _cause(name: Hashable, part: str, by_step: pd.Series) -> Cause:
    return Cause(str(name), part, float(by_step.sum()), by_step.to_numpy(dtype=float))


def _gathered(causes: list[Cause]) -> list[Cause]:
    """Put the negligible causes into one, `rest`, at the end; a single one keeps its name."""
    if not causes:
        return causes
    summed = max(abs(cause.share) for cause in causes)
    moved = max(np.abs(cause.by_step).sum() for cause in causes)
    small = [
        cause
        for cause in causes
        if abs(cause.share) < NEGLIGIBLE * summed and np.abs(cause.by_step).sum() < NEGLIGIBLE * moved
    ]
    if len(small) < 2:
        return causes
    by_step = np.sum([cause.by_step for cause in small], axis=0)
    rest = Cause(REST, "", float(by_step.sum()), by_step, tuple(small))
    return [*(cause for cause in causes if cause not in small), rest]


def label_of(cause: Cause, names: Names) -> str:
    """Return the label of a cause: its name for people, and whose prompts its tokens answer."""
    prompts = {OWN: ", own prompt", OTHERS: ", other prompts", "": ""}[cause.part]
    return names.get(cause.name, cause.name) + prompts
