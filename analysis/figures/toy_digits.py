"""The classifier of the toy figures: scikit-learn's 8 x 8 digits, a small network in float64, its exact eNTK.

Stands in for the MNIST experiment of Ren & Sutherland, *Learning Dynamics of LLM Finetuning*, ICLR 2025 (arXiv
2407.10490) [LD], whose data cannot be shipped; these digits come inside scikit-learn. The activation is tanh: a smooth
network, so that the remainder of the first-order account really is O(eta^2).

Letters: U examples trained on, O observed ones (probes), V = 10 classes, W weights, H hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

DIGITS = 10
TRAINING = 1200
"""Training examples; the other 597 are the held-out ones that probes are drawn from."""
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Digits:
    """Images (N, 64) in [0, 1], float64, and their digits (N,), int64."""

    images: Tensor
    labels: Tensor

    def some_of_each(self, count: int) -> Digits:
        """Return the first `count` of each digit, digit by digit."""
        rows = torch.cat([(self.labels == digit).nonzero()[:count, 0] for digit in range(DIGITS)])
        return Digits(self.images[rows], self.labels[rows])

    def of(self, digit: int) -> Tensor:
        """Return which rows show a digit, (N,), bool."""
        return self.labels == digit


def load(seed: int) -> tuple[Digits, Digits]:
    """Return training and held-out digits, shuffled by the seed."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    images, labels = torch.from_numpy(data.data)[order] / 16, torch.from_numpy(data.target)[order]
    train, held_out = slice(0, TRAINING), slice(TRAINING, None)
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def similarity(digits: Digits) -> Tensor:
    """Return the correlation of the mean images of the digits, about the mean of all, (V, V): what pixels alone say."""
    means = torch.stack([digits.images[digits.of(digit)].mean(0) for digit in range(DIGITS)])
    return torch.corrcoef(means - means.mean(0))


def alike(table: Tensor) -> tuple[int, int, int]:
    """Return the two digits that are most alike, and the one that is least like the first of them."""
    off_diagonal = table.masked_fill(torch.eye(DIGITS, dtype=torch.bool), -torch.inf)
    first, second = divmod(int(off_diagonal.argmax()), DIGITS)
    return first, second, int(table[first].argmin())


class Classifier:
    """A network 64 - H - H - 10 with tanh; stateless: every call takes the weights.

    Args:
        seed: Of the initial weights.
        hidden: H.
    """

    def __init__(self, seed: int, hidden: int = 64) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, DIGITS)]
        self.network = nn.Sequential(*layers).double()

    def start(self) -> Weights:
        """Return the initial weights."""
        return {name: weight.detach().clone() for name, weight in self.network.named_parameters()}

    def logits(self, weights: Weights, images: Tensor) -> Tensor:
        """Return z, (N, V)."""
        return functional_call(self.network, weights, images)

    def log_probs(self, weights: Weights, images: Tensor) -> Tensor:
        """Return log pi, (N, V), nats."""
        return self.logits(weights, images).log_softmax(-1)

    def loss_gradients(self, weights: Weights, digits: Digits) -> Weights:
        """Return the gradient of each example's cross-entropy, by name: (N, ...)."""

        def loss(w: Weights, image: Tensor, label: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.logits(w, image[None]), label[None])

        return vmap(grad(loss), in_dims=(None, 0, 0))(weights, digits.images, digits.labels)

    def jacobian(self, weights: Weights, images: Tensor) -> Tensor:
        """Return dz/dtheta, (N, V, W)."""
        by_name = vmap(jacrev(lambda w, image: self.logits(w, image[None])[0]), in_dims=(None, 0))(weights, images)
        return torch.cat([part.flatten(2) for part in by_name.values()], dim=2)

    def change_along(self, weights: Weights, directions: Weights, images: Tensor) -> Tensor:
        """Return the derivative of log pi along each of D directions, (D, N, V)."""

        def along(direction: Weights) -> Tensor:
            return jvp(lambda w: self.log_probs(w, images), (weights,), (direction,))[1]

        return vmap(along)(directions)


def kernel(observed: Tensor, trained: Tensor) -> Tensor:
    """Return the exact eNTK of the logits, K = J_o J_u^T, (O, U, V, V), from two Jacobians (N, V, W)."""
    (o, v, _), u = observed.shape, len(trained)
    return (observed.flatten(0, 1) @ trained.flatten(0, 1).T).view(o, v, u, v).transpose(1, 2)


def first_order(kernel: Tensor, observed_logp: Tensor, trained_logp: Tensor, labels: Tensor) -> Tensor:
    """Return - A K G, the change of log pi per unit of learning rate [LD, Prop. 1], (U, O, V).

    A = I - 1 pi_o^T (V, V) at the observed example, G = pi_u - e_y (V,), the gradient of cross-entropy by the logits.

    Args:
        kernel: K, (O, U, V, V).
        observed_logp: log pi of observed examples, (O, V).
        trained_logp: log pi of the trained ones, (U, V).
        labels: Their labels, (U,).
    """
    residual = trained_logp.exp() - nn.functional.one_hot(labels, DIGITS)  # (U, V)
    of_logits = -torch.einsum("ouij,uj->uoi", kernel, residual)
    return of_logits - (of_logits * observed_logp.exp()).sum(-1, keepdim=True)


def sgd(
    classifier: Classifier, digits: Digits, *, steps: int, learning_rate: float, seed: int, batch: int = 20
) -> Iterator[tuple[int, Weights, Digits]]:
    """Train by plain SGD on the mean cross-entropy.

    Yields:
        Steps done, the weights and the next batch: `steps` + 1 times, the start first.
    """
    weights = classifier.start()
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    for step in range(steps + 1):
        rows = rows or list(torch.randperm(len(digits.labels), generator=generator).split(batch))
        chosen = rows.pop()
        examples = Digits(digits.images[chosen], digits.labels[chosen])
        yield step, weights, examples
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        loss = nn.functional.cross_entropy(classifier.logits(leaves, examples.images), examples.labels)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        pairs = zip(leaves.items(), gradients, strict=True)
        weights = {name: (weight - learning_rate * g).detach() for (name, weight), g in pairs}
