"""What differs between architectures: where positions begin and end, which ids there are, what a token may see."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from llm_dynamics.likelihood import score_responses, split_model

END = 40
BERT = {
    "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": END, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
GPT = {"vocab_size": 101, "n_positions": END, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = dict(BERT, num_key_value_heads=2)
DECODER = {"vocab_size": 101, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
               "max_position_embeddings": END}  # fmt: skip
ENDS = {
    "gpt2": (GPT, END),
    "gptj": (GPT | {"rotary_dim": 4}, END),  # rotary, from a table
    "ctrl": ({"vocab_size": 101, "n_positions": END, "n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4}, END),
    "opt": (BERT | {"ffn_dim": 48, "word_embed_proj_dim": 32}, END),
    "gpt_neo": ({"vocab_size": 101, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": END,
                     "attention_types": [[["global", "local"], 1]]}, END),
    "mpt": ({"vocab_size": 101, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": END}, END),
    "roberta": (BERT | {"is_decoder": True}, END - 2),
    "bert": (BERT | {"is_decoder": True}, END),
    "trocr": (DECODER, END),
    "llama": (LLAMA, None),
    "mistral": (LLAMA | {"sliding_window": 8}, None),
    "bloom": ({"vocab_size": 101, "hidden_size": 32, "n_layer": 2, "n_head": 4}, None),
    "xglm": ({"vocab_size": 101, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4,
                  "max_position_embeddings": END}, None),
}  # fmt: skip


def build(kind, **config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).eval()


def ids(length):
    return [3 + i % 97 for i in range(length)]


def plain_sum(model, prompt, response):
    """The log-prob of a response by the model's own forward, given nothing but ids."""
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double().log_softmax(-1)
    return float(sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(response)))


@pytest.mark.parametrize("kind", ENDS)
def test_the_last_position_is_the_one_beyond_which_the_forward_fails(kind):
    config, end = ENDS[kind]
    model = build(kind, **config)
    with torch.no_grad():
        split = split_model(model)
        assert split.max_positions == end
        model(input_ids=torch.tensor([ids(end or 2 * END)]))
        if end is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.tensor([ids(end + 1)]))
            assert split.misfit(ids(end)) is None
            assert f"longer than the {end} positions" in split.misfit(ids(end + 1))
            with pytest.raises(ValueError, match=f"longer than the {end} positions"):
                score_responses(model, [SimpleNamespace(prompt_ids=(5, 6), response_ids=tuple(ids(end)))])


@pytest.mark.parametrize(
    "kind", ["roberta", "xlm-roberta", "camembert", "data2vec-text", "bert", "gpt2", "opt", "llama"]
)
def test_scores_are_those_of_the_plain_forward(kind):
    config = {"gpt2": GPT, "opt": ENDS["opt"][0], "llama": LLAMA}.get(kind, BERT | {"is_decoder": True})
    model = build(kind, **config)
    rows = [((5, 6, 7), (8, 9, 2)), ((5, 6, 7), (1, 9)), ((4, 1, 3, 9, 9, 30), (8, 9, 2, 77, 1, 5))]  # 1 is padding
    for side in ("left", "right"):
        scores = score_responses(
            model, [SimpleNamespace(prompt_ids=p, response_ids=r) for p, r in rows], padding_side=side
        )
        assert scores.logp_sum.tolist() == pytest.approx([plain_sum(model, *row) for row in rows], abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("bert", BERT),
        ("rembert", BERT | {"input_embedding_size": 32, "output_embedding_size": 32}),
        ("xlnet", {"vocab_size": 101, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
        ("modernbert", BERT | {"cls_token_id": 0, "sep_token_id": 2}),
        ("roberta", BERT),
    ],
)
def test_a_model_that_sees_later_tokens_is_refused(kind, config):
    torch.manual_seed(0)
    whole = AutoConfig.for_model(kind, **config)
    kinds = AutoModelForCausalLM if kind in ("xlnet", "rembert") else AutoModelForMaskedLM
    model = kinds.from_config(whole).eval()
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"is no causal model.*is_decoder=True"):
        split_model(model)


def test_a_prefix_that_sees_itself_whole_is_refused():
    model = build("llama", **LLAMA)
    model.config._attn_implementation = "eager"

    def bidirectional(module, args, kwargs):
        kwargs["attention_mask"] = torch.zeros_like(kwargs["attention_mask"])
        return args, kwargs

    model.model.layers[0].self_attn.register_forward_pre_hook(bidirectional, with_kwargs=True)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="no causal model"):
        split_model(model)


@pytest.mark.parametrize("bad", [101, 10**6, -1])
def test_an_id_that_the_model_lacks_is_named(bad):
    model = build("llama", **LLAMA)
    with torch.no_grad():
        assert "outside the model's vocabulary of 101" in split_model(model).misfit([5, bad, 6])
    with pytest.raises(ValueError, match="outside the model's vocabulary of 101"):
        score_responses(model, [SimpleNamespace(prompt_ids=(5,), response_ids=(bad,))])


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA))
    with pytest.raises(NotImplementedError, match=r"meta device.*Load the whole model"):
        split_model(model)
