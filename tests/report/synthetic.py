"""Synthetic run logs: what an SFT and a DPO run look like, made of numbers chosen here."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from llm_dynamics.runlog import RunLogWriter, load_run

HOSTILE = "</script><img src=x onerror=alert(1)>"
FAMILIES = (
    "chosen", "rejected", "chosen_initial", "chosen_semantic", "rejected_semantic", "chosen_format", "rejected_format",
    "other_train", "other_test", "ungrammatical", "random", "random_tokens",
)  # fmt: skip
START = {
    "chosen": -17.0, "rejected": -33.0, "chosen_initial": -12.0, "chosen_semantic": -30.0, "rejected_semantic": -41.0,
    "chosen_format": -38.0, "rejected_format": -44.0, "other_train": -52.0, "other_test": -54.0, "ungrammatical": -89.0,
    "random": -97.0, "random_tokens": -118.0,
}  # fmt: skip
DPO_DELTA = {
    "chosen": -4.7, "rejected": -26.0, "chosen_initial": -9.9, "chosen_semantic": -9.0, "rejected_semantic": -20.0,
    "chosen_format": -11.0, "rejected_format": -17.0, "other_train": -16.5, "other_test": -15.0, "ungrammatical": -23.0,
    "random": -22.0, "random_tokens": -14.0,
}  # fmt: skip
SFT_DELTA = {
    "chosen": 9.0, "rejected": -3.0, "chosen_initial": 1.5, "chosen_semantic": 4.0, "rejected_semantic": -1.5,
    "chosen_format": 2.0, "rejected_format": -1.0, "other_train": 4.5, "other_test": 1.0, "ungrammatical": -6.0,
    "random": -9.0, "random_tokens": -11.0,
}  # fmt: skip
META = {
    "packages": {"llm-dynamics": "0.1.0", "torch": "2.9.0", "peft": None}, "dtype": "float32", "device": "cpu",
    "arguments": {"loss_type": ["sigmoid"], "beta": 0.1, "optim": "adamw_torch", "learning_rate": 2e-4, "seed": 7},
    "every": 5, "truncation": {"max_length": 512, "mode": "keep_start"}, "squeeze_strength": 0.5,
}  # fmt: skip
WORDS = ["About", " ten", " minutes", " in", " gently", " boil", "ing", " water", ",", " then", " cool", " it", "."]


def write_run(
    folder: Path, trainer: str, delta: dict, *, steps=tuple(range(0, 65, 5)), n_prompts=12, seed=0, n_tokens=13,
    keep_tokens=4, nan_probe: str | None = None, words=WORDS, text: str | None = None, prompt: str | None = None,
    meta: dict | None = None,
):  # fmt: skip
    """Write a run log whose families move by `delta` (nats) from the first step to the last."""
    rng = np.random.default_rng(seed)
    tokens = [words[place % len(words)] for place in range(n_tokens)]
    chat = json.dumps([{"role": "user", "content": "How long should I boil an egg?"}])
    probes = pd.DataFrame(
        {
            "probe_id": f"{family}-{number}",
            "prompt_id": f"prompt-{number}",
            "family": family,
            "prompt": prompt or (chat if number == 0 else f"Question {number}: what do plants need to grow?"),
            "response": text or "".join(tokens),
            "source_row": number,
            "prompt_ids": [1, 2, 3],
            "response_ids": list(range(n_tokens)),
            "n_cut": 0,
        }
        for family in delta
        for number in range(n_prompts)
    )
    writer = RunLogWriter(folder)
    writer.start(probes, {"trainer": trainer, "model": "HuggingFaceTB/SmolLM2-135M-Instruct", **META, **(meta or {})})
    start = pd.Series([START.get(family, -50.0) for family in probes["family"]]) + rng.normal(0, 3, len(probes))
    slope = np.array([delta[family] for family in probes["family"]]) * rng.uniform(0.6, 1.4, len(probes))
    weights = rng.dirichlet(np.ones(n_tokens), len(probes))
    for step in steps:
        done = (step - steps[0]) / max(1, steps[-1] - steps[0])
        bell = 5.0 * np.sin(np.pi * done) * (probes["family"] == "rejected") if "SFT" in trainer else 0.0
        logp = start + slope * done**1.6 + bell
        if nan_probe is not None:
            logp = logp.mask((probes["probe_id"] == nan_probe) & (step > steps[0]))
        sequences = probes[["probe_id", "prompt_id", "family"]].assign(
            n_tokens=n_tokens, n_nonfinite=0, logp_sum=logp, argmax_logp_sum=-7.5 + 2.8 * done,
            **{f"{name}_sum": n_tokens * value for name, value in _squeezing(probes["family"], done).items()},
        )  # fmt: skip
        scalars = {"seconds_observing": 1.5, "overhead": 0.04 if step else None, "n_probes": len(probes)}
        kept = probes["prompt_id"].isin([f"prompt-{number}" for number in range(keep_tokens)])
        rows = _token_rows(probes[kept], logp[kept].to_numpy(), weights[kept], tokens) if keep_tokens else None
        writer.write(step, sequences=sequences, tokens=rows, scalars=lambda scalars=scalars: scalars)
    return load_run(folder)


def _squeezing(families, done):
    down = (families == "rejected") * done
    p_other = 0.3 + 0.25 * done + 0.1 * down
    return {
        "p_label": 0.35 - 0.2 * down, "p_other": p_other, "collision": 0.4 + 0.2 * done, "tau0": 0.05 + 0.15 * down,
        "tau": 0.06 + 0.15 * down, "riser_count": 3.0 - done, "riser_mass": 0.5 + 0.3 * done,
        "moved_to_other": 0.02 + 0.02 * done, "log1m_p_other": np.log1p(-p_other), "entropy": 1.9 - 0.9 * done,
    }  # fmt: skip


def _token_rows(probes, logp, weights, tokens):
    return pd.DataFrame(
        {
            "probe_id": probe_id, "position": place, "token_id": place, "token": token, "logp": total * weight[place],
            "greedy_id": 0, "greedy_token": " the", "greedy_logp": -0.2, "other_id": 0, "other_logp": -0.3, "rank": 4,
        }
        for probe_id, total, weight in zip(probes["probe_id"], logp, weights, strict=True)
        for place, token in enumerate(tokens)
    )  # fmt: skip


def write_values(folder: Path, values: dict, *, steps=(0, 10, 20), trainer="DPOTrainer", n_tokens=None, columns=None):
    """Write a run log from numbers: `{probe_id: [log-prob at each step]}`; the family is what stands before the `-`.

    Args:
        n_tokens: `{probe_id: tokens}`; 2 where not given.
        columns: Further columns of the sequences table, `{name: {probe_id: [value at each step]}}`.
    """
    names = list(values)
    probes = pd.DataFrame(
        {"probe_id": names, "prompt_id": "p", "family": [name.rsplit("-", 1)[0] for name in names], "prompt": "p",
         "response": "r", "n_cut": 0}
    )  # fmt: skip
    writer = RunLogWriter(folder)
    writer.start(probes, {"trainer": trainer})
    for place, step in enumerate(steps):
        sequences = probes[["probe_id", "prompt_id", "family"]].assign(
            n_tokens=[(n_tokens or {}).get(name, 2) for name in names],
            logp_sum=[float(values[name][place]) for name in names],
            **{
                column: [float(own[name][place]) if name in own else None for name in names]
                for column, own in (columns or {}).items()
            },
        )
        writer.write(step, sequences=sequences, tokens=None, scalars=dict)
    return load_run(folder)
