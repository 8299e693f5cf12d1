"""Runs of `NTHRGRPOTrainer` on fixed completions, in global batches that any number of processes can share."""

import random
from unittest import mock

import pytest
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from llm_dynamics.callbacks import watch
from llm_dynamics.trainers import NTHRConfig, NTHRGRPOTrainer
from llm_dynamics.trainers.nthr import trainer as nthr_trainer_module
from llm_dynamics.trainers.nthr.token_pool import TokenPool
from tests.callbacks.explained import short_probes
from tests.trainers.vllm_stand_in import Engine, install

LONG, SHORT = (7, 8, 9, 10, 11), (1, 2, 3)
# Rewards of each question's completions, and lengths: questions are answered in order, a few a step.
# In steps of three questions over two processes the middle one straddles.
MIXED = {
    2: [
        # rank 0 | rank 1: the middle question is mixed; all wrong; without a reward; none of the three is mixed
        [(1, 0), (0, 1), (0, 1)],
        [(0, 0), (1, 0), (1, 1)],
        [(0, 1), (0, 0), (1, 0)],
        [(1, None), (1, 0), (0, 1)],
        [(1, 1), (0, 0), (1, None)],
    ],
    4: [
        [(1, 0, 0, 1), (0, 0, 1, 0), (0, 1, 1, 1)],
        [(0, 1, 0, 0), (0, 0, 0, 0), (1, 0, 0, 1)],
        [(1, 1, 1, 1), (1, 0, None, 1), (0, 0, 0, 0)],
    ],
    # one question, three completions on each process; the second process has no correct one at first
    6: [[(1, 0, 1, 0, 0, 0)], [(0, 0, 0, 1, 0, 1)]],
}
WHOLE = {2: [[(1, 0), (0, 1), (1, 0), (0, 0)], [(1, 1), (0, 0), (0, 1), (1, 0)]]}
RUNS = {
    # rewards by size of the groups, size, configuration
    "nthr_2": (MIXED, 2, {}),
    "nthr_4": (MIXED, 4, {"nthr_beta": 0.0}),
    "nthr_6": (MIXED, 6, {"nthr_beta": 0.0}),
    "thr_4": (MIXED, 4, {"nthr_method": "thr", "nthr_beta": 0.01}),
    "random_4": (MIXED, 4, {"nthr_method": "random", "nthr_beta": 0.0}),
    "group_4": (MIXED, 4, {"nthr_vocab": "group", "nthr_beta": 0.0}),
    "others_4": (MIXED, 4, {"nthr_include_self": False, "nthr_beta": 1.0}),
    "whole_2": (WHOLE, 2, {"nthr_beta": 0.0}),
    # the first process asks a vLLM server for all completions, and the others receive theirs from it
    "server_4": (MIXED, 4, {"nthr_beta": 0.0, "use_vllm": True, "vllm_mode": "server"}),
}
TENSORS = ("before", "advantages", "scores", "selected", "thresholds", "anchors", "etas", "success")


def questions_of(rewards, size, vocab_size):
    """Rows of the data set in order, and for each prompt its completions: ids and reward."""
    draw = random.Random(0)
    common = [draw.randrange(10, vocab_size) for _ in range(6)]
    answers = {}
    for step in rewards[size]:
        per_process = len(step) * size // 2
        for i, of_question in enumerate(step):
            completions = []
            for j, reward in enumerate(of_question):
                # completions of the first process are long, those of the second short: each pads to its own length
                length = draw.choice(LONG if i * size + j < per_process else SHORT)
                ids = [
                    draw.choice(common) if draw.random() < 0.6 else draw.randrange(10, vocab_size)
                    for _ in range(length)
                ]
                completions.append((ids, reward))
            answers[f"Question {len(answers)}?"] = completions
    return [{"prompt": prompt} for prompt in answers], answers


class Answering(Engine):
    """What a vLLM server has behind it: known completions, with log-probs near those of an untrained model."""

    def __init__(self, answers):
        self.answers, self.received = answers, []

    def load(self, weights):
        """Take note of the weights."""
        self.received += [name for name, _ in weights]

    def complete(self, prompts, n, **_):
        """The n completions of each prompt, and what it says of them."""
        ids = [list(completion) for prompt in prompts for completion in self.answers[tuple(prompt)]]
        assert len(ids) == n * len(prompts)
        return ids, [[-5.5 - token % 7 / 10 for token in completion] for completion in ids]


class Recorder(TrainerCallback):
    """What each generation was made into, row by row without padding."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, []

    def on_pre_optimizer_step(self, args, state, control, **_):
        shaped = self.trainer.shaped
        rows = []
        for i, mask in enumerate(shaped.mask):
            values = {name: getattr(shaped, name)[i] for name in TENSORS}
            rows.append({name: (value[mask] if value.ndim else value).tolist() for name, value in values.items()})
        self.steps.append(rows)


class Counting:
    """An accelerator that counts what passes through it."""

    def __init__(self, accelerator):
        self.accelerator, self.calls = accelerator, 0

    def gather(self, values):
        self.calls += 1
        return self.accelerator.gather(values)

    def pad_across_processes(self, values, **options):
        self.calls += 1
        return self.accelerator.pad_across_processes(values, **options)


def nthr_run(name, model_folder, output_dir, *, world_size):
    """Train a run; return the trainer, what was recorded, and how often each token pool exchanged something."""
    rewards, size, options = RUNS[name]
    transformers.set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows, answers = questions_of(rewards, size, len(tokenizer))
    global_batch = len(rewards[size][0]) * size

    def rollout(prompts, trainer):
        first = trainer.accelerator.process_index * len(prompts)
        completions = [answers[prompt][(first + i) % size][0] for i, prompt in enumerate(prompts)]
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    def reward(prompts, completion_ids, **_):
        found = [{tuple(ids): r for ids, r in answers[prompt]} for prompt in prompts]
        return [given[tuple(ids)] for given, ids in zip(found, completion_ids, strict=True)]

    config = NTHRConfig(
        str(output_dir),
        per_device_train_batch_size=global_batch // world_size,
        num_generations=size,
        max_completion_length=max(LONG),
        max_steps=len(rewards[size]),
        shuffle_dataset=False,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        adam_epsilon=1e-3,  # with less, noise of sums decides where a gradient cancels
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder).double()
    by_ids = {tuple(tokenizer(prompt)["input_ids"]): [ids for ids, _ in given] for prompt, given in answers.items()}
    with pytest.MonkeyPatch.context() as patch:
        install(patch, Answering(by_ids))  # for the run that asks a server
        trainer = NTHRGRPOTrainer(
            model,
            reward,
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            rollout_func=None if config.use_vllm else rollout,
        )
    assert trainer.args.world_size == world_size
    watch(trainer, short_probes(1), every=1, displacement=True)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    exchanged = []

    class Pool(TokenPool):
        def __init__(self, states, labels, mask, groups, accelerator):
            counting = Counting(accelerator)
            super().__init__(states, labels, mask, groups, counting)
            exchanged.append(counting.calls)

    with mock.patch.object(nthr_trainer_module, "TokenPool", Pool):
        trainer.train()
    return trainer, recorder.steps, exchanged


def metrics_of(trainer):
    """What was logged of NTHR and of displacement, by step."""
    return {
        row["step"]: {key: value for key, value in row.items() if key.startswith(("nthr/", "lld/"))}
        for row in trainer.state.log_history
        if "loss" in row
    }


def weights_digest(trainer):
    """Sums that tell whether two processes hold the same weights."""
    return {name: float(value.double().abs().sum()) for name, value in trainer.model.state_dict().items()}
