import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.report.packing import varints
from llm_dynamics.report.token_blocks import (
    COARSE,
    FINE,
    LEVELS,
    RESOLUTIONS,
    levels_of,
    resolution_of,
    token_blocks,
)  # fmt: skip
from llm_dynamics.report.token_table import MIN_STEPS, TokenTable, read_token_table, thinned
from llm_dynamics.runlog import RunLogError, load_run, schema
from tests.runlog.logs import as_before_stamps

from .synthetic import HOSTILE, write_run
from .unpacking import read_varints, unpack_block

STRINGS = ["", " the", " boil", HOSTILE, "\n", "ß", "\u202e"]


def made_table(n_steps, sizes, seed=0):
    """Tokens with gaps, infinities, large ranks, ties at rank 1 and greedy tokens that come and go."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    rank = rng.choice([0, 1, 1, 2, 9, 10, 11, 57, 48_000], (n_steps, n)).astype(np.int32)
    tokens = rng.integers(1, len(STRINGS), n).astype(np.int32)
    greedy = rng.integers(0, len(STRINGS), (n_steps, n)).astype(np.int32)
    greedy = np.where((rank == 1) & (rng.random(rank.shape) < 0.9), tokens, greedy)
    logp = -rng.gamma(0.5, 6, (n_steps, n)).astype(np.float32)
    logp[rng.random(logp.shape) < 0.1] = np.nan
    return TokenTable(
        steps=list(range(0, 10 * n_steps, 10)), probe_ids=[f"p{number}" for number in range(len(sizes))],
        bounds=np.cumsum([0, *sizes]), positions=np.concatenate([np.arange(size) for size in sizes]),
        tokens=tokens, strings=STRINGS, logp=logp, rank=rank, greedy=greedy, n_steps=n_steps, n_probes=len(sizes),
    )  # fmt: skip


def assert_holds(table, packed, dictionary):
    rows = [table.steps.index(step) for step in packed.steps]
    for number, block in enumerate(packed.blocks):
        columns = table.columns(number)
        seen = unpack_block(block, list(dictionary))
        assert seen["positions"] == table.positions[columns].tolist()
        assert seen["tokens"] == [table.strings[token] for token in table.tokens[columns]]
        assert seen["greedy"] == [[table.strings[g] for g in row] for row in table.greedy[rows, columns].T]
        ranks = table.rank[rows, columns].T
        np.testing.assert_array_equal(np.array(seen["rank"])[ranks <= 10], ranks[ranks <= 10])
        np.testing.assert_allclose(seen["rank"], ranks, rtol=0.1)
        expected = table.logp[rows, columns].T
        np.testing.assert_array_equal(np.isnan(seen["logp"]), np.isnan(expected))
        assert np.nanmax(np.abs(seen["logp"] - expected), initial=0) <= seen["resolution"] / 2 + 1e-5
    return packed


@settings(max_examples=25, deadline=None)
@given(n_steps=st.integers(1, 15), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_blocks_hold_the_log_to_the_stated_resolution(n_steps, sizes, seed):
    table, dictionary = made_table(n_steps, sizes, seed), {"": 0, "of another run": 1}
    packed = assert_holds(table, token_blocks(table, dictionary, 10**9), dictionary)
    assert packed.steps == table.steps
    assert packed.probe_ids == table.probe_ids


def test_a_run_log_comes_back_from_its_blocks(dpo):
    table, dictionary = read_token_table(dpo), {}
    packed = assert_holds(table, token_blocks(table, dictionary, 10**9), dictionary)
    assert packed.steps == dpo.observed_steps
    rows = dpo.tokens.query("probe_id == 'rejected-2'").pivot(index="position", columns="step", values="logp")
    seen = unpack_block(packed.blocks[packed.probe_ids.index("rejected-2")], list(dictionary))
    np.testing.assert_allclose(seen["logp"], rows, atol=seen["resolution"] / 2 + 1e-5)


def test_probes_worth_a_look_come_first(dpo):
    table = read_token_table(dpo)
    assert {probe.rsplit("-")[-1] for probe in table.probe_ids[:12]} == {table.probe_ids[0].rsplit("-")[-1]}
    assert table.probe_ids[0].startswith("rejected-")
    assert sorted(table.probe_ids) == sorted(dpo.tokens["probe_id"].unique())


def test_space_is_saved_first_on_resolution_then_on_observations_then_on_probes():
    table, fine = made_table(40, [30] * 20), None
    sizes = []
    for share in (1.0, 0.9, 0.5, 0.05):
        packed = assert_holds(table, token_blocks(table, names := {}, int((fine or 10**9) * share)), names)
        sizes.append((len(packed.steps), len(packed.blocks), unpack_block(packed.blocks[0], list(names))["resolution"]))
        fine = fine or sum(map(len, packed.blocks))
        assert sum(map(len, packed.blocks)) <= fine * share
        assert {packed.steps[0], packed.steps[-1]} == {0, 390}
    (_, _, finest), (_, _, coarse) = sizes[:2]
    assert finest < coarse
    assert [size[:2] for size in sizes[:2]] == [(40, 20), (40, 20)]
    assert MIN_STEPS < sizes[2][0] < 40
    assert sizes[2][1] == 20
    assert sizes[3][0] == MIN_STEPS
    assert 1 <= sizes[3][1] < 20


def test_one_probe_is_kept_whatever_its_size():
    packed = token_blocks(made_table(30, [50, 50]), {}, 1)
    assert (len(packed.blocks), len(packed.steps), packed.n_steps, packed.n_probes) == (1, MIN_STEPS, 30, 2)


@pytest.mark.parametrize("fineness", [FINE, COARSE])
def test_resolution_follows_the_colour_scale(fineness):
    for end in (1e-6, 0.03, 0.4, 1.0, 300.0):
        step = RESOLUTIONS[resolution_of(np.array([[-1.0] * 9, [-1.0 - end] * 9]), fineness)]
        assert step <= fineness.coarsest
        assert step * fineness.steps <= end or step == RESOLUTIONS[-1]
    assert RESOLUTIONS[resolution_of(np.array([[-1.0], [-9.5]]), FINE)] == 0.01
    assert RESOLUTIONS[resolution_of(np.array([[-1.0], [np.nan]]), FINE)] == RESOLUTIONS[-1]


def test_a_level_is_within_a_tenth_of_its_rank():
    ranks = np.arange(0, 300_000)
    levels = np.array(LEVELS)[levels_of(ranks)]
    np.testing.assert_array_equal(levels[:11], ranks[:11])
    assert np.max(np.abs(levels[1:] / ranks[1:] - 1)) < 0.1 + 1e-9


def test_varints_are_read_back():
    numbers = [0, 1, 127, 128, 300, 2**31, 2**63 - 1]
    assert read_varints(varints(np.array(numbers))) == numbers
    assert varints(np.array([], np.int64)) == b""


def test_thinning_keeps_both_ends_and_spreads_the_rest():
    assert thinned(range(10), 10) == thinned(range(10), 99) == list(range(10))
    assert thinned(range(101), 5) == [0, 25, 50, 75, 100]
    assert thinned([3, 8], 2) == [3, 8]
    with pytest.raises(ValueError, match="n is 1"):
        thinned([1, 2, 3], 1)


def test_cells_that_are_read_are_bounded(dpo):
    n_steps, n_tokens = len(dpo.observed_steps), dpo.tokens.query("step == 0").shape[0]
    table = read_token_table(dpo, max_cells=n_tokens * 12)
    assert (len(table.steps), table.steps[0], table.steps[-1]) == (12, 0, 60)
    assert n_steps == 13
    few = read_token_table(dpo, max_cells=5 * 13 * 12)
    assert few.probe_ids == table.probe_ids[:5]
    assert few.logp.shape == (12, 5 * 13)
    assert read_token_table(dpo, max_cells=1).probe_ids == table.probe_ids[:1]


def test_rows_may_come_in_any_order_and_some_may_be_missing(tmp_path):
    run = write_run(tmp_path / "run", "DPOTrainer", {"rejected": -5.0, "chosen": 1.0}, n_prompts=2, steps=(0, 5, 10))
    whole = read_token_table(run)
    file = run.path / "tokens" / schema.part_name(5)
    rows = run.tokens.query("step == 5 and not (probe_id == 'rejected-1' and position == 3)")
    as_before_stamps(run.path)
    rows.sample(frac=1, random_state=0).to_parquet(file, schema=schema.TOKENS)
    table = read_token_table(load_run(run.path))
    number = table.probe_ids.index("rejected-1")
    gap = table.columns(number).start + 3
    assert math.isnan(table.logp[1, gap])
    assert (table.rank[1, gap], table.strings[table.greedy[1, gap]]) == (0, "")
    kept = np.ones(table.logp.shape, bool)
    kept[1, gap] = False
    np.testing.assert_array_equal(table.logp[kept], whole.logp[kept])
    assert [table.strings[token] for token in table.tokens] == [whole.strings[token] for token in whole.tokens]


def test_a_bad_part_raises_or_is_left_out_as_the_run_was_opened(tmp_path):
    run = write_run(tmp_path / "run", "DPOTrainer", {"rejected": -5.0}, n_prompts=2, steps=(0, 5, 10))
    (run.path / "tokens" / schema.part_name(5)).write_bytes(b"cut")
    with pytest.raises(RunLogError, match="000000005"):
        read_token_table(run)
    with pytest.warns(UserWarning, match="000000005"):
        assert read_token_table(load_run(run.path, errors="warn")).steps == [0, 10]


def test_a_run_without_tokens_has_no_table(tmp_path):
    run = write_run(tmp_path / "run", "DPOTrainer", {"rejected": -5.0}, n_prompts=2, keep_tokens=0)
    assert read_token_table(run) is None
