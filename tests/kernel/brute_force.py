"""The slow, obvious twin of the exact kernel: one backward per token over the model's own forward, flat gradients."""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from tests.likelihood.models import without_float32_casts


def jacobian(model, responses, names, *, pad_to=None, padding_side="right"):
    """(N, parameters): the gradient of every response token's log-prob by the named parameters, one at a time."""
    named = dict(model.named_parameters(remove_duplicate=False))
    parameters = [named[name] for name in names]
    rows = []
    for response in responses:
        ids = [*response.prompt_ids, *response.response_ids]
        padding = max(0, (pad_to or 0) - len(ids))
        left = padding if padding_side == "left" else 0
        padded = torch.tensor([[0] * left + ids + [0] * (padding - left)])
        mask = torch.zeros_like(padded)
        mask[0, left : left + len(ids)] = 1
        inputs = {"input_ids": padded, "use_cache": False}
        if padding:
            inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        logp = model(**inputs).logits[0].log_softmax(-1)
        for j, label in enumerate(response.response_ids):
            token_logp = logp[left + len(response.prompt_ids) + j - 1, label]
            grads = torch.autograd.grad(token_logp, parameters, retain_graph=True, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
            rows.append(torch.cat([g.flatten() for g in flat]))
    return torch.stack(rows)


def trainable(model):
    """Names of all trainable parameters, tied ones once."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def brute_force(model, train, probes, names=None, **layout):
    """(M, L): the kernel of every probe token with every training token."""
    names = names or trainable(model)
    return jacobian(model, probes, names, **layout) @ jacobian(model, train, names, **layout).T


@contextmanager
def in_float64():
    """Patch the float32 casts of the architectures in use, which would hide anything below 1e-7."""

    def gemma_norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)

    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def softmax(x, dim=None, dtype=None, **_):
        return torch.softmax(x, dim)

    with ExitStack() as stack:
        stack.enter_context(without_float32_casts())
        stack.enter_context(mock.patch.object(Qwen2RMSNorm, "forward", norm))
        stack.enter_context(mock.patch.object(Qwen3RMSNorm, "forward", norm))
        stack.enter_context(mock.patch.object(Gemma2RMSNorm, "forward", gemma_norm))
        stack.enter_context(mock.patch.object(nn.functional, "softmax", softmax))
        yield


@contextmanager
def learning(model):
    """Every token's embedding has a derivative: what the log-probs' own is."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    before = [table.padding_idx for table in tables]
    for table in tables:
        table.padding_idx = None
    yield
    for table, padding in zip(tables, before, strict=True):
        table.padding_idx = padding
