"""Explained runs whose global batches do not depend on how many processes share them."""

from llm_dynamics.callbacks import watch
from tests.callbacks.explained import CHOSEN, short_probes
from tests.training import build_trainer

GLOBAL_BATCH = 4
IN_TURN = [0, 1, 2, 3, 4, 5, 0, 1]
RUNS = {
    # kind of trainer, its arguments, rows of its data in order, prompts that are watched, what is asked of the account
    "dpo": ("dpo", {"gradient_accumulation_steps": 2}, IN_TURN, 2, {}),
    # one prompt: the second process has no probe
    "sft": ("sft", {"lora": True, "learning_rate": 5e-3}, IN_TURN, 1, {"detail": "token", "history": "split"}),
    "map": ("sft", {}, IN_TURN, 1, {"map_probes": CHOSEN[:1]}),
    # desirable rows for the first process, undesirable ones for the second
    "kto": ("kto", {"loss_type": "apo_zero_unpaired"}, [0, 2, 1, 3, 4, 6, 5, 7], 2, {}),
}


def explained_trainer(name, model_folder, output_dir, *, world_size):
    """The trainer of a run, watched and ready to train: two steps over eight rows."""
    kind, arguments, rows, n_prompts, influence = RUNS[name]
    settings = {
        "per_device_train_batch_size": GLOBAL_BATCH // world_size,
        "train_sampling_strategy": "sequential",
        "max_steps": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "optim": "adamw_torch",
        # with the usual 1e-8, shares at weights whose gradient cancels are decided by the noise of float32 sums
        "adam_epsilon": 1e-3,
    }
    trainer = build_trainer(kind, model_folder, output_dir, **settings | arguments)
    assert trainer.args.world_size == world_size
    trainer.model.double()
    trainer.train_dataset = trainer.train_dataset.select(rows)
    watch(trainer, short_probes(n_prompts), every=1, influence={"every": 1} | influence)
    return trainer
