"""The last-layer kernel, its sums and CHES, against double loops and autograd of the head's weight, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from llm_dynamics.kernel.ches import ches_scores, pair_scores
from llm_dynamics.kernel.last_layer import (
    AnchorSum,
    anchor_scores,
    last_layer_kernel,
    last_layer_scores,
    last_layer_table,
)
from llm_dynamics.kernel.output_head import OutputHead
from llm_dynamics.kernel.residuals import EXACT_RULE, PAPER_RULE, ResidualRule, label_residuals
from llm_dynamics.kernel.token_states import HeadTokens
from tests.kernel.whole_jacobians import draw_responses, flat_gradient, labels_of, logits_at_responses
from tests.likelihood.models import VOCAB, build, without_float32_casts

EXACT = {"atol": 1e-12, "rtol": 1e-10}
PROBES = draw_responses([4, 1, 6], seed=1, vocab=VOCAB)
TRAINS = draw_responses([3, 5], seed=2, vocab=VOCAB)


def make_tokens(lengths, seed, *, vocab=37, d=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    return HeadTokens(
        torch.randn(n, d, generator=generator, dtype=dtype),
        torch.randint(0, vocab, (n,), generator=generator),
        torch.tensor(lengths),
    )


def make_head(*, vocab=37, d=6, dtype=torch.float64, **rule):
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(vocab, d, generator=generator, dtype=dtype)
    return OutputHead(weight, torch.randn(vocab, generator=generator, dtype=dtype), **rule)


def residual_by_definition(head, h, y, *, temperature, exact, vocabulary):
    """One token's g as a dictionary of its entries, by scalar arithmetic."""
    a = head.weight @ h + head.bias
    z = a * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    p = torch.exp(z / temperature) / torch.exp(z / temperature).sum()
    entries = {}
    for v in range(len(z)) if vocabulary is None else set(vocabulary):
        entry = float(v == y) - p[v].item()
        if exact:
            bend = 1.0 if head.softcap is None else 1 - (z[v].item() / head.softcap) ** 2
            entry *= head.scale * bend / temperature
        entries[v] = entry
    return entries


def table_by_definition(head, probes, trains, **options):
    """The double sum over pairs and vocabulary entries."""
    sides = [
        [residual_by_definition(head, h, y, **options) for h, y in zip(s.hidden, s.labels.tolist(), strict=True)]
        for s in (probes, trains)
    ]
    table = torch.zeros(len(probes.labels), len(trains.labels), dtype=torch.float64)
    for m, g_m in enumerate(sides[0]):
        for l, g_l in enumerate(sides[1]):  # noqa: E741
            similarity = sum(g_m[v] * g_l[v] for v in g_m)
            table[m, l] = similarity * (probes.hidden[m] @ trains.hidden[l])
    return table


HEADS = {"plain": {}, "scaled": {"scale": 0.25}, "capped": {"softcap": 3.0}, "both": {"scale": 2.0, "softcap": 5.0}}
VOCABULARIES = {"all": None, "few": [30, 2, 2, 17, 5]}


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("kind", HEADS)
def test_the_table_and_its_sums_are_the_double_sums(kind, temperature, exact, vocabulary):
    head, probes, trains = make_head(**HEADS[kind]), make_tokens([3, 2], 1), make_tokens([2, 1, 3], 2)
    expected = table_by_definition(head, probes, trains, temperature=temperature, exact=exact, vocabulary=vocabulary)
    ids = None if vocabulary is None else torch.tensor(vocabulary)
    rule = ResidualRule(exact=exact, temperature=temperature, vocabulary=ids)
    torch.testing.assert_close(last_layer_table(head, probes, trains, rule=rule), expected, **EXACT)

    weights = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, -0.25])
    torch.testing.assert_close(anchor_scores(head, probes, trains, rule=rule), expected.sum(1), **EXACT)
    torch.testing.assert_close(
        anchor_scores(head, probes, trains, weights=weights, rule=rule), expected @ weights.double(), **EXACT
    )
    by_response = torch.stack([part.sum(1) for part in expected.split([2, 1, 3], dim=1)], dim=1)
    torch.testing.assert_close(anchor_scores(head, probes, trains, by_response=True, rule=rule), by_response, **EXACT)


