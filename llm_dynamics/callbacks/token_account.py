"""The tables of training tokens: what each of them did to a family or a probe in a finished step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from llm_dynamics.callbacks.finished_step import FinishedStep
from llm_dynamics.callbacks.probe_account import REMAINDER
from llm_dynamics.callbacks.sharding import gather_frames, on_every_process, sum_over_processes, union_over_processes
from llm_dynamics.callbacks.training_examples import TrainingExamples, describe_examples
from llm_dynamics.influence import MicroBatch, TokenInfluence, influence_of_training_tokens, inner_products
from llm_dynamics.influence.tape import Labelling
from llm_dynamics.influence.update import PRECISION

_ADDS_UP = 0.01
"""Part of the sum of absolute shares by which tokens may miss their label's share before the account says so."""


@dataclass(frozen=True)
class TokenAccount:
    """Training tokens of a step over all processes.

    Attributes:
        examples: Rows of `schema.TRAINING_EXAMPLES`, step excepted; None where no tables were asked for.
        tokens: Rows of `schema.TRAINING_TOKENS`, likewise.
        maps: Rows of `schema.INFLUENCE_MAPS`, or None where no probe asked for one.
        own: By family and label of tokens: what examples with the probes' own prompts did to the family's mean, nats.
        missed: By target and label: the label's part of the update less the shares of its tokens, nats. Not zero where
            the gradient of training is not that of the loss at the weights in float32.
        size: By target and label: sum of the absolute shares of its tokens, nats.
        replay_error: Largest difference between a replayed log-prob and the one in training, nats.
    """

    examples: pd.DataFrame | None
    tokens: pd.DataFrame | None
    maps: pd.DataFrame | None
    own: Mapping[tuple[str, str], float]
    missed: Mapping[tuple[str, str], float]
    size: Mapping[tuple[str, str], float]
    replay_error: float

    def note(self, *, carried: bool) -> str | None:
        """Say where training tokens do not add up to their labels, unless the difference is `carried` in the table."""
        off = [key for key, missed in self.missed.items() if abs(missed) > _ADDS_UP * self.size[key]]
        if carried or not off:
            return None
        target, label = max(off, key=lambda key: abs(self.missed[key]))
        return (
            f"the shares of training tokens in {target} add up to `{label}` less {self.missed[target, label]:.3g} "
            "nats: the gradient that was used is not that of the loss in float32 (lower precision, a hook on a weight "
            "or a layer, or a model that is random)"
        )

    @property
    def tables(self) -> dict[str, pd.DataFrame | None]:
        """The tables by name."""
        return {"training_examples": self.examples, "training_tokens": self.tokens, "influence_maps": self.maps}


