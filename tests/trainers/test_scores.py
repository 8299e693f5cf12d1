"""Scores of a group's tokens against the papers' formulas, written as loops over tokens, in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.kernel.output_head import OutputHead
from llm_dynamics.kernel.residuals import EXACT_RULE, PAPER_RULE, ResidualRule
from llm_dynamics.kernel.token_states import HeadTokens
from llm_dynamics.trainers.nthr.scores import GroupScores, score_group, score_group_exactly
from tests.kernel.brute_force import in_float64, jacobian, learning, trainable
from tests.kernel.literal import HEADS, all_tokens, draw_head, draw_tokens, gradients_by_definition, inner
from tests.kernel.whole_jacobians import build_small, draw_responses

RELATIVE = 1e-10


def assert_close(found, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert found.shape == expected.shape
    assert found.dtype == torch.float64
    assert torch.equal(found.isnan(), expected.isnan())
    found, expected = found.nan_to_num(), expected.nan_to_num()
    if found.numel():
        assert (found - expected).abs().max() <= RELATIVE * expected.abs().max()


def papers_token_score(gradient, correct, *, by_length, without=-1):
    """[NTHR]: sum over i in P and k of (g . g)(h . h); [THR]: the same with 1/|y_i| before the inner sum."""
    total = 0.0
    for i, response in enumerate(correct):
        if i != without:
            of_response = sum(inner(gradient, other) for other in response)
            total += of_response / len(response) if by_length and response else of_response
    return total


def papers_anchor(i, correct, trained, *, by_length, include_self):
    """Mean over the tokens of response i of their scores against P, or P without i."""
    if not correct[i]:
        return math.nan
    without = -1 if include_self else i
    scores = [papers_token_score(g, correct, by_length=by_length, without=without) for g in trained[i]]
    return sum(scores) / len(scores)


def expected_of(correct, tokens, own, *, include_self, by_length, trained=None):
    """Scores of tokens and anchors; `trained` are the correct ones' gradients in training, where they differ."""
    scores = []
    for gradient, owner in zip(tokens, own, strict=True):
        without = owner if not include_self else -1
        scores.append(papers_token_score(gradient, correct, by_length=by_length, without=without))
    options = {"by_length": by_length, "include_self": include_self}
    return scores, [papers_anchor(i, correct, trained or correct, **options) for i in range(len(correct))]


@pytest.mark.parametrize("rule", [PAPER_RULE, EXACT_RULE, ResidualRule(exact=False, temperature=0.7)])
@pytest.mark.parametrize("by_length", [False, True], ids=["nthr", "thr"])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_scores_of_wrong_tokens_and_anchors_are_the_papers(kind, include_self, by_length, rule):
    head, correct, wrong = draw_head(**HEADS[kind]), draw_tokens([3, 1, 0, 7], 1), draw_tokens([2, 4], 2)
    of = {"exact": rule.exact, "temperature": rule.temperature}
    tokens = all_tokens(gradients_by_definition(head, wrong, **of))
    options = {"include_self": include_self, "by_length": by_length}
    scores, anchors = expected_of(gradients_by_definition(head, correct, **of), tokens, [-1] * 6, **options)
    found = score_group(head, correct, wrong, rule=rule, **options)
    assert_close(found.tokens, scores)
    assert_close(found.anchors, anchors)


@pytest.mark.parametrize("by_length", [False, True], ids=["nthr", "thr"])
@pytest.mark.parametrize("include_self", [True, False])
def test_a_correct_responses_own_tokens_count_themselves_only_if_asked(include_self, by_length):
    head, correct = draw_head(bias=True), draw_tokens([3, 1, 0, 7], 1)
    wrong = draw_tokens([2], 2)
    scored = HeadTokens(
        torch.cat([correct.of_response(3).hidden, wrong.hidden, correct.of_response(0).hidden]),
        torch.cat([correct.of_response(3).labels, wrong.labels, correct.of_response(0).labels]),
        torch.tensor([7, 2, 3]),
    )
    own = [3] * 7 + [-1] * 2 + [0] * 3
    responses = gradients_by_definition(head, correct, exact=False)
    tokens = all_tokens(gradients_by_definition(head, scored, exact=False))
    options = {"include_self": include_self, "by_length": by_length}
    scores, anchors = expected_of(responses, tokens, own, **options)
    found = score_group(head, correct, scored, own=torch.tensor(own), **options)
    assert_close(found.tokens, scores)
    assert_close(found.anchors, anchors)
    assert found.tokens[:7].mean().item() == pytest.approx(anchors[3], rel=RELATIVE)


