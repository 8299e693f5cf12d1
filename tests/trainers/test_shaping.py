"""From groups and scores to token advantages, against loops over the responses of each group."""

import functools
import math
from dataclasses import dataclass, fields
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_dynamics.rollouts import Groups
from llm_dynamics.trainers import NTHRConfig
from llm_dynamics.trainers.nthr.config import METHODS, SCORED_METHODS
from llm_dynamics.trainers.nthr.scores import GroupScores
from llm_dynamics.trainers.nthr.shaping import shape_batch

NAN = math.nan


@functools.cache
def configure(method, **options):
    return NTHRConfig("unused", nthr_method=method, bf16=False, use_cpu=True, report_to="none", **options)


@dataclass
class Rollouts:
    """All responses of all processes, with the scores that a scorer would find."""

    size: int
    rewards: Tensor
    advantages: Tensor
    mask: Tensor
    scores: Tensor
    anchors: Tensor

    def groups(self, process=0, processes=1, correct_from=0.5):
        count = len(self.rewards) // processes
        return Groups(self.size, process * count, count, self.rewards, self.mask.sum(dim=1), correct_from)

    def scorer(self, groups, calls):
        def score(group, right, scored):
            assert right == [row for row in group if groups.correct[row]]
            assert all(row in group and groups.first <= row < groups.first + groups.count for row in scored)
            calls.append((group, scored))
            tokens = [self.scores[row][self.mask[row]] for row in scored]
            anchors = torch.where(self.mask[right].any(dim=1), self.anchors[right], NAN)
            return GroupScores(torch.cat([self.scores[0, :0], *tokens]), anchors)

        return score

    def shape(self, config, process=0, processes=1, calls=None, **options):
        groups = self.groups(process, processes)
        scorer = self.scorer(groups, [] if calls is None else calls)
        here = groups.local
        options = {"seed": 3} | options
        return shape_batch(config, groups, self.advantages[here], self.mask[here], scorer, **options)


