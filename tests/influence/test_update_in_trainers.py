"""The parts of an update add up in real trainers: their optimizers, schedules, clipping and wrappers."""

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from llm_dynamics.influence import MomentHistory
from llm_dynamics.influence.update import innermost
from tests.influence.steps import flat, relative_gap, run_steps, total
from tests.training import save_tiny_model

OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "sgd", "rmsprop"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def change(step):
    return {name: step.after[name] - step.before[name] for name in step.before}


def all_but_rounding(step):
    return total({cause: part for cause, part in step.update.parts.items() if cause != "rounding"})


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05], ids=["whole", "clipped"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_parts_add_up_under_the_trainers_optimizers(optim, max_grad_norm, folder, tmp_path):
    recorder = run_steps(
        "dpo",
        folder,
        tmp_path,
        max_steps=3,
        optim=optim,
        max_grad_norm=max_grad_norm,
        weight_decay=0.1,
        warmup_steps=2,
        learning_rate=1e-3,
    )
    assert (recorder.steps[1].clip < 1) == (max_grad_norm > 0)
    for step in recorder.steps[1:]:  # the first step of a warm-up has a learning rate of zero
        assert step.update.note is None
        assert relative_gap(all_but_rounding(step), change(step)) <= 1e-10
        assert relative_gap(total(step.update.parts), change(step)) <= 1e-12
        assert {"up", "down", "other", "rounding", "decay"} <= set(step.update.parts)
        # nothing but the labels' tokens is in the gradient of this loss
        assert flat(step.update.parts["other"], step.before).norm() <= 1e-9 * flat(change(step), step.before).norm()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sft", {"lora": True, "dropout": 0.1, "gradient_accumulation_steps": 2}),
        ("grpo", {"per_device_train_batch_size": 4, "num_generations": 4, "beta": 0.1}),
        ("kto", {}),
        ("rloo", {}),
        ("plain", {}),
    ],
    ids=["sft-lora", "grpo", "kto", "rloo", "plain"],
)
def test_parts_add_up_in_every_trainer(kind, options, folder, tmp_path):
    recorder = run_steps(kind, folder, tmp_path, max_steps=2, max_grad_norm=0.5, weight_decay=0.01, **options)
    for step in recorder.steps:
        assert relative_gap(all_but_rounding(step), change(step)) <= 1e-10
    assert "momentum" in recorder.steps[1].update.parts


def test_the_history_of_a_run_splits_its_momentum(folder, tmp_path):
    runs = [
        run_steps("dpo", folder, tmp_path / name, max_steps=3, history=history)
        for name, history in (("total", None), ("split", MomentHistory()))
    ]
    whole, split = (run.steps[2].update.parts for run in runs)
    together = total({cause: split[cause] for cause in ("momentum_up", "momentum_down")})
    assert relative_gap(together, whole["momentum"]) <= 1e-9
    assert relative_gap(split["momentum_up"], whole["momentum"]) > 0.1
    assert relative_gap(total(split), total(whole)) <= 1e-12


def test_an_optimizer_that_is_not_known_is_one_part(folder, tmp_path):
    step = run_steps("sft", folder, tmp_path, optim="adafactor").steps[0]
    assert set(step.update.parts) == {"step"}
    assert relative_gap(step.update.parts["step"], change(step)) == 0
    assert "Adafactor is not known" in step.update.note


def test_accelerates_wrapper_is_taken_off(folder, tmp_path):
    optimizer = run_steps("sft", folder, tmp_path, optim="sgd", double=False).trainer.optimizer
    assert isinstance(optimizer, AcceleratedOptimizer)
    assert type(innermost(optimizer)) is torch.optim.SGD
    assert innermost(innermost(optimizer)) is innermost(optimizer)
