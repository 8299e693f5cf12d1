"""What each of two processes does where one of them fails; run by `test_two_processes.py` under `accelerate launch`.

accelerate launch --config_file two.yaml --module tests.distributed.fault_worker MODEL_FOLDER WORKSPACE
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState

from llm_dynamics.callbacks import influence, probe, watch
from llm_dynamics.callbacks.finished_step import FinishedStep
from llm_dynamics.callbacks.recorder import Recorder
from llm_dynamics.influence import LossTape
from tests.callbacks.explained import short_probes
from tests.training import build_trainer, own_rows, weights_of

FAULTS = {
    "scoring": (probe, "score_responses", "observing probes"),
    "metrics": (probe, "observation_metrics", "observing probes"),
    "writing": (Recorder, "write", "observing probes"),
    "opening": (Recorder, "open", "observing probes"),
    "tape": (LossTape, "_record", "explaining steps"),
    "update": (influence, "split_update", "explaining steps"),
    "gradient": (FinishedStep, "family_mean", "explaining steps"),
    "averaging": (influence, "average_weights", "explaining steps"),
}
ONLY_MAIN = ("writing", "opening")


def train(name, fault=None, after=0):
    trainer = build_trainer("dpo", MODEL_FOLDER, WORKSPACE / name)
    if fault is None:
        trainer.train()
        return trainer
    where, function, _ = FAULTS[fault]
    right, calls = getattr(where, function), []

    def fails(*arguments, **options):
        calls.append(1)
        if len(calls) > after:
            raise ValueError("thrown into one process")
        return right(*arguments, **options)

    watch(trainer, short_probes(2), every=1, influence={"every": 1, "training_tokens": ()}, on_error="warn")
    setattr(where, function, fails if name.endswith(str(RANK)) else right)
    try:
        trainer.train()
    finally:
        setattr(where, function, right)
    return trainer


def main():
    alone = train("alone")
    ends = {}
    for fault in FAULTS:
        for rank in range(1 if fault in ONLY_MAIN else 2):
            trainer = train(f"{fault}_{rank}", fault, after=0 if fault == "opening" else 1)
            off = [c.part for c in trainer.callback_handler.callbacks if getattr(c, "failed_at", None) is not None]
            same = weights_of(trainer) == weights_of(alone) and own_rows(trainer) == own_rows(alone)
            ends[f"{fault}_{rank}"] = {"off": off, "same": same, "steps": trainer.state.global_step}
    (WORKSPACE / f"faults_{RANK}.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    MODEL_FOLDER, WORKSPACE = Path(sys.argv[1]), Path(sys.argv[2])
    state = PartialState(cpu=True)
    RANK = state.process_index
    main()
    state.wait_for_everyone()
    state.destroy_process_group()
