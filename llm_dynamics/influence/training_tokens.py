"""The token account: every training token's exact share in a step, under the real optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from llm_dynamics.influence.optimizers import Factor
from llm_dynamics.influence.tape import MicroBatch
from llm_dynamics.kernel.weights import PaddingRows, Weights, at_weights, dual_weights, unpacked
from llm_dynamics.likelihood.head import SplitModel
from llm_dynamics.likelihood.preserve import keeping_random

_HEAD_ROWS = 512


@dataclass(frozen=True)
class TokenInfluence:
    """Shares of the training tokens that carry a loss, in the order of the batches, rows and positions.

    Attributes:
        shares: What token l did to the target in this step, nats, (L,), float64.
        places: Micro-batch, row and position (as in `MicroBatch.labels`) of each token, (L, 3), int64.
        replay_error: Largest difference between a log-prob in the replay and in training, nats: how faithfully dropout
            and temperature were repeated.
    """

    shares: Tensor
    places: Tensor
    replay_error: float


def influence_of_training_tokens(
    model: nn.Module,
    split: SplitModel,
    batches: Sequence[MicroBatch],
    before: Weights,
    per_gradient: Mapping[str, Factor],
    probe_gradient: Weights,
    *,
    temperature: float = 1.0,
    n_processes: int = 1,
) -> TokenInfluence:
    """Return every training token's share in the change of a target: a probe, or any weighted sum of probe tokens.

    With F the optimizer's factor per gradient (`UpdateSplit.per_gradient`; AdamW: -lr (1 - beta1) s D / b1) and
    grad f(theta) the target's gradient averaged over the path of the step (`path_gradient`),

        share_l = c_l < F * grad f , d log pi(y_l)(theta_before)/d theta >

    for all l at once: one directional derivative of the training batch at the weights it was trained at, replayed
    under its own random state. Summed over all tokens, it is the target's share of all labels' parts.

    Args:
        model: The trained model, in the modes it was trained in.
        split: Its halves.
        batches: What `LossTape.batches` recorded, with random states where dropout is on.
        before: Weights before the step, of the trained parameters.
        per_gradient: F by parameter name.
        probe_gradient: The target's gradient by parameter name.
        temperature: What the trainer divides logits by.
        n_processes: Processes whose gradients the trainer averages: each token's coefficient counts 1/n.

    Returns:
        Shares and places of the tokens with a loss.

    Raises:
        ValueError: Where the optimizer's factor is missing (an optimizer that is not known).
    """
    missing = [name for name in probe_gradient if name not in per_gradient]
    if len(missing) == len(probe_gradient):
        raise ValueError(
            "the optimizer's step is not known as a function of the gradient (see UpdateSplit.note), so it cannot be "
            "split over training tokens"
        )
    direction = {name: value * per_gradient[name] for name, value in probe_gradient.items() if name in per_gradient}
    if split.backbone is None:
        raise NotImplementedError(
            f"{type(split.model).__name__} computes its logits in an unknown way: its batches cannot be replayed"
        )
    device = split.device
    shares, places, error = [torch.zeros(0, dtype=torch.float64)], [torch.zeros((0, 3), dtype=torch.long)], 0.0
    with forward_ad.dual_level(), keeping_random():
        weights = dual_weights(before, direction)
        for k, batch in enumerate(batches):
            where = batch.has_loss.nonzero()

            def replay(batch: MicroBatch = batch, where: Tensor = where) -> tuple[Tensor, Tensor]:
                if batch.random is not None:
                    batch.random.restore(device)
                return _replay(split, batch, where, temperature)

            with PaddingRows(learn=False):
                logps, tangents = at_weights(model, weights, replay, evaluate=False)
            c = batch.c[where[:, 0], where[:, 1]].double().cpu() / n_processes
            recorded = batch.logps[where[:, 0], where[:, 1]].double().cpu()
            shares.append(c * tangents.double().cpu())
            places.append(torch.cat([torch.full((len(where), 1), k), where.cpu()], dim=1))
            if len(where):
                error = max(error, float((logps.double().cpu() - recorded).abs().max()))
    return TokenInfluence(torch.cat(shares), torch.cat(places), error)


def _replay(split: SplitModel, batch: MicroBatch, where: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return log-probs and their tangents at the positions `where` (L, 2) of a micro-batch."""
    assert split.backbone is not None
    hidden = split.backbone(**{**batch.inputs, "use_cache": False}).last_hidden_state[where[:, 0], where[:, 1]]
    labels = batch.labels[where[:, 0], where[:, 1]]
    values, tangents = [], []
    for some, ids in zip(hidden.split(_HEAD_ROWS), labels.split(_HEAD_ROWS), strict=True):
        logits = split.head(some) / temperature
        logps = logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(dim=1)
        value, tangent = unpacked(logps)
        values.append(value)
        tangents.append(tangent)
    return torch.cat(values), torch.cat(tangents)
