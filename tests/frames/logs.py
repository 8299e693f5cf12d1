"""Run logs of random numbers, with everything in them that real logs may have: NaN, infinities, missing probes."""

import math

import numpy as np
import pandas as pd

from llm_dynamics.runlog import RunLogWriter, load_run

FAMILIES = ("chosen", "rejected", "zebra")
SUMS = ("logp_sum", "argmax_logp_sum", "entropy_sum", "ref_logp_sum")


def probes_frame(n_prompts=3, families=FAMILIES, **columns):
    rows = [
        {"probe_id": f"p{number}/{family}", "prompt_id": f"p{number}", "family": family, "prompt": f"Why {number}?",
         "response": f"{family} {number}", "prompt_ids": [1, number], "response_ids": [2, 3, 4, 5, 6], "n_cut": 0}
        for number in range(n_prompts) for family in families
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(**columns)


def write_log(folder, probes, observations, *, epochs=None, tokens=None):
    """Write a run log.

    Args:
        observations: `{step: sequences frame}`, with `probe_id`; what identifies a probe is filled in.
        epochs: `{step: epoch}`.
        tokens: `{step: tokens frame}`.
    """
    writer = RunLogWriter(folder)
    writer.start(probes, {"trainer": "DPOTrainer"})
    about = probes[["probe_id", "prompt_id", "family"]]
    for step, frame in observations.items():
        sequences = frame.merge(about, on="probe_id", how="left", validate="one_to_one").assign(n_nonfinite=0)
        writer.write(
            step,
            sequences=sequences,
            tokens=(tokens or {}).get(step),
            scalars=lambda step=step: {"epoch": (epochs or {}).get(step)},
        )
    return load_run(folder)


def random_log(folder, *, seed=0, steps=(0, 5, 10), n_prompts=3, families=FAMILIES, spoilt=0.0, missing=0.0, **more):
    """Write a log of random sums; a share of the numbers is `spoilt` (NaN, infinite), a share of the rows `missing`."""
    rng = np.random.default_rng(seed)
    probes = probes_frame(n_prompts, families)
    n_tokens = rng.integers(1, 9, len(probes))
    observations = {}
    for step in steps:
        frame = pd.DataFrame({"probe_id": probes["probe_id"], "n_tokens": n_tokens})
        for column in SUMS:
            values = rng.normal(-20, 8, len(probes))
            bad = rng.random(len(probes)) < spoilt
            values[bad] = rng.choice([np.nan, np.inf, -np.inf], bad.sum())
            frame[column] = values
        observations[step] = frame[rng.random(len(frame)) >= missing]
    return write_log(folder, probes, observations, **more)


def value_log(folder, values, *, n_tokens=2, prompt_ids=True, **more):
    """Write a log from `{probe_id: {step: logp_sum}}`; a probe id is `prompt/family`."""
    probes = pd.DataFrame(
        {"probe_id": list(values), "prompt_id": [name.split("/")[0] for name in values],
         "family": [name.split("/")[1] for name in values], "prompt": "Why?", "response": list(values), "n_cut": 0}
    )  # fmt: skip
    steps = sorted({step for own in values.values() for step in own})
    observations = {
        step: pd.DataFrame(
            [{"probe_id": name, "n_tokens": n_tokens, "logp_sum": float(own[step])} for name, own in values.items()
             if step in own]
        )
        for step in steps
    }  # fmt: skip
    return write_log(folder, probes, observations, **more)


def same(one, other):
    """Tell whether two numbers are the same to rounding, NaN equal to NaN."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return one == other or abs(one - other) <= 1e-9 * max(1.0, abs(one), abs(other))


def assert_rows(frame, expected):
    """Compare a frame with a list of tuples, number by number."""
    rows = list(frame.itertuples(index=False, name=None))
    assert len(rows) == len(expected), (rows[:3], expected[:3])
    for row, wanted in zip(rows, expected, strict=True):
        assert all(same(a, b) for a, b in zip(row, wanted, strict=True)), (row, wanted)
