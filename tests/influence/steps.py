"""Real training steps with the tape open: what was recorded, and what the step really did."""

import gc
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from transformers import TrainerCallback

from llm_dynamics import _trl
from llm_dynamics.influence import BeforeStep, LossTape, by_sign, split_update
from tests.likelihood.models import without_float32_casts
from tests.training import build_trainer


@dataclass
class Step:
    """One optimizer step: the tape (its parts as they were before the split), `.grad` after clipping, the weights."""

    tape: LossTape
    parts: dict
    gradients: dict
    before: dict
    after: dict
    update: object
    clip: float
    setting: object = None

    def gradient_of_loss(self):
        """`.grad` before clipping."""
        return {name: gradient / self.clip for name, gradient in self.gradients.items()}


class StepRecorder(TrainerCallback):
    """Opens the tape in `on_step_begin`, closes it in `on_pre_optimizer_step`, splits in `on_optimizer_step`.

    `settings`, one per step, go to `apply(trainer, setting)` as the step begins: one run serves many losses.
    """

    def __init__(self, trainer, labelling=by_sign, settings=None, apply=None, history=None):
        self.trainer, self.labelling, self.settings, self.apply = trainer, labelling, settings, apply
        self.history = history
        self.steps = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.setting = self.settings[state.global_step] if self.settings else None
        if self.apply:
            self.apply(self.trainer, self.setting)
        self.stack = ExitStack()
        self.tape = self.stack.enter_context(LossTape(self.trainer.model, self.labelling))
        self.clip = self.stack.enter_context(_trl.recording_clip(self.trainer))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.stack.close()
        self.tape.raise_if_empty()
        trained = self.tape.parameters
        self.parts = {label: {n: g.clone() for n, g in part.items()} for label, part in self.tape.parts.items()}
        self.gradients = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
        self.before = BeforeStep.of(self.trainer.optimizer, trained)

    def on_optimizer_step(self, args, state, control, **kwargs):
        factor = self.clip[0] if self.clip else 1.0
        update = split_update(
            self.trainer.optimizer,
            self.tape.parameters,
            self.before,
            self.tape.parts,
            clip_factor=factor,
            history=self.history,
        )
        after = {name: parameter.detach().clone() for name, parameter in self.tape.parameters.items()}
        self.steps.append(
            Step(self.tape, self.parts, self.gradients, self.before.weights, after, update, factor, self.setting)
        )


class PlainLogProbs:
    """Twin of TRL's fused head in plain differentiable operations, which keeps float64 where TRL's goes to float32."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap=None, scale=1.0, outputs=()):
        logits = hidden @ weight.T * scale
        assert bias is None
        assert softcap is None
        logp = (logits / temperature).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        top = logits.argmax(-1) == targets
        return (
            logp.gather(1, targets[:, None])[:, 0],
            entropy,
            (2 * logp.detach()).logsumexp(-1),
            logits.detach().mean(-1),
            top,
        )


@contextmanager
def in_float64():
    """Patch what casts to float32 in Llama and in TRL's head."""
    with without_float32_casts(), mock.patch("trl.trainer.utils._ChunkedLogProbFunction", PlainLogProbs):
        yield


def run_steps(kind, folder, output_dir, *, double=True, labelling=by_sign, settings=None, apply=None, **options):
    """Train `kind` with the tape open at every step: the recorder; in float64 unless told."""
    history = options.pop("history", None)
    prepare = options.pop("prepare", None)
    options = {"max_steps": len(settings) if settings else 1, "logging_steps": 1000} | options
    trainer = build_trainer(kind, folder, output_dir, **options)
    if prepare:
        prepare(trainer)
    recorder = StepRecorder(trainer, labelling, settings, apply, history)
    trainer.add_callback(recorder)
    with ExitStack() as stack:
        if double:
            stack.enter_context(in_float64())
            for model in (trainer.model, getattr(trainer, "ref_model", None)):
                if model is not None:
                    model.double()
        train(trainer)
    return recorder


def train(trainer):
    """Train; what lives already is kept from the garbage collection that accelerate asks for (most of the time)."""
    gc.freeze()
    try:
        trainer.train()
    finally:
        gc.unfreeze()


def total(parts):
    """Sum over the labels of parts by label and name, by name."""
    sums = {}
    for part in parts.values():
        for name, tensor in part.items():
            sums[name] = sums[name] + tensor if name in sums else tensor
    return sums


def flat(by_name, names):
    """The tensors of `names` (zero where missing) as one vector."""
    like = next(iter(by_name.values()), torch.zeros(()))
    return torch.cat([by_name[n].flatten() if n in by_name else like.new_zeros(names[n].numel()) for n in names])


def relative_gap(ours, theirs):
    """|ours - theirs| / |theirs| over all parameters, both by name."""
    return float(
        torch.linalg.vector_norm(flat(ours, theirs) - flat(theirs, theirs))
        / torch.linalg.vector_norm(flat(theirs, theirs))
    )
