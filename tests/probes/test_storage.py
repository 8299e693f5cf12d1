import json

import pandas as pd
import pyarrow.parquet as pq
import pytest

from llm_dynamics.probes import DroppedProbe, Probe, ProbeSet
from llm_dynamics.probes.storage import FORMAT_KEY


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
