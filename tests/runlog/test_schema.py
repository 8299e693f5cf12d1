import ast
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llm_dynamics.runlog
from llm_dynamics.runlog import schema

TABLES = {"probes": schema.PROBES, **schema.OBSERVED_TABLES}


@given(st.integers(0, 10**12))
def test_the_name_of_a_part_tells_its_step(step):
    assert schema.part_step(schema.part_name(step)) == step


def test_names_of_parts_sort_by_step():
    steps = [0, 9, 10, 999, 123_456_789]
    assert sorted(map(schema.part_name, reversed(steps))) == [schema.part_name(step) for step in steps]


@pytest.mark.parametrize(
    "name",
    [".step_000000001.parquet.77.tmp", "step_.parquet", "step_one.parquet", "step_-00000001.parquet",
     "000000001.parquet", "step_000000001.csv", "meta.json", ""],
)  # fmt: skip
def test_other_names_are_no_parts(name):
    assert schema.part_step(name) is None


@pytest.mark.parametrize("table", TABLES)
def test_every_column_says_what_it_holds(table):
    assert all(field.metadata[b"doc"] for field in TABLES[table])
    assert len(set(TABLES[table].names)) == len(TABLES[table])


def test_sums_are_double_precision():
    sums = [field for field in schema.SEQUENCES if field.name.endswith("_sum")]
    assert len(sums) > 10
    assert all(field.type == pa.float64() for field in sums)


def test_steps_are_written_last_since_they_mark_completeness():
    assert list(schema.OBSERVED_TABLES)[-1] == "steps"


def test_the_run_log_is_data_only_no_pickle():
    for file in Path(llm_dynamics.runlog.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
        }
        assert not imported & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "torch"}, file
        constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert not any(isinstance(value, str) and value.endswith((".pkl", ".pickle", ".pt")) for value in constants), (
            file
        )
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not attributes & {"to_pickle", "read_pickle"}, file
