"""Tiny GRPO runs with scripted completions, and the shaping of their advantages by literal double sums."""

import contextlib
import functools
import io
import math
import random
from dataclasses import dataclass

import torch
import transformers
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig

from llm_dynamics import _trl
from llm_dynamics.demo.tiny import build_tiny_model, build_tiny_tokenizer
from llm_dynamics.trainers.nthr import NTHRConfig, NTHRGRPOTrainer
from tests.conftest import CORPUS
from tests.likelihood.models import ARCHITECTURES

G = 4
MIXED = (1, 0, 0, 1, 0, 0, 1, 0)
"""Rewards of two mixed groups."""
QUESTIONS = ["Why is the sky blue?", "How long should I boil an egg?", "Hello.", "Name the capital of France."]
EOS = 2
OURS = ("nthr/", "llds/")
TIMED = ("_runtime", "_per_second", "step_time", "tps")


@functools.cache
def tokenizer():
    """The tokenizer of all runs; nothing here changes it."""
    return build_tiny_tokenizer(CORPUS, vocab_size=320)


def tiny_model(dropout=0.0):
    """A tiny tied Llama, with dropout in its attention."""
    model = build_tiny_model(len(tokenizer()), hidden_size=32)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return model


def model_like(name):
    """A tiny model of one of `ARCHITECTURES`, with the vocabulary of the tokenizer."""
    model_type, sizes = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **sizes | {"vocab_size": len(tokenizer())})
        return AutoModelForCausalLM.from_config(config)


def rewarding(*values):
    """A reward function: the values in turn, by place in the batch."""

    def reward(completions, **_):
        return [values[i % len(values)] for i in range(len(completions))]

    return reward


class Script:
    """A `rollout_func` that answers with drawn tokens of a small vocabulary, so that responses share many.

    Prompts differ in length: a batch has padding on both sides.

    Args:
        truncated: Places in the batch whose completion has no end-of-sequence token.
        tools: Whether some tokens are the environment's (`env_mask`).
        only_tools: Places whose tokens are all the environment's.
    """

    def __init__(self, truncated=(), tools=False, only_tools=()):
        self.truncated, self.tools, self.only_tools, self.calls = truncated, tools, only_tools, 0

    def __call__(self, prompts, trainer):
        draw = random.Random(self.calls)
        self.calls += 1
        prompt_ids = [tokenizer()(prompt)["input_ids"] for prompt in prompts]
        completions = []
        for i in range(len(prompts)):
            ids = [draw.randint(20, 30) for _ in range(draw.randint(1, 8))]
            completions.append(ids if i in self.truncated else [*ids, EOS])
        answer = {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}
        if self.tools:
            answer["env_mask"] = [
                [0] * len(ids) if i in self.only_tools else [int(draw.random() < 0.6) for _ in ids]
                for i, ids in enumerate(completions)
            ]
        return answer


def build(out, trainer_class=NTHRGRPOTrainer, *, model=None, rewards=MIXED, script=None, lora=None, **settings):
    """Build a trainer; a run of it depends on nothing but the arguments.

    `rewards` are values by place or reward functions; without a `script` the model generates.
    """
    transformers.set_seed(0)
    config_class = NTHRConfig if issubclass(trainer_class, NTHRGRPOTrainer) else GRPOConfig
    options = {}
    if "eval_dataset" in settings:
        options["eval_dataset"] = settings.pop("eval_dataset")
    arguments = {
        "per_device_train_batch_size": 8,
        "num_generations": G,
        "max_completion_length": 9,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "shuffle_dataset": False,
    }
    return trainer_class(
        tiny_model() if model is None else model,
        reward_funcs=rewards if callable(rewards) or callable(rewards[0]) else rewarding(*rewards),
        args=config_class(str(out), **arguments | settings),
        train_dataset=Dataset.from_list([{"prompt": text} for text in QUESTIONS * 2]),
        processing_class=tokenizer(),
        rollout_func=script,
        peft_config=lora,
        **options,
    )


def run(trainer, **options):
    """Train, and return the generations that reached the loss."""
    transformers.set_seed(0)
    with contextlib.redirect_stdout(io.StringIO()), _trl.recording_rollouts(trainer) as rollouts:
        trainer.train(**options)
    return rollouts


def weights_of(trainer):
    """A copy of all weights."""
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def same_weights(trainer, other):
    """Whether all weights of two trainers are equal, bit for bit."""
    mine, others = weights_of(trainer), weights_of(other)
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def loss_rows(trainer, kind="loss"):
    """TRL's own part of the rows with the loss, as exact text."""
    return [
        {key: repr(value) for key, value in row.items() if not key.startswith(OURS) and not key.endswith(TIMED)}
        for row in trainer.state.log_history
        if kind in row
    ]


def our_rows(trainer):
    """Our part of the rows with the loss."""
    history = [row for row in trainer.state.log_history if "loss" in row]
    return [{key: value for key, value in row.items() if key.startswith(OURS)} for row in history]


class Each(TrainerCallback):
    """Calls a function with the trainer before every optimizer step, gradients in place."""

    def __init__(self, trainer, act):
        self.trainer, self.act = trainer, act

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.act(self.trainer)


# ---- the shaping, by its definition ----------------------------------------------------------------------------------


@dataclass
class Response:
    """One completion: its tokens that count, each with the head's input h, the residual g, and its position."""

    positions: list
    h: list
    g: list


