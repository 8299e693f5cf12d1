"""Scores against anchor responses, and these against each other: literal double sums over tokens, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.kernel import output_head
from llm_dynamics.kernel.gwhes import gwhes
from llm_dynamics.kernel.last_layer import anchor_products, anchor_scores
from llm_dynamics.kernel.output_head import OutputHead
from llm_dynamics.kernel.residuals import EXACT_RULE, PAPER_RULE, ResidualRule
from llm_dynamics.kernel.token_states import HeadTokens
from tests.kernel.literal import HEADS, all_tokens, draw_head, draw_tokens, gradients_by_definition, inner

LENGTHS = [2, 0, 4, 1]
WEIGHTS = torch.tensor([0.5, 7.0, -1.25, 3.0], dtype=torch.float64)
VOCABULARIES = {"all": None, "few": [30, 2, 2, 17, 5]}


def assert_close(found, expected, tolerance=1e-10):
    expected = torch.as_tensor(expected, dtype=found.dtype)
    assert found.shape == expected.shape
    assert not found.isnan().any()
    if found.numel():
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def rule_of(exact, temperature=1.0, vocabulary=None, **options):
    ids = None if vocabulary is None else torch.tensor(vocabulary)
    return ResidualRule(exact=exact, temperature=temperature, vocabulary=ids, **options)


def by_definition(head, tokens, anchors, weights, **options):
    own = all_tokens(gradients_by_definition(head, tokens, **options))
    responses = gradients_by_definition(head, anchors, **options)
    scores = [
        sum(w * inner(g, a) for w, response in zip(weights.tolist(), responses, strict=True) for a in response)
        for g in own
    ]
    products = [[sum(inner(a, b) for a in left for b in right) for right in responses] for left in responses]
    return scores, products


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "paper"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("kind", HEADS)
def test_scores_and_products_are_the_double_sums(kind, temperature, exact, vocabulary):
    head, tokens, anchors = draw_head(**HEADS[kind]), draw_tokens([3, 2], 1), draw_tokens(LENGTHS, 2)
    options = {"exact": exact, "temperature": temperature, "vocabulary": vocabulary}
    scores, products = by_definition(head, tokens, anchors, WEIGHTS, **options)
    found = anchor_products(head, tokens, anchors, weights=WEIGHTS, rule=rule_of(**options))
    assert found.scores.dtype == found.products.dtype == torch.float64
    assert_close(found.scores, scores)
    assert_close(found.products, products)


@pytest.mark.parametrize("rule", [PAPER_RULE, EXACT_RULE], ids=["paper", "exact"])
def test_the_default_weight_of_every_response_is_one(rule):
    head, tokens, anchors = draw_head(bias=True, softcap=4.0), draw_tokens([5], 1), draw_tokens(LENGTHS, 2)
    scores, products = by_definition(head, tokens, anchors, torch.ones(4), exact=rule.exact)
    found = anchor_products(head, tokens, anchors, rule=rule)
    assert_close(found.scores, scores)
    assert_close(found.products, products)
    assert_close(anchor_scores(head, tokens, anchors, rule=rule), scores)


def test_the_default_rule_is_the_gradient_of_the_head():
    head, tokens, anchors = draw_head(scale=0.5), draw_tokens([3], 1), draw_tokens([2, 2], 2)
    scores, products = by_definition(head, tokens, anchors, torch.ones(2), exact=True)
    found = anchor_products(head, tokens, anchors)
    assert_close(found.scores, scores)
    assert_close(found.products, products)


def test_weights_leave_the_products_alone():
    head, tokens, anchors = draw_head(), draw_tokens([3], 1), draw_tokens(LENGTHS, 2)
    plain, weighted = (anchor_products(head, tokens, anchors, weights=w) for w in (None, WEIGHTS))
    assert torch.equal(plain.products, weighted.products)
    assert not torch.allclose(plain.scores, weighted.scores)


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], [0, 3, 0], [1]])
def test_empty_responses_give_zeros(lengths):
    head, tokens, anchors = draw_head(), draw_tokens([3, 0, 1], 1), draw_tokens(lengths, 2)
    weights = torch.arange(1.0, 1 + len(lengths), dtype=torch.float64)
    scores, products = by_definition(head, tokens, anchors, weights, exact=False)
    found = anchor_products(head, tokens, anchors, weights=weights, rule=PAPER_RULE)
    assert_close(found.scores, scores)
    assert_close(found.products, products)
    empty = torch.tensor(lengths) == 0
    assert not found.products[empty].any()


@pytest.mark.parametrize("vocabulary", VOCABULARIES.values(), ids=VOCABULARIES)
def test_without_tokens_to_score_the_products_are_the_same(vocabulary):
    head, anchors, rule = draw_head(), draw_tokens(LENGTHS, 2), rule_of(False, vocabulary=vocabulary)
    none = anchor_products(head, draw_tokens([], 1), anchors, rule=rule)
    some = anchor_products(head, draw_tokens([3], 1), anchors, rule=rule)
    assert none.scores.shape == (0,)
    assert_close(none.products, some.products)


def test_without_anchor_responses_scores_are_zero():
    found = anchor_products(draw_head(), draw_tokens([3], 1), draw_tokens([], 2), weights=torch.ones(0))
    assert torch.equal(found.scores, torch.zeros(3, dtype=torch.float64))
    assert found.products.shape == (0, 0)


def test_scores_of_the_anchors_themselves_add_up_to_the_products():
    head, anchors = draw_head(bias=True), draw_tokens(LENGTHS, 2)
    found = anchor_products(head, anchors, anchors, weights=WEIGHTS)
    summed = torch.stack([part.sum() for part in found.scores.split(LENGTHS)])
    assert_close(found.products @ WEIGHTS, summed)


@pytest.mark.parametrize("vocabulary", [None, [*range(40, 260), 3]], ids=["all", "some"])
@pytest.mark.parametrize("kept", [0, 2**40], ids=["computed_twice", "kept"])
@pytest.mark.parametrize("block_bytes", [1, 2**40])
def test_no_number_depends_on_blocks_or_on_kept_logits(monkeypatch, block_bytes, kept, vocabulary):
    head = draw_head(vocab=300, bias=True, softcap=3.0)
    tokens, anchors = draw_tokens([3, 2], 1, vocab=300), draw_tokens(LENGTHS, 2, vocab=300)
    plain = anchor_products(head, tokens, anchors, weights=WEIGHTS, rule=rule_of(True, 0.7, vocabulary))
    monkeypatch.setattr(output_head, "KEPT_BYTES", kept)
    rule = rule_of(True, 0.7, vocabulary, block_bytes=block_bytes)
    found = anchor_products(head, tokens, anchors, weights=WEIGHTS, rule=rule)
    assert_close(found.scores, plain.scores, 1e-12)
    assert_close(found.products, plain.products, 1e-12)


@pytest.mark.parametrize(("kept", "products"), [(0, 4), (2**40, 2)])
def test_kept_logits_save_the_second_pass(monkeypatch, kept, products):
    calls = []
    original = OutputHead.logits
    monkeypatch.setattr(OutputHead, "logits", lambda *args: calls.append(args) or original(*args))
    monkeypatch.setattr(output_head, "KEPT_BYTES", kept)
    anchor_products(draw_head(), draw_tokens([3], 1), draw_tokens([2], 2), rule=rule_of(False, block_bytes=2**30))
    assert len(calls) == products  # each side once, or twice


def test_kept_logits_are_measured_over_all_tokens_and_the_whole_vocabulary(monkeypatch):
    head, tokens, anchors = draw_head(), draw_tokens([3], 1), draw_tokens([2], 2)
    calls = []
    original = OutputHead.logits
    monkeypatch.setattr(OutputHead, "logits", lambda *args: calls.append(args) or original(*args))
    for kept, products in ((5 * 37 * 8, 2), (5 * 37 * 8 - 1, 4)):
        monkeypatch.setattr(output_head, "KEPT_BYTES", kept)
        calls.clear()
        anchor_products(head, tokens, anchors)
        assert len(calls) == products


def test_the_inputs_are_left_as_they_were():
    head, tokens, anchors = draw_head(bias=True, softcap=3.0), draw_tokens([3], 1), draw_tokens([2, 2], 2)
    inputs = [head.weight, head.bias, tokens.hidden, tokens.labels, anchors.hidden, anchors.labels]
    before = [one.clone() for one in inputs]
    anchor_products(head, tokens, anchors, weights=WEIGHTS[:2], rule=rule_of(True, 0.7))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_a_bfloat16_head_is_computed_in_float32_whatever_the_autocast():
    head = draw_head(bias=True, dtype=torch.bfloat16)
    tokens, anchors = (draw_tokens([3, 1], seed, dtype=torch.bfloat16) for seed in (1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = anchor_products(head, tokens, anchors)
    wide = OutputHead(head.weight.double(), head.bias.double())
    sides = [HeadTokens(s.hidden.double(), s.labels, s.lengths) for s in (tokens, anchors)]
    expected = anchor_products(wide, *sides)
    assert found.scores.dtype == found.products.dtype == torch.float32
    assert_close(found.scores.double(), expected.scores, 1e-5)
    assert_close(found.products.double(), expected.products, 1e-5)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"weights must be \(R,\), one for each of 2 responses; seen \(4,\)"):
        anchor_products(draw_head(), draw_tokens([3], 1), draw_tokens([2, 2], 2), weights=torch.ones(4))
    with pytest.raises(ValueError, match="token id 37, but the model has 37 logits"):
        anchor_products(draw_head(), draw_tokens([3], 1), draw_tokens([2], 2), rule=rule_of(False, vocabulary=[37]))


@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    count=st.integers(0, 3),
    vocab=st.integers(2, 150),
    d=st.integers(1, 4),
    kind=st.sampled_from(sorted(HEADS)),
    exact=st.booleans(),
    temperature=st.floats(0.3, 3.0),
    few=st.booleans(),
    block_bytes=st.sampled_from([None, 1]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_gives_the_double_sums(lengths, count, vocab, d, kind, exact, temperature, few, block_bytes, seed):
    head = draw_head(vocab=vocab, d=d, seed=seed, **HEADS[kind])
    tokens, anchors = (draw_tokens(n, seed + s, vocab=vocab, d=d) for n, s in (([count], 1), (lengths, 2)))
    weights = torch.randn(len(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options = {"exact": exact, "temperature": temperature, "vocabulary": [0, vocab - 1, vocab // 2] if few else None}
    scores, products = by_definition(head, tokens, anchors, weights, **options)
    found = anchor_products(head, tokens, anchors, weights=weights, rule=rule_of(**options, block_bytes=block_bytes))
    # sums of terms of either sign may cancel: the scale is that of the terms
    scale = max(1.0, math.sqrt(max(map(max, products))))
    for got, wanted in ((found.scores, scores), (found.products, products)):
        wanted = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(got, wanted, atol=1e-10 * scale, rtol=1e-10)


@pytest.mark.parametrize("correct", ["TFFF", "FTTF", "TTTF"])
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_gwhes_is_the_papers_sum_over_tokens(kind, correct):
    right = [letter == "T" for letter in correct]
    head, responses = draw_head(**HEADS[kind]), draw_tokens([2, 3, 1, 2], 2)
    products = anchor_products(head, draw_tokens([], 1), responses, rule=rule_of(False, 0.8)).products
    tokens = gradients_by_definition(head, responses, exact=False, temperature=0.8)
    p = sum(right) / 4
    total = 0.0
    for i in range(4):
        if not right[i]:
            continue
        for j in range(4):
            advantage = (-p if not right[j] else 1 - p) / math.sqrt(p * (1 - p))
            total -= advantage * sum(inner(a, b) for a in tokens[i] for b in tokens[j])
    assert gwhes(products, torch.tensor(right)) == pytest.approx(total / sum(right), rel=1e-10)


def test_gwhes_is_minus_the_change_of_the_mean_correct_log_prob_under_a_small_step_of_the_head():
    head, responses, right = draw_head(vocab=11, d=3), draw_tokens([2, 3, 1], 2, vocab=11, d=3), [True, False, True]
    correct = torch.tensor(right)
    advantages = [(1 - 2 / 3) / math.sqrt(2 / 9) if r else -(2 / 3) / math.sqrt(2 / 9) for r in right]
    products = anchor_products(head, draw_tokens([], 1, d=3), responses).products

    def log_probs(weight):
        return [
            sum((weight @ h).log_softmax(0)[y] for h, y in zip(one.hidden, one.labels, strict=True))
            for one in map(responses.of_response, range(3))
        ]

    weight = head.weight.clone().requires_grad_()
    objective = sum(a * logp for a, logp in zip(advantages, log_probs(weight), strict=True))
    (step,) = torch.autograd.grad(objective, weight)
    size = 1e-6
    after, before = (torch.stack(log_probs(head.weight + s * size * step))[correct].mean() for s in (1, -1))
    assert gwhes(products, correct) == pytest.approx(-float(after - before) / (2 * size), rel=1e-6)


@pytest.mark.parametrize(("correct", "message"), [([True, True], "2 correct responses of 2"), ([False], "0 .* of 1")])
def test_gwhes_of_a_group_that_is_not_mixed_is_refused(correct, message):
    with pytest.raises(ValueError, match=message):
        gwhes(torch.eye(len(correct)), torch.tensor(correct))
