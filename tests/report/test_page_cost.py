import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_page_cost_prints_size_seconds_and_how_the_tokens_compare(tmp_path, dpo):
    size = ("--probes", "20", "--steps", "6", "--tokens", "8", "--rounds", "1", "--like", str(dpo.path))
    done = subprocess.run(
        [sys.executable, ROOT / "analysis" / "page_cost.py", *size, "--log", str(tmp_path / "log")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for part in (
        "20 probes x 6 observations x 8 tokens.", "| this log | ", "| an empty log | ", "rank, to 10%", str(dpo.path),
    ):  # fmt: skip
        assert part in done.stdout
