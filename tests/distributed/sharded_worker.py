"""What each of two processes does with a model whose parameters are sharded (`fully_shard`); run under torchrun.

    python -m torch.distributed.run --nproc_per_node 2 -m tests.distributed.sharded_worker MODEL_FOLDER WORKSPACE

On a CPU accelerate turns FSDP into plain data parallelism, so the model is sharded by hand, and the callback's events
are called by hand. Process 0 writes what it saw to `WORKSPACE/sharded.json`; the run log lies in `WORKSPACE/sharded`.
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llm_dynamics.callbacks import ProbeCallback
from llm_dynamics.likelihood import idle_forwards, is_sharded, score_logps, split_model
from llm_dynamics.likelihood.preserve import evaluating
from llm_dynamics.trainers import NTHRGRPOTrainer
from tests.distributed.nthr_runs import MIXED, RUNS, Recorder, nthr_run
from tests.training import build_trainer, make_probes

NTHR_CASES = ("nthr_4", "thr_4", "group_4")


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def first_generation(name, folder, output_dir, *, world_size, sharded):
    """Score the first batch of an NTHR run, and return what was made of its rows."""
    rows = []

    def generate(trainer):
        if sharded:
            shard(trainer.model)
        trainer.model.train()
        size = RUNS[name][1]
        questions = [row for row in list(trainer.train_dataset)[: len(MIXED[size][0])] for _ in range(size)]
        count = len(questions) // world_size
        first = trainer.args.process_index * count
        trainer._generate_and_score_completions(questions[first : first + count])
        recorder = Recorder(trainer)
        recorder.on_pre_optimizer_step(None, None, None)
        rows.extend(recorder.steps[0])

    with mock.patch.object(NTHRGRPOTrainer, "train", generate):
        nthr_run(name, folder, output_dir, world_size=world_size)
    return rows


def train_step(model, ids, rate):
    """One step of SGD, the same on both processes."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= rate * weight.grad
            weight.grad = None
    return float(loss.detach())


def main():
    trainer = build_trainer("sft", MODEL_FOLDER, WORKSPACE / "sharded")
    rank = trainer.args.process_index
    assert trainer.args.world_size == 2
    model = shard(trainer.model)
    assert is_sharded(model)
    callback = ProbeCallback(trainer, make_probes(3), every=1, batch_tokens=64)  # shares of unequal numbers of forwards
    ids = torch.tensor([list(callback.encoded[0].input_ids)])
    trainer.state.max_steps = 2
    losses = []
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    for step in (1, 2):
        losses.append(train_step(model, ids, 0.1))
        trainer.state.global_step = step
        callback.on_step_end(trainer.args, trainer.state, trainer.control)
    sharded_again = all(isinstance(weight, DTensor) for weight in model.parameters())

    # one process alone has something to score
    with evaluating(model):
        split = split_model(model)
    responses = callback.encoded[:2]
    if rank == 0:
        alone = score_logps(model, responses, split=split, forwards=3).tolist()
    else:
        idle_forwards(model, split, 3)
    nthr = {}
    for name in NTHR_CASES:
        mine = first_generation(name, MODEL_FOLDER, WORKSPACE / name, world_size=2, sharded=True)
        everything = [None, None]
        dist.all_gather_object(everything, mine)
        nthr[name] = everything[0] + everything[1]
    if rank == 0:
        seen = {
            "nthr": nthr,
            "losses": losses,
            "sharded_again": sharded_again,
            "backbone": split.backbone is not None,
            "shares_prompts": split.shares_prompts,
            "alone": alone,
        }
        (WORKSPACE / "sharded.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    MODEL_FOLDER, WORKSPACE = map(Path, sys.argv[1:])
    main()
