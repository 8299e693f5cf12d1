"""What each of two processes does; run by `test_nthr_two_processes.py` under `accelerate launch`.

    accelerate launch --config_file two.yaml --module tests.distributed.nthr_worker WORKSPACE

Every process writes what it ends with to `WORKSPACE/<run>/process_<rank>.json`; the run logs lie in the same folders.
"""

import json
import sys
import warnings
from pathlib import Path

import pandas as pd
from accelerate import PartialState

from tests.distributed.nthr_runs import RUNS, metrics_of, nthr_run, weights_digest


def main(workspace, rank):
    # what pandas says of frames of processes that have no rows must not go unseen
    warnings.filterwarnings("error", category=FutureWarning, module="pandas|llm_dynamics")
    warnings.filterwarnings("error", category=pd.errors.Pandas4Warning)
    for name in RUNS:
        trainer, steps, exchanged = nthr_run(name, workspace / "model", workspace / name, world_size=2)
        ends_with = {
            "steps": steps,
            "exchanged": exchanged,
            "metrics": metrics_of(trainer),
            "weights": weights_digest(trainer),
        }
        (workspace / name / f"process_{rank}.json").write_text(json.dumps(ends_with))


if __name__ == "__main__":
    state = PartialState(cpu=True)
    assert state.num_processes == 2, f"{state.num_processes} process was started, not two"
    main(Path(sys.argv[1]), state.process_index)
    state.wait_for_everyone()
    state.destroy_process_group()