class TokenAccountant:
    """Accounts for a step by its training tokens.

    Args:
        step: The step.
        roles: Names the role of training examples.
        prompts: Prompt id of every probe prompt, by its token ids.
        decode: Text of token ids.
        temperature: What the loss divides logits by.
        row_of: Row of the data set that has these token ids.
    """

    def __init__(
        self,
        step: FinishedStep,
        roles: Labelling,
        prompts: Mapping[tuple[int, ...], str],
        decode: Callable[[list[int]], str],
        temperature: float,
        row_of: Callable[[list[int]], int | None],
    ) -> None:
        self.step = step
        self.temperature = temperature
        self.replay_error = 0.0
        self._counts = [int(batch.has_loss.sum()) for batch in step.tape.batches]
        self.local: TrainingExamples = describe_examples(
            step.tape.batches, roles, prompts, decode, n_processes=step.accelerator.num_processes, row_of=row_of
        )

    def account(
        self,
        families: Sequence[str],
        probes: Sequence[str] = (),
        map_probes: Sequence[str] = (),
        *,
        tables: bool = True,
    ) -> TokenAccount:
        """Return the tables.

        Args:
            families: Families whose training tokens, and own shares, are told.
            probes: Probes whose training tokens are told.
            map_probes: Probes whose influence maps are drawn, against the training example that moved them most.
            tables: Tell training tokens; else only the own shares, which cost nothing unless a probe's prompt is in
                the batch.
        """
        step = self.step
        targets = {(family, "family"): partial(step.family_mean, family) for family in families}
        targets |= {(probe, "probe"): partial(step.probe_sum, probe) for probe in dict.fromkeys([*probes, *map_probes])}
        tokens, maps = [], []
        labels = union_over_processes(step.tape.parts) if tables else []
        parts = {label: step.update.parts.get(label, {}) for label in labels}
        whole: dict[tuple[str, str], float] = {}
        added: dict[tuple[str, str], np.ndarray] = {}
        for (target, kind), weights in targets.items() if tables else ():
            gradient = step.gradient(weights)
            whole |= {(target, label): share for label, share in inner_products(gradient, parts).items()}
            shares = self._influence(step.tape.batches, gradient).shares
            added |= {(target, label): both for label, both in self._added_up(labels, shares).items()}
            frame = self.local.tokens.assign(target=target, kind=kind, share=shares.numpy())
            tokens.append(frame)
            if kind == "probe" and target in map_probes:
                maps.append(self._map(target, frame))
        sums = dict(zip(added, sum_over_processes(np.array(list(added.values()))), strict=True))
        return TokenAccount(
            examples=self._numbered([self.local.examples]) if tables else None,
            tokens=self._numbered(tokens) if tokens else None,
            maps=self._numbered(maps) if maps else None,
            own=self._own_shares(families),
            missed={key: share - float(sums[key][0]) for key, share in whole.items()},
            size={key: float(both[1]) for key, both in sums.items()},
            replay_error=max(on_every_process(self.replay_error)),
        )

    def _influence(self, batches: Sequence[MicroBatch], gradient: Mapping[str, Tensor]) -> TokenInfluence:
        step = self.step
        found = influence_of_training_tokens(
            step.model,
            step.split,
            batches,
            step.before,
            step.update.per_gradient,
            gradient,
            temperature=self.temperature,
            n_processes=step.accelerator.num_processes,
        )
        self.replay_error = max(self.replay_error, found.replay_error)
        return found

    def _own_shares(self, families: Sequence[str]) -> dict[tuple[str, str], float]:
        step, examples = self.step, self.local.examples
        labels = union_over_processes(step.tape.parts)
        own = {(family, label): 0.0 for family in families for label in labels}
        for family in families:
            for prompt in union_over_processes(examples["prompt_id"].dropna()):
                gradient = step.gradient(partial(step.family_mean, family, prompt))
                mine = examples.loc[examples["prompt_id"] == prompt, "example"].tolist()
                for batch in step.tape.batches:
                    for label, share in self._shares_by_label(batch, mine, gradient).items():
                        if (family, label) in own:  # a label may have no tokens in the whole step
                            own[family, label] += share
        total = sum_over_processes(np.array(list(own.values())))
        return dict(zip(own, total.tolist(), strict=True))

    def _shares_by_label(
        self, batch: MicroBatch, examples: Sequence[int], gradient: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Return what some examples did to a target, by the label that their tokens have in the whole micro-batch."""
        alone = restricted([batch], examples)
        if not alone:
            return {}
        shares = self._influence(alone, gradient).shares
        kept = batch.has_loss & is_among(batch.example, examples)
        return {label: float(some.sum()) for label, some in self._by_label(batch, kept, shares).items()}

    def _added_up(self, labels: Sequence[str], shares: Tensor) -> dict[str, np.ndarray]:
        """Return the sum of the shares of all local tokens, and of their absolute values, by label."""
        sums = {label: np.zeros(2) for label in labels}
        for batch, mine in zip(self.step.tape.batches, shares.split(self._counts), strict=True):
            for label, some in self._by_label(batch, batch.has_loss, mine).items():
                if label in sums:  # a label may have no tokens in the whole step
                    sums[label] += [float(some.sum()), float(some.abs().sum())]
        return sums

    def _by_label(self, batch: MicroBatch, kept: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """Return the shares of the tokens `kept` (B, S), in their order, by label."""
        labelling = self.step.tape.labelling
        assert labelling is not None
        return {label: shares[mask[kept].cpu()] for label, mask in labelling(batch).items()}

    def _map(self, probe: str, influence: pd.DataFrame) -> pd.DataFrame:
        """Return M x L shares of a probe's tokens and the tokens of the example, on any process, that moved it most."""
        step = self.step
        by_example = influence.groupby("example")["share"].sum().abs()
        strongest = on_every_process(float(by_example.max()) if len(by_example) else -1.0)
        rows = [pd.DataFrame({"m": [], "l": [], "share": []})]
        if max(strongest) < 0:  # a step whose loss has no tokens, as of groups with equal rewards
            return rows[0].assign(probe_id=probe, example=0)
        here = strongest.index(max(strongest)) == step.accelerator.process_index
        example = int(by_example.index[int(by_example.argmax())]) if here else -1
        batches = restricted(step.tape.batches, [example])
        positions = influence.loc[influence["example"] == example, "position"].to_numpy()
        for m in range(max(on_every_process(self._length_of(probe)))):
            gradient = step.gradient(partial(self._token_of, probe, m))
            if here:
                shares = torch.cat([self._influence([batch], gradient).shares for batch in batches])
                rows.append(pd.DataFrame({"m": m, "l": positions, "share": shares.numpy()}))
        return pd.concat(rows, ignore_index=True).assign(probe_id=probe, example=example)

    def _length_of(self, probe: str) -> int:
        here = (self.step.table["probe_id"] == probe).to_numpy().nonzero()[0]
        return len(self.step.encoded[here[0]].response_ids) if len(here) else 0

    def _token_of(self, probe: str, m: int) -> Tensor:
        weights = self.step.probe_sum(probe)
        places = weights.nonzero()[:, 0]
        only = torch.zeros_like(weights)
        only[places[m : m + 1]] = 1.0
        return only

    def _numbered(self, frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
        """Stack frames of all processes, with examples counted over the global batch."""
        index = self.step.accelerator.process_index
        sizes = np.zeros(self.step.accelerator.num_processes)
        sizes[index] = sum(int(batch.example.max()) + 1 for batch in self.step.tape.batches[-1:])
        offset = int(sum_over_processes(sizes)[:index].sum())
        frame = pd.concat(frames, ignore_index=True)
        return gather_frames(frame.assign(example=frame["example"] + offset, order=index), "order")


def with_tokens(influence: pd.DataFrame, tokens: TokenAccount, *, coarse: bool) -> pd.DataFrame:
    """Add to the account of families what is known of their training tokens.

    Args:
        influence: Rows of `schema.INFLUENCE` of whole families, step excepted.
        tokens: The tokens.
        coarse: Carry what the tokens of each label miss of its share as a cause of its own, `precision`: the share of
            a label is then the sum of its tokens' shares.

    Returns:
        The rows, with `own_share`.
    """
    keys = list(zip(influence["family"], influence["cause"], strict=True))
    own = pd.Series([tokens.own.get(key) for key in keys], index=influence.index, dtype=object)  # None: not measured
    influence = influence.assign(own_share=own)
    told = {family for family, _ in tokens.missed}
    if not coarse:
        return influence
    missed = pd.Series([tokens.missed.get(key, 0.0) for key in keys], index=influence.index)
    influence["share"] -= missed
    rows = []
    for family, group in influence.groupby("family", sort=False):
        carried = group[group["cause"] == REMAINDER].assign(cause=PRECISION, share=missed[group.index].sum())
        rows += [group[:-1], carried, group[-1:]] if family in told else [group]
    return pd.concat(rows, ignore_index=True)


def restricted(batches: Sequence[MicroBatch], examples: Sequence[int]) -> list[MicroBatch]:
    """Return the micro-batches with only some examples' losses: whole, where their dropout must be drawn again.

    Args:
        batches: The micro-batches.
        examples: Which examples' coefficients to keep.
    """
    kept = []
    for batch in batches:
        alone = replace(batch, c=batch.c.masked_fill(~is_among(batch.example, examples), 0))
        rows = alone.has_loss.any(dim=1)
        if not rows.any():
            continue
        if batch.random is None:
            size = len(rows)
            inputs = {
                name: value[rows] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == size else value
                for name, value in batch.inputs.items()
            }
            by_row = {name: getattr(alone, name)[rows] for name in ("labels", "logps", "c", "example")}
            alone = replace(alone, inputs=inputs, **by_row)
        kept.append(alone)
    return kept


def is_among(example: Tensor, examples: Sequence[int]) -> Tensor:
    """Tell which entries are one of some examples, bool, of the same shape."""
    return torch.isin(example, torch.tensor(list(examples), device=example.device, dtype=torch.long))
