"""One update on one question from the same weights, by each method: checked against a step taken by hand."""

import hashlib
import math

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from llm_dynamics.callbacks import ProbeCallback, watch
from llm_dynamics.trainers import measure_lld
from llm_dynamics.trainers.displacement import ARMS
from tests.callbacks.explained import short_probes
from tests.conftest import PREFERENCES
from tests.training import save_tiny_model, weights_of

G = 6
LEARNING_RATE = 2e-3
TEMPERATURE = 0.7
QUESTIONS = [{"prompt": row["prompt"], "bonus": float(i % 2)} for i, row in enumerate(PREFERENCES)]
SETTINGS = {
    "num_generations": G,
    "max_completion_length": 6,
    "learning_rate": LEARNING_RATE,
    "temperature": TEMPERATURE,
    "max_grad_norm": 0.3,
    "weight_decay": 0.1,
    "adam_epsilon": 1e-6,
    # scores above 0 are selected: some of the wrong tokens
    "nthr_beta": 0.0,
    "nthr_include_self": False,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder).double()


class Odd:
    """Reward: 1 where the first token's id is odd, and a bonus by question; remembers what it was shown."""

    __name__ = "odd"

    def __init__(self, fail_at=None, reseed=False):
        self.seen, self.fail_at, self.reseed = [], fail_at, reseed

    def __call__(self, prompts, completion_ids, bonus, **_):
        self.seen.append((prompts[0], [tuple(ids) for ids in completion_ids]))
        assert len(set(prompts)) == 1  # one question at a time
        if len(self.seen) == self.fail_at:
            raise RuntimeError("the judge is down")
        if self.reseed:
            torch.manual_seed(11)  # the next question is sampled with these random numbers
        return [ids[0] % 2 + 0.25 * extra for ids, extra in zip(completion_ids, bonus, strict=True)]


def is_mixed(completions):
    return 0 < sum(ids[0] % 2 for ids in completions) < len(completions)


@pytest.fixture(scope="module")
def study(model_folder, tokenizer):
    """A study of three mixed questions by all arms: its table, the reward function and the calls of `on_progress`."""
    model, reward, calls = AutoModelForCausalLM.from_pretrained(model_folder).double(), Odd(), []
    frame = measure_lld(
        model,
        QUESTIONS,
        reward_funcs=reward,
        processing_class=tokenizer,
        n_questions=3,
        on_progress=lambda *call: calls.append(call),
        **SETTINGS,
    )
    return frame, reward, calls


def asked_and_mixed(reward):
    """The baseline's questions: index, prompt and completions of the mixed ones."""
    asked = len(reward.seen) - 3 * (len(ARMS) - 1)
    return [(i, *reward.seen[i]) for i in range(asked) if is_mixed(reward.seen[i][1])]


