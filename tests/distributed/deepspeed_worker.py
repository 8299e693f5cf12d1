"""What each of two processes does under DeepSpeed; run by `test_deepspeed.py` under `accelerate launch`.

    accelerate launch --config_file two.yaml --module tests.distributed.deepspeed_worker WORKSPACE

The run logs lie in `WORKSPACE/<run>`; process 0 writes what a run ended with to `WORKSPACE/<run>/end.json`.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from llm_dynamics.callbacks import watch
from tests.distributed.explained_runs import GLOBAL_BATCH, IN_TURN
from tests.distributed.nthr_runs import nthr_run
from tests.training import build_trainer, make_probes, own_rows

KINDS = ("sft", "dpo", "grpo")
NTHR = "nthr_4"


def short_run(kind, model_folder, output_dir, *, world_size, watched=True, lora=False):
    """Train for two steps on global batches that do not depend on the number of processes."""
    trainer = build_trainer(
        kind,
        model_folder,
        output_dir,
        lora=lora,
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        max_steps=2,
        learning_rate=1e-3,
        optim="adamw_torch",
        adam_epsilon=1e-3,  # with less, noise of sums decides where a gradient cancels
        **{"train_sampling_strategy": "sequential"} if kind != "grpo" else {},
    )
    assert trainer.args.world_size == world_size
    if kind != "grpo":
        trainer.train_dataset = trainer.train_dataset.select(IN_TURN)
    if watched:
        watch(trainer, make_probes(3), every=1)
    trainer.train()
    return trainer


def write_end(folder, trainer, **more):
    if trainer.args.process_index == 0:
        (folder / "end.json").write_text(json.dumps({"rows": own_rows(trainer), **more}))


def main(workspace):
    model = workspace / "model"
    for kind in KINDS:
        for name, watched in ((kind, True), (f"{kind}_alone", False)):
            trainer = short_run(kind, model, workspace / name, world_size=2, watched=watched)
            write_end(workspace / name, trainer, stage=trainer.accelerator.state.deepspeed_plugin.zero_stage)
    trainer = short_run("dpo", model, workspace / "lora", world_size=2, lora=True)
    write_end(workspace / "lora", trainer)

    trainer, steps, _ = nthr_run(NTHR, model, workspace / NTHR, world_size=2)
    both = [None, None]
    dist.all_gather_object(both, steps)
    write_end(workspace / NTHR, trainer, steps=[mine + other for mine, other in zip(*both, strict=True)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
