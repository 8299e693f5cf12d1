import pytest

from llm_dynamics.report.probe_index import ProbeIndex
from llm_dynamics.report.token_blocks import token_blocks
from llm_dynamics.report.token_section import MAX_CHARS, token_section
from llm_dynamics.report.token_table import read_token_table
from llm_dynamics.runlog import RunLogs, load_runs

from .synthetic import DPO_DELTA, HOSTILE, write_run, write_values
from .unpacking import unpack_block, unpack_json


def unpacked(section):
    index, *blocks = section.data.split("\n")
    return unpack_json(index), blocks


def rows_of(index):
    """The probes of an index as one mapping each, places looked up."""
    probes = [dict(zip(index["probes"], row, strict=True)) for row in zip(*index["probes"].values(), strict=True)]
    return [
        probe | {
            "run": index["runs"][probe["run"]], "family": index["families"][probe["family"]],
            "prompt": index["texts"][probe["prompt"]], "response": index["texts"][probe["response"]],
        }
        for probe in probes
    ]  # fmt: skip


def test_every_probe_of_every_run_can_be_found(both):
    index, blocks = unpacked(token_section(both))
    probes = rows_of(index)
    assert len(probes) == sum(len(run.probes) for run in both.runs.values())
    by_key = {(probe["run"], probe["id"]): probe for probe in probes}
    for name, run in both.runs.items():
        moved = run.delta_from_start().query("step == 60").set_index("probe_id")["delta_logp_sum"]
        about = run.probes.set_index("probe_id")
        for probe_id in ("chosen-0", "rejected-3", "random_tokens-11"):
            probe = by_key[name, probe_id]
            assert probe["family"] == about.loc[probe_id, "family"]
            assert probe["response"] == about.loc[probe_id, "response"]
            assert probe["change"] == pytest.approx(moved[probe_id], rel=1e-4)
            assert (probe["block"] > 0) == (probe_id != "random_tokens-11")  # of which no tokens were kept
    assert by_key["dpo", "chosen-0"]["prompt"] == "user: How long should I boil an egg?"
    assert by_key["dpo", "other_test-3"]["change"] is None  # not finite
    assert len(blocks) == 2 * 12 * 4


def test_blocks_belong_to_their_probes(both):
    index, blocks = unpacked(token_section(both))
    for probe in rows_of(index)[::7]:
        if probe["block"] > 0:
            seen = unpack_block(blocks[probe["block"] - 1], index["strings"])
            rows = both[probe["run"]].tokens.query(f"probe_id == '{probe['id']}'")
            wanted = rows.pivot(index="position", columns="step", values="logp")
            assert seen["logp"][4] == pytest.approx(wanted.loc[4].tolist(), abs=seen["resolution"] / 2 + 1e-5)
            assert index["steps"][probe["run"]] == wanted.columns.tolist()


def test_groups_are_prompts_of_one_run(both):
    probes = rows_of(unpacked(token_section(both))[0])
    groups = {(probe["run"], probe["id"].rsplit("-")[1]): probe["group"] for probe in probes}
    assert len(set(groups.values())) == len(groups) == 2 * 12


def test_a_text_is_kept_once(both):
    texts = unpacked(token_section(both))[0]["texts"]
    assert len(texts) == len(set(texts)) == 12 + 1


def test_the_first_probe_is_the_rejected_one_of_the_last_run_that_moved_most(both):
    section = token_section(both)
    index, _ = unpacked(section)
    first = rows_of(index)[index["first"]]
    assert (first["run"], first["family"]) == ("dpo", "rejected")
    assert section.view["notes"] == [
        "sft kept tokens of 48 of its 144 probes in its log.",
        "dpo kept tokens of 48 of its 144 probes in its log.",
    ]


