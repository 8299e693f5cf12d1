"""Explained runs of tiny trainers, shared by the tests of the step account."""

import pandas as pd

from llm_dynamics.callbacks import watch
from llm_dynamics.probes import ProbeSet
from llm_dynamics.runlog import load_run
from tests.conftest import FIRST, PREFERENCES, SECOND
from tests.training import build_trainer

# the prompts are among those that are trained on; the responses are short, since a map takes one gradient a token
SHORT = [
    {"prompt": PREFERENCES[0]["prompt"], "chosen": "Ten minutes.", "rejected": "Figure it out."},
    {"prompt": PREFERENCES[1]["prompt"], "chosen": "Light.", "rejected": "Who cares?"},
]
FAMILIES = ("chosen", "rejected", "other_train")
CHOSEN = (f"{FIRST}/chosen", f"{SECOND}/chosen")
GENTLE = {"learning_rate": 1e-3, "optim": "adamw_torch", "gradient_accumulation_steps": 2, "max_steps": 2}


def short_probes(n_prompts=2, families=FAMILIES):
    """Probes with few tokens, of two prompts, so that accounts are cheap."""
    probes = ProbeSet.from_preference_dataset(SHORT, families=families)
    return probes.select(prompt_ids=probes.prompt_ids[:n_prompts])


def explain(kind, model_folder, output_dir, *, influence=None, probes=None, every=1, **arguments):
    """A finished run, observed and explained at every step unless told otherwise: trainer and run log."""
    trainer = build_trainer(kind, model_folder, output_dir, **GENTLE | arguments)
    watch(trainer, probes or short_probes(), every=every, influence={"every": 1} | (influence or {}))
    trainer.train()
    return trainer, load_run(output_dir)


def by_family(run):
    """Share by step, family and cause, remainder included."""
    return run.family_influence().set_index(["step", "family", "cause"])["share"].sort_index()


def measured(run):
    """Measured change by step and family."""
    return run.family_influence().groupby(["step", "family"])["measured"].first()


def observed_change(run):
    """Change of each family's mean log-prob sum between consecutive observations, by step and family."""
    sums = run.sequences.pivot(index="step", columns="probe_id", values="logp_sum").diff().iloc[1:]
    families = run.probes.set_index("probe_id")["family"]
    changes: pd.Series = sums.T.groupby(families).mean().T.stack()
    return changes.rename_axis(["step", "family"]).sort_index()
