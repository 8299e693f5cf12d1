"""Watching changes nothing: weights and loss rows of a watched run are, bit for bit, those of the run without it."""

import random
from contextlib import contextmanager, nullcontext
from unittest import mock

import numpy as np
import pytest
import torch

from llm_dynamics.callbacks import ProbeCallback, guard, watch
from llm_dynamics.influence import LossTape
from llm_dynamics.likelihood import scoring
from llm_dynamics.runlog import load_run
from tests.callbacks.explained import CHOSEN, short_probes
from tests.training import build_trainer, make_probes, own_rows, save_tiny_model, uses_dropout, weights_of

DROPOUT = 0.2
RUNS = [(kind, lora) for kind in ("sft", "dpo", "grpo") for lora in (False, True)]
RUNS += [("kto", False), ("rloo", True), ("plain", False)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), dropout=DROPOUT)


ACCOUNTS = {
    # what is asked of the account in each run: every detail, label, rule and table once
    ("sft", False): {"detail": "token", "rule": "gauss2"},
    ("sft", True): {"history": "split", "tokens_every": 2},
    ("dpo", False): {"map_probes": [CHOSEN[0]]},
    ("dpo", True): {"detail": "probe", "split_by": "role"},
    ("grpo", False): {"history": "split", "map_probes": [CHOSEN[1]]},
    ("grpo", True): {"training_tokens": ["other_train", CHOSEN[0]]},
    ("kto", False): {"rule": "start"},
    ("rloo", True): {"detail": "token", "split_by": "role"},
    ("plain", False): {"training_tokens": ()},
}


def run(kind, model_folder, output_dir, *, watched, influence=None, **options):
    options = {"gradient_accumulation_steps": 2, "optim": "adamw_torch"} | options
    trainer = build_trainer(kind, model_folder, output_dir, dropout=DROPOUT, **options)
    if influence is not None:
        watch(trainer, short_probes(), every=1, influence={"every": 3, **influence})
    elif watched:
        watch(trainer, make_probes(), every=1)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run_alone(model_folder, tmp_path_factory):
    """Runs that nobody watches, by what they are; each made once."""
    runs = {}

    def alone(kind, **options):
        key = f"{kind} {sorted(options.items())}"
        if key not in runs:
            runs[key] = run(kind, model_folder, tmp_path_factory.mktemp("alone"), watched=False, **options)
        return runs[key]

    return alone


def assert_same_run(watched, alone):
    assert own_rows(watched) == own_rows(alone)
    assert weights_of(watched) == weights_of(alone)


@pytest.mark.parametrize(("kind", "lora"), RUNS, ids=[f"{kind}-{'lora' if lora else 'full'}" for kind, lora in RUNS])
def test_a_watched_run_ends_with_the_bytes_and_loss_rows_of_the_run_alone(
    kind, lora, model_folder, tmp_path, run_alone
):
    alone = run_alone(kind, lora=lora)
    watched = run(kind, model_folder, tmp_path / "watched", watched=True, lora=lora)
    assert_same_run(watched, alone)

    # the comparison means something: probes were observed, training moved the weights, and dropout was on
    observed = sorted(row["step"] for row in watched.state.log_history if "probe/chosen_logp" in row)
    assert observed == [0, 1, 2, 3]
    assert [row["step"] for row in alone.state.log_history if "loss" in row] == [1, 2, 3]
    untrained = build_trainer(kind, model_folder, tmp_path / "untrained", lora=lora)
    assert weights_of(untrained) != weights_of(alone)
    assert uses_dropout(alone)


def assert_explained(trainer):
    explained = sorted(row["step"] for row in trainer.state.log_history if "influence/explained" in row)
    assert explained == load_run(trainer.args.output_dir).explained_steps == [1, 3]


@pytest.mark.parametrize(("kind", "lora"), RUNS, ids=[f"{kind}-{'lora' if lora else 'full'}" for kind, lora in RUNS])
def test_an_explained_run_ends_with_the_bytes_and_loss_rows_of_the_run_alone(
    kind, lora, model_folder, tmp_path, run_alone
):
    influence = ACCOUNTS[kind, lora]
    explained = run(kind, model_folder, tmp_path, watched=True, influence=influence, lora=lora)
    assert_same_run(explained, run_alone(kind, lora=lora))
    assert_explained(explained)


