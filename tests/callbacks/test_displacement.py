"""What a step does to the correct responses of its own batch, measured in real runs."""

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from llm_dynamics.callbacks import watch
from llm_dynamics.callbacks.displacement import DisplacementCallback, displacement_metrics
from llm_dynamics.callbacks.influence import InfluenceCallback
from llm_dynamics.runlog import load_run
from llm_dynamics.trainers import NTHRConfig, NTHRGRPOTrainer
from tests.callbacks.explained import short_probes
from tests.conftest import PREFERENCES
from tests.training import build_trainer, own_rows, save_tiny_model, uses_dropout, weights_of

KINDS = {
    "grpo": (GRPOTrainer, GRPOConfig),
    "rloo": (RLOOTrainer, RLOOConfig),
    "nthr": (NTHRGRPOTrainer, NTHRConfig),
}
G = 4
WEIGHTS = [1.0, 0.5]
CORRECT_FROM = 0.75  # of rewards 0, 0.5, 1 and 1.5
EVALUATED = "Is this one of the evaluation?"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dropout_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), dropout=0.2)


class Rewards:
    """Rewards by the ids of a completion, and what they were asked for."""

    __name__ = "first_is_odd"

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, completion_ids, **_):
        self.seen.append((list(prompts), [list(ids) for ids in completion_ids]))
        return [float(ids[0] % 2) for ids in completion_ids]

    def last_is_even(self, completion_ids, **_):
        """Has no opinion on some, as a function of a mixture of tasks."""
        return [None if ids[0] % 3 == 0 else float(ids[-1] % 2 == 0) for ids in completion_ids]

    @staticmethod
    def total(ids):
        """Weighted sum of both; the first always gives one."""
        return WEIGHTS[0] * (ids[0] % 2) + WEIGHTS[1] * (ids[0] % 3 != 0 and ids[-1] % 2 == 0)


class Weights(TrainerCallback):
    """Copies of all weights before each optimizer step and after it, by the number of steps done then."""

    def __init__(self):
        self.before, self.after = {}, {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.before[state.global_step + 1] = {name: value.clone() for name, value in model.state_dict().items()}

    def on_optimizer_step(self, args, state, control, model=None, **_):
        self.after[state.global_step + 1] = {name: value.clone() for name, value in model.state_dict().items()}


def build(kind, folder, output_dir, *, lora=False, rollout=None, **arguments):
    """A trainer of two questions a step, and its rewards."""
    transformers.set_seed(0)
    trainer_class, config_class = KINDS[kind]
    rewards = Rewards()
    evaluation = Dataset.from_list([{"prompt": EVALUATED}, {"prompt": PREFERENCES[0]["prompt"] + EVALUATED}])
    settings = {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 2 * G,
        "per_device_eval_batch_size": G,
        "num_generations": G,
        "max_completion_length": 6,
        "reward_weights": WEIGHTS,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    options = {} if rollout is None else {"rollout_func": rollout}
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=[rewards, rewards.last_is_even],
        args=config_class(**settings | arguments),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PREFERENCES]),
        eval_dataset=evaluation,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear") if lora else None,
        **options,
    )
    return trainer, rewards


