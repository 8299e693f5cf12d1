"""The universal tap: what any loss asks of every training token, and the gradient split by a labelling of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from llm_dynamics.influence.plain_logits import IGNORED, coefficients_from_logits, gradient_of_logits
from llm_dynamics.kernel.weights import unshared

_CAST = "ToCopyBackward0"
"""Node of the graph that makes a copy in another format."""

_FOR_THE_LOSS = {"labels", "shift_labels", "num_items_in_batch"}


@dataclass(frozen=True)
class RandomState:
    """The random state at the beginning of a forward, so that its dropout masks can be drawn again."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """Return the present state."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def is_now(self, device: torch.device) -> bool:
        """Tell whether nothing was drawn since."""
        now = RandomState.now(device)
        same_cuda = self.cuda is None or now.cuda is None or torch.equal(self.cuda, now.cuda)
        return torch.equal(self.cpu, now.cpu) and same_cuda

    def restore(self, device: torch.device) -> None:
        """Make this the present state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)


@dataclass(frozen=True)
class MicroBatch:
    """One forward of the training model, and what the loss asked of it.

    Attributes:
        inputs: Tensors that the model was called with, by name, labels excluded: what a replay needs.
        labels: y_l at the position that predicts it, -100 where there is no loss, (B, S), int64; S is T - 1, or T where
            the trainer shifts labels itself.
        logps: log pi(y_l) as the loss saw it (temperature included), nats, (B, S); 0 where there is no loss.
        c: dL/d log pi(y_l), (B, S), with everything that scales the loss: accumulation, token counts. c < 0 pulls the
            token up. 0 where there is no loss.
        example: Index of the token's example, (B, S), int64, counted over the whole step; a packed row holds several.
        shifted: Whether labels came shifted (S = T).
        random: Random state before the forward; None where the forward drew nothing, or the state was not kept.
    """

    inputs: Mapping[str, Any]
    labels: Tensor
    logps: Tensor
    c: Tensor
    example: Tensor
    shifted: bool
    random: RandomState | None

    @property
    def has_loss(self) -> Tensor:
        """Which positions carry a loss: a label, and a coefficient that is not zero, (B, S), bool."""
        return (self.labels != IGNORED) & (self.c != 0)


Labelling = Callable[[MicroBatch], Mapping[str, Tensor]]
"""Gives disjoint masks (B, S) over the tokens of a micro-batch, by name; see `influence.labelling`."""


class LossTape:
    """Records, between `with` and its end, every micro-batch that a loss differentiates.

    A forward hook on the model puts a gradient hook on `log_probs` (TRL's trainers) or `logits` (`transformers.Trainer`
    with its own loss); in backward, that hook sees c_l = dL/d log pi(y_l) of whatever loss there is. Inside it, on the
    graph in use, so under the same dropout masks and without a second forward, the gradient of

        sum_l 1[l has label k] c_l log pi(y_l)

    is taken for every label k: the parts of the gradient. They are sums over micro-batches, like `.grad`, which they do
    not touch; what a loss sends past the label log-probs is missing from their sum.

    Args:
        model: The model that the trainer trains, PEFT included, DDP not.
        labelling: Which tokens belong to which part; None records tokens and splits no gradient.
        parameters: The parameters to take parts for; None: all that require a gradient.
        keep_random: Keep the random state of each forward, for replays with dropout.
        attempt: Runs each piece of the tape's own work within a forward or backward; it may keep errors to itself.

    Attributes:
        batches: The micro-batches in the order of their backward passes.
        parts: Gradient by label and parameter name; a label without tokens is missing.

    Raises:
        RuntimeError: In `raise_if_empty`, where no loss was seen.

    Example:
        >>> with LossTape(model, by_sign) as tape:  # doctest: +SKIP
        ...     loss_of(model, batch).backward()
        >>> tape.parts["down"]["lm_head.weight"]  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        labelling: Labelling | None = None,
        *,
        parameters: Mapping[str, nn.Parameter] | None = None,
        keep_random: bool = True,
        attempt: Callable[[Callable[[], None]], None] = lambda work: work(),
    ) -> None:
        self.model = model
        self.labelling = labelling
        self.parameters = dict(parameters) if parameters is not None else trainable_parameters(model)
        self.batches: list[MicroBatch] = []
        self.parts: dict[str, dict[str, Tensor]] = {}
        self._keep_random = keep_random
        self._attempt = attempt
        self._random: list[RandomState | None] = []
        self._handles: list[Any] = []
        self._taps: list[_Tap] = []
        self._n_examples = 0
        self._splitting = False

    def __enter__(self) -> LossTape:
        self._handles = [
            self.model.register_forward_pre_hook(lambda *call: self._attempt(lambda: self._before_forward(*call))),
            self.model.register_forward_hook(
                lambda *call: self._attempt(lambda: self._after_forward(*call)), with_kwargs=True
            ),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for tap in self._taps:
            tap.output = None
        self._handles, self._random, self._taps = [], [], []

    def raise_if_empty(self) -> None:
        """Check that some loss was seen.

        Raises:
            RuntimeError: Where none was; the message says what the tap looks for.
        """
        if not self.batches:
            raise RuntimeError(
                "no loss was seen: the loss did not differentiate the `log_probs` or `logits` of "
                f"{type(self.model).__name__}'s output. The step account needs a trainer whose loss goes through them "
                "(TRL's trainers, transformers.Trainer); watch this run without influence=True."
            )

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        for tap in self._taps:
            if tap.seen:
                tap.output = None
        self._taps = [tap for tap in self._taps if not tap.seen]
        keeps = self._keep_random and torch.is_grad_enabled()
        self._random.append(RandomState.now(next(module.parameters()).device) if keeps else None)

    def _after_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        random = self._random.pop()
        logps = getattr(output, "log_probs", None)
        tapped = logps if logps is not None else getattr(output, "logits", None)
        if tapped is None or not tapped.requires_grad:
            return  # generation, evaluation, the reference: nothing is learnt from it
        if random is not None and random.is_now(next(module.parameters()).device):
            random = None
        inputs = dict(kwargs)
        if args:
            inputs["input_ids"] = args[0]

        tap, fused = _Tap(tapped), logps is not None
        self._taps.append(tap)

        def on_gradient(gradient: Tensor | None) -> None:
            if gradient is not None and tap.output is not None and not self._splitting:
                output, tap.seen = tap.output, True
                self._attempt(lambda: self._record(inputs, output, gradient, random, fused=fused))

        node, place = tapped.grad_fn, tapped.output_nr
        if node is None or node.name() != _CAST:
            tapped.register_hook(on_gradient)
            return
        # accelerate hands out a float32 copy of bfloat16 logits, past which a loss inside the model's forward goes
        node, place = node.next_functions[0]
        assert node is not None, "a copy that requires a gradient has a source that does"
        node.register_prehook(lambda gradients: on_gradient(gradients[place]))

    def _record(
        self, inputs: dict[str, Any], tapped: Tensor, gradient: Tensor, random: RandomState | None, *, fused: bool
    ) -> None:
        labels, shifted = _labels_of(inputs)
        if fused:
            logps, c = tapped.detach(), gradient
        else:
            if inputs.get("labels") is None and not shifted:  # those of all tokens: the loss took some of them
                taken = gradient[:, : labels.shape[1]].any(dim=-1)
                labels = labels.masked_fill(~taken, IGNORED)
            logps, c = coefficients_from_logits(tapped.detach(), gradient, labels)
        valid = labels != IGNORED
        example = _examples(inputs, labels.shape, shifted) + self._n_examples
        batch = MicroBatch(
            inputs={
                name: value for name, value in inputs.items() if isinstance(value, Tensor) and name not in _FOR_THE_LOSS
            },
            labels=labels,
            logps=logps.detach().masked_fill(~valid, 0),
            c=c.detach().masked_fill(~valid, 0),
            example=example.to(labels.device),
            shifted=shifted,
            random=random,
        )
        self._n_examples = int(example.max()) + 1
        self.batches.append(batch)
        if self.labelling is None:
            return
        self._splitting = True
        try:
            for label, mask in self.labelling(batch).items():
                wanted = batch.c * mask
                if (wanted != 0).any():
                    self._add_part(label, tapped, wanted, batch, fused=fused)
        finally:
            self._splitting = False

    def _add_part(self, label: str, tapped: Tensor, wanted: Tensor, batch: MicroBatch, *, fused: bool) -> None:
        outward = wanted.to(tapped.dtype) if fused else gradient_of_logits(tapped.detach(), wanted, batch.labels)
        gradients = torch.autograd.grad(
            tapped, list(self.parameters.values()), outward, retain_graph=True, allow_unused=True
        )
        part = self.parts.setdefault(label, {})
        for name, gradient in zip(self.parameters, unshared(gradients), strict=True):
            if gradient is None:
                continue
            # sums of micro-batches in float32 at least: a running sum in bfloat16 would lose the small ones
            wide = gradient.float() if gradient.dtype in (torch.bfloat16, torch.float16) else gradient
            part[name] = part[name].add_(wide) if name in part else wide.detach()


@dataclass
class _Tap:
    """What a hook on an output knows of that output.

    A hook that held its own tensor would keep it, and the graph behind it, alive for good: Python does not see that
    cycle. So the tape holds it here, until the next forward after its gradient was seen, or to the end.

    Attributes:
        output: The tensor that the hook is on; None when it is let go.
        seen: Whether its gradient came.
    """

    output: Tensor | None
    seen: bool = False


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name; a tied parameter appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _labels_of(inputs: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """Return the labels at the positions that predict them, (B, S), and whether they came shifted (S = T)."""
    if inputs.get("shift_labels") is not None:
        return inputs["shift_labels"], True
    labels = inputs.get("labels")
    if labels is None:  # a loss that holds its labels back from the model, such as transformers' label smoother
        labels = inputs["input_ids"]
    return labels[:, 1:], False


def _examples(inputs: Mapping[str, Any], shape: torch.Size, shifted: bool) -> Tensor:
    """Return the example that each predicted token belongs to, (B, S): the row, or the sequence in a packed row."""
    positions = inputs.get("position_ids")
    if positions is not None and inputs.get("attention_mask") is None and positions.dim() == 2:
        sequence = ((positions == 0).long().cumsum(dim=1) - 1).clamp(min=0)
        sequence = sequence if shifted else sequence[:, 1:]
        per_row = sequence.amax(dim=1) + 1
        first = per_row.cumsum(dim=0) - per_row
        return (sequence + first[:, None]).expand(shape)
    return torch.arange(shape[0])[:, None].expand(shape)
