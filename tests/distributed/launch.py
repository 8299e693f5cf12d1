"""Starts two processes that can talk to each other, and waits for them."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# `accelerate launch --cpu --num_processes 2` and `distributed_type: MULTI_CPU` start one process, silently
LAUNCH = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: "no"
main_process_ip: 127.0.0.1
main_process_port: {port}
"""


def run_two_processes(module, workspace, *arguments, launch=LAUNCH):
    """Run `module` under `accelerate launch` with `arguments`; fail the test with what it said where it fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config = launch.format(port=free.getsockname()[1])
    (workspace / "two.yaml").write_text(config)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(workspace / "two.yaml")]
    command += ["--module", module, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=600)  # a guard against hanging, not a measure of speed
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and its workers
        pytest.fail(f"the two processes hang; they said:\n{process.communicate()[0]}")
    if process.returncode != 0:
        pytest.fail(f"the two processes failed; they said:\n{output}")
