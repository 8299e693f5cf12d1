"""Two measures of K_uo from the log-probs before and after a step: LBK and SignDelta [LD, App. C, Eq. 23-31].

[LD] is Ren & Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025 (arXiv 2407.10490). For a response o observed
while u is trained on, over all its M tokens and all V entries,

    LBK_uo       = ||Delta log pi||_F^2 / (||A_o||_F^2 ||G_u||_F^2)  <=  eta^2 ||K_uo||_F^2      (to first order in eta)
    SignDelta_uo = mean over v and m of (log pi_{v,m} after - log pi_{v,m} before)

with ||A_o||_F^2 = sum_m (V - 2 + V ||pi_m||^2), ||G_u||_F^2 = sum_l c_l^2 ||e_{y_l} - pi_l||^2, and
||K_uo||_F^2 = sum_m sum_l ||K_{m,l}||_F^2 (what `norms.response_block_norms` estimates). LBK tells the strength of the
influence, SignDelta its direction; a falling SignDelta says that mass moves into few entries. These are the equations
as printed; the published code differs (label entries only, and both divided by norms without squares).

As A is a projection, its spectral norm is known too: ||A_m||_2^2 = V ||pi_m||^2. It gives a bound of the same form that
takes the largest A_m in place of their sum, and is tighter by a factor from about 2 (peaked pi) to V - 1 (flat pi).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_dynamics.kernel.output_head import BLOCK_BYTES, BLOCK_BYTES_ON_CPU, OutputHead, output_head
from llm_dynamics.kernel.token_states import HeadTokens, TokenStates
from llm_dynamics.likelihood.packing import TokenizedResponse
from llm_dynamics.likelihood.scoring import DEFAULT_BATCH_TOKENS


@dataclass(frozen=True)
class KernelProxies:
    """What a step did to P observed responses; every field is (P,), float64, on the CPU.

    Attributes:
        lbk: Lower bound of eta^2 ||K_uo||_F^2 of [LD, Eq. 26].
        spectral_lbk: The tighter bound of this module, from ||A||_2.
        sign_delta: Mean change of log pi over all V entries and all tokens, nats [LD, Eq. 26].
    """

    lbk: Tensor
    spectral_lbk: Tensor
    sign_delta: Tensor


def squared_softmax_norm(logp: Tensor) -> Tensor:
    """Compute ||A||_F^2 = V - 2 + V ||pi||^2 of A = I - 1 pi^T [LD, Eq. 31].

    Args:
        logp: Log-probs, (N, V).

    Returns:
        (N,), in the dtype of `logp`: from V - 1 for a flat pi to 2 (V - 1) for a one-hot one.
    """
    v = logp.shape[-1]
    return v - 2 + v * logp.exp().square().sum(-1)


def squared_residual_norm(logp: Tensor, labels: Tensor) -> Tensor:
    """Compute ||e_y - pi||^2, the energy of a label's residual.

    Args:
        logp: Log-probs, (N, V).
        labels: y, (N,), int64.

    Returns:
        (N,), in the dtype of `logp`: from 0 (certain of y) to 2 (certain of another token).
    """
    of_label = logp.gather(-1, labels[:, None])[:, 0]
    others = logp.scatter(-1, labels[:, None], -torch.inf).exp().square().sum(-1)
    return torch.expm1(of_label).square() + others  # not 1 - 2 pi_y + ||pi||^2, which cancels where pi_y is near one


def kernel_proxies(
    before: nn.Module,
    after: nn.Module,
    probes: Sequence[TokenizedResponse],
    trains: Sequence[TokenizedResponse],
    *,
    coefficients: Tensor | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> KernelProxies:
    """Compute LBK and SignDelta of every probe for a step from `before` to `after` that trained on `trains`.

    The bound holds for a plain gradient step, theta' = theta - eta dL/dtheta; for other optimizers LBK is a
    description.

    Args:
        before: The model at theta.
        after: A model of the same vocabulary at theta'.
        probes: P observed responses.
        trains: The responses of the step, L tokens in all.
        coefficients: c_l = dL/d log pi(y_l), (L,); None: -1, the summed negative log-likelihood of [LD].
        batch_tokens: Most tokens in one forward, padding included.

    Returns:
        The measures, in the order of `probes`.

    Raises:
        ValueError: For bad responses, coefficients that do not fit or are all zero, or two different vocabularies.
        NotImplementedError: For models that cannot be split into backbone and head.
    """
    states = [TokenStates(model, probes, batch_tokens=batch_tokens) for model in (before, after)]
    trained = TokenStates(before, trains, batch_tokens=batch_tokens, split=states[0].split)
    sizes = [s.split.vocab_size for s in states]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the models have {sizes[0]} and {sizes[1]} logits: they are not two checkpoints of one model")
    n = len(trained.labels)
    if coefficients is None:
        coefficients = torch.ones(n)
    if coefficients.shape != (n,) or not coefficients.any():
        raise ValueError(
            f"coefficients must be (L,), one for each of {n} training tokens, and not all zero; seen "
            f"{tuple(coefficients.shape)}"
        )
    energy = coefficients.double().cpu().square() @ _energies(output_head(trained.split), trained.values())
    change, total, frobenius, spectral = _changes(
        [output_head(s.split) for s in states], [s.values().hidden for s in states]
    )
    owner, lengths, v = states[0].owner, states[0].lengths, sizes[0]

    def by_response(values: Tensor) -> Tensor:
        return torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, owner, values)

    largest = torch.zeros(len(lengths), dtype=torch.float64).scatter_reduce(0, owner, spectral, "amax")
    moved = by_response(change)
    return KernelProxies(
        moved / (by_response(frobenius) * energy), moved / (largest * energy), by_response(total) / (v * lengths)
    )


def _energies(head: OutputHead, tokens: HeadTokens) -> Tensor:
    """Return ||e_y - pi||^2 of all tokens, (L,), float64, on the CPU."""
    rows = _rows(head)
    blocks = zip(tokens.hidden.split(rows), tokens.labels.split(rows), strict=True)
    parts = [squared_residual_norm(head.logits(h).log_softmax(1), y.to(head.weight.device)) for h, y in blocks]
    return torch.cat(parts).double().cpu()


def _changes(heads: Sequence[OutputHead], hidden: Sequence[Tensor]) -> Tensor:
    """Return sum_v Delta^2, sum_v Delta, ||A||_F^2 and ||A||_2^2 of all tokens, (4, N), float64, on the CPU."""
    rows = _rows(heads[0])
    parts = []
    for blocks in zip(*(side.split(rows) for side in hidden), strict=True):
        old, new = (head.logits(block).log_softmax(dim=1) for head, block in zip(heads, blocks, strict=True))
        frobenius = squared_softmax_norm(old)
        spectral = frobenius - (old.shape[1] - 2)
        delta = new.to(old).sub_(old)
        columns = (delta.square().sum(1), delta.sum(1), frobenius, spectral)
        parts.append(torch.stack([column.double() for column in columns]).cpu())
    return torch.cat(parts, dim=1)


def _rows(head: OutputHead) -> int:
    """Rows of logits at a time."""
    size = BLOCK_BYTES_ON_CPU if head.weight.device.type == "cpu" else BLOCK_BYTES
    return max(1, size // (head.dtype.itemsize * head.vocab_size))
