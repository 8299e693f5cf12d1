"""Contract with TRL and transformers: what the tap on the loss and the split of the update rely on.

A failure here means that an upgrade changed how trainers call their model or their callbacks; each message says what,
and where to look.
"""

import pytest
import torch
from transformers import TrainerCallback

from tests.conftest import PREFERENCES
from tests.training import build_trainer, save_tiny_model

KINDS = [("sft", False), ("dpo", False), ("dpo", True), ("kto", False), ("grpo", False), ("rloo", True)]
IDS = [f"{kind}-{'lora' if lora else 'full'}" for kind, lora in KINDS]
SEE = "see influence/tape.py"


class Forwards(TrainerCallback):
    """Records every differentiated forward of a run of one step, and the gradients it ends with."""

    def __init__(self):
        self.calls, self.gradients, self.busy = [], {}, False

    def watch(self, trainer):
        self.model = trainer.model
        self.model.register_forward_hook(self.after_forward, with_kwargs=True)
        trainer.add_callback(self)

    def after_forward(self, module, args, kwargs, output):
        logps = getattr(output, "log_probs", None)
        if not torch.is_grad_enabled():
            return
        call = {"args": args, "kwargs": kwargs, "output": output, "logps": logps}
        self.calls.append(call)
        if logps is None or not logps.requires_grad:
            return
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

        def on_gradient(gradient):
            if not self.busy:
                self.busy = True
                call["c"] = c = gradient.masked_fill(kwargs["labels"][:, 1:] == -100, 0)
                found = torch.autograd.grad(logps, parameters.values(), c, retain_graph=True, allow_unused=True)
                call["gradients"] = dict(zip(parameters, found, strict=True))
                self.busy = False

        logps.register_hook(on_gradient)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), dropout=0.2)


@pytest.fixture(scope="module")
def one_step(model_folder, tmp_path_factory):
    """The differentiated forwards of a run of one step, without clipping; each made once."""
    runs = {}

    def run(kind, lora=False):
        if (kind, lora) not in runs:
            trainer = build_trainer(
                kind, model_folder, tmp_path_factory.mktemp(kind), lora=lora, max_steps=1, max_grad_norm=0.0
            )
            forwards = Forwards()
            forwards.watch(trainer)
            trainer.train()
            runs[kind, lora] = trainer, forwards
        return runs[kind, lora]

    return run


@pytest.mark.parametrize(("kind", "lora"), KINDS, ids=IDS)
def test_the_model_is_called_with_labels_and_returns_differentiable_log_probs_of_all_but_the_first_token(
    kind, lora, one_step
):
    _, forwards = one_step(kind, lora)
    differentiated = [call for call in forwards.calls if "c" in call]
    assert differentiated, f"{kind}: no forward of the model returned `log_probs` that the loss differentiates; {SEE}"
    for call in differentiated:
        assert {"input_ids", "labels"} <= call["kwargs"].keys(), (
            f"{kind}: the model is called with {sorted(call['kwargs'])}: labels or input_ids no longer come by name; "
            f"{SEE}, _labels_of"
        )
        rows, length = call["kwargs"]["input_ids"].shape
        assert call["logps"].shape == (rows, length - 1), (
            f"{kind}: log_probs are {tuple(call['logps'].shape)} for input_ids {(rows, length)}, not (B, T - 1); {SEE}"
        )
        labels = call["kwargs"]["labels"][:, 1:]
        ids = call["kwargs"]["input_ids"][:, 1:]
        assert ((labels == -100) | (labels == ids)).all(), f"{kind}: labels are no longer unshifted input_ids; {SEE}"


