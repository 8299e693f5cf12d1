"""Small run logs, made of numbers chosen here."""

import pandas as pd

from llm_dynamics.runlog import RunLogWriter

IDS = ("p0/chosen", "p0/rejected")
META = {"probes_fingerprint": "abc", "trainer": "DPOTrainer"}


def probes_frame(ids=IDS):
    return pd.DataFrame(
        {
            "probe_id": ids,
            "prompt_id": [name.split("/")[0] for name in ids],
            "family": [name.split("/")[1] for name in ids],
            "prompt": "How long should I boil an egg?",
            "response": "Ten minutes.",
            "source_row": pd.Series([0, None], dtype=object),
            "prompt_ids": [[1, 2, 3]] * len(ids),
            "response_ids": [[4, 5]] * len(ids),
            "n_cut": 0,
        }
    )


def sequences_frame(logp, **columns):
    """One row per probe of `IDS`; `logp` and `columns` hold a value for each."""
    return pd.DataFrame(
        {
            "probe_id": IDS,
            "prompt_id": "p0",
            "family": ["chosen", "rejected"],
            "n_tokens": 2,
            "n_nonfinite": 0,
            "logp_sum": logp,
            **columns,
        }
    )


def tokens_frame(logp):
    return pd.DataFrame(
        {
            "probe_id": [name for name in IDS for _ in range(2)],
            "position": [0, 1] * 2,
            "token_id": [4, 5] * 2,
            "token": ["Ten", " minutes"] * 2,
            "logp": [value / 2 for value in logp for _ in range(2)],
        }
    )


def new_log(folder, **meta):
    writer = RunLogWriter(folder)
    writer.start(probes_frame(), META | meta)
    return writer


def observe(writer, step, logp=(-1.0, -2.0), *, tokens=True, **scalars):
    writer.write(
        step,
        sequences=sequences_frame(list(logp)),
        tokens=tokens_frame(logp) if tokens else None,
        scalars=lambda: {"epoch": step / 10, "n_probes": 2, **scalars},
    )


def files_of(folder):
    """Every file below `folder`, hidden ones too, with its bytes, by relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
