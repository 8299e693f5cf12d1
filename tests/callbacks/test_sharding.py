"""Probes over processes: each is scored once, with its prompt's others, and the work is even."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_dynamics.callbacks.sharding import broadcast, gather_frames, share_of
from llm_dynamics.probes import EncodedProbe


def encoded(lengths_by_prompt):
    """Probes of several prompts, interleaved: (prompt length, response lengths) of each."""
    probes = [
        (j, EncodedProbe(f"p{i}/{j}", (i,) * prompt, (0,) * response))
        for i, (prompt, responses) in enumerate(lengths_by_prompt)
        for j, response in enumerate(responses)
    ]
    return [probe for _, probe in sorted(probes, key=lambda pair: pair[0])]


def tokens(probes, share):
    prompts = {probes[i].prompt_ids for i in share}
    return sum(map(len, prompts)) + sum(len(probes[i].response_ids) for i in share)


PROMPTS = st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=6)), min_size=1)


@given(prompts=PROMPTS, world_size=st.integers(1, 5))
def test_every_probe_is_scored_by_exactly_one_process_in_order(prompts, world_size):
    probes = encoded(prompts)
    shares = [share_of(probes, rank, world_size) for rank in range(world_size)]
    assert sorted(i for share in shares for i in share) == list(range(len(probes)))
    assert all(share == sorted(share) for share in shares)


@given(prompts=PROMPTS, world_size=st.integers(1, 5))
def test_probes_of_one_prompt_stay_together(prompts, world_size):
    probes = encoded(prompts)
    owners = {}
    for rank in range(world_size):
        for i in share_of(probes, rank, world_size):
            owners.setdefault(probes[i].prompt_ids, set()).add(rank)
    assert all(len(ranks) == 1 for ranks in owners.values())


@given(prompts=PROMPTS, world_size=st.integers(2, 5))
def test_no_process_has_more_than_one_prompt_more_than_another(prompts, world_size):
    probes = encoded(prompts)
    loads = [tokens(probes, share_of(probes, rank, world_size)) for rank in range(world_size)]
    largest = max(prompt + sum(responses) for prompt, responses in prompts)
    assert max(loads) - min(loads) <= largest


def test_equal_prompts_are_dealt_evenly():
    probes = encoded([(5, [3, 4])] * 8)
    assert [len(share_of(probes, rank, 4)) for rank in range(4)] == [4, 4, 4, 4]


def test_processes_without_a_prompt_have_an_empty_share():
    probes = encoded([(5, [3, 4, 5])])
    assert [share_of(probes, rank, 3) for rank in range(3)] == [[0, 1, 2], [], []]


def test_one_process_gathers_its_own_frame_in_the_order_column():
    frame = pd.DataFrame({"probe_id": ["b", "b", "a"], "logp": [1.0, 2.0, 3.0], "order": [1, 1, 0]})
    gathered = gather_frames(frame, "order")
    expected = pd.DataFrame({"probe_id": ["a", "b", "b"], "logp": [3.0, 1.0, 2.0]})
    pd.testing.assert_frame_equal(gathered, expected)


@pytest.mark.parametrize("value", [None, True, {"a": 1.5}, ("x", {1, 2})])
def test_one_process_broadcasts_to_itself(value):
    assert broadcast(value) == value