def token_logps(model, prompt, ids, temperature=1.0):
    logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def step_by_hand(model_folder, prompt, completions, advantages):
    """Sums of log-probs of correct completions before and after one step of AdamW on TRL's default loss."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).double().eval()
    correct = [ids for ids in completions if ids[0] % 2]

    def score():
        with torch.no_grad():
            return [float(token_logps(model, prompt, ids).sum()) for ids in correct]

    before = score()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, eps=1e-6)
    plain = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    optimizer.param_groups[0]["params"] = [p for p in model.parameters() if all(p is not other for other in plain)]
    optimizer.add_param_group({"params": plain, "weight_decay": 0.0})
    # "dapo": the sum over the tokens of all completions, by their number; the ratio of the policy to itself is 1
    loss = torch.zeros((), dtype=torch.float64)
    for ids, advantage in zip(completions, advantages, strict=True):
        logps = token_logps(model, prompt, ids, TEMPERATURE)
        loss = loss - (torch.exp(logps - logps.detach()) * advantage).sum()
    (loss / sum(map(len, completions))).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()
    return np.array(before), np.array(score()), np.array([len(ids) for ids in correct])


def group_advantages(completions):
    rewards = torch.tensor([float(ids[0] % 2) for ids in completions])  # the bonus of a question cancels
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["grpo", "pos_only"])
def test_displacement_is_that_of_a_step_taken_by_hand(arm, study, model_folder, tokenizer):
    frame, reward, _ = study
    own = frame[frame["arm"] == arm].set_index("question")
    questions = asked_and_mixed(reward)
    assert own.index.tolist() == [index for index, *_ in questions]
    assert len(own) == 3
    for index, prompt, completions in questions:
        advantages = group_advantages(completions)
        if arm == "pos_only":
            advantages = advantages.clamp(min=0)
        before, after, lengths = step_by_hand(model_folder, tokenizer(prompt)["input_ids"], completions, advantages)
        change, row = after - before, own.loc[index]
        assert row["delta"] == pytest.approx(change.mean(), rel=1e-4)
        assert row["delta_per_token"] == pytest.approx(change.sum() / lengths.sum(), rel=1e-4)
        assert row["logp_before"] == pytest.approx(before.mean(), rel=1e-6)
        assert row["fell_share"] == (change < 0).mean()
        assert (row["n_correct"], row["n_tokens"]) == (len(change), lengths.sum())
        assert row["success_rate"] == len(change) / G
        assert abs(change.mean()) > 1e-2


def test_arms_differ_and_share_what_belongs_to_the_question(study):
    frame, _, _ = study
    assert frame["arm"].tolist() == sorted(ARMS) * 3
    shared = ["success_rate", "n_correct", "n_tokens", "gwhes", "logp_before"]
    assert (frame.groupby("question")[shared].nunique() == 1).all(axis=None)
    deltas = frame.pivot(index="question", columns="arm", values="delta")
    for one, other in (("grpo", "pos_only"), ("grpo", "nthr"), ("nthr", "random")):
        assert (deltas[one] - deltas[other]).abs().max() > 1e-2


def test_as_many_tokens_are_selected_at_random_as_by_score(study):
    frame, _, _ = study
    selected = frame.pivot(index="question", columns="arm", values="frac_selected")
    assert selected["nthr"].tolist() == selected["random"].tolist()
    assert selected["nthr"].between(0.05, 0.95).any()
    assert selected[["grpo", "pos_only"]].isna().all(axis=None)


def test_gwhes_is_its_double_sum(study, model, tokenizer):
    frame, reward, _ = study
    for index, prompt, completions in asked_and_mixed(reward):
        prompt_ids = tokenizer(prompt)["input_ids"]
        gradients = []
        for ids in completions:
            with torch.no_grad():
                hidden = model.base_model(input_ids=torch.tensor([[*prompt_ids, *ids]])).last_hidden_state[0]
                hidden = hidden[len(prompt_ids) - 1 : -1]
                residual = -(model.lm_head(hidden) / TEMPERATURE).softmax(-1)
            for t, token in enumerate(ids):
                residual[t, token] += 1
            gradients.append(sum(torch.outer(g, h) for g, h in zip(residual, hidden, strict=True)))
        right = [i for i, ids in enumerate(completions) if ids[0] % 2]
        wrong = [i for i, ids in enumerate(completions) if not ids[0] % 2]
        p, total = len(right) / G, 0.0
        for i in right:
            for j in wrong:
                total += p / math.sqrt(p * (1 - p)) * float((gradients[i] * gradients[j]).sum())
            for j in right:
                total -= (1 - p) / math.sqrt(p * (1 - p)) * float((gradients[i] * gradients[j]).sum())
        gwhes = frame[frame["question"] == index]["gwhes"].iloc[0]
        assert gwhes == pytest.approx(total / len(right), rel=1e-5)


# ---- the protocol ----------------------------------------------------------------------------------------------------


def test_all_arms_see_the_responses_that_the_baseline_sampled(study):
    _, reward, _ = study
    mixed = [(prompt, completions) for _, prompt, completions in asked_and_mixed(reward)]
    assert reward.seen[-3 * (len(ARMS) - 1) :] == mixed * (len(ARMS) - 1)
    assert len({str(question) for question in mixed}) == 3


def test_progress_is_told_arm_by_arm(study):
    _, _, calls = study
    assert calls == [(arm, done, 3) for arm in ("grpo", "pos_only", "nthr", "random") for done in (1, 2, 3)]


def test_the_order_of_the_arms_does_not_matter(study, model, tokenizer):
    arms = dict(reversed(ARMS.items()))
    again = measure_lld(
        model, QUESTIONS, reward_funcs=Odd(), processing_class=tokenizer, arms=arms, n_questions=3, **SETTINGS
    )
    pd.testing.assert_frame_equal(again, study[0], check_exact=True)


def test_an_arm_does_not_depend_on_the_others(study, model, tokenizer):
    arms = {"grpo": ARMS["grpo"], "random": ARMS["random"]}
    again = measure_lld(
        model, QUESTIONS, reward_funcs=Odd(), processing_class=tokenizer, arms=arms, n_questions=3, **SETTINGS
    )
    theirs = study[0][study[0]["arm"].isin(arms)].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, theirs, check_exact=True)


def test_arms_of_ones_own_are_fields_of_the_configuration(model, tokenizer):
    arms = {
        "grpo": ARMS["grpo"],
        "spare none": {"nthr_method": "nthr", "nthr_beta": math.inf},
        "spare all": {"nthr_method": "nthr", "nthr_beta": -math.inf, "nthr_eta": "0.0"},
        "pos_only": ARMS["pos_only"],
        "still": {"nthr_method": "none", "learning_rate": 0.0},
    }
    frame = measure_lld(
        model, QUESTIONS, reward_funcs=Odd(), processing_class=tokenizer, arms=arms, n_questions=2, **SETTINGS
    )
    deltas = frame.pivot(index="question", columns="arm", values="delta")
    np.testing.assert_allclose(deltas["spare none"], deltas["grpo"], rtol=1e-6)
    np.testing.assert_allclose(deltas["spare all"], deltas["pos_only"], rtol=1e-6)
    assert (deltas["still"] == 0).all()
    selected = frame.pivot(index="question", columns="arm", values="frac_selected")
    assert (selected["spare none"] == 0).all()
    assert (selected["spare all"] == 1).all()


def test_the_optimizer_is_fresh_for_each_question(model, tokenizer):
    reward = Odd(reseed=True)
    frame = measure_lld(
        model, QUESTIONS[:1] * 4, reward_funcs=reward, processing_class=tokenizer, n_questions=4, **SETTINGS
    )
    assert reward.seen[1] == reward.seen[2] == reward.seen[3]  # the first was sampled with other random numbers
    assert is_mixed(reward.seen[1][1])
    by_question = frame.set_index(["question", "arm"])["delta"].unstack()
    for arm in ("grpo", "pos_only", "nthr"):  # "random" draws anew
        assert by_question.loc[[1, 2, 3], arm].nunique() == 1
    assert by_question.loc[1, "grpo"] != 0


# ---- the model is as it was ------------------------------------------------------------------------------------------


def digest(content):
    """Of bytes, since pytest compares long ones slowly where they differ."""
    return hashlib.sha256(content).hexdigest()


def state_of(model):
    return {
        "weights": {name: digest(value.numpy().tobytes()) for name, value in model.state_dict().items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "forward": {name: vars(module).get("forward") for name, module in model.named_modules()},
        "checkpointing": {name: vars(module).get("gradient_checkpointing") for name, module in model.named_modules()},
        "use_cache": model.config.use_cache,
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        },
    }


class StoppedError(Exception):
    pass


def stop(*_):
    raise StoppedError("stopped here")


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ({}, None),
        ({"fail_at": 2, "n_questions": 2}, (RuntimeError, "the judge is down")),
        ({"fail_at": 3}, (RuntimeError, "the judge is down")),  # of another arm than the baseline
        ({"on_progress": stop}, (StoppedError, "stopped here")),  # after the step, before the weights are back
        ({"correct_from": 9.0}, (ValueError, "none of 6 questions got both correct and wrong responses")),
        ({"correct_from": -1.0}, (ValueError, "none of 6 questions")),
        ({"num_generation": 4}, (TypeError, "num_generation")),
    ],
    ids=["finished", "reward-fails", "reward-fails-late", "stopped", "all-wrong", "all-correct", "no-such-option"],
)
def test_the_model_is_left_as_it_was(ending, expected, model, tokenizer):
    training = expected is None or "num_generation" in ending
    model.train(training)
    model.model.layers[0].mlp.train(not training)  # in another mode by intent
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    before = state_of(model)
    options = {"n_questions": 1, **ending}
    reward = Odd(options.pop("fail_at", None))
    arguments = {"reward_funcs": reward, "processing_class": tokenizer, **SETTINGS, **options}
    if expected is None:
        assert len(measure_lld(model, QUESTIONS, **arguments)) == len(ARMS)
    else:
        with pytest.raises(expected[0], match=expected[1]):
            measure_lld(model, QUESTIONS, **arguments)
    after = state_of(model)
    assert [name for name in before if before[name] != after[name]] == []


# ---- a trainer as source ---------------------------------------------------------------------------------------------


def grpo(model_folder, output_dir, reward, **arguments):
    transformers.set_seed(0)
    config = GRPOConfig(
        str(output_dir),
        per_device_train_batch_size=G,
        num_generations=G,
        max_completion_length=6,
        temperature=TEMPERATURE,
        learning_rate=LEARNING_RATE,
        max_steps=2,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    return GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_folder),
        reward,
        config,
        train_dataset=Dataset.from_list(QUESTIONS),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )


def negative(completion_ids, **_):
    """Outweighs `Odd`: were it given the same weight, hardly a response would be correct."""
    return [-5.0 for _ in completion_ids]


def test_a_trainer_gives_model_rewards_and_tokenizer(model_folder, tmp_path):
    reward = Odd()
    trainer = grpo(model_folder, tmp_path, [reward, negative], reward_weights=[1.0, 0.0])
    of_trainer = measure_lld(trainer, QUESTIONS, n_questions=2, **SETTINGS)
    of_model = measure_lld(
        AutoModelForCausalLM.from_pretrained(model_folder),
        QUESTIONS,
        reward_funcs=Odd(),
        processing_class=trainer.processing_class,
        n_questions=2,
        **SETTINGS,
    )
    pd.testing.assert_frame_equal(of_trainer, of_model, check_exact=True)
    other = Odd()
    measure_lld(trainer, QUESTIONS, reward_funcs=other, n_questions=1, **SETTINGS)  # what is given goes first
    assert other.seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_trains_on_as_if_it_had_not_been_measured(checkpointing, model_folder, tmp_path):
    runs = []
    for measured in (False, True):
        trainer = grpo(model_folder, tmp_path / str(measured), Odd(), gradient_checkpointing=checkpointing)
        callbacks = list(trainer.callback_handler.callbacks)
        if measured:  # at another temperature than the trainer's
            measure_lld(trainer, QUESTIONS, n_questions=1, **SETTINGS | {"temperature": 1.3})
            assert trainer.callback_handler.callbacks == callbacks
        transformers.set_seed(1)
        trainer.train()
        weights = {name: digest(content) for name, content in weights_of(trainer).items()}
        runs.append((weights, [row["loss"] for row in trainer.state.log_history if "loss" in row]))
    assert runs[0] == runs[1]


def test_a_watched_trainer_is_measured_outside_of_its_log(model_folder, tmp_path):
    trainer = grpo(model_folder, tmp_path, Odd())
    watcher = watch(trainer, short_probes(1), every=1, displacement=True)
    measure_lld(trainer, QUESTIONS, n_questions=1, **SETTINGS)
    assert not watcher.log_folder.exists()
    assert any(isinstance(callback, ProbeCallback) for callback in trainer.callback_handler.callbacks)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named(model, tokenizer):
    given = {"reward_funcs": Odd(), "processing_class": tokenizer}
    with pytest.raises(ValueError, match=r'arms need "grpo", whose samples the others share; seen: nthr, random'):
        measure_lld(model, QUESTIONS, arms={name: ARMS[name] for name in ("nthr", "random")}, **given)
    for missing in given:
        rest = {name: value for name, value in given.items() if name != missing}
        with pytest.raises(ValueError, match="pass reward_funcs= and processing_class="):
            measure_lld(model, QUESTIONS, **rest)
    with pytest.raises(ValueError, match="n_questions is 0"):
        measure_lld(model, QUESTIONS, n_questions=0, **given)


def test_questions_are_taken_in_order_until_enough_are_mixed(study):
    frame, reward, _ = study
    asked = len(reward.seen) - 3 * (len(ARMS) - 1)
    assert [prompt for prompt, _ in reward.seen[:asked]] == [row["prompt"] for row in QUESTIONS[:asked]]
    assert frame["question"].max() == asked - 1