@pytest.mark.parametrize(("kind", "lora"), KINDS, ids=IDS)
def test_log_probs_of_labelled_tokens_carry_the_whole_gradient_of_the_loss(kind, lora, one_step):
    _, forwards = one_step(kind, lora)
    assert any(gradient.any() for gradient in forwards.gradients.values())
    for name, gradient in forwards.gradients.items():
        parts = [call["gradients"][name] for call in forwards.calls if call.get("gradients", {}).get(name) is not None]
        carried = torch.stack(parts).sum(dim=0)
        assert torch.allclose(carried, gradient, rtol=1e-4, atol=1e-6), (
            f"{kind}: of the gradient of {name}, |{float((gradient - carried).norm()):.3g}| of "
            f"|{float(gradient.norm()):.3g}| does not pass through the `log_probs` of labelled tokens: the loss "
            f"uses another output of the model; {SEE}, and the cause `other`"
        )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dpo_batches_have_their_chosen_rows_first(lora, one_step):
    trainer, forwards = one_step("dpo", lora)
    (call,) = (call for call in forwards.calls if "c" in call)
    texts = trainer.processing_class.batch_decode(call["kwargs"]["input_ids"], skip_special_tokens=True)
    half = len(texts) // 2
    rejected = {row["prompt"]: row["rejected"] for row in PREFERENCES}
    chosen = {row["prompt"]: row["chosen"] for row in PREFERENCES}
    for place, text in enumerate(texts):
        prompt = next(prompt for prompt in chosen if text.startswith(prompt))
        side = chosen if place < half else rejected
        assert side[prompt] in text, (
            f"row {place} of {len(texts)} is {text!r}: DPOTrainer no longer concatenates chosen, then rejected; see "
            "by_halves in influence/labelling.py and callbacks/roles.py"
        )
    assert (call["c"][:half].sum(dim=1) < 0).all()
    assert (call["c"][half:].sum(dim=1) > 0).all(), "the loss pulls the second half up: is it still the rejected one?"


def test_a_plain_trainer_trains_through_logits_with_labels_by_name(one_step):
    _, forwards = one_step("plain")
    assert len(forwards.calls) == 1
    (call,) = forwards.calls
    assert call["logps"] is None, "transformers.Trainer's models return log_probs now: LossTape would tap those"
    assert call["output"].logits.requires_grad, f"a plain trainer's forward returns no differentiable logits; {SEE}"
    assert "labels" in call["kwargs"], f"a plain trainer's labels no longer come by name; {SEE}, _labels_of"


class Moments(TrainerCallback):
    """Looks at gradients, weights and the learning rate in every event around the optimizer's step."""

    def __init__(self):
        self.seen = {}

    def look(self, event):
        parameter = next(p for p in self.trainer.model.parameters() if p.requires_grad)
        self.seen[event] = {
            "weight": parameter.detach().clone(),
            "gradient": None if parameter.grad is None else parameter.grad.clone(),
            "rate": self.trainer.optimizer.param_groups[0]["lr"],
        }

    def on_step_begin(self, args, state, control, **kwargs):
        self.look("begin")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.look("before")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.look("after")

    def on_step_end(self, args, state, control, **kwargs):
        self.look("end")


def test_callbacks_see_weights_before_and_after_the_step_with_its_gradients_and_learning_rate(model_folder, tmp_path):
    moments = Moments()
    trainer = build_trainer("sft", model_folder, tmp_path, max_steps=1, callbacks=[moments], warmup_steps=0)
    moments.trainer = trainer
    trainer.train()
    see = "see callbacks/influence.py, which explains the step in on_optimizer_step"
    begin, before, after, end = (moments.seen[event] for event in ("begin", "before", "after", "end"))
    assert torch.equal(begin["weight"], before["weight"]), f"on_pre_optimizer_step comes after the step; {see}"
    assert not torch.equal(before["weight"], after["weight"]), f"on_optimizer_step comes before the step; {see}"
    assert torch.equal(before["gradient"], after["gradient"]), f"gradients are cleared before on_optimizer_step; {see}"
    assert after["rate"] == before["rate"], f"the scheduler steps before on_optimizer_step; {see}"
    assert end["rate"] != after["rate"], "this test's schedule is constant, so that it shows nothing"
