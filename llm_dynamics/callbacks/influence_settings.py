"""What the influence callback explains, and how: its options, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import pandas as pd

from llm_dynamics.callbacks.influence_maps import AUTO, pick_map_probes
from llm_dynamics.callbacks.probe_account import DETAILS
from llm_dynamics.influence import RULES
from llm_dynamics.options import Count, Limit, check_options

DEFAULT_TARGETS = ("chosen", "rejected")


@dataclass(frozen=True)
class InfluenceSettings:
    """Options of `InfluenceCallback`.

    Attributes:
        every: Optimizer steps between explained ones.
        rule: "midpoint", "start" (the classical first-order account) or "gauss2", see `account_for_change`.
        detail: "family" (means over families, cheapest), "probe" or "token" (rows for each, one directional derivative
            per cause).
        families: Families to account for; None: all.
        training_tokens: Families and probe ids whose training tokens are told apart, at one gradient and one pass over
            the training batch each; None: "chosen" and "rejected" where they are accounted for, else the first family.
            () for none. For these families, `own_share` says what examples with a probe's own prompt did.
        tokens_every: Tell training tokens apart at the first step and every `tokens_every * every` steps; 1 for all
            that are explained, the last among them.
        map_probes: Probes for which the M x L influence between their tokens and the tokens of the training example
            that moved them most is kept, at the steps of `tokens_every`; one gradient and one pass over that example
            per probe token. Probe ids; or how many, in turn from "chosen" and "rejected" (else from the first family);
            or "auto": one of each. Of their tokens `influence_tokens` is kept too, whatever the detail.
        split_by: "sign" of c_l (causes `up`, `down`), "role" (chosen/rejected, correct/wrong, ...) or a labelling.
        history: "total", or "split": momentum is itself split by the labels of the past tokens that filled it, which
            takes the tap at every step. Checkpoints keep that split; a run resumed from one without it leaves what is
            older in `momentum`, and its accounts say so.
        compare_gradient: Also measure what the best multiple of -grad explains (`accounts.explained_by_gradient`), at
            one directional derivative.

    Raises:
        ValueError: For a value that is not allowed; the message says which are.
    """

    every: Count = 100
    rule: Annotated[str, Limit(choices=RULES)] = "midpoint"
    detail: Annotated[str, Limit(choices=DETAILS)] = "family"
    families: Sequence[str] | None = None
    training_tokens: Sequence[str] | None = None
    tokens_every: Count = 1
    map_probes: Annotated[Sequence[str] | int | str, Limit(least=0, choices=(AUTO,))] = ()
    split_by: Annotated[str | Callable[..., Any], Limit(choices=("sign", "role"))] = "sign"
    history: Annotated[str, Limit(choices=("total", "split"))] = "total"
    compare_gradient: bool = False

    def __post_init__(self) -> None:
        check_options(self)

    def of_probes(self, probes: pd.DataFrame) -> InfluenceSettings:
        """Return the settings with families and targets filled in for a probe set.

        Args:
            probes: The probes table: probe_id, family.

        Returns:
            The settings; `map_probes` is a list of probe ids.

        Raises:
            ValueError: For families or probes that are not watched.
        """
        watched = list(dict.fromkeys(probes["family"]))
        families = watched if self.families is None else list(self.families)
        if not families:
            raise ValueError(f"families is empty: name some of {watched}, or None for all")
        defaults = [family for family in DEFAULT_TARGETS if family in families] or families[:1]
        targets = defaults if self.training_tokens is None else self.training_tokens
        mapped = pick_map_probes(self.map_probes, probes, defaults)
        accounted = set(probes.loc[probes["family"].isin(families), "probe_id"])
        for name, given, allowed in (
            ("families", families, set(watched)),
            ("training_tokens", targets, set(families) | accounted),
            ("map_probes", mapped, accounted),
        ):
            if missing := [item for item in given if item not in allowed]:
                raise ValueError(f"{name}: {missing} are not accounted for; those that are: {sorted(allowed)[:20]}")
        return replace(self, families=families, training_tokens=list(targets), map_probes=mapped)

    @property
    def mapped(self) -> Sequence[str]:
        """Ids of the probes whose maps are kept, of settings that `of_probes` returned."""
        assert not isinstance(self.map_probes, int | str)
        return self.map_probes

    def describe(self) -> dict[str, Any]:
        """Return what `meta.json` says of them."""
        named = {name: value for name, value in vars(self).items() if name != "split_by"}
        return named | {"split_by": self.split_by if isinstance(self.split_by, str) else "custom"}

    def explains(self, step: int, max_steps: int) -> bool:
        """Tell whether optimizer step `step`, counted from 1, is explained: the first, the last, and every `every`."""
        return step == 1 or step % self.every == 0 or step >= max_steps > 0

    def tells_tokens(self, step: int) -> bool:
        """Tell whether training tokens are told apart at the explained step `step`."""
        return step == 1 or self.tokens_every == 1 or step % (self.every * self.tokens_every) == 0
