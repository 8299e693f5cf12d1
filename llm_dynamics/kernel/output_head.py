"""The LM head by columns: logits and label residuals of some vocabulary entries at a time, in float32 at least."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_dynamics.kernel.residuals import ResidualRule, label_places, onehot_minus_exp_
from llm_dynamics.likelihood.head import SplitModel
from llm_dynamics.likelihood.preserve import evaluating

BLOCK_BYTES_ON_CPU = 12 * 2**20
"""Bytes of one (N, columns) block on a CPU: it then stays in the last-level cache between its uses."""
BLOCK_BYTES = 2**28
"""Bytes of one (N, columns) block elsewhere."""
KEPT_BYTES = 2**30
"""Most bytes of logits that are kept between the two passes over the vocabulary, so that the second need not repeat the
first's products."""
_FEWEST_COLUMNS = 64


@dataclass(frozen=True)
class OutputHead:
    """An LM head: logits `z = c tanh(s (W h + b) / c)`, with scale s and, where the model has one, soft cap c.

    Attributes:
        weight: W, (V, d).
        bias: b, (V,), or None.
        scale: s.
        softcap: c, or None for no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float64 for a float64 head, float32 for all others."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def logits(self, hidden: Tensor, columns: slice | Tensor | None = None) -> Tensor:
        """Return z, (N, columns), of hidden states (N, d); all V columns by default."""
        some = slice(None) if columns is None else columns
        hidden, weight = hidden.to(self.weight.device, self.dtype), self.weight[some].to(self.dtype)
        bias = None if self.bias is None else self.bias[some].to(self.dtype)
        with torch.no_grad(), as_given(hidden):
            z = nn.functional.linear(hidden, weight, bias)
            if self.scale != 1.0:
                z *= self.scale
            return z if self.softcap is None else (z / self.softcap).tanh_().mul_(self.softcap)

    def slopes(self, logits: Tensor) -> Tensor:
        """Return dz_v / d(W h + b)_v = s (1 - (z_v / c)^2), in the shape of `logits`."""
        if self.softcap is None:
            return torch.full_like(logits, self.scale)
        return (logits / self.softcap).square_().neg_().add_(1).mul_(self.scale)

    def normalisers(self, hidden: Tensor, labels: Tensor, rule: ResidualRule) -> tuple[Tensor, Tensor]:
        """Sum exp(z_v / t) over all V, one block of columns at a time.

        Args:
            hidden: h, (N, d).
            labels: y, (N,), int64.
            rule: Temperature t and size of the blocks.

        Returns:
            log sum_v exp(z_v / t), and log(1 - pi_y), each (N,).
        """
        blocks = (self.logits(hidden, columns) for columns in self.blocks(len(hidden), rule))
        return self.normalisers_of(blocks, labels, rule)

    def residuals(
        self, sides: Sequence[tuple[Tensor, Tensor]], rule: ResidualRule, *, beside: int = 0
    ) -> Iterator[list[Tensor]]:
        """Yield the residuals of all tokens of several sets, a block of columns at a time.

        Args:
            sides: Hidden states (N, d) and labels (N,) of each set.
            rule: Which residual, and which columns.
            beside: Numbers that the caller keeps for each column of a block; blocks are as narrow as these ask for.

        Yields:
            For each set its (N, columns), float32 or float64; the blocks together make up the columns of `rule`.

        Raises:
            ValueError: Where the vocabulary of `rule` is not that of this head.
        """
        vocabulary = rule.vocabulary_of(self.vocab_size)
        rows = [len(hidden) for hidden, _ in sides]
        keeps = vocabulary is None and sum(rows) * self.vocab_size * self.dtype.itemsize <= KEPT_BYTES
        blocks = self.blocks(max(*rows, beside), rule)
        kept: list[list[Tensor]] = []
        norms = []
        for hidden, labels in sides:
            if keeps:
                kept.append([self.logits(hidden, columns) for columns in blocks])
                norms.append(self.normalisers_of(kept[-1], labels, rule))
            else:
                norms.append(self.normalisers(hidden, labels, rule))
        if vocabulary is not None:
            blocks = list(vocabulary.to(self.weight.device).split(self.width(max(*rows, beside), rule)))
        for number, columns in enumerate(blocks):
            found = []
            for side, (hidden, labels) in enumerate(sides):
                z = kept[side][number] if keeps else self.logits(hidden, columns)
                found.append(self.residuals_of(z, labels, *norms[side], columns, rule))
                if keeps:
                    kept[side][number] = z.new_empty(0)  # each block is freed when it has been used
            yield found

    def normalisers_of(self, blocks: Iterable[Tensor], labels: Tensor, rule: ResidualRule) -> tuple[Tensor, Tensor]:
        """Return what `normalisers` does, of the logits in blocks of columns in order; they are left as they were."""
        labels = labels.to(self.weight.device)
        others = torch.full((len(labels),), -torch.inf, dtype=self.dtype, device=self.weight.device)
        of_label = others.clone()
        start = 0
        for z in blocks:
            stop = start + z.shape[1]
            rows, places = label_places(labels, slice(start, stop))
            start = stop
            seen = z[rows, places]
            of_label[rows] = seen / rule.temperature
            z[rows, places] = -torch.inf
            scaled = z if rule.temperature == 1.0 else z / rule.temperature
            others = others.logaddexp(scaled.logsumexp(dim=1))
            z[rows, places] = seen
        total = others.logaddexp(of_label)
        return total, others - total

    def residuals_of(
        self,
        z: Tensor,
        labels: Tensor,
        norm: Tensor,
        log1m_label: Tensor,
        columns: slice | Tensor,
        rule: ResidualRule,
    ) -> Tensor:
        """Return the residuals of the logits `z` of some columns; `z` is overwritten."""
        slopes = self.slopes(z) if rule.exact and self.softcap is not None else None
        g = onehot_minus_exp_(z.div_(rule.temperature).sub_(norm[:, None]), labels.to(z.device), log1m_label, columns)
        if slopes is not None:
            g *= slopes.div_(rule.temperature)
        elif rule.exact and self.scale != rule.temperature:
            g *= self.scale / rule.temperature
        return g

    def blocks(self, rows: int, rule: ResidualRule) -> list[slice]:
        """Return the columns of V in blocks such that (rows, columns) stays within the bytes of `rule`."""
        return [slice(*ends) for ends in _ranges(self.vocab_size, self.width(rows, rule))]

    def width(self, rows: int, rule: ResidualRule, fewest: int = _FEWEST_COLUMNS) -> int:
        """Return how many numbers per row fit into the bytes of `rule`, for blocks of `rows` rows."""
        on_cpu = self.weight.device.type == "cpu"
        size = rule.block_bytes or (BLOCK_BYTES_ON_CPU if on_cpu else BLOCK_BYTES)
        return max(fewest, size // (self.dtype.itemsize * max(rows, 1)))


def as_given(tensor: Tensor) -> torch.autocast:
    """Return a context in which products keep the precision of their factors, whatever the caller's autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