@given(seed=st.integers(0, 10_000), cut=st.integers(1, 5), temperature=st.floats(0.3, 3.0), few=st.booleans())
@settings(max_examples=30, deadline=None)
def test_anchors_added_in_any_blocks_score_as_the_table_does(seed, cut, temperature, few):
    head, probes, trains = make_head(), make_tokens([4], seed), make_tokens([6], seed + 1)
    rule = ResidualRule(exact=False, temperature=temperature, vocabulary=torch.tensor([1, 4, 36]) if few else None)
    g_m, g_l = (label_residuals(head.logits(s.hidden), s.labels, rule) for s in (probes, trains))
    weights = torch.randn(6, generator=torch.Generator().manual_seed(seed))
    anchors = AnchorSum().add(g_l[:cut], trains.hidden[:cut], weights[:cut])
    anchors.add(g_l[cut:], trains.hidden[cut:], weights[cut:])
    expected = last_layer_table(head, probes, trains, rule=rule) @ weights.double()
    torch.testing.assert_close(anchors.score(g_m, probes.hidden), expected, **EXACT)
    assert anchors.matrix.shape == (3 if few else 37, 6)


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
def test_numbers_do_not_depend_on_the_blocks(vocabulary):
    head = make_head(vocab=300)
    probes, trains = make_tokens([3, 2], 1, vocab=300), make_tokens([2, 1], 2, vocab=300)
    ids = None if vocabulary is None else torch.tensor([*vocabulary, *range(100, 250)])
    for function in (last_layer_table, anchor_scores):
        whole, pieces = (
            function(head, probes, trains, rule=ResidualRule(vocabulary=ids, block_bytes=size)) for size in (2**30, 1)
        )
        torch.testing.assert_close(pieces, whole, **EXACT)


def test_a_certain_label_keeps_its_residual_in_float32():
    rest = 2 / (2 + torch.tensor(20.0, dtype=torch.float64).exp().item())  # 4e-9: 1 - pi is zero in float32
    logits, labels = torch.tensor([[20.0, 0.0, 0.0]]), torch.tensor([0])
    assert label_residuals(logits, labels, PAPER_RULE)[0, 0].item() == pytest.approx(rest, rel=1e-5)

    head = OutputHead(logits.T)
    token = HeadTokens(torch.ones(1, 1), labels, torch.tensor([1]))
    # g = (rest, -rest / 2, -rest / 2), h = 1
    assert last_layer_table(head, token, token).item() == pytest.approx(1.5 * rest**2, rel=1e-5, abs=0)


MODELS = ["llama_untied", "gemma2_soft_capped", "cohere_logit_scale", "granite_divided"]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_is_the_products_of_the_heads_own_gradients(name, temperature):
    model = build(name, dtype=torch.float64)
    with without_float32_casts():
        kernel = last_layer_kernel(model, PROBES, TRAINS, rule=ResidualRule(temperature=temperature))
        # a head of its own, so that tied embeddings do not count
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        gradients = []
        for responses in (PROBES, TRAINS):
            logp = (logits_at_responses(model, responses) / temperature).log_softmax(-1)
            of_labels = logp.gather(1, labels_of(responses)[:, None])[:, 0]
            gradients.append(torch.stack([flat_gradient(entry, [model.lm_head.weight]) for entry in of_labels]))
    expected = gradients[0] @ gradients[1].T
    assert kernel.shape == (11, 8)
    # models other than Llama cast to float32 inside
    tolerance = 1e-9 if name == "llama_untied" else 2e-5
    assert ((kernel - expected).norm() / expected.norm()).item() < tolerance


def test_scores_of_a_model_are_sums_of_its_kernel():
    model = build("llama_tied", dtype=torch.float64)
    with without_float32_casts():
        kernel = last_layer_kernel(model, PROBES, TRAINS, rule=PAPER_RULE, batch_tokens=12)
        scores = last_layer_scores(model, PROBES, TRAINS, rule=PAPER_RULE)
        apart = last_layer_scores(model, PROBES, TRAINS, by_response=True, rule=PAPER_RULE)
    torch.testing.assert_close(scores, kernel.sum(1), **EXACT)
    torch.testing.assert_close(apart, torch.stack([kernel[:, :3].sum(1), kernel[:, 3:].sum(1)], 1), **EXACT)


def test_a_lora_head_counts_as_its_merged_weight_and_the_fused_head_changes_nothing():
    model = build("llama_untied", dtype=torch.float64)
    plain = last_layer_kernel(model, PROBES, TRAINS)
    add_fused_lm_head(model)
    torch.testing.assert_close(last_layer_kernel(model, PROBES, TRAINS), plain, **EXACT)

    model = build("llama_untied", dtype=torch.float64)
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, lora_dropout=0.5)
    adapted = get_peft_model(model, config).double().train()
    random_state = torch.get_rng_state()
    kernel = last_layer_kernel(adapted, PROBES, TRAINS)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert adapted.training
    assert not torch.allclose(kernel, plain)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(kernel, last_layer_kernel(merged.eval(), PROBES, TRAINS), **EXACT)


