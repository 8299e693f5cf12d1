"""Reinforcement run logs: rollouts, their tokens and displacements, made of numbers chosen here."""

import numpy as np
import pandas as pd

from llm_dynamics.runlog import RunLogWriter, load_run

QUESTIONS = (
    "<|im_start|>user\nA farm has 12 hens and 5 goats. How many legs are there?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nIt is 9:40. The train leaves in 45 minutes. When is that?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat is 15 % of 240?<|im_end|>\n<|im_start|>assistant\n",
)
WRONG = (
    "Hens have 2 legs and goats have 4 . So we add 12 + 5 = 17 , and \n the farm has 17 legs in all . <|im_end|>",
    "From 9:40 we count 45 minutes : 9:40 plus 20 is 10:00 , plus 25 is 10:35 . The answer is 10:35 . <|im_end|>",
    "First take 10 % of 240 , which is 24 . Half of that is 12 . Together they are 35 . <|im_end|>",
)
RIGHT = (
    "12 hens have 24 legs and 5 goats have 20 , so there are 44 legs . <|im_end|>",
    "9:40 plus 20 minutes is 10:00 , and 25 more make it 10:25 . <|im_end|>",
    "10 % is 24 and 5 % is 12 , so 15 % is 36 . <|im_end|>",
)


def rows(
    step, *, method="nthr", n_questions=3, group=4, seed=0, shift=0.0, eta=0.5, threshold=0.12, length=None,
    hostile=None,
):  # fmt: skip
    """Return the tables of one generation: of each question, `group` completions of which about half are wrong.

    Args:
        length: Tokens of each completion; as many as its words where None.
        hostile: What to put in the place of every word and prompt.
    """
    rng = np.random.default_rng([seed, step])
    scored = method in ("nthr", "thr", "random")
    rollouts, tokens, displacements = [], [], []
    for example in range(n_questions * group):
        question = example // group
        correct = bool(example % group >= 2 or (example % group == 1 and rng.random() < 0.2 + 0.02 * step))
        words = [f" {word}" for word in (RIGHT if correct else WRONG)[question % 3].split(" ")]
        words = [hostile or words[place % len(words)] for place in range(length or len(words))]
        shared = {"example": example, "question": question}
        before = 0.87 if correct else -0.87
        own = []
        for place, word in enumerate(words):
            score = rng.exponential(0.08) - 0.02 + (0.15 if word.strip().isdigit() else 0.0)
            score = score if scored and (method == "thr" or not correct) else None
            selected = method in ("nthr", "random") and score is not None and score > threshold
            after = before * (eta if selected else 1.1 if method == "thr" else 0.0 if method == "pos_only" else 1.0)
            own.append(
                {**shared, "position": place, "token_id": 100 + place, "token": "\n" if word == " \n" else word,
                 "score": score, "threshold": threshold if scored else None, "selected": selected,
                 "advantage_before": before, "advantage": max(after, 0.0) if method == "pos_only" else after}
            )  # fmt: skip
        tokens += own
        text = {"prompt": hostile or QUESTIONS[question % 3], "completion": "".join(token["token"] for token in own)}
        rollouts.append(
            {**shared, **text, "n_tokens": len(own), "reward": float(correct), "correct": correct, "advantage": before,
             "eta": eta if scored else None, "threshold": threshold if scored else None,
             "anchor": 0.2 if scored and correct else None, "n_selected": sum(token["selected"] for token in own)}
        )  # fmt: skip
        if correct:
            logp = -20.0 + rng.normal()
            moved = logp + rng.normal(0.4 + shift, 0.35)
            displacements.append({**shared, **text, "n_tokens": len(own), "logp_before": logp, "logp_after": moved})
    rate = pd.DataFrame(rollouts).groupby("question")["correct"].mean()
    for row in rollouts + displacements:
        row["success_rate"] = float(rate[row["question"]])
    frames = {"rollouts": rollouts, "nthr_tokens": tokens, "displacements": displacements}
    return {name: pd.DataFrame(own) for name, own in frames.items()}


def write_rollouts(run, *, steps=(1, 11, 21, 31), tables=("rollouts", "nthr_tokens", "displacements"), **choice):
    """Add the tables of some steps to a run log; `choice` as for `rows`."""
    writer = RunLogWriter(run.path)
    for step in steps:
        made = rows(step, **choice)
        writer.write_rollouts(step, {name: made[name] for name in tables})
    return load_run(run.path)
