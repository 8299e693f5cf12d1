"""Watched runs that stop in the middle of writing their log and wait there to be killed."""

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from llm_dynamics.callbacks import watch
from llm_dynamics.runlog import writer
from tests.callbacks.explained import CHOSEN, short_probes
from tests.trainers.runs import build as build_grpo
from tests.training import build_trainer, make_probes

SAVED = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 5}


def start_sft(model_folder, output_dir):
    """Five steps of full SFT with dropout, observed every two, with a checkpoint at 2."""
    trainer = build_trainer("sft", model_folder, output_dir, **SAVED)
    watch(trainer, make_probes(), every=2)
    return trainer


def start_dpo(model_folder, output_dir):
    """Five steps of LoRA DPO with dropout, observed every three and explained every two, momentum by its labels."""
    options = {"lora": True, "dropout": 0.2, "optim": "adamw_torch", "gradient_accumulation_steps": 2}
    trainer = build_trainer("dpo", model_folder, output_dir, **SAVED | options)
    watch(trainer, short_probes(), every=3, influence={"every": 2, "history": "split", "map_probes": [CHOSEN[0]]})
    return trainer


def start_nthr(model_folder, output_dir):
    """Five steps of NTHR that generate, with rollouts and tokens kept, explained and measured in different rhythms."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = build_grpo(output_dir, model=model, optim="adamw_torch", **SAVED)
    watch(trainer, short_probes(), every=3, influence={"every": 4, "detail": "probe"}, displacement={"every": 4})
    return trainer


STARTS = {"sft": start_sft, "dpo": start_dpo, "nthr": start_nthr}


def train_until(kind, where, threads, model_folder, output_dir, connection):
    """Train one of `STARTS`, and block at `where`: "before <file>" or "half <file>", a file of the run log.

    Says so through `connection`, and never returns: the process is there to be killed.
    """
    torch.set_num_threads(threads)
    how, file = where.split()
    target = Path(output_dir) / "dynamics" / file

    def block():
        connection.send("blocked")
        connection.recv()  # which nobody sends

    if how == "before":
        write_table = writer.write_parquet

        def write_or_block(path, table, stamp):
            if path == target:
                block()
            write_table(path, table, stamp)

        writer.write_parquet = write_or_block
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
    STARTS[kind](model_folder, output_dir).train()
    connection.send("finished")


def is_due(target):
    """A part is written once; `meta.json` several times, of which the last, after the last observation, is meant."""
    return target.name != "meta.json" or (target.parent / "steps" / "step_000000005.parquet").exists()
