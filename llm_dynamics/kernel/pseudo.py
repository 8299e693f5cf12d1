"""The pseudo-NTK: one scalar output per position stands for all V logits.

Mohamadi, Bae & Sutherland, *A Fast, Well-Founded Approximation to the Empirical Neural Tangent Kernel*, ICML 2023
(arXiv 2206.12543) [pNTK]: with a unit vector v and f_m = v . z_m,

    kappa[m, l] = < d f_m / d theta, d f_l / d theta > = v^T K_{m,l} v,      K_{m,l} ~ kappa[m, l] I_V,

which holds for a wide, randomly initialised readout. [pNTK] takes the sum of logits, v = 1 / sqrt(V). For a language
model that is the one direction that does not matter: log-probs see K through A = I - 1 pi^T, and A 1 = 0. Adding the
same vector u to all rows of the head changes no log-prob, nor any of their gradients; yet it adds u . h to every logit,
sqrt(V) u . h to the sum of logits, and anything at all to its kernel. So the direction must be *centred*, v . 1 = 0:
here v has random signs, less their mean, at unit length. It is exchangeable over the vocabulary, so that
`E v v^T = C / (V - 1)` with `C = I - 1 1^T / V`, and therefore

    E kappa[m, l] = tr(C K_{m,l} C) / (V - 1),

the multiple of C that is nearest to the visible block C K_{m,l} C in Frobenius norm, and invariant to such shifts in
every draw. (Centring each logit before *summing* them all would be identically zero.)

Both factors are derivatives of the model's outputs, the padding token's embedding included, so that kappa is a Gram
matrix: symmetric and never negative on one set. (Training moves less: see `token_kernel`.)

An approximation, and a rough one: on a small pretrained language model, the token kernel made of it (`kappa g_m . g_l`)
correlates with the exact one at 0.25-0.29.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from llm_dynamics.kernel.last_layer import residual_products
from llm_dynamics.kernel.residuals import PAPER_RULE
from llm_dynamics.kernel.token_states import TokenStates, trainable_weights, units_of
from llm_dynamics.kernel.weights import Weights
from llm_dynamics.likelihood.head import SplitModel
from llm_dynamics.likelihood.packing import TokenizedResponse
from llm_dynamics.likelihood.scoring import DEFAULT_BATCH_TOKENS

Output = Literal["centred", "sum", "first"]

_WARNINGS = {
    "sum": "the sum of logits is the direction that log-probs cannot see (A 1 = 0): its kernel changes without any "
    'change of the model\'s predictions, as when one vector is added to all rows of the head. Use output="centred".',
    "first": "the first logit has a part along the sum of all logits, which log-probs cannot see: its kernel changes "
    "when one vector is added to all rows of the head, which changes no prediction, and it stands for one token of the "
    'vocabulary. Use output="centred".',
}


def centred_direction(vocab_size: int, generator: torch.Generator) -> Tensor:
    """Draw v: random signs, less their mean, at unit length; float64.

    Args:
        vocab_size: V, at least 2.
        generator: Source of randomness, on the CPU.

    Returns:
        (V,), orthogonal to the vector of ones.

    Raises:
        ValueError: For fewer than two entries.
    """
    if vocab_size < 2:
        raise ValueError(f"a centred direction needs at least 2 logits; seen {vocab_size}")
    signs = (2 * torch.arange(vocab_size).remainder(2) - 1).double()
    # as many of one sign as of the other, in random places: the sum is zero, or one for an odd V
    signs = signs[torch.randperm(vocab_size, generator=generator)]
    signs -= signs.mean()
    return signs / signs.norm()


def pseudo_kernel(
    model: nn.Module,
    probes: Sequence[TokenizedResponse],
    trains: Sequence[TokenizedResponse],
    *,
    output: Output = "centred",
    draws: int = 1,
    generator: torch.Generator | None = None,
    weights: Weights | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    split: SplitModel | None = None,
) -> Tensor:
    """Compute the pseudo-NTK kappa[m, l] of all probe tokens and all training tokens.

    One backward of one sequence and one forward-mode pass over the other side, for each token of the side that has
    fewer, and each draw.

    Args:
        model: A Hugging Face causal LM, PEFT adapters and TRL's fused head included.
        probes: Responses with M tokens in all.
        trains: Responses with L tokens in all.
        output: The scalar: "centred", a random centred direction; "sum", the sum of logits over sqrt(V) as [pNTK] has
            it, and "first", logit 0: both with a warning.
        draws: Random directions to average over, for "centred".
        generator: Source of the directions, on the CPU; default: seeded with 0.
        weights: What is differentiated, tensors by parameter name; default: the model's trainable parameters.
        batch_tokens: Most tokens in one forward, padding included.
        split: The model's halves from `split_model`, to save the check.

    Returns:
        (M, L), float32, or float64 for a float64 model; on the CPU.

    Raises:
        ValueError: For bad responses, an unknown output, draws below one, or nothing to differentiate.
        NotImplementedError: For models that cannot be split into backbone and head.
    """
    if output not in ("centred", "sum", "first"):
        raise ValueError(f'output is {output!r}; allowed: "centred", "sum", "first"')
    if draws < 1 or (draws > 1 and output != "centred"):
        raise ValueError(f'draws must be at least 1, and 1 but for output="centred"; seen {draws} for {output!r}')
    if output in _WARNINGS:
        warnings.warn(_WARNINGS[output], UserWarning, stacklevel=2)
    rows = TokenStates(model, probes, batch_tokens=batch_tokens, split=split)
    columns = TokenStates(model, trains, batch_tokens=batch_tokens, split=rows.split)
    weights = trainable_weights(model, weights)
    generator = generator or torch.Generator().manual_seed(0)
    v = rows.split.vocab_size
    total: Tensor | None = None
    for _ in range(draws):
        if output == "centred":
            direction = centred_direction(v, generator)
        else:
            direction = torch.ones(v).double() / v**0.5 if output == "sum" else torch.eye(1, v)[0]
        table = _scalar_kernel(rows, columns, weights, direction)
        total = table if total is None else total.add_(table)
    assert total is not None
    return total / draws


def pseudo_token_kernel(
    model: nn.Module,
    probes: Sequence[TokenizedResponse],
    trains: Sequence[TokenizedResponse],
    *,
    draws: int = 1,
    generator: torch.Generator | None = None,
    weights: Weights | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    split: SplitModel | None = None,
) -> Tensor:
    """Compute the token kernel that the pseudo-NTK implies: kappa[m, l] (g_m . g_l), g = e_y - pi.

    With K_{m,l} = kappa I the token kernel `e_{y_m}^T A_m K_{m,l} A_l^T e_{y_l}` is that product, as A^T e_y = g.

    Args:
        model: As for `pseudo_kernel`.
        probes: As for `pseudo_kernel`.
        trains: As for `pseudo_kernel`.
        draws: As for `pseudo_kernel`, of the centred output.
        generator: As for `pseudo_kernel`.
        weights: As for `pseudo_kernel`.
        batch_tokens: As for `pseudo_kernel`.
        split: As for `pseudo_kernel`.

    Returns:
        (M, L), float32, or float64 for a float64 model; on the CPU.

    Raises:
        ValueError: As for `pseudo_kernel`.
        NotImplementedError: As for `pseudo_kernel`.
    """
    rows = TokenStates(model, probes, batch_tokens=batch_tokens, split=split)
    columns = TokenStates(model, trains, batch_tokens=batch_tokens, split=rows.split)
    kappa = pseudo_kernel(
        model,
        probes,
        trains,
        draws=draws,
        generator=generator,
        weights=weights,
        batch_tokens=batch_tokens,
        split=rows.split,
    )
    weights = trainable_weights(model, weights)
    (head, row_tokens), (_, column_tokens) = rows.head_and_values(weights), columns.head_and_values(weights)
    products = residual_products(head, row_tokens, column_tokens, rule=PAPER_RULE)
    return kappa.mul_(products.cpu())


def _scalar_kernel(rows: TokenStates, columns: TokenStates, weights: Weights, direction: Tensor) -> Tensor:
    """Return < d(v . z_m), d(v . z_l) > of all tokens, (M, L)."""
    if len(columns.labels) < len(rows.labels):
        return _scalar_kernel(columns, rows, weights, direction).T
    head = rows.split.head

    def outputs(hidden: Tensor) -> Tensor:
        logits = head(hidden)
        return logits @ direction.to(logits)

    def row(response: int, place: int) -> Tensor:
        gradient = rows.gradient(weights, response, lambda hidden: outputs(hidden[place : place + 1])[0])
        return columns.jvp(weights, gradient, outputs, lambda tangent: tangent[:, None])[:, 0]

    return torch.stack([row(response, place) for response, place in units_of(rows)])