def exact_logps(folder, weights, pairs):
    """Sum of log-probs of each completion by its definition, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    model.load_state_dict({name: value.double() for name, value in weights.items()})
    sums = []
    for prompt, ids in pairs:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0]
        logp = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        sums.append(float(logp.gather(1, torch.tensor(ids)[:, None]).sum()))
    return sums


def expected_rows(folder, tokenizer, generation, weights, step):
    """The table of a step by its definition, from what the reward function was shown."""
    prompts, completions = generation
    rows, pairs = [], []
    for number, (prompt, ids) in enumerate(zip(prompts, completions, strict=True)):
        group = completions[number // G * G : number // G * G + G]
        share = sum(Rewards.total(other) >= CORRECT_FROM for other in group) / G
        if Rewards.total(ids) < CORRECT_FROM or share == 1:
            continue
        prompt_ids = tokenizer(prompt)["input_ids"]
        pairs.append((prompt_ids, ids))
        rows.append(
            {
                "step": step,
                "example": number,
                "question": number // G,
                "prompt": tokenizer.decode(prompt_ids),
                "completion": tokenizer.decode(ids),
                "n_tokens": len(ids),
                "success_rate": share,
            }
        )
    frame = pd.DataFrame(rows)
    frame["logp_before"] = exact_logps(folder, weights.before[step], pairs)
    frame["logp_after"] = exact_logps(folder, weights.after[step], pairs)
    return frame


def expected_metrics(table, eps):
    """The scalars of a step by their definitions."""
    deltas, fell, change, tokens = {}, [], 0.0, 0
    for row in table.itertuples():
        moved = row.logp_after - row.logp_before
        deltas.setdefault(row.question, []).append(moved)
        fell.append(moved < 0)
        change += moved
        tokens += row.n_tokens
    means = [sum(values) / len(values) for values in deltas.values()]
    return {
        "lld/questions": len(means),
        "lld/delta": sum(means) / len(means),
        "lld/delta_per_token": change / tokens,
        "lld/lazy_share": sum(mean <= eps for mean in means) / len(means),
        "lld/fell_share": sum(fell) / len(fell),
    }


def lld_rows(trainer):
    """What was logged of displacement, by step."""
    rows = {}
    for row in trainer.state.log_history:
        found = {key: value for key, value in row.items() if key.startswith("lld/")}
        if found:
            assert row["step"] not in rows
            rows[row["step"]] = found
    return dict(sorted(rows.items()))  # held rows stand after the trainer's first


def watched_run(kind, folder, output_dir, *, every=1, eps=0.0, **arguments):
    trainer, rewards = build(kind, folder, output_dir, **arguments)
    watch(trainer, short_probes(1), every=100, displacement={"every": every, "correct_from": CORRECT_FROM, "eps": eps})
    weights = Weights()
    trainer.add_callback(weights)
    return trainer, rewards, weights


def assert_measured(trainer, folder, generations, weights, steps, eps=0.0):
    """The table and the metrics of a run are what they are defined to be; `generations` are those measured."""
    table = load_run(trainer.args.output_dir).displacements
    expected = [
        expected_rows(folder, trainer.processing_class, generation, weights, step)
        for step, generation in zip(steps, generations, strict=True)
    ]
    assert sum(map(len, expected)) > 2
    whole = pd.concat(expected, ignore_index=True)
    pd.testing.assert_frame_equal(table, whole, check_dtype=False, rtol=3e-6, atol=1e-6)
    logged = lld_rows(trainer)
    assert list(logged) == steps
    for step in steps:
        own = table[table["step"] == step]
        assert logged[step] == pytest.approx(expected_metrics(own, eps), abs=1e-9)
        assert (own["logp_after"] - own["logp_before"]).abs().min() > 1e-3  # the step did move them


# ---- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_before_and_after_a_step_are_those_of_its_weights(kind, model_folder, tmp_path):
    trainer, rewards, weights = watched_run(kind, model_folder, tmp_path, temperature=0.7, eps=0.2)
    trainer.train()
    assert_measured(trainer, model_folder, rewards.seen, weights, [1, 2, 3], eps=0.2)


@pytest.mark.parametrize(("every", "iterations", "steps"), [(2, 1, [1, 3, 5]), (1, 2, [1, 2, 3, 4, 5]), (3, 2, [1, 4])])
def test_every_counts_optimizer_steps_whatever_the_rhythm_of_generations(
    every, iterations, steps, model_folder, tmp_path
):
    trainer, rewards, weights = watched_run(
        "grpo",
        model_folder,
        tmp_path,
        every=every,
        num_iterations=iterations,
        max_steps=5,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=G,
    )
    trainer.train()
    assert len(rewards.seen) == math.ceil(5 / iterations)
    generations = [rewards.seen[(step - 1) // iterations] for step in steps]
    assert_measured(trainer, model_folder, generations, weights, steps)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("grpo", {"steps_per_generation": 4}),  # a generation lasts four steps
        ("rloo", {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}),
        ("nthr", {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        ("grpo", {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        ("rloo", {"steps_per_generation": 4, "shuffle_dataset": False, "per_device_train_batch_size": 3}),
    ],
    ids=["above", "above-twice", "across", "below", "groups-parted"],
)
def test_the_responses_measured_are_those_that_the_very_step_was_taken_on(kind, arguments, model_folder, tmp_path):
    trainer, rewards, weights = watched_run(
        kind, model_folder, tmp_path, max_steps=4, **{"per_device_train_batch_size": 2, **arguments}
    )
    taken, compute_loss = {}, trainer.compute_loss

    def seeing(model, inputs, *args, **kwargs):
        ids = [
            row[keep.bool()].tolist()
            for row, keep in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
        ]
        taken.setdefault(trainer.state.global_step + 1, []).extend(ids)
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = seeing
    trainer.train()
    table, tokenizer = load_run(tmp_path).displacements, trainer.processing_class
    assert table["step"].nunique() > 1
    groups = {}  # by a completion: its group
    for _, completions in rewards.seen:
        for number, ids in enumerate(completions):
            groups[tuple(ids)] = completions[number // G * G : number // G * G + G]
    assert sum(map(len, (g for _, g in rewards.seen))) == len(groups), "completions of this seed are no keys"
    for step in range(1, 5):
        expected = []
        for ids in taken[step]:
            correct = [Rewards.total(other) >= CORRECT_FROM for other in groups[tuple(ids)]]
            if Rewards.total(ids) >= CORRECT_FROM and not all(correct):
                expected.append(tokenizer.decode(ids))
        assert sorted(table.loc[table["step"] == step, "completion"]) == sorted(expected)
        assert lld_rows(trainer)[step] == pytest.approx(displacement_metrics(table[table["step"] == step]), abs=1e-9)
    # the first measured response against the definition
    row = table.iloc[-1]
    prompt, ids = next(
        (prompt, ids)
        for prompts, completions in rewards.seen
        for prompt, ids in zip(prompts, completions, strict=True)
        if tokenizer.decode(ids) == row["completion"]
    )
    pair = [(tokenizer(prompt)["input_ids"], ids)]
    assert row["logp_before"] == pytest.approx(
        exact_logps(model_folder, weights.before[row["step"]], pair)[0], rel=3e-6
    )
    assert row["logp_after"] == pytest.approx(exact_logps(model_folder, weights.after[row["step"]], pair)[0], rel=3e-6)


def test_generations_of_evaluations_are_not_measured(model_folder, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "num_generations_eval": 2}
    # the second step on a generation has an evaluation before it
    trainer, rewards, weights = watched_run("grpo", model_folder, tmp_path, num_iterations=2, **options)
    trainer.train()
    trained_on = [seen for seen in rewards.seen if not any(EVALUATED in prompt for prompt in seen[0])]
    assert len(rewards.seen) > len(trained_on) == 2
    generations = [trained_on[0], trained_on[0], trained_on[1]]
    assert_measured(trainer, model_folder, generations, weights, [1, 2, 3])


def test_an_evaluation_after_training_leaves_nothing_behind(model_folder, tmp_path):
    trainer, _, _ = watched_run("grpo", model_folder, tmp_path, max_steps=1)
    trainer.train()
    logged = lld_rows(trainer)
    trainer.evaluate()
    assert lld_rows(trainer) == logged


def test_a_second_train_measures_again(model_folder, tmp_path):
    trainer, rewards, weights = watched_run("nthr", model_folder, tmp_path, max_steps=2)
    trainer.train()
    assert_measured(trainer, model_folder, rewards.seen, weights, [1, 2])
    first = [dict(copies) for copies in (weights.before[1], weights.after[2])]
    del rewards.seen[:]
    trainer.train()
    assert_measured(trainer, model_folder, rewards.seen, weights, [1, 2])
    assert all(torch.equal(weights.before[1][name], value) for name, value in first[1].items())  # it went on
    assert load_run(tmp_path / "dynamics_before_001").displacements["step"].unique().tolist() == [1, 2]


def test_training_that_broke_off_can_be_begun_again(model_folder, tmp_path):
    trainer, rewards, weights = watched_run("grpo", model_folder, tmp_path, max_steps=2)

    def fail(*_, **__):
        raise RuntimeError("the judge is down")

    trainer.reward_funcs[1], kept = fail, trainer.reward_funcs[1]
    with pytest.raises(RuntimeError, match="the judge is down"):
        trainer.train()
    trainer.reward_funcs[1] = kept
    del rewards.seen[:]
    trainer.train()
    assert_measured(trainer, model_folder, rewards.seen, weights, [1, 2])
    assert not {"_generate_and_score_completions", "_calculate_rewards"} & vars(trainer).keys()


def test_a_second_callback_is_refused_since_both_would_write_the_same_table(model_folder, tmp_path):
    trainer, _, _ = watched_run("grpo", model_folder, tmp_path)
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match="has a DisplacementCallback already"):
        DisplacementCallback(trainer)
    with pytest.raises(ValueError, match="has a DisplacementCallback already"):
        watch(trainer, short_probes(1), log_folder=tmp_path / "other", displacement=True)
    assert trainer.callback_handler.callbacks == before


def test_without_a_mixed_question_there_is_their_number_and_nothing_else(model_folder, tmp_path):
    trainer, _ = build("grpo", model_folder, tmp_path, max_steps=2)
    watch(trainer, short_probes(1), every=1, displacement={"correct_from": 100.0})
    trainer.train()
    assert lld_rows(trainer) == {1: {"lld/questions": 0.0}, 2: {"lld/questions": 0.0}}
    assert [part.num_rows for part in load_run(tmp_path).parts("displacements")] == [0, 0]


def test_truncated_responses_that_the_loss_leaves_out_are_left_out(model_folder, tmp_path):
    end = AutoTokenizer.from_pretrained(model_folder).eos_token_id
    # odd at first: correct; the last of them is cut off, and so are both correct ones of the second question
    completions = [[5, 9, end], [6, end], [7, 8, 9, end], [9, 8, 7], [5, 9], [6, end], [6, 5, end], [7, 8]]

    def rollout(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    options = {"max_steps": 1, "mask_truncated_completions": True, "rollout": rollout}
    trainer, rewards, weights = watched_run("grpo", model_folder, tmp_path, **options)
    trainer.train()
    table = load_run(tmp_path).displacements
    whole = expected_rows(model_folder, trainer.processing_class, rewards.seen[0], weights, 1)
    assert whole["example"].tolist() == [0, 2, 3, 4, 7]
    pd.testing.assert_frame_equal(table, whole.iloc[:2], check_dtype=False, rtol=3e-6, atol=1e-6)
    assert lld_rows(trainer)[1] == pytest.approx(expected_metrics(table, 0.0), abs=1e-9)


def test_tokens_that_a_tool_put_in_are_read_but_do_not_count(model_folder, tmp_path):
    completions = [[5, 9, 4], [6, 8, 8], [7, 8, 9, 11], [8, 8, 7]] * 2
    own = [[1, 0, 1], [1, 1, 1], [1, 0, 0, 1], [1, 1, 1]] * 2

    def rollout(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None, "env_mask": own}

    trainer, _, weights = watched_run("grpo", model_folder, tmp_path, max_steps=1, rollout=rollout)
    trainer.train()
    table = load_run(tmp_path).displacements
    assert table["example"].tolist() == [0, 2, 4, 6]
    assert table["n_tokens"].tolist() == [2, 2, 2, 2]
    for side, copies in (("logp_before", weights.before[1]), ("logp_after", weights.after[1])):
        for row in table.itertuples():
            prompt = trainer.processing_class(row.prompt)["input_ids"]
            ids, counted = completions[row.example], own[row.example]
            whole = [exact_logps(model_folder, copies, [(prompt + ids[:t], [ids[t]])])[0] for t in range(len(ids))]
            expected = sum(logp for logp, counts in zip(whole, counted, strict=True) if counts)
            assert getattr(row, side) == pytest.approx(expected, rel=3e-6)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_a_table_made_by_hand():
    table = pd.DataFrame(
        {
            "question": [0, 0, 2, 3],
            "n_tokens": [1, 3, 4, 2],
            "logp_before": [-2.0, -3.0, -5.0, -1.0],
            "logp_after": [-1.0, -3.5, -4.75, -1.0],
        }
    )
    # changes: 1, -0.5 | 0.25 | 0
    assert displacement_metrics(table) == {
        "lld/questions": 3.0,
        "lld/delta": pytest.approx((0.25 + 0.25 + 0) / 3),
        "lld/delta_per_token": pytest.approx(0.75 / 10),
        "lld/lazy_share": pytest.approx(1 / 3),
        "lld/fell_share": 0.25,
    }
    assert displacement_metrics(table, eps=0.25)["lld/lazy_share"] == 1.0
    assert displacement_metrics(table.iloc[:0]) == {"lld/questions": 0.0}


def test_metrics_stand_beside_the_loss_or_in_a_row_of_their_own(model_folder, tmp_path):
    rows = {}
    for logging in ({"logging_steps": 2}, {"logging_strategy": "no"}):
        trainer, _ = build("grpo", model_folder, tmp_path / str(len(rows)), **logging)
        trainer.add_callback(DisplacementCallback(trainer, every=1, correct_from=CORRECT_FROM))  # no run log
        trainer.train()
        rows[len(rows)] = sorted(  # held rows stand after the trainer's first
            (row["step"], "loss" in row, "lld/questions" in row)
            for row in trainer.state.log_history
            if row.keys() & {"loss", "lld/questions"}
        )
    assert rows == {0: [(1, False, True), (2, True, True), (3, False, True)], 1: []}


# ---- training is as without it ---------------------------------------------------------------------------------------


def rows_without_ours(trainer):
    rows = [{key: value for key, value in row.items() if not key.startswith("lld/")} for row in own_rows(trainer)]
    return [row for row in rows if row.keys() - {"step", "epoch"}]


@pytest.mark.parametrize(("kind", "lora"), [(kind, False) for kind in KINDS] + [("grpo", True)])
def test_a_measured_run_ends_with_the_bytes_and_loss_rows_of_the_run_alone(kind, lora, dropout_folder, tmp_path):
    runs = []
    for measured in (False, True):
        trainer, _ = build(
            kind,
            dropout_folder,
            tmp_path / str(measured),
            lora=lora,
            num_iterations=2,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=G,
            max_steps=4,
            logging_steps=2,
        )
        if measured:
            trainer.add_callback(DisplacementCallback(trainer, every=1, correct_from=CORRECT_FROM))
        trainer.train()
        runs.append(trainer)
    alone, measured = runs
    assert rows_without_ours(measured) == rows_without_ours(alone)
    assert weights_of(measured) == weights_of(alone)

    # the comparison means something
    assert [row["step"] for row in alone.state.log_history if "loss" in row] == [2, 4]
    logged = lld_rows(measured)
    assert list(logged) == [1, 2, 3, 4]
    assert max(row["lld/questions"] for row in logged.values()) > 0
    untrained, _ = build(kind, dropout_folder, tmp_path / "untrained", lora=lora)
    assert weights_of(untrained) != weights_of(alone)
    assert uses_dropout(alone)


# ---- attaching -------------------------------------------------------------------------------------------------------


def attached(trainer):
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, DisplacementCallback)]


def test_watch_attaches_it_and_passes_its_arguments(model_folder, tmp_path):
    trainer, _ = build("rloo", model_folder, tmp_path)
    watch(trainer, short_probes(1), every=7, displacement=True)
    (callback,) = attached(trainer)
    assert (callback.every, callback.correct_from, callback.eps) == (7, 0.5, 0.0)

    trainer, _ = build("nthr", model_folder, tmp_path)
    watch(trainer, short_probes(1), every=7, displacement={"every": 2, "correct_from": -1.0, "eps": 0.5})
    (callback,) = attached(trainer)
    assert (callback.every, callback.correct_from, callback.eps) == (2, -1.0, 0.5)

    trainer, _ = build("grpo", model_folder, tmp_path)
    watch(trainer, short_probes(1))
    assert attached(trainer) == []


@pytest.mark.parametrize("influence", [False, True])
def test_a_trainer_that_does_not_roll_out_is_refused_and_left_as_it_was(influence, model_folder, tmp_path):
    trainer = build_trainer("dpo", model_folder, tmp_path)
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(TypeError, match=r"GRPOTrainer or RLOOTrainer, which roll out; seen DPOTrainer"):
        watch(trainer, short_probes(1), influence=influence, displacement=True)
    assert trainer.callback_handler.callbacks == before


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"every": 0}, r"every is 0; allowed: 1, 2"),
        ({"every": -3}, "every is -3"),
        ({"every": True}, "every is True"),
        ({"every": 2.0}, r"every is 2\.0"),
        ({"every": "2"}, "every is '2'"),
        ({"eps": -1e-9}, "eps is -1e-09; allowed: a finite number from 0"),
        ({"eps": math.nan}, "eps is nan"),
        ({"correct_from": math.nan}, "correct_from is nan; allowed: a finite number"),
        ({"correct_from": math.inf}, "correct_from is inf"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name_and_nothing_is_attached(arguments, error, model_folder, tmp_path):
    trainer, _ = build("grpo", model_folder, tmp_path)
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match=error):
        DisplacementCallback(trainer, **arguments)
    for influence in (False, True):
        with pytest.raises(ValueError, match=error):
            watch(trainer, short_probes(1), influence=influence, displacement=arguments)
    assert trainer.callback_handler.callbacks == before


def test_other_things_than_trainers_are_refused():
    with pytest.raises(TypeError, match="seen NoneType"):
        DisplacementCallback(None)


def test_it_is_attached_beside_the_account_of_steps(model_folder, tmp_path):
    trainer, _ = build("grpo", model_folder, tmp_path, max_steps=1)
    watch(trainer, short_probes(1), every=1, influence=True, displacement={"correct_from": CORRECT_FROM})
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert {DisplacementCallback, InfluenceCallback} <= set(kinds)
    trainer.train()
    run = load_run(tmp_path)
    assert run.explained_steps == run.displacements["step"].unique().tolist() == [1]
    assert np.isfinite(run.displacements["logp_after"]).all()
    assert all(one < other for one, other in pairwise(run.displacements["example"]))