def rollouts(rewards, lengths, *, size=4, width=5, seed=0, advantages=None):
    """Scores are drawn around the anchors; every second response has a hole, where a tool wrote."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.tensor(rewards)
    b = len(rewards)
    mask = torch.zeros(b, width, dtype=torch.bool)
    for i, length in enumerate(lengths):
        hole = i % 2 and length < width - 1
        places = [k for k in range(width) if not (hole and k == 1)][:length]
        mask[i, places] = True
    if advantages is None:
        grouped = rewards.view(-1, size)
        mean = grouped.nanmean(dim=1, keepdim=True)
        advantages = (grouped - mean).nan_to_num(-0.25).flatten() * 2
    return Rollouts(
        size,
        rewards,
        torch.as_tensor(advantages, dtype=torch.float32),
        mask,
        torch.randn(b, width, generator=generator) + 1,
        torch.rand(b, generator=generator) + 0.5,
    )


def expected(config, data):
    """Of tokens (scores, selected, advantages), of responses (threshold, anchor, eta, p); "random" but for its draw."""
    method, (b, t) = config.nthr_method, data.mask.shape
    tokens = torch.full((3, b, t), NAN)
    responses = torch.full((4, b), NAN)
    tokens[1] = 0
    for start in range(0, b, data.size):
        rows = range(start, start + data.size)
        known = [i for i in rows if not math.isnan(data.rewards[i])]
        right = [i for i in known if data.rewards[i] >= config.nthr_correct]
        wrong = [i for i in known if i not in right]
        p = len(right) / len(known) if known else NAN
        anchors = {i: data.anchors[i].item() for i in right if data.mask[i].any()}
        active = bool(anchors) and bool(wrong) and method in SCORED_METHODS
        if active:
            infinite = math.isinf(config.nthr_beta)
            tau = config.nthr_beta if infinite else config.nthr_beta * min(anchors.values())
            eta = {"p": p, "1-p": 1 - p, "2|0.5-p|": 2 * abs(0.5 - p)}.get(config.nthr_eta)
            eta = float(config.nthr_eta) if eta is None else eta
        for i in rows:
            a = data.advantages[i].item()
            responses[3, i] = p
            if active:
                responses[0, i], responses[1, i], responses[2, i] = tau, anchors.get(i, NAN), eta
            for k in range(t):
                counts, s = bool(data.mask[i, k]), data.scores[i, k].item()
                result = a
                if active and counts and method in ("nthr", "random") and i in wrong:
                    tokens[0, i, k] = s
                    if s > tau and a < 0:
                        tokens[1, i, k], result = 1, eta * a
                elif active and counts and method == "thr" and i in known:
                    reward = s if i in right else -s
                    tokens[0, i, k] = reward
                    sign = 1 if reward > 0 else -1
                    result = a * (1 + sign * config.thr_q) if abs(reward) > tau else 0.0
                elif method == "pos_only":
                    result = max(a, 0)
                elif method in ("w_reinforce", "nsr"):
                    weight = config.w_reinforce_weight if method == "w_reinforce" else 0
                    result = (weight if i in right else -1) if i in known else 0
                tokens[2, i, k] = result
    return tokens, responses


def assert_same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0, equal_nan=True)


def assert_as_expected(shaped, config, data):
    (scores, selected, advantages), (thresholds, anchors, etas, success) = expected(config, data)
    assert torch.equal(shaped.before, data.advantages)
    assert torch.equal(shaped.mask, data.mask)
    assert_same(shaped.scores, scores)
    assert_same(shaped.thresholds, thresholds)
    assert_same(shaped.anchors, anchors)
    assert_same(shaped.etas, etas)
    assert_same(shaped.success, success)
    if config.nthr_method == "random":
        assert_drawn(shaped, selected.bool(), data)
    else:
        assert torch.equal(shaped.selected, selected.bool())
        assert_same(shaped.advantages, advantages)


def assert_drawn(shaped, selected, data):
    """As many tokens of each group as NTHR selects, among those it could have selected, times eta."""
    groups = data.groups()
    wrong = groups.wrong & (data.advantages < 0)
    assert not (shaped.selected & ~(data.mask & wrong[:, None])).any()
    for start in range(0, len(selected), data.size):
        rows = slice(start, start + data.size)
        assert shaped.selected[rows].sum() == selected[rows].sum()
    plain = data.advantages[:, None].expand_as(selected)
    assert_same(shaped.advantages, torch.where(shaped.selected, shaped.etas[:, None] * plain, plain))


KINDS = {
    "mixed": ([1.0, 0.0, 0.0, 0.0], [3, 2, 5, 4]),
    "evenly_mixed": ([0.0, 1.0, 1.0, 0.0], [3, 2, 5, 4]),
    "all_correct": ([1.0, 1.0, 1.0, 1.0], [3, 2, 5, 4]),
    "all_wrong": ([0.0, 0.0, 0.0, 0.0], [3, 2, 5, 4]),
    "mixed_with_unscorable": ([1.0, NAN, 0.0, 0.0], [3, 2, 5, 4]),
    "correct_and_unscorable": ([1.0, NAN, 1.0, NAN], [3, 2, 5, 4]),
    "wrong_and_unscorable": ([0.0, NAN, 0.0, NAN], [3, 2, 5, 4]),
    "all_unscorable": ([NAN, NAN, NAN, NAN], [3, 2, 5, 4]),
    "correct_without_tokens": ([1.0, 0.0, 0.0, 1.0], [0, 2, 5, 0]),
    "one_correct_without_tokens": ([1.0, 0.0, 0.0, 1.0], [0, 2, 5, 4]),
    "wrong_without_tokens": ([1.0, 0.0, 0.0, 0.0], [3, 0, 5, 0]),
    "no_tokens_at_all": ([1.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]),
    "a_correct_response_with_a_penalty": ([0.9, 0.4, 0.6, 1.0], [3, 2, 5, 4]),
    "rewards_of_many_values": ([0.9, 0.4, -1.0, 0.5], [3, 2, 5, 4]),
}
METHOD_OPTIONS = [(method, {}) for method in METHODS] + [
    ("nthr", {"nthr_eta": "0.0"}),
    ("nthr", {"nthr_eta": "1-p", "nthr_beta": -math.inf}),
    ("nthr", {"nthr_eta": "p", "nthr_beta": math.inf}),
    ("random", {"nthr_eta": "0.25", "nthr_beta": -math.inf}),
    ("thr", {"thr_q": -0.4, "nthr_beta": 0.5}),
    ("thr", {"nthr_beta": -math.inf}),
    ("w_reinforce", {"w_reinforce_weight": 0.7}),
]


def everything(**options):
    rewards, lengths = zip(*KINDS.values(), strict=True)
    return rollouts([*chain(*rewards)], [*chain(*lengths)], **options)


def ids_of(cases):
    return ["-".join([method, *(f"{k}={v}" for k, v in options.items())]) for method, options in cases]


@pytest.mark.parametrize(("method", "options"), METHOD_OPTIONS, ids=ids_of(METHOD_OPTIONS))
@pytest.mark.parametrize("kind", KINDS)
def test_every_method_does_to_every_kind_of_group_what_its_paper_says(kind, method, options):
    config, data = configure(method, **options), rollouts(*KINDS[kind])
    assert_as_expected(data.shape(config), config, data)


@pytest.mark.parametrize("method", METHODS)
def test_groups_of_one_batch_do_not_see_each_other(method):
    config, data = configure(method), everything()
    shaped = data.shape(config)
    assert_as_expected(shaped, config, data)
    if method in ("nthr", "random"):
        assert shaped.selected.any()
        assert not shaped.selected.all(dim=1)[data.groups().wrong].all()


@pytest.mark.parametrize("method", ["nthr", "thr", "random"])
@pytest.mark.parametrize("kind", ["all_correct", "all_wrong", "all_unscorable", "correct_without_tokens"])
def test_a_group_without_contrast_keeps_its_advantages(kind, method):
    data = rollouts(*KINDS[kind], advantages=[0.5, -0.5, -1.0, 1.0])
    calls = []
    shaped = data.shape(configure(method, nthr_beta=-math.inf), calls=calls)
    assert calls == []
    assert torch.equal(shaped.advantages, data.advantages[:, None].expand(4, 5))
    assert not shaped.selected.any()


@pytest.mark.parametrize("method", [m for m in METHODS if m not in SCORED_METHODS])
def test_methods_without_scores_never_ask_for_them(method):
    calls = []
    everything().shape(configure(method), calls=calls)
    assert calls == []


def test_only_tokens_that_the_method_needs_are_scored():
    data, nthr, thr = rollouts([1.0, 0.0, NAN, 1.0], [3, 2, 5, 4]), [], []
    data.shape(configure("nthr"), calls=nthr)
    data.shape(configure("thr"), calls=thr)
    assert nthr == [(range(4), [1])]
    assert thr == [(range(4), [0, 1, 3])]


def test_a_wrong_response_with_a_positive_advantage_is_left_alone():
    data = rollouts([0.9, 0.4, -1.0, 0.45], [3] * 4, advantages=[1.0, 0.2, -1.5, 0.0])
    for method in ("nthr", "random"):
        shaped = data.shape(configure(method, nthr_beta=-math.inf, nthr_eta="0.0"))
        assert shaped.selected.any(dim=1).tolist() == [False, False, True, False]
        assert torch.equal(shaped.advantages[[0, 1, 3]], data.advantages[[0, 1, 3], None].expand(3, 5))
        assert not shaped.advantages[2][data.mask[2]].any()


@pytest.mark.parametrize("method", ["nthr", "thr"])
def test_tokens_that_do_not_count_keep_their_advantage(method):
    data = everything()
    shaped = data.shape(configure(method, nthr_beta=-math.inf, nthr_eta="0.0", thr_q=0.3))
    plain = data.advantages[:, None].expand_as(data.mask)
    assert torch.equal(shaped.advantages[~data.mask], plain[~data.mask])
    assert shaped.scores[~data.mask].isnan().all()


def test_correct_responses_keep_their_advantage_under_nthr():
    data = everything()
    shaped = data.shape(configure("nthr", nthr_beta=-math.inf, nthr_eta="0.0"))
    correct = data.groups().correct
    assert torch.equal(shaped.advantages[correct], data.advantages[correct, None].expand(-1, 5))


def test_the_reward_from_which_a_response_is_correct_is_the_groups():
    data = rollouts([0.9, 0.4, -1.0, 0.5], [3] * 4)
    groups = data.groups(correct_from=0.95)
    shaped = shape_batch(configure("nthr"), groups, data.advantages, data.mask, data.scorer(groups, []), seed=0)
    assert shaped.success.tolist() == [0.0] * 4
    assert not shaped.selected.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rewards", [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, NAN]])
def test_groups_of_two(rewards, method):
    config = configure(method, nthr_eta="1-p")
    data = rollouts(rewards, [4, 3], size=2)
    assert_as_expected(data.shape(config), config, data)


def test_a_group_of_two_has_no_eta_of_its_own():
    data = rollouts([1.0, 0.0], [4, 3], size=2)
    shaped = data.shape(configure("nthr", nthr_beta=-math.inf))
    assert shaped.etas.tolist() == [0.0, 0.0]  # 2 |0.5 - 1/2|
    assert not shaped.advantages[1][data.mask[1]].any()


def test_the_inputs_are_left_as_they_were():
    data, twin = everything(), everything()
    for method in METHODS:
        shaped = data.shape(configure(method, nthr_beta=-math.inf, nthr_eta="0.0"))
        shaped.advantages.fill_(9)
    for name in ("rewards", "advantages", "mask", "scores", "anchors"):
        assert torch.equal(getattr(data, name).nan_to_num(), getattr(twin, name).nan_to_num())


def test_a_draw_depends_on_its_seed_and_its_group():
    data = rollouts([1.0, 0.0, 0.0, 0.0] * 2, [5] * 8, width=5)
    data.scores[4:], data.anchors[4:] = data.scores[:4], data.anchors[:4]
    config = configure("random")
    draws = {seed: data.shape(config, seed=seed).selected for seed in (1, 1 + 2**31, 2, 3)}
    assert torch.equal(draws[1], data.shape(config, seed=1).selected)
    assert any(not torch.equal(draws[1], draw) for draw in draws.values())
    assert any(not torch.equal(draw[:4], draw[4:]) for draw in draws.values())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(data.shape(config, seed=2).selected, draws[2])
    assert torch.equal(torch.get_rng_state(), state)


def run_processes(config, data, processes):
    """Shape each process's share; what they gather is exchanged in a second round."""
    total, seen = len(data.rewards), [[] for _ in range(processes)]
    for process in range(processes):

        def record(counts, process=process):
            seen[process].append(counts)
            return torch.zeros(total, dtype=torch.int64)

        data.shape(config, process, processes, count_selected=record)
    rounds = list(zip(*seen, strict=True))  # every process gathers as often as any other, or all would hang
    shares = []
    for process in range(processes):
        answers = iter([torch.cat(counts) for counts in rounds])
        shares.append(data.shape(config, process, processes, count_selected=lambda _, a=answers: next(a)))
        assert list(answers) == []
    return shares