@torch.no_grad()
def responses_of(model, batch, temperature=1.0, dtype=torch.float64, padded=False):
    """Every completion of a batch, one plain forward each, in `dtype`.

    The model is converted and left so: call it after training.

    Args:
        model: The model.
        batch: The batch.
        temperature: What logits are divided by.
        dtype: Of the forwards.
        padded: Keep the padding of the prompt. TRL passes no `position_ids`: where positions are absolute, they begin
            at the padding, in its loss as in the rollout's log-probs.
    """
    model = model.eval().to(dtype)
    seen = []
    for i in range(len(batch["completion_ids"])):
        seen_prompt = batch["prompt_mask"][i].bool() | padded
        prompt = batch["prompt_ids"][i][seen_prompt].tolist()
        real = batch["completion_mask"][i].tolist()
        tool = batch["tool_mask"][i].tolist() if "tool_mask" in batch else [1] * len(real)
        completion = [token for token, kept in zip(batch["completion_ids"][i].tolist(), real, strict=True) if kept]
        ids, kept = torch.tensor([prompt + completion]), torch.ones(1, len(completion), dtype=torch.int64)
        kept = torch.cat([batch["prompt_mask"][i][seen_prompt][None], kept], dim=1)
        output = model(input_ids=ids, attention_mask=kept, output_hidden_states=True, use_cache=False)
        response = Response([], [], [])
        for t, token in enumerate(completion):
            if tool[t]:
                place = len(prompt) + t - 1
                g = -(output.logits[0, place].double() / temperature).softmax(-1)
                g[token] += 1
                response.positions.append(t)
                response.h.append(output.hidden_states[-1][0, place].double())
                response.g.append(g)
        seen.append(response)
    return seen


def double_sum(response, k, others, vocabulary=None, by_length=False):
    """Score of token k of a response: the sum over all tokens of others, one product at a time."""
    total = 0.0
    for other in others:
        for h, g in zip(other.h, other.g, strict=True):
            both = response.g[k] * g
            product = float(both.sum() if vocabulary is None else both[vocabulary].sum())
            total += product * float(response.h[k] @ h) / (len(other.h) if by_length else 1)
    return total


@dataclass
class Shaped:
    """Expected shaping of a batch: `advantages[i][t]`, `scores[i][t]`, `selected[i][t]`, tau and eta of a group."""

    advantages: list
    scores: dict
    selected: set
    thresholds: dict
    etas: dict
    margin: float = math.inf
    """Smallest distance of a score from its threshold, relative to the threshold's size."""


ETAS = {"2|0.5-p|": lambda p: abs(1 - 2 * p), "p": lambda p: p, "1-p": lambda p: 1 - p}


def shaped_by_hand(
    method, rewards, before, seen, length, *, size=G, beta=1.0, eta="2|0.5-p|", q=0.1, weight=0.1, include_self=True,
    correct_from=0.5, vocabularies=None,
):  # fmt: skip
    """What every token's advantage must be: loops over groups, responses and tokens; `rewards` may be None."""
    result = Shaped([[a] * length for a in before], {}, set(), {}, {})
    if method == "pos_only":
        result.advantages = [[a if a > 0 else 0.0] * length for a in before]
    if method in ("w_reinforce", "nsr"):
        right = weight if method == "w_reinforce" else 0.0
        result.advantages = [[0.0 if r is None else right if r >= correct_from else -1.0] * length for r in rewards]
    if method not in ("nthr", "thr", "random"):
        return result
    for start in range(0, len(rewards), size):
        group = range(start, start + size)
        right = [i for i in group if rewards[i] is not None and rewards[i] >= correct_from]
        wrong = [i for i in group if rewards[i] is not None and rewards[i] < correct_from]
        if not right or not wrong or not any(seen[i].h for i in right):
            continue
        p = len(right) / (len(right) + len(wrong))
        vocabulary = None if vocabularies is None else vocabularies[start // size]
        by_length = method == "thr"
        anchors = []
        for i in right:
            others = [seen[j] for j in right if include_self or j != i]
            if seen[i].h:
                own = [double_sum(seen[i], k, others, vocabulary, by_length) for k in range(len(seen[i].h))]
                anchors.append(sum(own) / len(own))
        tau = beta if math.isinf(beta) else beta * min(anchors)
        factor = ETAS[eta](p) if eta in ETAS else float(eta)
        result.thresholds[start // size], result.etas[start // size] = tau, factor
        for i in wrong + (right if method == "thr" else []):
            for k, t in enumerate(seen[i].positions):
                others = [seen[j] for j in right if include_self or j != i]
                s = double_sum(seen[i], k, others, vocabulary, by_length)
                if not math.isinf(tau):
                    seen_size = abs(s) if method == "thr" else s
                    result.margin = min(result.margin, abs(seen_size - tau) / max(abs(tau), 1e-3))
                if method == "thr":
                    hidden_reward = s if i in right else -s
                    result.scores[i, t] = hidden_reward
                    sign = (hidden_reward > 0) - (hidden_reward < 0)
                    result.advantages[i][t] = (1 + sign * q) * before[i] if abs(s) > tau else 0.0
                else:
                    result.scores[i, t] = s
                    if s > tau and before[i] < 0:
                        result.selected.add((i, t))
                        if method == "nthr":
                            result.advantages[i][t] = factor * before[i]
    return result


def grpo_advantages(rewards, size=G):
    """TRL's advantages, scaled by group: (r - mean) / (std + 1e-4), 0 without a reward."""
    found = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        known = [r for r in group if r is not None]
        mean = sum(known) / len(known) if known else 0.0
        deviation = math.sqrt(sum((r - mean) ** 2 for r in known) / (len(known) - 1)) if len(known) > 1 else 0.0
        found += [0.0 if r is None else (r - mean) / (deviation + 1e-4) for r in group]
    return found
