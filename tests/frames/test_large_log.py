"""Logs that outgrow memory: the benchmark's script runs, its ways agree, and 50 million token rows fit into 2 GB."""

import importlib.util
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from llm_dynamics import load_run
from llm_dynamics.runlog import schema

SCRIPT = Path(__file__).parents[2] / "analysis" / "large_log.py"
TWO_GB = 2000


@pytest.fixture(scope="module")
def large_log():
    spec = importlib.util.spec_from_file_location("large_log", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    """Run the script in a fresh process; return its first line and the peak memory of every way, in MB."""
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = re.findall(r"^\| ([^|]+) \|.*\| (\d+) \|$", done.stdout, flags=re.M)
    return done.stdout.splitlines()[0], {way: int(peak) for way, peak in rows}


def test_fifty_million_token_rows_fit_into_two_gigabytes():
    engines = ["DuckDB"] if find_spec("duckdb") else []
    said, peaks = run("--lean", "--rounds", "1", "--ways", "token_curves", "family_curves", *engines)
    assert said.startswith("50,000,000 token rows in 100 parts")
    assert {"token_curves", "family_curves", *engines} <= peaks.keys()
    assert max(peaks.values()) < TWO_GB, peaks


def test_all_ways_agree_on_a_log_with_every_column():
    ways = ["token_curves, delta", "token_curves, by position"]
    ways += ["DuckDB with percentiles"] if find_spec("duckdb") else []
    ways += ["polars"] if find_spec("polars") else []
    said, peaks = run("--rows", "100_000", "--observations", "5", "--rounds", "1", "--whole", "--ways", *ways)
    assert said.startswith("100,000 token rows in 5 parts")
    assert {"bare read", "whole table", *ways} == peaks.keys()


def test_the_made_up_log_is_a_run_log_with_every_column(large_log, tmp_path):
    large_log.write_log(tmp_path / "run", 8_000, 4)
    run = load_run(tmp_path / "run")
    assert len(run.tokens) == 8_000
    assert run.observed_steps == [0, 25, 50, 75]
    assert run.tokens.notna().all(axis=None)
    sums = run.tokens.astype({"logp": float}).groupby(["step", "probe_id"])["logp"].sum()
    written = run.sequences.set_index(["step", "probe_id"])["logp_sum"]
    assert written.to_dict() == pytest.approx(sums.to_dict(), rel=1e-6)
    large_log.write_log(tmp_path / "lean", 8_000, 4, lean=True)
    lean = load_run(tmp_path / "lean")
    assert list(lean.tokens) == schema.TOKENS.names
    assert set(lean.tokens.columns[lean.tokens.notna().all()]) == set(large_log.LEAN)


@pytest.mark.parametrize("other", [[[0, "chosen", -2.0]], [[25, "chosen", -1.0]], [[0, "rejected", -1.0]]])
def test_ways_that_disagree_stop_the_script(large_log, other):
    mine = {"means": [[0, "chosen", -1.0]]}
    large_log.check([mine, {"means": None}, {"means": [[0, "chosen", -1.0 - 1e-9]]}])
    with pytest.raises(SystemExit, match="disagree at step 0, chosen"):
        large_log.check([mine, {"means": other}])
