"""Tasks for reinforcement: questions, reward functions, and answers to watch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data import load_rows
from datasets import Dataset
from trl import ScriptArguments

from llm_dynamics.demo.products import product_pairs, product_questions, product_reward

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
TAGGED = "\nGive your final answer between <answer> and </answer>."


@dataclass
class TaskArguments(ScriptArguments):
    """TRL's script arguments and the task."""

    task: str = field(
        default="products",
        metadata={"help": "What to train on: products (of digits), math, or the name of a reasoning-gym dataset."},
    )
    task_size: int = field(default=2000, metadata={"help": "Questions drawn from a reasoning-gym dataset."})


@dataclass(frozen=True)
class Task:
    """What a run of grpo.py trains on.

    Attributes:
        questions: Rows with `prompt` and what the rewards need.
        rewards: Reward functions as TRL calls them.
        answers: The same prompts with `chosen` (and `rejected`) or `completion`, to be watched.
    """

    questions: Dataset
    rewards: list[Callable[..., Any]]
    answers: list[dict[str, Any]]


def load_task(args: TaskArguments, seed: int) -> Task:
    """Load the task that `args.task` names.

    Args:
        args: The script's arguments.
        seed: Of the order of products and of the questions of reasoning-gym.

    Returns:
        The task.

    Raises:
        ModuleNotFoundError: If a package that the task needs is not installed; the message has the command.
        ValueError: If there is no such task, or it takes no data set and one is named.
    """
    if args.dataset_name and args.task != "math":
        raise ValueError(
            f"dataset_name is {args.dataset_name!r}, and the task {args.task} makes its own questions; --task math "
            "reads a data set with problem and solution"
        )
    if args.task == "products":
        rows = product_questions(seed)
        return Task(Dataset.from_list(rows), [product_reward], product_pairs(rows))
    if args.task == "math":
        _need("math_verify", "math-verify", args.task)
        return _math(args)
    _need("reasoning_gym", "reasoning-gym", f"{args.task} (neither products nor math, so a reasoning-gym dataset)")
    return _reasoning_gym(args, seed)


def _math(args: TaskArguments) -> Task:
    from trl.rewards import accuracy_reward

    named = args if args.dataset_name else replace(args, dataset_name="math")
    rows = [
        {"prompt": _ask(row["problem"] + BOXED), "solution": row["solution"]}
        for row in load_rows(named, named.dataset_train_split)
    ]
    answers = [{"prompt": row["prompt"], "completion": row["solution"]} for row in rows]
    return Task(Dataset.from_list(rows), [accuracy_reward], answers)


def _reasoning_gym(args: TaskArguments, seed: int) -> Task:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS
    from reasoning_gym.utils import extract_answer

    if args.task not in DATASETS:
        raise ValueError(f"task is {args.task!r}; allowed: products, math, {', '.join(sorted(DATASETS))}")
    gym = reasoning_gym.create_dataset(args.task, size=args.task_size, seed=seed)
    entries = list(gym)

    def gym_reward(completions: Sequence[Any], entry: Sequence[int], **kwargs: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [
            float(gym.score_answer(extract_answer(text), entry=entries[number]))
            for text, number in zip(texts, entry, strict=True)
        ]

    rows = [{"prompt": _ask(entry["question"] + TAGGED), "entry": number} for number, entry in enumerate(entries)]
    answers = [
        {"prompt": row["prompt"], "completion": f"The answer is <answer>{entries[row['entry']]['answer']}</answer>."}
        for row in rows
    ]
    return Task(Dataset.from_list(rows), [gym_reward], answers)


def _ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _need(module: str, package: str, task: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f'task {task} needs {package}: pip install "llm-dynamics[grpo]"')
