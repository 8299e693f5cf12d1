"""A model so small that whole Jacobians of its logits fit, and the plain definitions computed from them."""

from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SMALL_VOCAB = 13


def build_small(*, tied=False, seed=0, bias=False, dtype=torch.float64):
    """A Llama with V = 13, d = 8, one layer, in evaluation mode."""
    config = LlamaConfig(
        vocab_size=SMALL_VOCAB,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        if bias:
            model.lm_head.bias = torch.nn.Parameter(torch.randn(SMALL_VOCAB))
    return model.to(dtype).eval()


def draw_responses(lengths, *, seed=0, vocab=SMALL_VOCAB, prompt=3):
    """Responses of the given lengths to prompts of their own, random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return tuple(torch.randint(0, vocab, (n,), generator=generator).tolist())

    return [SimpleNamespace(prompt_ids=draw(prompt), response_ids=draw(n)) for n in lengths]


def logits_at_responses(model, responses):
    """Logits (N, V) at the positions that predict response tokens, one plain forward each, with their graph."""
    parts = []
    for r in responses:
        logits = model(input_ids=torch.tensor([[*r.prompt_ids, *r.response_ids]])).logits[0]
        parts.append(logits[len(r.prompt_ids) - 1 : -1])
    return torch.cat(parts)


def labels_of(responses):
    return torch.tensor([token for r in responses for token in r.response_ids])


def flat_gradient(scalar, parameters):
    """The gradient of one scalar as one vector."""
    gradients = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([torch.zeros(p.numel(), dtype=p.dtype) if g is None else g.flatten() for g, p in pairs])


def jacobians(outputs, parameters):
    """d outputs / d theta: (..., n parameters), one backward for each entry."""
    rows = [flat_gradient(entry, parameters) for entry in outputs.flatten()]
    return torch.stack(rows).reshape(*outputs.shape, -1)


def blocks(model, probes, trains, parameters=None):
    """K_{m,l} by definition: (M, L, V, V)."""
    parameters = list(model.parameters()) if parameters is None else parameters
    j_m = jacobians(logits_at_responses(model, probes), parameters)
    j_l = jacobians(logits_at_responses(model, trains), parameters)
    return torch.einsum("mvp,lwp->mlvw", j_m, j_l)
