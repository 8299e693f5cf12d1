"""An optimizer step that is done, with all that is needed to explain it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from llm_dynamics.callbacks.sharding import agree
from llm_dynamics.influence import LossTape, UpdateSplit, measured_change, path_gradient
from llm_dynamics.influence.update import checksum, copied
from llm_dynamics.kernel.derivatives import ResponseLogps
from llm_dynamics.kernel.weights import Weights, precise
from llm_dynamics.likelihood import SplitModel
from llm_dynamics.probes import EncodedProbe

logger = logging.getLogger(__name__)


class StepWeights:
    """The weights as a step begins, and whether anything but explained steps moved them since the last one.

    Attributes:
        begun_at: Copies by name of the trained weights, from before the step's first forward.
        note: What a reader of accounts must know: that something changes weights between steps; else None.
    """

    def __init__(self) -> None:
        self.begun_at: dict[str, Tensor] | None = None
        self.note: str | None = None
        self._stepped: list[Tensor] | None = None

    @property
    def waits(self) -> bool:
        """Whether the next step's begin is to be compared with what the last one left."""
        return self._stepped is not None

    def between_steps(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Compare the weights, as a step begins, with those that the explained step before it left."""
        left, self._stepped = self._stepped, None
        if left is None or self.note is not None:
            return
        now = checksum(parameters)
        if len(now) == len(left) and all(torch.equal(ours, theirs) for ours, theirs in zip(now, left, strict=True)):
            return
        self.note = (
            f"after step {step} something other than the optimizer changed the weights (a callback, such as EMA or "
            "SWA?): accounts are of the optimizer's steps alone"
        )
        logger.warning("%s", self.note)

    def begin(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy the weights."""
        self.begun_at = copied(parameters)

    def stepped(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Remember what the step left, by a checksum, and let the copies go."""
        self.begun_at, self._stepped = None, checksum(parameters)


@dataclass(frozen=True)
class FinishedStep:
    """A finished step and this process's share of the probes.

    Attributes:
        model: The trained model, with the weights after the step.
        split: Its halves.
        accelerator: The trainer's.
        tape: The micro-batches of this process, and the labelling.
        before: Weights before the step.
        update: The causes of the step, gradients averaged over processes.
        rule: Quadrature rule of the account.
        table: This process's probes: probe_id, prompt_id, family.
        order: Their indices among all probes.
        encoded: The same probes, tokenised.
        counts: Probes of each family, over all processes.
        batch_tokens: Most tokens in one forward.
    """

    model: nn.Module
    split: SplitModel
    accelerator: Accelerator
    tape: LossTape
    before: Weights
    update: UpdateSplit
    rule: str
    table: pd.DataFrame
    order: Sequence[int]
    encoded: Sequence[EncodedProbe]
    counts: Mapping[str, int]
    batch_tokens: int

    @cached_property
    def coarse(self) -> bool:
        """Whether training computes in a lower precision than the account."""
        low = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in self.model.parameters())
        return low or self.accelerator.mixed_precision != "no"

    @cached_property
    def after(self) -> Weights:
        """Weights after the step."""
        return {name: parameter.detach() for name, parameter in self.tape.parameters.items()}

    @cached_property
    def logps(self) -> ResponseLogps | None:
        """Log-probs of this process's probes as a function of the weights; None where it has none."""
        if not self.encoded:
            return None
        return ResponseLogps(self.model, self.encoded, batch_tokens=self.batch_tokens, split=self.split)

    @cached_property
    def measured(self) -> Tensor:
        """Measured change of this process's probe tokens, (N,), float64, nats."""
        if self.logps is None:
            return torch.zeros(0, dtype=torch.float64)
        return measured_change(self.logps, self.before, self.after)

    def family_mean(self, family: str, prompt_id: str | None = None) -> Tensor:
        """Return the weights (N,) of local tokens in the mean over a family of its probes' summed log-probs.

        Args:
            family: The family.
            prompt_id: Only the probes of this prompt, with their weight in that mean.
        """
        assert self.logps is not None
        wanted = self.table["family"] == family
        if prompt_id is not None:
            wanted &= self.table["prompt_id"] == prompt_id
        weight = torch.tensor(wanted.to_numpy(), dtype=torch.float64) / self.counts[family]
        return weight[self.logps.owner]

    def probe_sum(self, probe_id: str) -> Tensor:
        """Return the weights (N,) of local tokens in the summed log-prob of one probe; zero where it is not here."""
        assert self.logps is not None
        return torch.tensor((self.table["probe_id"] == probe_id).to_numpy(), dtype=torch.float64)[self.logps.owner]

    def gradient(self, token_weights: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Return the path gradient of a weighted sum of probe tokens over all processes.

        Args:
            token_weights: Makes the local weights (N,), called where this process has probes.

        Returns:
            The gradient by parameter name, the same on every process.
        """
        gradient: dict[str, Tensor] | None = None
        if self.logps is not None:
            weights = token_weights()
            if weights.any():
                gradient = path_gradient(self.logps, self.before, self.after, weights, rule=self.rule)
        if gradient is None:
            gradient = {name: torch.zeros_like(precise(value)) for name, value in self.before.items()}
        if self.accelerator.num_processes > 1:
            agree()
            gradient = {name: self.accelerator.reduce(value, "sum") for name, value in gradient.items()}
        return gradient