def test_a_bfloat16_head_is_computed_in_float32_whatever_the_autocast():
    head = make_head(dtype=torch.bfloat16)
    sides = [make_tokens([3], seed, dtype=torch.bfloat16) for seed in (1, 2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        table = last_layer_table(head, *sides)
    assert table.dtype == torch.float32
    wide = OutputHead(head.weight.double(), head.bias.double())
    expected = last_layer_table(wide, *(HeadTokens(s.hidden.double(), s.labels, s.lengths) for s in sides))
    torch.testing.assert_close(table.double(), expected, atol=1e-5, rtol=1e-5)


def test_plain_ches_is_the_papers_double_sum():
    chosen, rejected = make_tokens([3, 1], 1), make_tokens([2, 4], 2)
    scores = pair_scores(chosen, rejected)
    for i in range(2):
        plus, minus = chosen.of_response(i).hidden, rejected.of_response(i).hidden
        cross = sum(float(a @ b) for a in plus for b in minus)
        own = sum(float(a @ b) for a in plus for b in plus)
        assert scores.ches[i].item() == pytest.approx(cross - own, rel=1e-10)
        normalised = cross / (len(plus) * len(minus)) - own / len(plus) ** 2
        assert scores.normalised[i].item() == pytest.approx(normalised, rel=1e-10)


def test_ches_with_residuals_is_minus_the_chosen_change_under_a_step_of_the_head():
    model = build("llama_untied", dtype=torch.float64)
    chosen, rejected = PROBES[:2], TRAINS
    with without_float32_casts():
        scores = ches_scores(model, chosen, rejected, residuals=True)
        expected = []
        for pair in zip(chosen, rejected, strict=True):
            gradients = []
            for response in pair:
                logp = logits_at_responses(model, [response]).log_softmax(-1)
                total = logp.gather(1, labels_of([response])[:, None]).sum()
                gradients.append(flat_gradient(total, [model.lm_head.weight]))
            plus, minus = gradients
            expected.append(-(plus @ (plus - minus)))
        torch.testing.assert_close(scores.ches, torch.stack(expected), **EXACT)
        plain = ches_scores(model, chosen, rejected)
    assert not torch.allclose(plain.ches, scores.ches)


def test_bad_input_is_refused_by_name():
    head, probes, trains = make_head(), make_tokens([3], 1), make_tokens([2], 2)
    with pytest.raises(ValueError, match="temperature is 0"):
        ResidualRule(temperature=0)
    with pytest.raises(ValueError, match=r"vocabulary must hold token ids.*float32"):
        ResidualRule(vocabulary=torch.tensor([1.0]))
    with pytest.raises(ValueError, match="at least one; seen 0 ids"):
        ResidualRule(vocabulary=torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="token id 37, but the model has 37 logits"):
        last_layer_table(head, probes, trains, rule=ResidualRule(vocabulary=torch.tensor([37])))
    with pytest.raises(ValueError, match=r"weights must be \(L,\), one for each of 2 anchor tokens; seen \(3,\)"):
        anchor_scores(head, probes, trains, weights=torch.ones(3))
    with pytest.raises(ValueError, match="call `add` first"):
        AnchorSum().score(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"to add to a sum of shape \(3, 4\)"):
        AnchorSum().add(torch.ones(2, 3), torch.ones(2, 4)).add(torch.ones(2, 5), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"residuals \(N, 3\) and hidden \(N, 4\)"):
        AnchorSum().add(torch.ones(2, 3), torch.ones(2, 4)).score(torch.ones(2, 5), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"logits must be \(N, V\)"):
        label_residuals(torch.ones(3), torch.tensor([0]))
    with pytest.raises(ValueError, match="exact=False"):
        label_residuals(torch.ones(1, 3), torch.tensor([0]), EXACT_RULE)
    with pytest.raises(ValueError, match="lengths must sum to N"):
        HeadTokens(torch.ones(3, 2), torch.ones(3), torch.tensor([2]))
    with pytest.raises(ValueError, match="seen 1 and 2"):
        pair_scores(probes, make_tokens([1, 1], 1))
    model = build("llama_tied")
    with pytest.raises(ValueError, match="no responses given"):
        last_layer_kernel(model, [], TRAINS)
    with pytest.raises(ValueError, match="token id 500 of response 0"):
        last_layer_kernel(model, [_response([1], [500])], TRAINS)
    with pytest.raises(ValueError, match="response 0 has 1 prompt and 0 response tokens"):
        last_layer_kernel(model, [_response([1], [])], TRAINS)


def _response(prompt, answer):
    (response,) = draw_responses([1])
    response.prompt_ids, response.response_ids = tuple(prompt), tuple(answer)
    return response
