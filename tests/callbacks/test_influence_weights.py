"""What moves weights besides the optimizer: the measured change is the whole step's, and a note says what it was."""

import pytest
import torch
from transformers import TrainerCallback

from llm_dynamics.callbacks import watch
from llm_dynamics.influence.update import checksum
from llm_dynamics.runlog import load_run
from tests.callbacks.explained import GENTLE, measured, observed_change, short_probes
from tests.training import build_trainer, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def explained(prepare, folder, output_dir, **arguments):
    """The log of a run that `prepare` has changed before it is watched."""
    trainer = build_trainer("dpo", folder, output_dir, **GENTLE | {"gradient_accumulation_steps": 1} | arguments)
    prepare(trainer)
    watch(trainer, short_probes(families=("chosen", "rejected")), every=1, influence={"every": 1})
    trainer.train()
    return load_run(output_dir)


def step_in_backward(trainer):
    """Each weight has an optimizer of its own, called as its gradient comes; nothing is left for the trainer's."""
    own = {p: torch.optim.AdamW([p], lr=1e-3) for p in trainer.model.parameters()}

    def step(parameter):
        own[parameter].step()
        own[parameter].zero_grad()

    for parameter in own:
        parameter.register_post_accumulate_grad_hook(step)


def step_in_backward_too(trainer):
    """The same, and the gradient stays for the trainer's optimizer."""

    def step(parameter):
        with torch.no_grad():
            parameter.sub_(1e-3 * parameter.grad.sign())

    for parameter in trainer.model.parameters():
        parameter.register_post_accumulate_grad_hook(step)


class Nudge(TrainerCallback):
    """Moves the weights as the optimizer is about to step, past the version counters that autograd keeps."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            parameter.data.mul_(0.999)


def nudged(trainer):
    trainer.add_callback(Nudge())


@pytest.mark.parametrize("prepare", [step_in_backward, step_in_backward_too, nudged])
def test_weights_that_move_before_the_step_are_measured_and_noted(prepare, folder, tmp_path):
    run = explained(prepare, folder, tmp_path)
    assert (measured(run) - observed_change(run)).abs().max() < 2e-4
    assert measured(run).abs().max() > 0.1
    assert set(run.influence["cause"]) == {"step", "remainder"}
    assert run.influence.query("cause == 'step'")["share"].abs().max() > 0.1
    assert run.accounts["note"].str.contains("the weights changed before the optimizer's step").all()
    assert len(run.training_tokens) == 0


class Average(TrainerCallback):
    """Puts a mean of old and new weights in place after each step, as SWA does."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = [p.detach().clone() for p in model.parameters()]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for parameter, before in zip(model.parameters(), self.before, strict=True):
                parameter.lerp_(before, 0.5)


def test_weights_that_move_between_steps_are_noted(folder, tmp_path, caplog):
    run = explained(lambda trainer: trainer.add_callback(Average()), folder, tmp_path, max_steps=3)
    first, *later = run.accounts["note"]
    assert first is None or first != first
    assert all("after step 1 something other than the optimizer changed the weights" in note for note in later)
    assert caplog.text.count("something other than the optimizer changed") == 1


def no_step(trainer):
    def create_optimizer(*args):
        optimizer = type(trainer).create_optimizer(trainer, *args)
        optimizer.step = lambda *args, **kwargs: None
        return optimizer

    trainer.create_optimizer = create_optimizer


def other_step(trainer):
    """The optimizer that the trainer holds is known by name; another one steps in its place."""

    def create_optimizer(*args):
        optimizer = type(trainer).create_optimizer(trainer, *args)
        real = torch.optim.SGD(trainer.model.parameters(), lr=0.05)
        optimizer.step = lambda *args, **kwargs: real.step()
        return optimizer

    trainer.create_optimizer = create_optimizer


class Lookahead(torch.optim.Optimizer):
    """Takes the step of another optimizer, then half of it back."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        self.inner.step(closure)
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                parameter.lerp_(old, 0.5)


def lookahead(trainer):
    trainer.optimizer = Lookahead(torch.optim.AdamW(trainer.model.parameters(), lr=1e-3))


@pytest.mark.parametrize(
    ("prepare", "note", "moves"),
    [
        (no_step, "AdamW took no step of its own", False),
        (other_step, "AdamW took no step of its own", True),
        (lookahead, "Lookahead is not known", True),
    ],
)
def test_optimizers_that_are_not_what_they_seem_have_one_cause_and_a_note(prepare, note, moves, folder, tmp_path):
    run = explained(prepare, folder, tmp_path)
    assert (measured(run) - observed_change(run)).abs().max() < 2e-4
    assert (measured(run).abs().max() > 0.01) == moves
    assert set(run.influence["cause"]) == {"step", "remainder"}
    assert run.accounts["note"].str.contains(note).all()
    assert run.accounts["explained"].isna().all() == (not moves)


def test_a_step_of_no_length_has_no_explained_share(folder, tmp_path):
    run = explained(lambda trainer: None, folder, tmp_path, learning_rate=0.0, max_steps=1)
    assert (run.accounts["measured_norm"] == 0).all()
    assert run.accounts["explained"].isna().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_checksum_sees_a_single_bit(dtype):
    weight = torch.nn.Parameter(torch.randn(7, 5).to(dtype))
    before = checksum({"weight": weight, "view": torch.nn.Parameter(weight.T[1:])})
    with torch.no_grad():
        weight[2, 3] = torch.nextafter(weight[2, 3], torch.tensor(9.0, dtype=dtype))
    after = checksum({"weight": weight, "view": torch.nn.Parameter(weight.T[1:])})
    assert [bool(a != b) for a, b in zip(before, after, strict=True)] == [True, True]
