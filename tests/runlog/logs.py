"""Small run logs, made of numbers chosen here."""

import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

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


CAUSES = ("momentum", "up", "down", "remainder")


def influence_frame(measured=-4.0, *, ids=IDS):
    """One row per probe and cause; the shares of every probe add up to `measured`."""
    shares = dict(zip(CAUSES, (-1.0, 2.0, measured - 1.0, 0.0), strict=True))
    return pd.DataFrame(
        {
            "family": name.split("/")[1], "probe_id": name, "n_probes": 1, "cause": cause, "share": share,
            "own_share": share / 2 if cause in ("up", "down") else None, "measured": measured,
        }
        for name in ids
        for cause, share in shares.items()
    )  # fmt: skip


def examples_frame():
    return pd.DataFrame(
        {
            "example": [0, 1], "role": ["chosen", "rejected"], "prompt_id": ["p0", None], "prompt": "How long?",
            "response": ["Ten minutes.", "A week."], "n_tokens": 2, "c_sum": [-0.1, 0.1],
        }
    )  # fmt: skip


def training_tokens_frame(share=-0.5, target="chosen", kind="family"):
    return pd.DataFrame(
        {
            "target": target, "kind": kind, "example": [0, 0, 1, 1], "position": [0, 1] * 2, "token_id": [4, 5, 6, 7],
            "token": ["Ten", " minutes", "A", " week"], "logp": -1.5, "c": [-0.05, -0.05, 0.05, 0.05],
            "share": [share] * 4,
        }
    )  # fmt: skip


def explain(writer, step, measured=-4.0, *, tables=(), **account):
    """Write the account of one step: influence, training examples and tokens, and the frames in `tables`."""
    writer.write_account(
        step,
        {
            "influence": influence_frame(measured),
            "training_examples": examples_frame(),
            "training_tokens": training_tokens_frame(),
            **dict(tables),
        },
        {"rule": "midpoint", "explained": 0.99, "optimizer": "AdamW", **account},
    )


def unsealed(file, **columns):
    """Write the part as an earlier version would have: no stamp, no digest; `columns` replace its own."""
    table = pq.ParquetFile(file).read().replace_schema_metadata(None)
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))
    pq.write_table(table, file)


def as_before_stamps(folder):
    """Turn a log into one of an earlier version, whose parts tests may write as they like."""
    meta = json.loads((folder / "meta.json").read_text())
    del meta["run_id"]
    (folder / "meta.json").write_text(json.dumps(meta))
    for part in folder.rglob("*.parquet"):
        unsealed(part)
