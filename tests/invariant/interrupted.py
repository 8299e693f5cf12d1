"""A watched run that stops in the middle of an observation and waits there to be killed."""

import os
from pathlib import Path

import torch

from llm_dynamics.callbacks import watch
from llm_dynamics.runlog import writer
from tests.training import build_trainer, make_probes


def start_run(model_folder, output_dir):
    """The run: five steps of SFT with dropout, observed every two, with a checkpoint at 2."""
    trainer = build_trainer(
        "sft", model_folder, output_dir, max_steps=5, save_strategy="steps", save_steps=2, save_total_limit=5
    )
    watch(trainer, make_probes(), every=2)
    return trainer


def train_until(where, threads, model_folder, output_dir, connection):
    """Train, and block at `where`: "before <file>" or "half <file>", a file of the run log.

    Says so through `connection`, and never returns: the process is there to be killed.
    """
    torch.set_num_threads(threads)
    how, file = where.split()
    target = Path(output_dir) / "dynamics" / file

    def block():
        connection.send("blocked")
        connection.recv()  # which nobody sends

    if how == "before":
        write_table = writer._write_table

        def write_or_block(path, table):
            if path == target:
                block()
            write_table(path, table)

        writer._write_table = write_or_block
    else:
        fsync = os.fsync

        def fsync_or_block(descriptor):
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            due = path.parent == target.parent and target.name in path.name and is_due(target)
            if due and path != target:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                block()
            fsync(descriptor)

        os.fsync = fsync_or_block
    start_run(model_folder, output_dir).train()
    connection.send("finished")


def is_due(target):
    """A part is written once; `meta.json` several times, of which the last, after the last observation, is meant."""
    return target.name != "meta.json" or (target.parent / "steps" / "step_000000005.parquet").exists()