OTHERWISE = {
    "checkpointing-off-clipped": ("dpo", {"gradient_checkpointing": False, "max_grad_norm": 0.1}),
    "checkpointing-off-lora": ("sft", {"gradient_checkpointing": False, "lora": True}),
    "plain-checkpointing-on": ("plain", {"gradient_checkpointing": True}),
    "clipping-off": ("sft", {"max_grad_norm": 0.0}),
    "bfloat16": ("sft", {"bf16": True}),
    "sgd": ("dpo", {"optim": "sgd"}),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_an_explained_run_in_other_settings_is_that_of_the_run_alone(case, model_folder, tmp_path, run_alone):
    kind, options = OTHERWISE[case]
    explained = run(kind, model_folder, tmp_path, watched=True, influence={}, **options)
    assert_same_run(explained, run_alone(kind, **options))
    assert_explained(explained)
    clipped = load_run(tmp_path).accounts["clip_factor"]
    if "max_grad_norm" in options:
        assert (clipped < 0.2).all() if options["max_grad_norm"] else (clipped == 1).all()


def test_a_watched_run_in_bfloat16_is_that_of_the_run_alone(model_folder, tmp_path, run_alone):
    watched = run("sft", model_folder, tmp_path / "watched", watched=True, bf16=True)
    assert_same_run(watched, run_alone("sft", bf16=True))


def test_watching_leaves_an_adapter_with_frozen_parts_as_it_trains_alone(model_folder, tmp_path):
    runs = []
    for watched in (False, True):
        trainer = build_trainer("sft", model_folder, tmp_path / str(watched), lora=True, max_grad_norm=0.1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_A" in name:  # LoRA-FA trains B alone
                parameter.requires_grad_(False)
        if watched:
            watch(trainer, make_probes(), every=1)
        trainer.train()
        runs.append(trainer)
    assert_same_run(*runs)


@contextmanager
def drawing(model):
    """A broken `evaluating`: scoring draws from the global random state; the edge of the callback gives it back."""
    with original(model):
        yield
    torch.rand(1)


@contextmanager
def staying_in_evaluation_mode(model):
    """A broken `evaluating`: the model is left in evaluation mode."""
    with original(model):
        yield
    model.eval()


@contextmanager
def moving_a_weight(model):
    """A broken `evaluating`: one weight is moved by its last bit."""
    with original(model):
        yield
    with torch.no_grad():
        weight = next(model.parameters()).view(-1)[:1]
        weight.copy_(torch.nextafter(weight, torch.tensor(torch.inf)))


original = scoring.evaluating


@pytest.mark.parametrize("broken", [drawing, staying_in_evaluation_mode, moving_a_weight])
def test_the_comparison_sees_an_observation_that_leaves_a_trace(broken, model_folder, tmp_path, run_alone):
    alone = run_alone("sft", lora=False)
    with mock.patch.object(scoring, "evaluating", broken), mock.patch.object(guard, "keeping_random", nullcontext):
        watched = run("sft", model_folder, tmp_path / "watched", watched=True)
    with pytest.raises(AssertionError):
        assert_same_run(watched, alone)


def test_random_numbers_that_an_observation_draws_are_given_back(model_folder, tmp_path, run_alone):
    with mock.patch.object(scoring, "evaluating", drawing):
        watched = run("sft", model_folder, tmp_path / "watched", watched=True)
    assert_same_run(watched, run_alone("sft", lora=False))


def drawing_random_numbers(tape, *args, **options):
    """A broken tap: the split of the gradient draws from the global random state."""
    torch.rand(1)
    return original_part(tape, *args, **options)


def leaving_a_gradient(tape, label, tapped, *args, **options):
    """A broken tap: the split of the gradient reaches `.grad`."""
    tapped.backward(torch.ones_like(tapped), retain_graph=True)
    return original_part(tape, label, tapped, *args, **options)


original_part = LossTape._add_part


def test_the_comparison_sees_an_account_that_leaves_a_trace(model_folder, tmp_path, run_alone):
    with mock.patch.object(LossTape, "_add_part", leaving_a_gradient):
        explained = run("sft", model_folder, tmp_path, watched=True, influence={"training_tokens": ()})
    with pytest.raises(AssertionError):
        assert_same_run(explained, run_alone("sft", lora=False))


def test_random_numbers_that_an_account_draws_are_given_back(model_folder, tmp_path, run_alone):
    with mock.patch.object(LossTape, "_add_part", drawing_random_numbers):
        explained = run("sft", model_folder, tmp_path, watched=True, influence={"training_tokens": ()})
    assert_same_run(explained, run_alone("sft", lora=False))


def state_of(trainer):
    """Everything that an observation could disturb; gradients by identity and by value."""
    model = trainer.model
    return {
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "modes": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {
            name: None if parameter.grad is None else (id(parameter.grad), parameter.grad.tolist())
            for name, parameter in model.named_parameters()
        },
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()
        },
        "weights": weights_of(trainer),
        "use_cache": model.config.use_cache,
        "padding_side": trainer.processing_class.padding_side,
        "grad_mode": torch.is_grad_enabled(),
        "control": vars(trainer.control).copy(),
    }


class ScoringFailed(Exception):
    pass


def draw_and_fail(*_):
    """Fails where scoring does its arithmetic, in the middle of an observation."""
    torch.rand(1)
    raise ScoringFailed


@pytest.mark.parametrize("raises", [False, True], ids=["", "raising"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_one_observation_leaves_no_trace(lora, raises, model_folder, tmp_path):
    trainer = build_trainer("sft", model_folder, tmp_path, lora=lora, dropout=DROPOUT)
    callback = ProbeCallback(trainer, make_probes(), every=1)
    trainer.model.train()
    frozen = [module for name, module in trainer.model.named_modules() if name.endswith("layers.0.mlp")]
    assert len(frozen) == 1
    frozen[0].eval()  # in evaluation mode by intent
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainable[0].requires_grad_(False)
    for parameter in trainable[1:]:
        parameter.grad = torch.full_like(parameter, 0.5)
    trainer.model.config.use_cache = True
    trainer.control.should_log = True
    before = state_of(trainer)

    if raises:
        with mock.patch.object(scoring, "_token_scores", draw_and_fail), pytest.raises(ScoringFailed):
            callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    else:
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)

    assert trainer.state.log_history == []  # the trainer's own row comes first
    assert callback.rows.holds is not raises
    after = state_of(trainer)
    assert [name for name in before if before[name] != after[name]] == []


def test_a_reference_that_raises_leaves_the_adapter_on(model_folder, tmp_path):
    trainer = build_trainer("sft", model_folder, tmp_path, lora=True, dropout=DROPOUT)
    callback = ProbeCallback(trainer, make_probes(), every=1)
    before = state_of(trainer)
    with mock.patch.object(scoring, "_label_logps", draw_and_fail), pytest.raises(ScoringFailed):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    after = state_of(trainer)
    assert [name for name in before if before[name] != after[name]] == []
    assert trainer.model.get_model_status().enabled is True
