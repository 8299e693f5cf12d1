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
TRAINED_ON = {"SFTTrainer": "plain", "Trainer": "plain", "DPOTrainer": "pairs", "GRPOTrainer": "rollouts"}
WORDS = ["About", " ten", " minutes", " in", " gently", " boil", "ing", " water", ",", " then", " cool", " it", "."]


def write_run(
    folder: Path, trainer: str, delta: dict, *, steps=tuple(range(0, 65, 5)), n_prompts=12, seed=0, n_tokens=13,
    keep_tokens=4, nan_probe: str | None = None, words=WORDS, text: str | None = None, prompt: str | None = None,
    meta: dict | None = None, jitter=0.0,
):  # fmt: skip
    """Write a run log whose families move by `delta` (nats) from the first step to the last.

    Args:
        jitter: Standard deviation, in nats, of what each token adds to that at each observation; ranks and greedy
            tokens jump likewise.
    """
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
    writer.start(
        probes,
        {
            "trainer": trainer,
            "trained_on": TRAINED_ON.get(trainer),
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            **META,
            **(meta or {}),
        },
    )
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
        if jitter:
            rows["logp"] -= np.abs(rng.normal(0, jitter, len(rows)))
            rows["rank"] = np.maximum(1, np.exp(-rows["logp"] + rng.normal(0, 0.1, len(rows))).astype(int))
            rows.loc[rng.random(len(rows)) < 0.06, "greedy_token"] = " a"
            rows["greedy_token"] = rows["greedy_token"].where(rows["rank"] > 1, rows["token"])
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
    writer.start(probes, {"trainer": trainer, "trained_on": TRAINED_ON.get(trainer)})
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


ANSWERS = {
    "chosen": "Lower the egg into gently boiling water, wait ten minutes, then cool it under the tap.",
    "trained": "Lower the egg into gently boiling water and wait ten minutes.",
    "rejected": "Eggs are fine however you cook them; just leave it in the pan until you remember it again.",
}
QUESTIONS = ("How long should I boil an egg?", "What do plants need to grow?", "Why is the sky blue?")


def write_accounts(
    run, *, steps=range(1, 25), families=None, detail="family", roles=("chosen", "rejected"), answers=None, seed=0,
    n_prompts=3, probes=("chosen-0",), nan_tokens=0, nan_step=None, note=None, prompt=None, scale=1.0, own=True,
):  # fmt: skip
    """Add the accounts of some steps to a run log: rejected tokens push everything down, chosen tokens pull it up."""
    rng = np.random.default_rng(seed)
    writer = RunLogWriter(run.path)
    families = list(families or dict.fromkeys(run.probes["family"]))
    answers = answers or ANSWERS
    for step in steps:
        examples = pd.DataFrame(
            {"example": 2 * number + place, "role": role, "prompt_id": f"prompt-{number}" if number < 2 else None,
             "prompt": prompt or json.dumps([{"role": "user", "content": QUESTIONS[number % 3]}]),
             "response": answers[role], "n_tokens": len(answers[role].split(" ")),
             "c_sum": (-0.4 if place == 0 else 0.4)}
            for number in range(n_prompts) for place, role in enumerate(roles)
        )  # fmt: skip
        causes = [_causes(family, step, rng, scale, own, len(roles) > 1) for family in families]
        influence = pd.DataFrame(row | {"probe_id": None, "n_probes": 12} for rows in causes for row in rows)
        if detail == "probe":
            nats = ["share", "own_share", "measured"]
            influence[nats] = influence[nats].astype(float)
            influence = pd.concat(
                influence.assign(
                    probe_id=influence["family"] + f"-{number}", n_probes=1,
                    **{name: influence[name] * size for name in nats},
                )
                for number, size in enumerate((0.5, 1.5))
            )  # fmt: skip
        if step == nan_step:
            influence.loc[influence["family"] == families[0], ["share", "measured"]] = np.nan
        tokens = [_training_tokens(name, "family", examples, rng, scale) for name in families]
        tokens += [_training_tokens(name, "probe", examples, rng, scale) for name in probes]
        frame = pd.concat(tokens, ignore_index=True)
        if nan_tokens:
            frame.loc[frame.index[:nan_tokens], "share"] = np.nan
        account = {
            "rule": "midpoint", "explained": 0.99998, "explained_by_gradient": 0.41, "measured_norm": 10.0 / step,
            "remainder_norm": 0.04 / step, "learning_rate": 2e-4, "clip_factor": 1.0, "grad_norm": 3.0, "seconds": 1.0,
            "optimizer": "AdamW", "note": note,
        }  # fmt: skip
        tables = {"influence": influence, "training_examples": examples, "training_tokens": frame}
        writer.write_account(step, tables, account)
    return load_run(run.path)


def _causes(family, step, rng, scale, own, pushes_down):
    """The rows of one family and step; the shares add up."""
    size = scale * np.exp(-((step - 9) ** 2) / 90) * rng.uniform(0.7, 1.3)
    down = pushes_down * -4.2 * size * {"rejected": 2.0, "chosen": 1.0}.get(family, 0.7)
    up = 3.6 * size * {"rejected": 0.7, "chosen": 1.0}.get(family, 0.3)
    shares = {
        "momentum": 0.25 * (up + down) * min(step - 1, 4), "up": up, "down": down, "decay": -0.002 * scale,
        "rounding": 0.001 * scale * rng.normal(), "remainder": 0.0005 * scale * rng.normal(),
    }  # fmt: skip
    shares = {cause: share for cause, share in shares.items() if share}
    measured = sum(shares.values())
    part = {"chosen": 0.6, "rejected": 0.65}.get(family, 0.2)
    return [
        {"family": family, "cause": cause, "share": share, "measured": measured,
         "own_share": share * part if own and cause in ("up", "down") else None}
        for cause, share in shares.items()
    ]  # fmt: skip


def _training_tokens(target, kind, examples, rng, scale):
    rows = []
    for example in examples.to_dict("records"):
        words = example["response"].split(" ")
        for place, word in enumerate(words):
            sign = np.sign(example["c_sum"])
            share = -sign * rng.exponential(0.12) * scale * (3 if word in ("however", "fine", "ten") else 1)
            rows.append(
                {"target": target, "kind": kind, "example": example["example"], "position": place, "token_id": place,
                 "token": word if place == 0 else f" {word}", "logp": -1.5, "c": example["c_sum"] / len(words),
                 "share": share + 0.06 * scale * rng.normal()}
            )  # fmt: skip
    return pd.DataFrame(rows)
