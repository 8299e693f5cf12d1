"""The parts of the gradient add up to `.grad` in real trainers under every loss; what is not of label log-probs shows.

One run per kind of trainer serves all its losses: the loss is changed as each step begins.
"""

import inspect
import re

import pytest
from transformers.trainer_pt_utils import LabelSmoother
from trl import DPOTrainer, GRPOTrainer

from llm_dynamics.influence import by_sign
from tests.influence.steps import relative_gap, run_steps, total
from tests.training import save_tiny_model

EXACT = 1e-10
FLOAT32 = 1e-6
SMOOTHING = 0.1

DPO_LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
              "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]  # fmt: skip
DPO = {name: {"loss_types": [name], "loss_weights": [1.0]} for name in DPO_LOSSES}
DPO["mpo"] = {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
DPO["length_desensitised"] = DPO["sigmoid"] | {"ld_alpha": 0.5}
DPO["weighted"] = DPO["sigmoid"] | {"use_weighting": True}
DPO["forward_kl"] = DPO["sigmoid"] | {"f_divergence_type": "forward_kl"}
DPO_DEFAULTS = {"ld_alpha": None, "use_weighting": False, "f_divergence_type": "reverse_kl"}

GRPO_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"]
GRPO_DEFAULTS = {
    "beta": 0.0,
    "importance_sampling_level": "token",
    "entropy_coef": 0.0,
    "_entropy_bonus_enabled": False,
    "top_entropy_quantile": 1.0,
}
GRPO = {name: {"loss_type": name} for name in GRPO_LOSSES}
GRPO |= {f"{name}_kl": {"loss_type": name, "beta": 0.2} for name in ("grpo", "bnpo", "dr_grpo", "dapo")}
GRPO["luspo"] = {"loss_type": "luspo", "importance_sampling_level": "sequence"}
GRPO["gspo"] = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
GRPO["high_entropy_tokens"] = {"loss_type": "dapo", "top_entropy_quantile": 0.5}
GRPO["entropy_bonus"] = {"loss_type": "dapo", "entropy_coef": 0.1, "_entropy_bonus_enabled": True}


def set_attributes(trainer, setting):
    for name, value in setting.items():
        setattr(trainer, name, value)


def set_sft(trainer, setting):
    trainer.args.loss_type = "dft" if setting == "dft" else "nll"
    trainer.label_smoother = LabelSmoother(SMOOTHING) if setting == "smoothed" else None
    trainer.penalty = 0.1 if setting == "weight_penalty" else 0.0


def with_penalty(trainer):
    """Let the loss have a weight penalty, which no token asks for."""
    compute_loss = trainer.compute_loss

    def penalised(model, *args, **kwargs):
        loss = compute_loss(model, *args, **kwargs)
        return loss + trainer.penalty * sum(p.square().sum() for p in model.parameters()) if trainer.penalty else loss

    trainer.compute_loss = penalised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def run_all(kind, losses, defaults, folder, output_dir, **options):
    recorder = run_steps(
        kind,
        folder,
        output_dir,
        settings=[defaults | setting for setting in losses.values()],
        apply=set_attributes,
        gradient_accumulation_steps=2,
        **options,
    )
    return dict(zip(losses, recorder.steps, strict=True))


@pytest.fixture(scope="module")
def dpo(folder, tmp_path_factory):
    options = {"label_smoothing": SMOOTHING, "learning_rate": 1e-2, "beta": 0.5}
    return run_all("dpo", DPO, DPO_DEFAULTS, folder, tmp_path_factory.mktemp("dpo"), **options)


@pytest.fixture(scope="module")
def grpo(folder, tmp_path_factory):
    options = {"per_device_train_batch_size": 4, "num_generations": 4, "beta": 0.2, "temperature": 0.7}
    return run_all("grpo", GRPO, GRPO_DEFAULTS, folder, tmp_path_factory.mktemp("grpo"), **options)


@pytest.fixture(scope="module")
def sft(folder, tmp_path_factory):
    losses = ("nll", "dft", "smoothed", "weight_penalty")
    recorder = run_steps(
        "sft",
        folder,
        tmp_path_factory.mktemp("sft"),
        settings=losses,
        apply=set_sft,
        prepare=with_penalty,
        gradient_accumulation_steps=2,
    )
    return dict(zip(losses, recorder.steps, strict=True))


def sign_parts_are_pure(step):
    """Both labels are those of the coefficients, so that up + down == grad is no accident of one label for all."""
    signs = {label for batch in step.tape.batches for label, mask in by_sign(batch).items() if (batch.c * mask).any()}
    return signs == set(step.parts)


def test_every_loss_of_this_trl_is_tried():
    def offered(method, variable):
        source = inspect.getsource(method)
        named = re.findall(rf"{variable} == \"(\w+)\"", source)
        listed = re.findall(rf"{variable} in \[([^\]]*)\]", source)
        return {*named, *(name for names in listed for name in re.findall(r"\w+", names))}

    assert offered(DPOTrainer._compute_loss, "loss_type") == set(DPO_LOSSES)
    assert offered(GRPOTrainer._compute_loss, "self.loss_type") == {*GRPO_LOSSES, "luspo"}


@pytest.mark.parametrize("loss", DPO)
def test_parts_add_up_under_every_dpo_loss(dpo, loss):
    assert relative_gap(total(dpo[loss].parts), dpo[loss].gradient_of_loss()) <= EXACT
    assert sign_parts_are_pure(dpo[loss])


@pytest.mark.parametrize("loss", [loss for loss in GRPO if loss != "entropy_bonus"])
def test_parts_add_up_under_every_grpo_loss(grpo, loss):
    assert relative_gap(total(grpo[loss].parts), grpo[loss].gradient_of_loss()) <= EXACT
    assert set(grpo[loss].parts) == {"up", "down"}
    assert sign_parts_are_pure(grpo[loss])


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_parts_add_up_under_every_sft_loss(sft, loss):
    assert relative_gap(total(sft[loss].parts), sft[loss].gradient_of_loss()) <= EXACT
    assert set(sft[loss].parts) == {"up"}


@pytest.mark.parametrize("kind", ["kto", "rloo"])
def test_parts_add_up_in_the_other_trainers(kind, folder, tmp_path):
    kto = [{"loss_type": "kto"}, {"loss_type": "apo_zero_unpaired"}]
    rloo = {"num_generations": 4, "beta": 0.1, "num_iterations": 2, "steps_per_generation": 2, "learning_rate": 2e-4}
    recorder = run_steps(
        kind,
        folder,
        tmp_path,
        settings=kto if kind == "kto" else [{}, {}],
        apply=set_attributes,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **({} if kind == "kto" else rloo),
    )
    for step in recorder.steps:
        assert relative_gap(total(step.parts), step.gradient_of_loss()) <= EXACT
        assert set(step.parts) == {"up", "down"}


def test_parts_add_up_off_policy(folder, tmp_path):
    recorder = run_steps(
        "grpo",
        folder,
        tmp_path,
        max_steps=4,
        num_iterations=2,
        steps_per_generation=2,
        per_device_train_batch_size=4,
        num_generations=4,
        learning_rate=0.02,
    )
    gaps = [relative_gap(total(step.parts), step.gradient_of_loss()) for step in recorder.steps]
    assert max(gaps) <= EXACT
    # off policy indeed: some tokens are clipped, and have no coefficient
    last = recorder.steps[-1].tape.batches[0]
    assert ((last.labels != -100) & (last.c == 0)).any()


@pytest.mark.parametrize(
    ("run", "loss", "least"),
    [("sft", "smoothed", 1e-3), ("sft", "weight_penalty", 0.1), ("grpo", "entropy_bonus", 1e-3)],
)
def test_what_a_loss_asks_past_the_label_log_probs_is_other(run, loss, least, request):
    step = request.getfixturevalue(run)[loss]
    assert relative_gap(total(step.parts), step.gradient_of_loss()) > least
    other = step.update.parts["other"]
    per_gradient = step.update.per_gradient
    rest = {name: gradient - total(step.parts)[name] for name, gradient in step.gradient_of_loss().items()}
    expected = {name: rest[name] * per_gradient[name] for name in rest}
    assert relative_gap(other, expected) <= EXACT


def test_a_plain_trainer_has_other_under_label_smoothing_alone(folder, tmp_path):
    recorder = run_steps(
        "plain",
        folder,
        tmp_path,
        settings=[None, LabelSmoother(SMOOTHING)],
        apply=lambda trainer, smoother: setattr(trainer, "label_smoother", smoother),
        gradient_accumulation_steps=2,
    )
    plain, smoothed = recorder.steps
    assert relative_gap(total(plain.parts), plain.gradient_of_loss()) <= FLOAT32  # its loss is computed in float32
    assert relative_gap(total(smoothed.parts), smoothed.gradient_of_loss()) > 1e-3


def test_a_plain_trainer_told_to_smooth_labels_is_seen(folder, tmp_path):
    step = run_steps("plain", folder, tmp_path, label_smoothing_factor=0.5).steps[0]
    assert relative_gap(total(step.parts), step.gradient_of_loss()) > 0.05


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_parts_add_up_in_float32_with_the_fused_head_as_it_is(kind, folder, tmp_path):
    groups = {"num_generations": 4, "per_device_train_batch_size": 4} if kind == "grpo" else {}
    step = run_steps(kind, folder, tmp_path, double=False, **groups).steps[0]
    assert relative_gap(total(step.parts), step.gradient_of_loss()) <= FLOAT32
