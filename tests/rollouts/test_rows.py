"""Rollouts without their padding."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.rollouts import loss_rows

PAD = 0


def batch_of(prompts, completions):
    """Prompts padded on the left, completions on the right, as TRL has them."""
    p, t = max(map(len, prompts)), max(map(len, completions))
    left = [[PAD] * (p - len(prompt)) + prompt for prompt in prompts]
    right = [completion + [PAD] * (t - len(completion)) for completion in completions]
    seen = [[0] * (p - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "prompt_ids": torch.tensor(left),
        "prompt_mask": torch.tensor(seen),
        "completion_ids": torch.tensor(right).view(len(completions), t),
    }


def test_padding_is_taken_off_either_side():
    batch = batch_of([[7], [5, 6, 7]], [[8, 9, 2], [8, 2]])
    rows = loss_rows(batch, torch.tensor([[True, True, True], [True, True, False]]))
    assert [row.response.prompt_ids for row in rows] == [[7], [5, 6, 7]]
    assert [row.response.response_ids for row in rows] == [[8, 9, 2], [8, 2]]
    assert [row.counted.tolist() for row in rows] == [[True] * 3, [True] * 2]
    assert [row.spans for row in rows] == [[(0, 3)], [(0, 2)]]


def test_padding_ids_within_a_prompt_or_completion_are_tokens():
    batch = batch_of([[PAD, 7]], [[8, PAD, 2]])
    (row,) = loss_rows(batch, torch.tensor([[True, True, True]]))
    assert row.response.prompt_ids == [PAD, 7]
    assert row.response.response_ids == [8, PAD, 2]


def test_tool_tokens_stay_in_the_response_but_out_of_the_spans():
    batch = batch_of([[7]], [[11, 12, 13, 14, 15, 16, 17]])
    (row,) = loss_rows(batch, torch.tensor([[True, False, False, True, True, False, True]]))
    assert row.response.response_ids == [11, 12, 13, 14, 15, 16, 17]
    assert row.counted.tolist() == [True, False, False, True, True, False, True]
    assert row.spans == [(0, 1), (3, 5), (6, 7)]


def test_a_response_starts_with_tool_tokens_and_ends_with_its_last_token_that_counts():
    batch = batch_of([[7]], [[11, 12, 13, 14]])
    (row,) = loss_rows(batch, torch.tensor([[False, True, True, False]]))
    assert row.response.response_ids == [11, 12, 13]
    assert row.counted.tolist() == [False, True, True]
    assert row.spans == [(1, 3)]


def test_a_masked_out_response_is_empty():
    batch = batch_of([[7], [5, 6]], [[11, 12], [13, 14]])
    empty, full = loss_rows(batch, torch.tensor([[False, False], [True, True]]))
    assert (empty.response.prompt_ids, empty.response.response_ids, empty.spans) == ([7], [], [])
    assert empty.counted.shape == (0,)
    assert full.response.response_ids == [13, 14]


def test_completions_without_any_position():
    (row,) = loss_rows(batch_of([[7]], [[]]), torch.zeros(1, 0, dtype=torch.bool))
    assert (row.response.response_ids, row.spans) == ([], [])


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_spans_are_the_runs_of_what_counts(masks, seed):
    mask = torch.tensor(masks)
    generator = torch.Generator().manual_seed(seed)
    completions = torch.randint(1, 50, mask.shape, generator=generator).tolist()
    batch = batch_of([[3]] * len(masks), completions)
    for row, completion, counted in zip(loss_rows(batch, mask), completions, masks, strict=True):
        covered = [place for start, stop in row.spans for place in range(start, stop)]
        assert covered == [place for place, counts in enumerate(counted) if counts]
        assert all(stop < start for (_, stop), (start, _) in zip(row.spans, row.spans[1:], strict=False))
        assert row.response.response_ids == completion[: len(row.counted)]
        assert row.counted.tolist() == counted[: len(row.counted)]
        assert row.counted.dtype == torch.bool
        assert len(row.counted) == (covered[-1] + 1 if covered else 0)
