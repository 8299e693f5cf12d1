"""Tiny causal LMs of many architectures, and the plain way to score them."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llm_dynamics.likelihood.preserve import keeping_rope

VOCAB = 101
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama_tied": ("llama", SIZES | {"tie_word_embeddings": True}),
    "llama_untied": ("llama", SIZES | {"tie_word_embeddings": False}),
    "qwen2_biases": ("qwen2", SIZES | {"tie_word_embeddings": False}),
    "qwen3_qk_norm": ("qwen3", SIZES),
    "gpt2_conv1d": ("gpt2", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                             "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}),
    "gemma2_soft_capped": ("gemma2", SIZES | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0,
                                              "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "cohere_logit_scale": ("cohere", SIZES | {"logit_scale": 0.25}),
    "granite_divided": ("granite", SIZES | {"logits_scaling": 4.0}),
    "mistral_sliding_window": ("mistral", SIZES | {"sliding_window": 6}),
    "bloom_alibi": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4,
                              "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "pythia": ("gpt_neox", {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}),
    "mixtral_moe": ("mixtral", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_neo_local_window": ("gpt_neo", {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                                         "attention_types": [[["global", "local"], 1]], "window_size": 12,
                                         "max_position_embeddings": 128, "initializer_range": 0.3,
                                         "bos_token_id": 1, "eos_token_id": 2}),
    "dynamic_rope": ("llama", SIZES | {"max_position_embeddings": 16, "rope_parameters":
                                       {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}),
    "longrope": ("phi3", SIZES | {"max_position_embeddings": 64, "original_max_position_embeddings": 16,
                                  "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0,
                                                      "original_max_position_embeddings": 16,
                                                      "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}}),
    "mamba_no_attention": ("mamba", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2,
                                     "state_size": 8, "initializer_range": 0.3}),
}  # fmt: skip


def build(name, *, dtype=torch.float32, seed=0):
    """A randomly initialised tiny model, in evaluation mode."""
    model_type, sizes = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    return model.to(dtype).eval()


def make_responses(seed=0, prompts=3, families=4, longest=14):
    """Responses of random tokens, several to each prompt; one prompt and one response of a single token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        size = int(torch.randint(low, high + 1, (1,), generator=generator))
        return tuple(torch.randint(3, VOCAB, (size,), generator=generator).tolist())

    responses = []
    for p in range(prompts):
        prompt = draw(1, 1) if p == 0 else draw(2, longest)
        responses += [SimpleNamespace(prompt_ids=prompt, response_ids=draw(1, longest)) for _ in range(families)]
    return responses


@torch.no_grad()
def plain_logps(model, response):
    """One row, its own forward, the whole log_softmax: (M, V) float64 log-probs at the response positions."""
    ids = torch.tensor([[*response.prompt_ids, *response.response_ids]])
    with keeping_rope(model):
        output = model(input_ids=ids)
    logp = output.logits[0].double().log_softmax(-1)
    return logp[len(response.prompt_ids) - 1 : -1]


@contextmanager
def without_float32_casts():
    """Llama's norm casts to float32, which would hide anything below 1e-7 in a float64 comparison."""

    def forward(self, hidden_states):
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden_states * scale

    with mock.patch.object(LlamaRMSNorm, "forward", forward):
        yield