def test_without_own_indices_no_token_is_taken_for_a_correct_responses():
    head, correct = draw_head(), draw_tokens([3, 2], 1)
    plain, without = (score_group(head, correct, correct, include_self=value) for value in (True, False))
    assert torch.equal(plain.tokens, without.tokens)
    assert not torch.allclose(plain.anchors, without.anchors)


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("lengths", [[4], [0, 4, 0]])
def test_a_lone_correct_response_without_itself_has_exactly_nothing_against_it(lengths, by_length):
    head, correct, wrong = draw_head(), draw_tokens(lengths, 1), draw_tokens([3], 2)
    own = torch.full((4,), lengths.index(4))
    found = score_group(head, correct, correct, own=own, include_self=False, by_length=by_length)
    assert found.anchors.nan_to_num(nan=-1).tolist() == [0.0 if length else -1.0 for length in lengths]
    assert found.tokens.tolist() == [0.0] * 4
    assert found.threshold(1.0) == 0.0
    of_wrong = score_group(head, correct, wrong, own=torch.full((3,), -1), include_self=False).tokens
    assert torch.equal(of_wrong, score_group(head, correct, wrong).tokens)


def test_the_vocabulary_of_the_group_limits_the_sum_over_entries():
    head, correct, wrong = draw_head(), draw_tokens([3, 2], 1), draw_tokens([2, 4], 2)
    vocabulary = torch.cat([correct.labels, wrong.labels]).unique()
    responses, tokens = (
        gradients_by_definition(head, side, exact=False, temperature=0.8, vocabulary=vocabulary)
        for side in (correct, wrong)
    )
    scores, anchors = expected_of(responses, all_tokens(tokens), [-1] * 6, include_self=True, by_length=False)
    rule = ResidualRule(exact=False, temperature=0.8, vocabulary=vocabulary)
    found = score_group(head, correct, wrong, rule=rule)
    assert_close(found.tokens, scores)
    assert_close(found.anchors, anchors)


@given(
    lengths=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    scored=st.lists(st.integers(-1, 3), max_size=4),
    include_self=st.booleans(),
    by_length=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_any_group_is_scored_as_the_papers_say(lengths, scored, include_self, by_length, seed):
    head, correct = draw_head(vocab=9, d=3), draw_tokens(lengths, seed, vocab=9, d=3)
    tokens = draw_tokens([len(scored)], seed + 1, vocab=9, d=3)
    own = [owner if owner < len(lengths) else -1 for owner in scored]
    options = {"include_self": include_self, "by_length": by_length}
    responses = gradients_by_definition(head, correct, exact=False)
    scores, anchors = expected_of(responses, gradients_by_definition(head, tokens, exact=False)[0], own, **options)
    found = score_group(head, correct, tokens, own=torch.tensor(own, dtype=torch.int64), **options)
    for got, wanted in ((found.tokens, scores), (found.anchors, anchors)):
        wanted = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10, equal_nan=True)


# ---- thresholds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0, -2.0])
def test_the_threshold_is_beta_times_the_least_anchor(beta):
    anchors = torch.tensor([3.0, math.nan, -1.5, 2.0])
    assert GroupScores(torch.zeros(0), anchors).threshold(beta) == beta * -1.5
    assert GroupScores(torch.zeros(0), anchors[[0, 1, 3]]).threshold(beta) == beta * 2.0


@pytest.mark.parametrize("beta", [math.inf, -math.inf])
def test_an_infinite_beta_is_the_threshold_whatever_the_anchors_sign(beta):
    for anchor in (2.0, 0.0, -2.0):
        assert GroupScores(torch.zeros(0), torch.tensor([anchor, math.nan])).threshold(beta) == beta


@pytest.mark.parametrize("beta", [1.0, 0.0, math.inf, -math.inf])
@pytest.mark.parametrize("anchors", [[], [math.nan, math.nan]])
def test_without_anchors_no_token_passes(anchors, beta):
    assert GroupScores(torch.zeros(0), torch.tensor(anchors)).threshold(beta) == math.inf


def test_without_correct_responses_scores_are_zero_and_nothing_passes():
    found = score_group(draw_head(), draw_tokens([], 1), draw_tokens([3], 2))
    assert found.tokens.tolist() == [0.0] * 3
    assert found.anchors.shape == (0,)
    assert found.threshold(-1.0) == math.inf


# ---- the exact kernel -----------------------------------------------------------------------------------------------

CORRECT = draw_responses([4, 1, 5], seed=1)
WRONG = draw_responses([3, 2], seed=2)
SPANS = [[(0, 4)], [(0, 1)], [(0, 1), (2, 3), (4, 5)]]  # the last has tool tokens at 1 and 3
SOLID = [[(0, 4)], [(0, 1)], [(0, 5)]]


