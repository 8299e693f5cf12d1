"""Scores against the plain way: one row at a time, the whole log-softmax, float64."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from llm_dynamics.likelihood import score_logps, score_responses, split_model
from llm_dynamics.likelihood.preserve import evaluating
from tests.likelihood.models import ARCHITECTURES, build, make_responses, plain_logps, without_float32_casts

EXACT = 1e-9


def assert_scores_equal_plain(model, responses, scores, tolerance):
    """Compare every column with its definition on one-row forwards."""
    tokens, squeezing = scores.tokens, scores.tokens.squeezing
    start = 0
    for response in responses:
        logp = plain_logps(model, response)
        labels = torch.tensor(response.response_ids)
        here = slice(start, start + len(labels))
        start += len(labels)
        label_logp = logp.gather(1, labels[:, None])[:, 0]
        others = logp.scatter(1, labels[:, None], -torch.inf)
        expected = {
            "logp": label_logp,
            "entropy": -(logp.exp() * logp).sum(1),
            "greedy_logp": logp.max(1).values,
            "other_logp": others.max(1).values,
        }
        for name, value in expected.items():
            torch.testing.assert_close(
                getattr(tokens, name)[here].double(),
                value,
                atol=tolerance,
                rtol=tolerance,
                msg=lambda m, n=name: f"{n}: {m}",
            )
        torch.testing.assert_close(
            squeezing.collision[here].double(), logp.exp().square().sum(1), atol=tolerance, rtol=tolerance
        )
        assert torch.equal(tokens.token_id[here], labels)
        assert torch.equal(tokens.greedy_id[here], logp.argmax(1))
        assert torch.equal(squeezing.other_id[here], others.argmax(1))
        assert torch.equal(tokens.rank[here], 1 + (logp > label_logp[:, None]).sum(1))
    assert start == len(tokens.logp)


@pytest.fixture(scope="module")
def exact_model():
    return build("llama_tied", dtype=torch.float64)


@given(
    seed=st.integers(0, 10_000),
    batch_tokens=st.integers(1, 200),
    chunk=st.integers(1, 40),
    padding_side=st.sampled_from(["left", "right"]),
    share_prompts=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_scores_equal_plain_log_softmax_for_any_batching(
    exact_model, seed, batch_tokens, chunk, padding_side, share_prompts
):
    responses = make_responses(seed)
    random.Random(seed).shuffle(responses)
    with without_float32_casts():
        scores = score_responses(
            exact_model,
            responses,
            batch_tokens=batch_tokens,
            chunk=chunk,
            padding_side=padding_side,
            share_prompts=share_prompts,
        )
        assert_scores_equal_plain(exact_model, responses, scores, EXACT)


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_of_every_architecture_are_the_models_own(name, padding_side, share_prompts):
    if name == "mamba_no_attention" and padding_side == "left":
        pytest.skip("a state-space model reads left padding as input, in transformers' own forward too")
    model, responses = build(name), make_responses(1)
    scores = score_responses(
        model, responses, padding_side=padding_side, share_prompts=share_prompts, batch_tokens=96, chunk=7
    )
    assert_scores_equal_plain(model, responses, scores, 2e-5)


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("llama_tied", True),
        ("gpt2_conv1d", True),
        ("gemma2_soft_capped", False),
        ("mistral_sliding_window", False),
        ("bloom_alibi", False),
        ("gpt_neo_local_window", False),
        ("mamba_no_attention", False),
    ],
)
def test_prompts_are_shared_only_where_the_mask_is_obeyed(name, shares):
    with torch.no_grad():
        assert split_model(build(name)).shares_prompts is shares


def test_unknown_logit_processing_falls_back_to_the_models_own_forward(caplog):
    model, responses = build("llama_tied"), make_responses(2)
    original = type(model).forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = output.logits * 3 + torch.arange(output.logits.shape[-1])
        return output

    model.forward = forward.__get__(model)
    scores = score_responses(model, responses)
    assert "scoring runs its whole forward" in caplog.text
    assert_scores_equal_plain(model, responses, scores, 2e-5)


def test_float32_scores_equal_plain_to_1e_6_per_nat():
    model, responses = build("llama_tied"), make_responses(3)
    scores = score_responses(model, responses)
    expected = torch.tensor(
        [plain_logps(model, r).gather(1, torch.tensor(r.response_ids)[:, None]).sum().item() for r in responses]
    )
    torch.testing.assert_close(scores.logp_sum, expected.double(), rtol=1e-6, atol=1e-6)


def test_argmax_is_taken_on_each_probes_own_prefix(exact_model):
    prompt = (5, 6, 7)
    first = SimpleNamespace(prompt_ids=prompt, response_ids=(10, 11, 12, 13))
    second = SimpleNamespace(prompt_ids=prompt, response_ids=(20, 21, 22, 23))
    scores = score_responses(exact_model, [first, second])
    for i, response in enumerate((first, second)):
        for m in range(4):
            prefix = torch.tensor([[*prompt, *response.response_ids[:m]]])
            with torch.no_grad():
                own = exact_model(prefix).logits[0, -1]
            assert scores.tokens.greedy_id[4 * i + m] == own.argmax()
            assert scores.tokens.greedy_logp[4 * i + m] == pytest.approx(own.log_softmax(-1).max().item(), abs=1e-6)
    # the two share only the first prefix: later argmaxes must come from different distributions
    assert scores.tokens.greedy_logp[0] == pytest.approx(scores.tokens.greedy_logp[4].item(), abs=1e-6)
    assert not torch.allclose(scores.tokens.greedy_logp[1:4], scores.tokens.greedy_logp[5:], atol=1e-3)


def test_only_response_positions_meet_the_head_a_chunk_at_a_time():
    model, responses = build("llama_tied"), make_responses(4)
    split = split_model(model)
    rows = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[0]))
    score_responses(model, responses, chunk=5, split=split)
    handle.remove()
    assert max(rows) <= 5
    assert sum(rows) == sum(len(r.response_ids) for r in responses)


def test_adapters_and_trls_fused_head_are_scored_as_they_generate():
    model, responses = build("llama_untied"), make_responses(5)
    add_fused_lm_head(model)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False, lora_dropout=0.5)
    adapted = get_peft_model(model, config).train()
    scores = score_responses(adapted, responses)
    with adapted.disable_adapter():
        base = score_logps(adapted, responses)
    adapted.eval()
    assert_scores_equal_plain(adapted, responses, scores, 2e-5)
    with adapted.disable_adapter():
        expected = score_responses(adapted, responses).tokens.logp
    assert torch.equal(base, expected)
    beside = score_responses(adapted, responses, reference="adapter_off").ref_logp
    assert torch.equal(beside, base)
    assert torch.equal(score_responses(adapted, responses, reference=adapted).ref_logp, scores.tokens.logp)
    assert not torch.allclose(base, scores.tokens.logp, atol=1e-3)


def test_reference_log_probs_equal_the_full_scores():
    model, responses = build("qwen2_biases"), make_responses(6)
    torch.testing.assert_close(score_logps(model, responses), score_responses(model, responses).tokens.logp)


def test_bfloat16_weights_get_a_float32_log_softmax():
    model, responses = build("llama_tied", dtype=torch.bfloat16), make_responses(7)
    scores = score_responses(model, responses, share_prompts=False, batch_tokens=1)
    assert scores.tokens.logp.dtype == torch.float32
    response, start = responses[0], 0
    with torch.no_grad():
        logits = model(torch.tensor([[*response.prompt_ids, *response.response_ids]])).logits[0]
    expected = logits.float().log_softmax(-1)[len(response.prompt_ids) - 1 : -1]
    labels = torch.tensor(response.response_ids)
    torch.testing.assert_close(
        scores.tokens.logp[start : start + len(labels)], expected.gather(1, labels[:, None])[:, 0], atol=1e-5, rtol=1e-5
    )


def test_a_responses_nan_stays_its_own():
    model = build("llama_untied")
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = torch.nan
    clean = SimpleNamespace(prompt_ids=(5, 6), response_ids=(7, 8, 9))
    broken = SimpleNamespace(prompt_ids=(5, 6), response_ids=(7, 77, 9, 10))
    scores = score_responses(model, [clean, broken])
    own = plain_logps(model, broken)[torch.arange(4), torch.tensor(broken.response_ids)].isfinite()
    assert not own.all()
    assert scores.tokens.finite.tolist() == [True, True, True, *own.tolist()]
    assert scores.tokens.greedy_id[-1] == -1
    assert scores.tokens.rank[-1] == -1
    assert scores.logp_sum[0].isfinite()
    assert scores.logp_sum[1].isnan()


def test_a_masked_vocabulary_keeps_its_finite_entropy():
    model = build("llama_untied")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
    with torch.no_grad():
        model.lm_head.bias[50:] = -torch.inf
    scores = score_responses(model, [SimpleNamespace(prompt_ids=(5,), response_ids=(6, 60))])
    assert scores.tokens.entropy.isfinite().all()
    assert scores.tokens.logp[1] == -torch.inf
    assert scores.tokens.finite.tolist() == [True, False]


def test_modes_gradients_and_random_state_are_left_as_found():
    model, responses = build("llama_tied").train(), make_responses(8)
    model.model.layers[0].eval()  # a part that its user froze
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    score_responses(model, responses)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].training
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.is_grad_enabled()


def test_everything_is_restored_after_an_error():
    model, responses = build("llama_tied").train(), make_responses(9)
    with evaluating(model):
        split = split_model(model)

    def fail(*args):
        torch.rand(3)
        raise RuntimeError("out of memory, say")

    handle = model.model.layers[1].register_forward_hook(fail)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        score_responses(model, responses, split=split)
    handle.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_progress_counts_every_response_once():
    model, responses = build("llama_tied"), make_responses(10)
    seen = []
    score_responses(model, responses, batch_tokens=30, on_progress=seen.append)
    assert sum(seen) == len(responses)
    assert len(seen) > 1


def row(prompt, response):
    return SimpleNamespace(prompt_ids=prompt, response_ids=response)


@pytest.mark.parametrize(
    ("responses", "options", "message"),
    [
        ([], {}, "nothing to score"),
        ([row((), (1,))], {}, "0 prompt and 1 response"),
        ([row((1,), ())], {}, "1 prompt and 0 response"),
        ([row((1,), (101,))], {}, "token id 101 is outside the model's vocabulary of 101"),
        ([row((1,), (2,))], {"chunk": 0}, "chunk must be at least 1"),
        ([row((1,), (2,))], {"batch_tokens": 0}, "batch_tokens"),
        ([row((1,), (2,))], {"padding_side": "top"}, 'allowed: "left", "right"'),
        ([row((1,), (2,))], {"squeeze_strength": -1.0}, "strength > 0"),
        ([row((1,), (2,))], {"reference": "base"}, "allowed: a model"),
        ([row((1,), (2,))], {"reference": "adapter_off"}, "needs a model with an adapter"),
    ],
)
def test_bad_input_is_named(responses, options, message):
    with pytest.raises(ValueError, match=message):
        score_responses(build("llama_tied"), responses, **options)


def test_prompts_stay_shared_under_mixed_precision():
    model, responses = build("llama_tied"), make_responses(11)

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    with torch.no_grad(), autocast():
        split = split_model(model)
    assert split.backbone is not None
    assert split.shares_prompts
    scores = score_responses(model, responses, split=split, autocast=autocast)
    exact = score_responses(model, responses)
    assert not torch.equal(scores.tokens.logp, exact.tokens.logp)  # bfloat16 was really in use
    torch.testing.assert_close(scores.tokens.logp, exact.tokens.logp, atol=0.3, rtol=0.05)


def test_a_column_counting_window_is_seen_by_the_check_itself(monkeypatch):
    monkeypatch.setattr("llm_dynamics.likelihood.head._limits_attention", lambda config: False)  # no name gives it away
    model = build("gpt_neo_local_window")
    with torch.no_grad():
        assert not split_model(model).shares_prompts


@pytest.mark.parametrize("name", ["dynamic_rope", "longrope"])
def test_long_probes_leave_no_trace_in_the_rotary_embedding(name):
    model = build(name)
    short = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        before = model(short).logits
        score_responses(model, make_responses(12, longest=30))
        assert torch.equal(model(short).logits, before)


def test_an_unknown_logit_cap_is_seen_in_bfloat16():
    model = build("llama_untied", dtype=torch.bfloat16)
    original = type(model).forward

    def forward(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits = 10 * torch.tanh(output.logits / 10)
        return output

    model.forward = forward.__get__(model)
    with torch.no_grad():
        assert split_model(model).backbone is None
