"""Accounts made of numbers that a test chooses."""

import pandas as pd

from llm_dynamics.runlog import RunLogWriter, load_run

from .synthetic import write_values


def bare_run(folder, steps=(0, 4)):
    """A run of two families to which accounts can be added."""
    return write_values(folder, {"chosen-1": [-9.0] * len(steps), "rejected-1": [-9.0] * len(steps)}, steps=steps)


def account(run, step, causes, *, own=None, family="chosen", measured=None, tables=None, **scalars):
    """Add the account of one step: `causes` are the shares of one family, `own` the own shares of some."""
    measured = sum(causes.values()) if measured is None else measured
    influence = pd.DataFrame(
        {"family": family, "n_probes": 3, "cause": list(causes), "share": list(causes.values()), "measured": measured}
    ).assign(own_share=[(own or {}).get(cause) for cause in causes])
    RunLogWriter(run.path).write_account(
        step, {"influence": influence, **(tables or {})}, {"rule": "midpoint", **scalars}
    )
    return load_run(run.path)


def examples(*rows):
    """The training examples table: `(example, role, c_sum)` or `(example, role, c_sum, response)` each."""
    return pd.DataFrame(
        {"example": row[0], "role": row[1], "c_sum": row[2], "prompt": "p", "response": row[3] if row[3:] else "r"}
        for row in rows
    )


def tokens(shares, *, target="chosen", kind="family", example=0):
    """The training tokens of one example: words w0, w1, ... with these shares."""
    return pd.DataFrame(
        {"target": target, "kind": kind, "example": example, "position": range(len(shares)),
         "token": [f" w{place}" for place in range(len(shares))], "logp": -1.0, "c": 0.1, "share": shares}
    )  # fmt: skip
