"""Accounts made of numbers that a test chooses."""

import numpy as np
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


def add_maps(run, *, probes=("chosen-0", "rejected-0"), steps=None, n_tokens=6, example=1, seed=0, scale=0.1):
    """Add influence maps of some probes to an explained run, against one example of each step, and their causes.

    The training tokens of each probe are made to agree: summed over probe tokens, a map is the share of each token.
    """
    rng = np.random.default_rng(seed)
    frames = ("influence", "training_examples", "training_tokens", "accounts")
    for step in steps or run.explained_steps[-3:]:
        part = {}
        for name in frames:
            frame = getattr(run, name)
            part[name] = frame[frame["step"] == step].drop(columns="step")
        told = part["training_tokens"]
        family = told[(told["kind"] == "family") & (told["target"] == told["target"].iloc[0])]
        words = family[family["example"] == example]
        maps, causes, told = [], [], [told[~told["target"].isin(probes)]]
        for probe in probes:
            shares = rng.normal(0, scale, (n_tokens, len(words)))
            maps.append(
                pd.DataFrame(
                    {"probe_id": probe, "example": example, "m": np.repeat(range(n_tokens), len(words)),
                     "l": np.tile(words["position"].to_numpy(), n_tokens), "share": shares.ravel()}
                )
            )  # fmt: skip
            own = family.assign(target=probe, kind="probe")
            own.loc[own["example"] == example, "share"] = shares.sum(axis=0)
            told.append(own)
            pushes = rng.normal(0, scale, (4, n_tokens))
            for cause, share in zip(("up", "down", "momentum", "remainder"), pushes, strict=True):
                causes.append(
                    pd.DataFrame(
                        {"probe_id": probe, "position": range(n_tokens), "cause": cause, "share": share,
                         "measured": pushes.sum(axis=0)}
                    )
                )  # fmt: skip
        account = part.pop("accounts").to_dict("records")[0]
        tables = {"training_tokens": told, "influence_maps": maps, "influence_tokens": causes}
        stacked = {name: pd.concat(frames, ignore_index=True) for name, frames in tables.items()}
        RunLogWriter(run.path).write_account(step, part | stacked, account)
    return load_run(run.path)
