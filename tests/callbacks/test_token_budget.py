"""Which probes keep their token tables when the run's budget does not hold all."""

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from llm_dynamics.callbacks.token_budget import BYTES_PER_PART, BYTES_PER_TOKEN_ROW, choose_token_probes


def probes_table(n_prompts=10, lengths=(4, 6)):
    return pd.DataFrame(
        [
            {"probe_id": f"p{i}/{j}", "prompt_id": f"p{i}", "response_ids": [0] * length}
            for i in range(n_prompts)
            for j, length in enumerate(lengths)
        ]
    )


def budget_for(rows, observations):
    return observations * (BYTES_PER_PART + rows * BYTES_PER_TOKEN_ROW)


def test_all_probes_keep_their_tokens_where_they_fit():
    assert choose_token_probes(probes_table(), 5, budget_for(100, 5), seed=0) == "all"


def test_one_row_too_many_leaves_out_a_whole_prompt():
    kept = choose_token_probes(probes_table(), 5, budget_for(99, 5), seed=0)
    assert len(kept) == 18
    assert {probe.split("/")[0]: kept.count(probe) for probe in kept}.keys() < {f"p{i}" for i in range(10)}


@given(rows=st.integers(0, 120), seed=st.integers(0, 20), observations=st.integers(1, 50))
def test_whole_prompts_are_kept_within_the_budget_and_in_the_order_of_the_table(rows, seed, observations):
    probes = probes_table()
    kept = choose_token_probes(probes, observations, budget_for(rows + 0.5, observations), seed=seed)
    if kept == "all":
        kept = list(probes["probe_id"])
    chosen = probes[probes["probe_id"].isin(kept)]
    assert kept == list(chosen["probe_id"])
    assert set(chosen.groupby("prompt_id").size()) <= {2}
    assert chosen["response_ids"].map(len).sum() <= rows
    assert len(kept) == 2 * min(10, rows // 10)  # and as many as fit


def test_the_sample_is_that_of_the_seed_and_not_of_the_order_of_rows():
    probes, budget = probes_table(), budget_for(50, 3)
    kept = choose_token_probes(probes, 3, budget, seed=1)
    assert set(choose_token_probes(probes.iloc[::-1], 3, budget, seed=1)) == set(kept)
    assert any(set(choose_token_probes(probes, 3, budget, seed=seed)) != set(kept) for seed in range(2, 6))


def test_a_prompt_too_long_to_fit_makes_room_for_shorter_ones():
    probes = pd.concat([probes_table(1, (50, 50)).replace({"p0": "long"}), probes_table(9, (2, 3))], ignore_index=True)
    probes["probe_id"] = probes["prompt_id"] + probes["probe_id"]
    kept = choose_token_probes(probes, 3, budget_for(45, 3), seed=0)
    assert kept == [probe for probe in probes["probe_id"] if not probe.startswith("long")]


def test_a_budget_below_one_part_keeps_nothing():
    assert choose_token_probes(probes_table(), 5, 0.0, seed=0) == []
    assert choose_token_probes(probes_table(), 5, 5 * BYTES_PER_PART - 1, seed=0) == []
