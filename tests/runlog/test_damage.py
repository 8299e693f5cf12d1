"""Files that are not what was written: a flipped bit, a part of elsewhere, an index beyond bounds, a broken meta."""

import json
import random
import shutil

import pandas as pd
import pyarrow.parquet as pq
import pytest

from llm_dynamics.files import read_parquet, write_whole
from llm_dynamics.report import write_report
from llm_dynamics.runlog import RunLogError, RunLogWriter, load_run, schema
from llm_dynamics.runlog.parts import read_part

from .logs import IDS, META, as_before_stamps, explain, influence_frame, new_log, observe, probes_frame, unsealed

TOKENS = pd.DataFrame(
    {"probe_id": IDS[0], "position": [0, 1], "cause": "up", "share": [0.25, 0.5], "measured": [0.5, 1.0]}
)
MAPS = pd.DataFrame(
    {"probe_id": IDS[0], "example": 1, "m": [0, 0, 1, 1], "l": [0, 1] * 2, "share": [0.1, 0.2, 0.3, 0.4]}
)
ROLLOUTS = {
    "rollouts": pd.DataFrame({"example": [0], "question": [0], "prompt": "q", "completion": "a", "n_tokens": 1}),
    "nthr_tokens": pd.DataFrame({"example": [0], "question": [0], "position": [0], "token_id": [4], "score": [0.5]}),
    "displacements": pd.DataFrame({"example": [0], "question": [0], "logp_before": [-2.0], "logp_after": [-1.0]}),
}


def full_log(folder, **meta):
    """Two observations, an account and rollouts: a part of every table."""
    writer = new_log(folder, **meta)
    observe(writer, 0)
    observe(writer, 1, (-2.0, -3.0))
    explain(writer, 1, tables={"influence_tokens": TOKENS, "influence_maps": MAPS})
    writer.write_rollouts(1, ROLLOUTS)
    return writer


def table_of(path, table):
    return (
        load_run(path).columns("probes", schema.PROBES.names) if table == "probes" else getattr(load_run(path), table)
    )


def file_of(folder, table, step=1):
    return folder / schema.PROBES_FILE if table == "probes" else folder / table / schema.part_name(step)


# ---- a bit that flips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["probes", *schema.TABLES])
def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path, table):
    folder = full_log(tmp_path).folder
    file = file_of(folder, table)
    content = file.read_bytes()
    draw, meta = random.Random(table), load_run(folder).meta
    columns = schema.PROBES if table == "probes" else schema.TABLES[table]
    places = [draw.randrange(8 * len(content)) for _ in range(60)]
    footer = content.rfind(b"llm_dynamics.stamp")  # stamp and digest, then the schema and the length of the footer
    places += [draw.randrange(8 * footer, 8 * len(content)) for _ in range(40)] + [8 * len(content) - 60]
    for place in places:
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        with pytest.raises(RunLogError, match=file.name):
            read_part(file, columns, meta=meta)
    with pytest.raises(RunLogError, match=file.name):
        table_of(folder, table)
    file.write_bytes(content)
    table_of(folder, table)


@pytest.mark.parametrize("spoil", ["zeroed", "swapped", "appended", "cut"])
def test_other_damage_than_a_bit_is_noticed(tmp_path, spoil):
    folder = full_log(tmp_path).folder
    file = file_of(folder, "sequences")
    content = file.read_bytes()
    file.write_bytes(
        {
            "zeroed": content[:100] + bytes(512) + content[612:],
            "swapped": content[512:1024] + content[:512] + content[1024:],
            "appended": content + b"PAR1",
            "cut": content[:-1],
        }[spoil]
    )
    with pytest.raises(RunLogError, match="step_000000001"):
        _ = load_run(folder).sequences


def test_pages_carry_checksums_for_other_readers(tmp_path):
    file = file_of(full_log(tmp_path).folder, "sequences")
    content = bytearray(file.read_bytes())
    with pq.ParquetFile(file) as opened:
        chunk = opened.metadata.row_group(0).column(schema.SEQUENCES.names.index("logp_sum"))
    content[chunk.dictionary_page_offset + chunk.total_compressed_size - 1] ^= 1
    file.write_bytes(content)
    with pytest.raises(OSError, match="CRC checksum"):
        pq.read_table(file, page_checksum_verification=True)


