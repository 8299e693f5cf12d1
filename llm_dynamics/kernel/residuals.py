"""Residuals of labels: the derivative of a label's log-prob by the logits, or by what the LM head puts out.

Two readings of g are offered:

- `EXACT_RULE`: with z = c tanh(s (W h + b) / c) and pi = softmax(z / t) at temperature t, the gradient of log pi(y) by
  W itself: `g_v = (e_y - pi)_v s (1 - (z_v / c)^2) / t`. At t = 1 this is the head's own part of the token kernel.
- `PAPER_RULE`: `g = e_y - pi`, pi under the sampling temperature, as [NTHR] writes it. It differs from the exact one
  by the factor s / t, which changes no ranking, and under soft-capping by a factor for each vocabulary entry.

[NTHR] is Deng et al., *On the Effect of Negative Gradient in Group Relative Deep Reinforcement Optimization* (arXiv
2505.18830).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ResidualRule:
    """Which residual g of a label is meant, and how it is computed.

    Attributes:
        exact: True: the gradient of log pi(y) by W h + b, so that `g h^T` is its gradient by the head's weight W.
            False: `e_y - pi`.
        temperature: t of `pi = softmax(z / t)`.
        vocabulary: Distinct token ids in ascending order (sorted here) that products of residuals are restricted to; pi
            stays that of the whole vocabulary, it is *not* renormalised. None: all.
        block_bytes: Bytes of one (tokens, columns) block; None: 12 MiB on a CPU, 256 MiB elsewhere. No number depends
            on it.

    Raises:
        ValueError: For a temperature that is not positive, or a vocabulary that does not hold token ids.
    """

    exact: bool = True
    temperature: float = 1.0
    vocabulary: Tensor | None = None
    block_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; it must be positive (greedy decoding has no gradient)"
            )
        if self.vocabulary is not None:
            ids = torch.unique(self.vocabulary)  # sorts
            if self.vocabulary.dtype not in (torch.int64, torch.int32) or len(ids) == 0 or ids[0] < 0:
                seen = f"{len(ids)} ids of {self.vocabulary.dtype}" + (f" from {ids[0].item()}" if len(ids) else "")
                raise ValueError(f"vocabulary must hold token ids, integers from 0, at least one; seen {seen}")
            object.__setattr__(self, "vocabulary", ids.long())

    def vocabulary_of(self, vocab_size: int) -> Tensor | None:
        """Return `vocabulary`, after a check of its ids.

        Args:
            vocab_size: V, above all ids.

        Returns:
            The ids, or None for all.

        Raises:
            ValueError: Where an id is not below V.
        """
        if self.vocabulary is not None and self.vocabulary[-1] >= vocab_size:
            raise ValueError(
                f"vocabulary holds token id {self.vocabulary[-1].item()}, but the model has {vocab_size} logits: was "
                "it made with another model's tokenizer?"
            )
        return self.vocabulary


EXACT_RULE = ResidualRule(exact=True)
PAPER_RULE = ResidualRule(exact=False)


def label_residuals(logits: Tensor, labels: Tensor, rule: ResidualRule = PAPER_RULE) -> Tensor:
    """Compute g = e_y - softmax(z / t), the residual as [NTHR] writes it, from whole logits.

    Multiplied by `OutputHead.slopes(logits) / t` it is the exact one of this module.

    Args:
        logits: z, (N, V), scaled and capped as the model gives them.
        labels: y, (N,), int64.
        rule: Temperature and vocabulary.

    Returns:
        (N, V), or (N, columns) in ascending order of the vocabulary's ids; float32, or float64 for float64 logits.

    Raises:
        ValueError: Where shapes or ids do not fit, or for an exact rule (logits do not tell the head's scale and cap).
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits must be (N, V) and labels (N,); seen {tuple(logits.shape)} and {tuple(labels.shape)}")
    if rule.exact:
        raise ValueError("logits do not tell the head's scale and cap: pass ResidualRule(exact=False, ...)")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    vocabulary = rule.vocabulary_of(logits.shape[1])
    logp = (logits / rule.temperature).log_softmax(dim=1)
    log1m_label = logp.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1)
    if vocabulary is None:
        return onehot_minus_exp_(logp, labels, log1m_label, slice(0, logits.shape[1]))
    vocabulary = vocabulary.to(logits.device)
    return onehot_minus_exp_(logp[:, vocabulary], labels, log1m_label, vocabulary)


def onehot_minus_exp_(logp: Tensor, labels: Tensor, log1m_label: Tensor, columns: slice | Tensor) -> Tensor:
    """Turn some columns of log-probs into those of `e_y - pi`, in place.

    Args:
        logp: log pi, (N, columns).
        labels: y, (N,), int64.
        log1m_label: log(1 - pi_y), (N,): the label's own residual then is exact where pi_y rounds to one.
        columns: Which columns they are: a slice of the vocabulary, or token ids in ascending order.

    Returns:
        `logp`, overwritten.
    """
    rows, places = label_places(labels, columns)
    g = logp.exp_().neg_()
    g[rows, places] = log1m_label[rows].exp()
    return g


def label_places(labels: Tensor, columns: slice | Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows have their label among the columns, and in which of them."""
    if isinstance(columns, slice):
        inside = (labels >= columns.start) & (labels < columns.stop)
        places = labels - columns.start
    else:
        places = torch.searchsorted(columns, labels).clamp(max=len(columns) - 1)
        inside = columns[places] == labels
    rows = inside.nonzero()[:, 0]
    return rows, places[rows]
