import json
import random

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_dynamics.probes import DroppedProbe, Probe, ProbeSet
from llm_dynamics.probes.storage import FORMAT_KEY, SCHEMA, probe_record


def example():
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Où ?"})
    return ProbeSet(
        [
            Probe("p0/chosen", "p0", chat, " là\n", "chosen", 0),
            Probe("p1/chosen", "p1", "plain", "x", "chosen", None),
            Probe("p1/random_tokens", "p1", "plain", "qx", "random_tokens", 1, (5, 2**20)),
        ],
        dropped=[DroppedProbe(3, "rejected", "empty response")],
        metadata={"seed": 4, "join": "reference", "families": {"chosen": {"made_by": "column", "columns": ["chosen"]}}},
    )


def test_a_saved_set_comes_back_whole(tmp_path):
    path = example().save(tmp_path / "new" / "probes.parquet")
    back = ProbeSet.load(path)
    assert back.probes == example().probes
    assert back.dropped == example().dropped
    assert back.metadata == example().metadata
    assert back.fingerprint() == example().fingerprint()
    pd.testing.assert_frame_equal(back.summary(), example().summary())
    assert [item.name for item in path.parent.iterdir()] == ["probes.parquet"]


def test_the_file_is_plain_parquet_for_others_to_read(tmp_path):
    frame = pd.read_parquet(example().save(tmp_path / "probes.parquet"))
    assert frame["response"].tolist() == [" là\n", "x", "qx"]
    assert json.loads(frame["prompt"][0])[1]["content"] == "Où ?"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.parquet"):
        ProbeSet.load(tmp_path / "absent.parquet")


def test_a_truncated_file_is_named(tmp_path):
    path = example().save(tmp_path / "probes.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"probes\.parquet is not a readable Parquet file"):
        ProbeSet.load(path)


def test_a_foreign_parquet_file_is_refused_with_its_columns(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"no probe set; its columns are \['a'\]"):
        ProbeSet.load(tmp_path / "other.parquet")


def test_a_later_format_is_refused(tmp_path):
    path = example().save(tmp_path / "probes.parquet")
    table = pq.read_table(path)
    header = json.dumps({"version": 99, "metadata": {}, "dropped": []})
    pq.write_table(table.replace_schema_metadata({FORMAT_KEY: header}), path)
    with pytest.raises(ValueError, match="format 99; this version reads up to 2"):
        ProbeSet.load(path)


# ---- damaged files ---------------------------------------------------------------------------------------------------

HEADER = {"version": 1, "metadata": {}, "dropped": []}
ROWS = [probe_record(probe) for probe in example()]
CHAT = {**ROWS[0], "prompt_is_chat": True}


def rows_with(place=0, **changes):
    return [row | changes if i == place else row for i, row in enumerate(ROWS)]


def with_table(rows=ROWS, header=HEADER, schema=SCHEMA):
    """Write a probe set that says `header`, as an earlier version or somebody else may have."""
    header = header if isinstance(header, str) else json.dumps(header)
    table = pa.Table.from_pylist(rows, schema=schema).replace_schema_metadata({FORMAT_KEY: header})
    return lambda path: pq.write_table(table, path)


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def other_type(name, kind):
    return pa.schema([pa.field(field.name, kind if field.name == name else field.type) for field in SCHEMA])


DAMAGED = {
    "empty": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"P"),
    "half": cut(0.5),
    "no end": cut(0.999),
    "JSON": lambda path: path.write_text('{"prompt": "a"}'),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04K\x01."),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a column is missing": with_table([{"probe_id": "a"}], schema=pa.schema([("probe_id", pa.string())])),
    "a column of another type": with_table(schema=other_type("source_row", pa.float64())),
    "no rows": with_table([]),
    "null id": with_table(rows_with(probe_id=None)),
    "null prompt": with_table(rows_with(prompt=None)),
    "null response": with_table(rows_with(1, response=None)),
    "null family": with_table(rows_with(2, family=None)),
    "null in response_ids": with_table(rows_with(2, response_ids=[1, None])),
    "negative response_ids": with_table(rows_with(2, response_ids=[-1])),
    "ids twice": with_table([ROWS[0], ROWS[0]]),
    "unknown family": with_table(rows_with(family="cho\x00sen")),
    "one prompt id of two prompts": with_table(rows_with(1, prompt_id="p0")),
    "a chat that is no JSON": with_table([CHAT | {"prompt": "hello"}]),
    "a chat that is a number": with_table([CHAT | {"prompt": "5"}]),
    "a chat of texts": with_table([CHAT | {"prompt": '["a", "b"]'}]),
    "a deep chat": with_table([CHAT | {"prompt": "[" * 100_000}]),
    "header is no JSON": with_table(header="{"),
    "header is a list": with_table(header="[]"),
    "header without version": with_table(header={"metadata": {}, "dropped": []}),
    "version is a text": with_table(header=HEADER | {"version": "one"}),
    "metadata is a number": with_table(header=HEADER | {"metadata": 5}),
    "dropped of other keys": with_table(header=HEADER | {"dropped": [{"x": 1}]}),
    "dropped is null": with_table(header=HEADER | {"dropped": None}),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_one_error_that_names_it(tmp_path, damage):
    path = example().save(tmp_path / "probes.parquet")
    damage(path)
    with pytest.raises(ValueError, match=r"probes\.parquet") as error:
        ProbeSet.load(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1200


def test_a_flipped_bit_is_noticed(tmp_path):
    path = example().save(tmp_path / "probes.parquet")
    content = path.read_bytes()
    for place in random.Random(0).sample(range(8 * len(content)), 100):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"probes\.parquet"):
            ProbeSet.load(path)


def test_a_set_that_an_earlier_version_saved_is_read(tmp_path):
    with_table()(tmp_path / "old.parquet")
    assert ProbeSet.load(tmp_path / "old.parquet").probes == example().probes