# ---- a part of elsewhere ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["sequences", "tokens", "steps", "influence", "rollouts", "probes"])
def test_a_part_of_another_run_is_refused_by_name(tmp_path, table):
    ours, other = full_log(tmp_path / "a").folder, full_log(tmp_path / "b").folder
    shutil.copy(file_of(other, table), file_of(ours, table))
    with pytest.raises(RunLogError, match=rf"{file_of(ours, table).name} belongs elsewhere: .*run_id"):
        table_of(ours, table)
    with pytest.warns(UserWarning, match="belongs elsewhere") if table != "probes" else pytest.raises(RunLogError):
        _ = getattr(load_run(ours, errors="warn"), table)


def test_a_part_under_the_name_of_another_step_is_refused(tmp_path):
    folder = full_log(tmp_path).folder
    shutil.copy(file_of(folder, "sequences", 0), file_of(folder, "sequences", 1))
    with pytest.raises(RunLogError, match=r"step_000000001.* step 0, not 1"):
        _ = load_run(folder).sequences


def test_a_part_without_a_stamp_is_refused_in_a_log_that_has_them(tmp_path):
    folder = full_log(tmp_path).folder
    unsealed(file_of(folder, "sequences"))
    with pytest.raises(RunLogError, match=r"step_000000001\.parquet belongs elsewhere: it says run_id None"):
        _ = load_run(folder).sequences


def test_a_log_from_before_stamps_stays_readable_and_takes_no_part_of_a_stamped_run(tmp_path):
    old, new = full_log(tmp_path / "old").folder, full_log(tmp_path / "new").folder
    as_before_stamps(old)
    for table in ("probes", *schema.TABLES):
        pd.testing.assert_frame_equal(table_of(old, table), table_of(new, table))
    shutil.copy(file_of(new, "tokens"), file_of(old, "tokens"))
    with pytest.raises(RunLogError, match="belongs elsewhere"):
        _ = load_run(old).tokens


@pytest.mark.parametrize("steps", [[0, 0], [1, 0], [1, None]])
def test_a_step_column_that_disagrees_with_the_name_is_refused_even_where_it_is_not_asked_for(tmp_path, steps):
    folder = full_log(tmp_path).folder
    as_before_stamps(folder)
    unsealed(file_of(folder, "sequences"), step=steps)
    with pytest.raises(RunLogError, match=r"sequences/step_000000001.*column `step`"):
        load_run(folder).columns("sequences", ["logp_sum"])


def test_a_resumed_run_keeps_its_id_and_its_new_parts_belong_to_it(tmp_path):
    before = load_run(full_log(tmp_path).folder).meta["run_id"]
    again = RunLogWriter(tmp_path)
    again.resume(1, META)
    observe(again, 2)
    assert load_run(tmp_path).meta["run_id"] == before
    assert load_run(tmp_path).sequences["step"].unique().tolist() == [0, 1, 2]


def test_an_older_log_that_is_resumed_stays_readable(tmp_path):
    as_before_stamps(full_log(tmp_path).folder)
    again = RunLogWriter(tmp_path)
    again.resume(1, META)
    observe(again, 2)
    assert load_run(tmp_path).sequences["step"].unique().tolist() == [0, 1, 2]


# ---- an index beyond all bounds --------------------------------------------------------------------------------------

HUGE = 2**31 - 1


@pytest.mark.parametrize(
    ("table", "column", "values"),
    [
        ("influence_maps", "m", [0, 0, 1, 1 + 2**30]),
        ("influence_maps", "l", [0, HUGE, 0, 1]),
        ("influence_maps", "example", [1, 1, -1, 1]),
        ("influence_tokens", "position", [0, HUGE]),
        ("tokens", "position", [0, 1, 0, 2]),
        ("tokens", "position", [0, 1, 0, -1]),
        ("training_tokens", "position", [0, 2, 0, 1]),
        ("training_tokens", "example", [0, 0, 1, -HUGE]),
        ("training_examples", "n_tokens", [2, -2]),
        ("sequences", "n_tokens", [2, -1]),
        ("nthr_tokens", "position", [-5]),
        ("rollouts", "question", [-1]),
    ],
)
def test_an_index_beyond_what_the_log_has_is_refused_with_file_and_column(tmp_path, table, column, values):
    folder = full_log(tmp_path).folder
    as_before_stamps(folder)
    unsealed(file_of(folder, table), **{column: values})
    with pytest.raises(RunLogError, match=rf"{table}/step_000000001\.parquet is damaged: column `{column}`"):
        getattr(load_run(folder), table)