def test_what_does_not_fit_is_said(both):
    room = len(token_section(both).data) // 3
    small = token_section(both, max_chars=room)
    assert len(small.data) <= room
    index, blocks = unpacked(small)
    notes = " ".join(small.view["notes"])
    n_dpo = sum(probe["block"] > 0 and probe["run"] == "dpo" for probe in rows_of(index))
    assert f"dpo: tokens of {n_dpo} of the 48 probes that kept them fit" in notes
    assert "dpo: 12 of the 13 observations with tokens fit" in notes
    assert small.view["n_detailed"] == len(blocks) < 96


def test_long_texts_are_cut_until_the_index_fits(tmp_path):
    # digits, so that compression does not make it fit
    long = " ".join(str(7**power) for power in range(160))
    run = write_run(tmp_path / "run", "DPOTrainer", {"chosen": 1.0}, n_prompts=1, prompt=long, keep_tokens=0)
    index = ProbeIndex(RunLogs({"a": run}))
    content = index.packed({}, {}, 2_000)
    assert len(content) <= 2_000
    assert index.cut_to == 1_000
    assert [len(text) for text in unpack_json(content)["texts"]] == [1_000, 56]
    assert unpack_json(content)["texts"][0].endswith("…")
    unpack_json(index.packed({}, {}, 10**6))
    assert index.cut_to is None


def test_runs_share_the_room_and_small_ones_leave_theirs_to_large_ones(tmp_path):
    small = write_run(tmp_path / "a", "SFTTrainer", {"chosen": 1.0}, n_prompts=1, steps=(0, 5))
    large = write_run(tmp_path / "b", "DPOTrainer", DPO_DELTA, n_prompts=4, n_tokens=60)
    both = load_runs({"small": small.path, "large": large.path})
    alone = token_section(RunLogs({"large": large}), max_chars=10**6)
    room = int(1.3 * len(alone.data))
    assert room / 2 < sum(map(len, unpacked(alone)[1]))  # an equal share would not hold the large one
    together = token_section(both, max_chars=room)
    assert together.view["notes"] == []
    resolutions = []
    for index, blocks in map(unpacked, (alone, together)):
        of_large = [probe["block"] for probe in rows_of(index) if probe["run"] == "large"]
        seen = [unpack_block(blocks[place - 1], index["strings"])["resolution"] for place in of_large if place > 0]
        resolutions.append(seen)
    assert resolutions[0] == resolutions[1]  # as fine as where it is alone


def test_what_would_act_is_made_visible(tmp_path):
    run = write_run(
        tmp_path / "run", "DPOTrainer", {"chosen": -1.0}, n_prompts=1, words=[HOSTILE, "\u202e", "\r", "\x00"],
        text="a\u202eb", prompt="c\x00d", steps=(0, 5),
    )  # fmt: skip
    index, _ = unpacked(token_section(RunLogs({"a": run})))
    assert {HOSTILE, "\\u202e", "␍", "\\u0000"} <= set(index["strings"])
    assert index["texts"] == ["c\\u0000d", "a\\u202eb"]


def test_runs_without_tokens_can_be_searched(tmp_path):
    section = token_section(RunLogs({"a": write_values(tmp_path / "run", {"chosen-1": [-1, -2, -4]})}))
    index, blocks = unpacked(section)
    assert blocks == []
    assert rows_of(index)[0]["change"] == -3
    assert section.view["notes"] == ["a kept no tokens in its log."]


def test_a_run_without_observations_can_be_searched(tmp_path):
    section = token_section(RunLogs({"a": write_values(tmp_path / "run", {"chosen-1": []}, steps=())}))
    assert rows_of(unpacked(section)[0])[0]["change"] is None


def test_the_room_of_a_page_holds_500_probes_of_200_tokens_at_40_observations(tmp_path):
    run = write_run(
        tmp_path / "run", "DPOTrainer", DPO_DELTA, steps=tuple(range(40)), n_prompts=2, n_tokens=100, jitter=0.1
    )
    table = read_token_table(run)
    assert table.logp.shape == (40, 24 * 100)
    a_cell = MAX_CHARS / (500 * 200 * 40)  # characters
    packed = token_blocks(table, {}, int(a_cell * table.logp.size))
    assert (len(packed.steps), len(packed.blocks)) == (40, 24)
