"""The kernel as a table, and the first-order change that it predicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from llm_dynamics.kernel.rows import Coefficients, RowIndex, split_coefficients

Kind = Literal["label", "residual"]


@dataclass(frozen=True)
class TokenKernel:
    """The token kernel of all probe rows with all training rows.

    Attributes:
        values: T[m, l] = <d log pi(y~_m)/dtheta, d log pi(y_l)/dtheta> summed over the tokens of row m and of row l,
            (M, L), nats^2 per squared unit of parameter, float32 (float64 for a float64 model), on the CPU. For
            `kind="residual"` each training token is weighted by its coefficient c_l.
        probes: Where the M rows come from.
        train: Where the L columns come from.
        kind: "label" or "residual".
        parameters: Names of the parameters that the inner product runs over.
    """

    values: Tensor
    probes: RowIndex
    train: RowIndex
    kind: Kind
    parameters: tuple[str, ...]

    def block(self, probe: int, train: int) -> Tensor:
        """Return the block of one probe and one training response, (M_p, L_u), a view."""
        return self.values[self.probes.of(probe), self.train.of(train)]

    def sums(self) -> Tensor:
        """Sum every block: the kernel of whole responses where rows are tokens, (P, U), float64."""
        by_probe = _sum_by(self.values.double(), self.probes)
        return _sum_by(by_probe.T, self.train).T

    def frame(self, probe: int | None = None, train: int | None = None) -> pd.DataFrame:
        """Return the kernel, or one probe's rows and one training response's columns, as a pandas frame.

        Args:
            probe: Index of the probe; None: all.
            train: Index of the training response; None: all.

        Returns:
            Rows indexed by (probe, start, stop), columns by (train, start, stop), in response tokens.
        """
        rows = slice(0, len(self.probes)) if probe is None else self.probes.of(probe)
        columns = slice(0, len(self.train)) if train is None else self.train.of(train)
        return pd.DataFrame(
            self.values[rows, columns].numpy(),
            index=_multi_index(self.probes, rows, "probe"),
            columns=_multi_index(self.train, columns, "train"),
        )


def predict_from_kernel(kernel: TokenKernel, learning_rate: float, coefficients: Coefficients | None = None) -> Tensor:
    """Predict the change of every probe row's log-prob by one plain gradient step (SGD), to first order.

        Delta log pi(y~_m) = - eta * sum_l c_l T[m, l] + O(eta^2)

    which is [LD, Prop. 1] contracted with the labels (arXiv 2407.10490, Eq. 3), with c_l = dL/d log pi(y_l). It says
    nothing of Adam's steps.

    Args:
        kernel: The token kernel.
        learning_rate: eta.
        coefficients: c of each training row: (L,), or one sequence per training response. Must be left out for
            `kind="residual"`, where they are part of the kernel.

    Returns:
        The predicted change, nats, (M,), float64.

    Raises:
        ValueError: For coefficients that are missing, superfluous or of a wrong number.
    """
    if kernel.kind == "residual":
        if coefficients is not None:
            raise ValueError('coefficients are part of a kernel of kind="residual" already; leave them out')
        return -learning_rate * kernel.values.double().sum(1)
    if coefficients is None:
        raise ValueError('a kernel of kind="label" needs coefficients: c_l = dL/d log pi(y_l) of every training row')
    lengths = torch.bincount(kernel.train.response, minlength=kernel.train.responses).tolist()
    c = torch.cat(split_coefficients(coefficients, lengths))
    return -learning_rate * (kernel.values.double() @ c)


def _sum_by(values: Tensor, index: RowIndex) -> Tensor:
    return values.new_zeros(index.responses, values.shape[1]).index_add_(0, index.response, values)


def _multi_index(index: RowIndex, rows: slice, name: str) -> pd.MultiIndex:
    columns = [column[rows].numpy() for column in (index.response, index.start, index.stop)]
    return pd.MultiIndex.from_arrays(columns, names=[name, "start", "stop"])