@pytest.fixture(autouse=True)
def _float64():
    with in_float64():
        yield


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request):
    return build_small(tied=request.param)


def rows_of(model, response):
    return list(jacobian(model, [response], trainable(model)))


def counted_rows(model, response, spans):
    rows = rows_of(model, response)
    return [rows[place] for start, stop in spans for place in range(start, stop)]


def correct_rows(model, spans):
    """The correct responses' derivatives, and their gradients in training, which leave the padding token's row out."""
    with learning(model):
        derivatives = [counted_rows(model, *pair) for pair in zip(CORRECT, spans, strict=True)]
    return derivatives, [counted_rows(model, *pair) for pair in zip(CORRECT, spans, strict=True)]


@pytest.mark.parametrize("spans", [SOLID, SPANS], ids=["solid", "holes"])
@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("include_self", [True, False])
def test_exact_scores_are_inner_products_of_whole_gradients(model, include_self, by_length, spans):
    options = {"include_self": include_self, "by_length": by_length}
    correct, trained = correct_rows(model, spans)
    tokens = [gradient for response in WRONG for gradient in rows_of(model, response)]
    scores, anchors = expected_of(correct, tokens, [-1] * len(tokens), trained=trained, **options)
    values, found = score_group_exactly(model, CORRECT, spans, WRONG, **options)
    assert [len(part) for part in values] == [3, 2]
    assert_close(torch.cat(values), scores)
    assert_close(found, anchors)


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("include_self", [True, False])
def test_exact_scores_of_correct_responses_leave_themselves_out_as_the_cheap_ones_do(model, include_self, by_length):
    options = {"include_self": include_self, "by_length": by_length}
    correct, trained = correct_rows(model, SPANS)
    scored, owners = [CORRECT[2], WRONG[0], CORRECT[0]], [2, -1, 0]
    tokens = [gradient for response in scored for gradient in rows_of(model, response)]
    own = [owner for owner, one in zip(owners, scored, strict=True) for _ in one.response_ids]
    scores, anchors = expected_of(correct, tokens, own, trained=trained, **options)
    values, found = score_group_exactly(model, CORRECT, SPANS, scored, own=owners, **options)
    assert [len(part) for part in values] == [5, 3, 4]
    assert_close(torch.cat(values), scores)
    assert_close(found, anchors)


def test_exact_scores_by_the_head_alone_are_the_cheap_ones():
    model = build_small(tied=False).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    values, anchors = score_group_exactly(model, CORRECT, SOLID, WRONG)
    states = model.model
    with torch.no_grad():
        sides = [
            [states(torch.tensor([[*r.prompt_ids, *r.response_ids]])).last_hidden_state[0, 2:-1] for r in side]
            for side in (CORRECT, WRONG)
        ]
    correct, wrong = (
        HeadTokens(
            torch.cat(hidden),
            torch.tensor([y for r in side for y in r.response_ids]),
            torch.tensor([len(h) for h in hidden]),
        )
        for hidden, side in zip(sides, (CORRECT, WRONG), strict=True)
    )
    head = OutputHead(model.lm_head.weight.detach())
    cheap = score_group(head, correct, wrong)  # the papers' residual is the exact one at temperature 1
    assert_close(torch.cat(values), cheap.tokens)
    assert_close(anchors, cheap.anchors)


def test_an_exact_anchor_without_counting_tokens_is_nan_and_a_lone_one_without_itself_zero(model):
    values, anchors = score_group_exactly(model, CORRECT[:2], [[(1, 3)], []], WRONG[:1], include_self=False)
    assert anchors[0] == 0
    assert anchors[1].isnan()
    gradients = counted_rows(model, CORRECT[0], [(1, 3)])
    assert_close(values[0], [sum(inner(g, a) for a in gradients) for g in rows_of(model, WRONG[0])])


def test_exact_anchors_need_no_scored_responses(model):
    values, anchors = score_group_exactly(model, CORRECT, SPANS, [])
    assert values == []
    assert_close(anchors, score_group_exactly(model, CORRECT, SPANS, WRONG)[1])


def test_exact_spans_may_be_cut_anywhere(model):
    cut = [[(0, 1), (1, 4)], [(0, 1)], [(0, 2), (2, 5)]]
    whole, pieces = (score_group_exactly(model, CORRECT, spans, WRONG, by_length=True) for spans in (SOLID, cut))
    assert_close(torch.cat(pieces[0]), torch.cat(whole[0]))
    assert_close(pieces[1], whole[1])


def test_scoring_exactly_leaves_the_model_alone(model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    score_group_exactly(model, CORRECT, SPANS, [SimpleNamespace(prompt_ids=[1], response_ids=[2, 3])])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad
