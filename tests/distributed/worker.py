"""What each of two processes does; run by `test_two_processes.py` under `accelerate launch`.

    accelerate launch --config_file two.yaml --module tests.distributed.worker MODEL_FOLDER WORKSPACE

Every process writes what it ends with to `WORKSPACE/<run>/process_<rank>.json`; the run logs lie in the same folders.
"""

import hashlib
import json
import sys
from pathlib import Path

from accelerate import PartialState

from llm_dynamics.callbacks import watch
from llm_dynamics.callbacks.schedule import Clock
from tests.callbacks.explained import CHOSEN, short_probes
from tests.distributed.explained_runs import RUNS, explained_trainer
from tests.training import build_trainer, make_probes, own_rows, weights_of


def train(name, kind, *, probes=None, options=None, **arguments):
    trainer = build_trainer(kind, MODEL_FOLDER, WORKSPACE / name, dropout=0.2, **arguments)
    assert trainer.args.world_size == 2
    if probes is not None:
        watch(trainer, probes, every=1, **(options or {}))
    trainer.train()
    write_end(name, trainer)


def write_end(name, trainer):
    weights = {name: hashlib.sha256(value).hexdigest() for name, value in weights_of(trainer).items()}
    observed = sorted(row["step"] for row in trainer.state.log_history if "probe/chosen_logp" in row)
    ends_with = {"weights": weights, "rows": own_rows(trainer), "observed": observed}
    (WORKSPACE / name / f"process_{RANK}.json").write_text(json.dumps(ends_with))


def main():
    for kind, lora in (("sft", True), ("dpo", False)):
        for name, probes in (("alone", None), ("watched", make_probes())):
            train(f"{kind}_{name}", kind, lora=lora, probes=probes, gradient_accumulation_steps=2)

    explaining = {
        "sft": {"influence": {"every": 2, "history": "split", "map_probes": CHOSEN[:1]}},
        "dpo": {"influence": {"every": 3, "detail": "probe"}},
    }
    for kind, lora in (("sft", True), ("dpo", False)):
        probes = short_probes(1)  # one process has none
        train(
            f"{kind}_explained", kind, lora=lora, probes=probes, options=explaining[kind], gradient_accumulation_steps=2
        )

    for name in RUNS:
        trainer = explained_trainer(name, WORKSPACE / "model", WORKSPACE / f"account_{name}", world_size=2)
        trainer.train()
        write_end(f"account_{name}", trainer)

    train("one_prompt", "sft", probes=make_probes(1), max_steps=1)

    train("tight", "sft", probes=make_probes(2), max_steps=4, options={"max_overhead": 1e-9})

    # Clocks differ between processes: here the first always has no time left, and the second always has.
    Clock.fits = lambda clock, max_overhead: RANK == 1
    train("clocks_disagree", "sft", probes=make_probes(2), max_steps=3, options={"max_overhead": 0.1})


if __name__ == "__main__":
    MODEL_FOLDER, WORKSPACE = Path(sys.argv[1]), Path(sys.argv[2])
    state = PartialState(cpu=True)
    RANK = state.process_index
    assert state.num_processes == 2, f"{state.num_processes} process was started, not two"
    main()
    state.wait_for_everyone()
    state.destroy_process_group()
