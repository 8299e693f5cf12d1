"""The scripts of `analysis/` run to their end on a tiny model; their numbers come from real ones."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "analysis" / script, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_cost_of_watching_prints_its_three_tables():
    done = run("cost_of_watching.py", "--quick", "--steps", "2", "--prompts", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    for part in ("One observation", "prompts not shared", "naive, one pass per family", "A DPO run"):
        assert part in done.stdout


def test_cost_of_explaining_times_every_route():
    done = run("cost_of_explaining.py", "--quick")
    assert done.returncode == 0, done.stderr[-2000:]
    for part in ("by family", "by probe token, one cause", "by training token", "% at the default interval"):
        assert part in done.stdout


def test_optimizer_matters_sets_every_account_against_the_measured_change():
    done = run("optimizer_matters.py", "--quick")
    assert done.returncode == 0, done.stderr[-2000:]
    for part in ("-grad", "start", "midpoint", "gauss2", "sgd", "rmsprop", "adamw_torch_fused", "LoRA"):
        assert part in done.stdout


def test_kernel_cost_sets_every_way_beside_the_floor():
    done = run("kernel_cost.py", "--quick")
    assert done.returncode == 0, done.stderr[-2000:]
    for part in ("forward+backward", "token_kernel", "vmap(jacrev)", "one backward per token", "one JVP per token"):
        assert part in done.stdout


def test_lld_tells_every_arm_with_intervals(tmp_path):
    done = run("lld.py", "--quick", "--out", tmp_path / "lld")
    assert done.returncode == 0, done.stderr[-2000:]
    for part in ("| grpo |", "| pos_only |", "| nthr |", "| random |", "GWHES", "By seed"):
        assert part in done.stdout
    assert (tmp_path / "lld.md").read_text().strip() in done.stdout
    assert len((tmp_path / "lld.csv").read_text().splitlines()) == 1 + 4 * 4


def test_cost_of_nthr_prints_its_three_tables():
    done = run("cost_of_nthr.py", "--quick")
    assert done.returncode == 0, done.stderr[-2000:]
    for part in ("Scoring one group", "A GRPO step", "Last layer against the exact kernel", "Spearman"):
        assert part in done.stdout