def test_a_page_is_refused_before_room_is_made_for_a_token_that_is_not_there(tmp_path):
    folder = full_log(tmp_path).folder
    as_before_stamps(folder)
    unsealed(file_of(folder, "influence_maps"), m=[0, 0, 1, HUGE])
    with pytest.raises(RunLogError, match="column `m`"):
        write_report(load_run(folder), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_indices_are_read_without_bounds_where_the_table_that_gives_them_is_missing(tmp_path):
    folder = full_log(tmp_path).folder
    file_of(folder, "training_examples").unlink()
    (folder / schema.PROBES_FILE).unlink()
    assert len(load_run(folder).influence_maps) == len(MAPS)
    assert len(load_run(folder).training_tokens)


# ---- meta.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"forms": "chat"}, {"forms": ["x"]}, {"trainer": 5}, {"trainer": {}}, {"finished_at_step": "x"},
        {"finished_at_step": True}, {"skipped_steps": 3}, {"run_id": 7}, {"resumed_at": {}},
        {"tokens_end_at_step": [1]},
    ],
)  # fmt: skip
def test_a_meta_whose_keys_hold_what_they_cannot_is_refused_by_key(tmp_path, change):
    folder = new_log(tmp_path).folder
    meta = json.loads((folder / "meta.json").read_text()) | change
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(RunLogError, match=rf"meta\.json: {next(iter(change))} is"):
        load_run(folder)


@pytest.mark.parametrize("kind", ["deep list", "deep dict", "huge"])
def test_a_deep_or_huge_meta_is_refused_in_one_line(tmp_path, kind):
    file = new_log(tmp_path).folder / "meta.json"
    if kind == "huge":
        with file.open("wb") as stream:
            stream.truncate(100_000_000)
    else:
        file.write_text("[" * 200_000 if kind == "deep list" else '{"a":' * 200_000)
    with pytest.raises(RunLogError, match=r"meta\.json") as error:
        load_run(tmp_path)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


# ---- text that UTF-8 has not -----------------------------------------------------------------------------------------


def test_half_a_surrogate_pair_ends_neither_log_nor_page(tmp_path):
    half = "half \ud83d of a smile"
    writer = RunLogWriter(tmp_path / "dynamics")
    writer.start(probes_frame().assign(prompt=pd.Series([half] * 2, dtype=object)), META | {"output_dir": "caf\udce9"})
    observe(writer, 0)
    writer.write_account(1, {"influence": influence_frame()}, {"rule": "midpoint"})
    run = load_run(writer.folder)
    assert run.probes["prompt"][0] == "half \\ud83d of a smile"
    assert run.meta["output_dir"] == "caf\udce9"
    page = tmp_path / "page.html"
    page.write_text("<!doctype html>an earlier page")
    write_report(run, page, title=half)
    assert "half \\ud83d of a smile" in page.read_text(encoding="utf-8")


# ---- writing files ---------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_through_its_link_with_its_mode_or_stays_as_it_was(tmp_path, monkeypatch):
    real, link = tmp_path / "real.html", tmp_path / "link.html"
    real.write_bytes(b"good")
    real.chmod(0o600)
    link.symlink_to(real)
    write_whole(link, b"better")
    assert link.is_symlink()
    assert (real.read_bytes(), real.stat().st_mode & 0o777) == (b"better", 0o600)

    def no_space(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        write_whole(link, b"best")
    assert real.read_bytes() == b"better"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link.html", "real.html"]


def test_a_folder_is_no_file_to_write(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        write_whole(tmp_path, b"")


@pytest.mark.parametrize("name", ["meta.json", "probes.parquet", "sequences/step_000000001.parquet", "sequences"])
def test_a_page_is_not_written_over_a_file_of_a_log(tmp_path, name):
    folder = full_log(tmp_path / "dynamics").folder
    before = (folder / name).read_bytes() if (folder / name).is_file() else None
    with pytest.raises(ValueError, match=r"no HTML page|is a folder"):
        write_report(load_run(folder), folder / name)
    assert before is None or (folder / name).read_bytes() == before


def test_what_was_stamped_comes_back(tmp_path):
    file = file_of(full_log(tmp_path).folder, "tokens")
    assert read_parquet(file).stamp == schema.stamp(load_run(tmp_path).meta, "tokens", 1)
