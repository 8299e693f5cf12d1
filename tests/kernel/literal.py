"""The slow, obvious twin of the last-layer sums: a gradient (V, d) per token, an inner product per pair of tokens."""

from itertools import pairwise

import torch

from llm_dynamics.kernel.output_head import OutputHead
from llm_dynamics.kernel.token_states import HeadTokens

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 2.0, "softcap": 5.0},
}


def draw_head(*, vocab=37, d=6, seed=9, dtype=torch.float64, bias=False, **options):
    generator = torch.Generator().manual_seed(seed)
    weight, offset = (torch.randn(vocab, n, generator=generator, dtype=dtype) for n in (d, 1))
    return OutputHead(weight, offset[:, 0] if bias else None, **options)


def draw_tokens(lengths, seed, *, vocab=37, d=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(lengths), d, generator=generator, dtype=dtype)
    labels = torch.randint(0, vocab, (sum(lengths),), generator=generator)
    return HeadTokens(hidden, labels, torch.tensor(lengths, dtype=torch.int64))


def gradients_by_definition(head, tokens, *, exact, temperature=1.0, vocabulary=None):
    """One list per response of each token's G: autograd of log pi(y) by W, or (e_y - pi) h^T as the paper has it."""
    kept = torch.ones(len(head.weight), dtype=torch.bool)
    if vocabulary is not None:
        kept[:] = False
        kept[vocabulary] = True
    found = []
    for h, y in zip(tokens.hidden, tokens.labels.tolist(), strict=True):
        weight = head.weight.clone().requires_grad_()
        z = head.scale * (weight @ h + (0 if head.bias is None else head.bias))
        if head.softcap is not None:
            z = head.softcap * torch.tanh(z / head.softcap)
        logp = (z / temperature).log_softmax(0)
        if exact:
            (gradient,) = torch.autograd.grad(logp[y], weight)
        else:
            residual = -logp.detach().exp()
            residual[y] += 1
            gradient = torch.outer(residual, h)
        found.append(gradient[kept])
    ends = torch.tensor([0, *tokens.lengths.tolist()]).cumsum(0).tolist()
    return [found[start:stop] for start, stop in pairwise(ends)]


def inner(a, b):
    return float((a * b).sum())


def all_tokens(by_response):
    return [gradient for response in by_response for gradient in response]