def output_head(split: SplitModel) -> OutputHead:
    """Read the LM head of a split model; its weight is shared, not copied, where the head is a plain linear layer.

    A wrapped head (LoRA, a quantised layer) is affine all the same: its effective weight is read off its outputs.

    Args:
        split: From `split_model`.

    Returns:
        The head.

    Raises:
        NotImplementedError: For a model whose logits are not its head's output, scaled and capped.
    """
    if split.backbone is None:
        raise NotImplementedError(
            f"{type(split.model).__name__} post-processes its logits in a way that llm_dynamics does not know: the "
            "gradient of its head has no closed form here. Use the exact token kernel."
        )
    layer: nn.Module = split.model.get_output_embeddings()  # type: ignore[operator]
    if type(layer) is nn.Linear:
        bias = None if layer.bias is None else layer.bias.detach()
        return OutputHead(layer.weight.detach(), bias, split.scale, split.softcap)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    floating = weight.dtype if weight.dtype.is_floating_point else torch.float32
    width = int(split.model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]
    with evaluating(split.model), as_given(weight):  # adapters may have dropout
        offset = layer(torch.zeros(1, width, dtype=floating, device=weight.device))
        columns = layer(torch.eye(width, dtype=floating, device=weight.device)) - offset
    return OutputHead(columns.T.contiguous(), offset[0], split.scale, split.softcap)


def _ranges(size: int, width: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, width):
        yield start, min(start + width, size)