@pytest.mark.parametrize("processes", [2, 8, 28, 56])
@pytest.mark.parametrize("method", METHODS)
def test_processes_together_shape_as_one_would(method, processes):
    config, data = configure(method), everything()
    whole, shares = data.shape(config), run_processes(config, data, processes)
    for field in fields(whole):
        if field.name != "groups":
            assert_same(torch.cat([getattr(share, field.name) for share in shares]), getattr(whole, field.name))
    assert [share.groups.first for share in shares] == [i * 56 // processes for i in range(processes)]


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_batch_is_shaped_as_the_loops_say_on_any_number_of_processes(data):
    size, count = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    b = size * count
    rewards = data.draw(st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0, NAN]), min_size=b, max_size=b))
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=b, max_size=b))
    batch = rollouts(rewards, lengths, size=size, width=3, seed=data.draw(st.integers(0, 99)))
    config = configure(*data.draw(st.sampled_from([(m,) for m in METHODS])))
    whole = batch.shape(config)
    assert_as_expected(whole, config, batch)
    processes = data.draw(st.sampled_from([n for n in range(1, b + 1) if b % n == 0]))
    shares = run_processes(config, batch, processes)
    assert_same(torch.cat([share.advantages for share in shares]), whole.advantages)
    assert torch.equal(torch.cat([share.selected for share in shares]), whole.selected)
