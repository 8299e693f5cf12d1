"""Groups of a batch: rewards, correctness, and where processes cut them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.rollouts import Groups

NAN = math.nan


def make(rewards, *, size=2, first=0, count=None, correct_from=0.5):
    rewards = torch.tensor(rewards)
    lengths = torch.ones(len(rewards), dtype=torch.int64)
    return Groups(size, first, len(rewards) if count is None else count, rewards, lengths, correct_from)


def on_processes(total, size, processes):
    count = total // processes
    return [make([0.0] * total, size=size, first=i * count, count=count) for i in range(processes)]


def test_a_response_is_correct_wrong_or_neither():
    groups = make([1.0, 0.0, NAN, 0.5, 0.49, -math.inf, math.inf, -2.0])
    assert groups.known.tolist() == [True, True, False, True, True, True, True, True]
    assert groups.correct.tolist() == [True, False, False, True, False, False, True, False]
    assert groups.wrong.tolist() == [False, True, False, False, True, True, False, True]


@given(st.lists(st.floats(-2, 2, width=32) | st.just(NAN), min_size=2, max_size=8), st.floats(-1, 1, width=32))
def test_correct_and_wrong_part_the_known(rewards, correct_from):
    groups = make(rewards, size=1, correct_from=correct_from)
    assert not (groups.correct & groups.wrong).any()
    assert torch.equal(groups.correct | groups.wrong, groups.known)
    assert groups.correct.tolist() == [r >= correct_from for r in rewards]


@pytest.mark.parametrize(
    ("rewards", "p", "mixed"),
    [
        ([1.0, 0.0, 0.0, 0.0], 0.25, True),
        ([1.0, 1.0, 1.0, 1.0], 1.0, False),
        ([0.0, 0.0, 0.0, 0.0], 0.0, False),
        ([1.0, NAN, 0.0, 0.0], 1 / 3, True),
        ([1.0, NAN, 1.0, NAN], 1.0, False),
        ([0.0, NAN, NAN, NAN], 0.0, False),
        ([NAN, NAN, NAN, NAN], NAN, False),
        ([0.5, 0.4, 0.6, -1.0], 0.5, True),
    ],
)
def test_success_rate_and_contrast_of_a_group(rewards, p, mixed):
    other = [1.0, 0.0, 1.0, 1.0]
    groups = make([*other, *rewards, *other], size=4)
    assert groups.success_rate(range(4, 8)) == pytest.approx(p, nan_ok=True)
    assert groups.is_mixed(range(4, 8)) is mixed
    assert groups.success_rate(range(8, 12)) == 0.75


def test_one_process_has_all_groups_and_none_straddles():
    groups = make([0.0] * 6, size=3)
    assert list(groups.here()) == [range(3), range(3, 6)]
    assert groups.local == slice(0, 6)
    assert not groups.straddle().any()


def test_a_group_on_two_processes_is_on_both():
    views = on_processes(total=6, size=2, processes=2)
    assert [list(view.here()) for view in views] == [[range(2), range(2, 4)], [range(2, 4), range(4, 6)]]
    assert [view.straddle().tolist() for view in views] == [[False, False, True, True, False, False]] * 2
    assert [view.local for view in views] == [slice(0, 3), slice(3, 6)]


def test_a_group_on_three_processes_is_on_all():
    views = on_processes(total=12, size=6, processes=6)
    assert [list(view.here()) for view in views] == [[range(6)]] * 3 + [[range(6, 12)]] * 3
    assert views[0].straddle().tolist() == [True] * 12


def test_groups_that_fit_into_processes_do_not_straddle():
    views = on_processes(total=12, size=2, processes=3)
    assert [list(view.here()) for view in views] == [
        [range(2), range(2, 4)], [range(4, 6), range(6, 8)], [range(8, 10), range(10, 12)],
    ]  # fmt: skip
    assert not views[1].straddle().any()


def test_no_responses_at_all():
    groups = make([], size=4)
    assert list(groups.here()) == []
    assert groups.straddle().shape == (0,)


@given(size=st.integers(1, 5), groups=st.integers(1, 6), data=st.data())
@settings(max_examples=60)
def test_processes_find_their_groups_and_agree_on_which_straddle(size, groups, data):
    total = size * groups
    processes = data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    count = total // processes
    views = on_processes(total, size, processes)
    assert [row for view in views for row in range(total)[view.local]] == list(range(total))
    for process, view in enumerate(views):
        mine = set(range(process * count, (process + 1) * count))
        assert list(view.here()) == [
            range(g * size, (g + 1) * size) for g in range(groups) if mine & set(range(g * size, (g + 1) * size))
        ]
        straddles = [len({row // count for row in range(i // size * size, i // size * size + size)}) > 1
                     for i in range(total)]  # fmt: skip
        assert view.straddle().tolist() == straddles
