"""Whatever fails in a callback ends that part of the watching, and training does what it does alone."""

import contextlib
import errno
import inspect
import io
import logging
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import llm_dynamics
from llm_dynamics import SqueezingAlert, load_run, watch
from llm_dynamics.callbacks import guard, influence
from llm_dynamics.callbacks.displacement import DisplacementCallback
from llm_dynamics.callbacks.guard import ERRORS_FILE, GuardedCallback
from llm_dynamics.callbacks.influence import InfluenceCallback
from llm_dynamics.callbacks.log_rows import LogRows
from llm_dynamics.callbacks.probe import ProbeCallback
from llm_dynamics.influence import LossTape
from llm_dynamics.likelihood import scoring
from llm_dynamics.likelihood.preserve import keeping_random
from llm_dynamics.runlog import RunLogWriter
from tests.callbacks.explained import short_probes
from tests.trainers.runs import Script
from tests.trainers.runs import build as build_nthr
from tests.training import build_trainer, make_probes, own_rows, save_tiny_model, weights_of

PACKAGE = str(Path(llm_dynamics.__file__).parent)
EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


STAYS = {"_load_optimizer_and_scheduler", "push_to_hub", "_push_from_checkpoint"}
"""Methods of the trainer that stay replaced: note the checkpoint of later runs, and leave the log out of pushes."""


class Fault(Exception):
    """Thrown into our code."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), dropout=0.2)


@pytest.fixture(autouse=True)
def our_warnings(caplog):
    caplog.set_level(logging.WARNING, logger="llm_dynamics")


def said(caplog, *words):
    """Our warnings that have all the words."""
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("llm_dynamics")]
    return [message for message in messages if all(word in message for word in words)]


def every_guarded(start=GuardedCallback):
    return [kind for child in start.__subclasses__() for kind in (child, *every_guarded(child))]


def without_displacement(row):
    return {key: value for key, value in row.items() if not key.startswith("lld/")}


def ends_with(trainer):
    """All that a run leaves: weights, rows, random state, and nothing of ours on the trainer."""
    model = trainer.model
    return {
        "weights": weights_of(trainer),
        "rows": [row for row in map(without_displacement, own_rows(trainer)) if row.keys() - {"step", "epoch"}],
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        "modes": {name: module.training for name, module in model.named_modules()},
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        "replaced": {name for name, value in vars(trainer).items() if inspect.isfunction(value)} - STAYS,
        "clipping": "clip_grad_norm_" in vars(trainer.accelerator),
        "control": vars(trainer.control).copy(),
    }


def test_every_event_of_every_callback_of_ours_is_guarded():
    kinds = every_guarded()
    assert {ProbeCallback, InfluenceCallback, DisplacementCallback, SqueezingAlert} <= set(kinds)
    for file in Path(PACKAGE).rglob("*.py"):
        if file.name != "guard.py" and file.parts[-2:] != ("trainers", "displacement.py"):  # a study trains by itself
            assert "(TrainerCallback)" not in file.read_text(encoding="utf-8"), f"{file} has an event without a guard"
    for kind in kinds:
        for name in EVENTS:
            event = getattr(kind, name)
            assert event is getattr(TrainerCallback, name) or event.__wrapped__, (kind, name)


# ---- a fault at every call -------------------------------------------------------------------------------------------


class Calls:
    """Finds the functions of the package that callbacks call, and throws a fault into one at a time."""

    def __init__(self, monkeypatch):
        self.armed, self.hit, self.seen, self.phase, self.edge = None, [], {}, "", ""
        for name in ("attempt", "amid_training"):
            monkeypatch.setattr(GuardedCallback, name, self.looking_into(getattr(GuardedCallback, name)))

    def looking_into(self, edge):
        def watched(callback, *arguments):
            before = sys.getprofile()
            self.edge = type(callback).__name__
            sys.setprofile(self.profile)
            try:
                edge(callback, *arguments)
            finally:
                sys.setprofile(before)

        return watched

    def profile(self, frame, what, _):
        code = frame.f_code
        if what != "call" or not code.co_filename.startswith(PACKAGE) or code.co_filename == guard.__file__:
            return
        self.seen.setdefault(self.phase, {}).setdefault(code, self.edge)
        if self.armed == code:
            self.hit.append((self.edge, code.co_qualname))
            self.armed = None
            raise Fault(code.co_qualname)


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def sample(found):
    """Every sixth call, for the time that it takes; all where the environment has EVERY_CALL."""
    return list(found)[:: 1 if "EVERY_CALL" in os.environ else 6]


class First(TrainerCallback):
    """Arms a fault for each step: finds the calls in step 2, then goes through them."""

    def __init__(self, calls):
        self.calls, self.left = calls, None

    def on_step_begin(self, args, state, control, **kwargs):
        self.calls.phase = "steps" if state.global_step == 1 else "other"
        if state.global_step >= 2:
            if self.left is None:
                self.left = sample(self.calls.seen["steps"])
            self.calls.armed = self.left.pop()


class Last(TrainerCallback):
    """Revives all callbacks after each step, and ends the run when all faults were thrown."""

    def __init__(self, first, trainer):
        self.first, self.trainer, self.missed = first, trainer, []

    def on_step_end(self, args, state, control, **kwargs):
        if self.first.calls.armed is not None:
            self.missed.append(self.first.calls.armed)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, GuardedCallback):
                callback._begin()
        control.should_training_stop = self.first.left == []


def quietly(trainer, **options):
    """Train without the tables of completions that GRPO prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(**options)


STEPS = 400


def everything(kind, folder, model_folder, **options):
    """A trainer with all callbacks that a kind can have."""
    options = {"max_steps": STEPS, "lr_scheduler_type": "constant", "logging_steps": 50} | options
    if kind == "nthr":
        trainer = build_nthr(folder, script=Script(), **options)
    else:
        trainer = build_trainer(kind, model_folder, folder, dropout=0.2, optim="adamw_torch", **options)
    return trainer


@pytest.mark.parametrize("kind", ["sft", "nthr"])
def test_a_fault_in_any_call_of_a_step_leaves_the_run_as_it_is_alone(kind, model_folder, tmp_path, calls):
    trainer = everything(kind, tmp_path / "watched", model_folder)
    families = ("chosen", "rejected")
    if kind == "sft":
        account = {"every": 1, "history": "split", "training_tokens": ["chosen"]}
        watcher = watch(
            trainer, short_probes(1, families), every=1, influence=account, tracker_tables=True, on_error="warn"
        )
        trainer.add_callback(SqueezingAlert(trainer))
    else:
        watcher = watch(trainer, short_probes(1, families), every=1, displacement={"every": 1}, on_error="warn")
    first = First(calls)
    last = Last(first, trainer)
    trainer.callback_handler.callbacks.insert(0, first)
    trainer.add_callback(last)
    quietly(trainer)
    steps = trainer.state.global_step
    assert 20 < steps < STEPS
    assert len(last.missed) <= 5  # what a step does only where the one before it did not fail, or once in a run
    assert len(calls.hit) == steps - 2 - len(last.missed)
    parts = {part for part, _ in calls.hit}
    assert parts >= ({"InfluenceCallback", "ProbeCallback"} if kind == "sft" else {"DisplacementCallback", "TokenLog"})
    failures = load_run(watcher.log_folder).meta["failures"]
    assert len(failures) > 0.8 * len(calls.hit)  # some faults come up where a function helps itself

    alone = everything(kind, tmp_path / "alone", model_folder)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == steps

    alone.add_callback(Stop())
    quietly(alone)
    watched, expected = ends_with(trainer), ends_with(alone)
    assert [name for name in expected if watched[name] != expected[name]] == []


BEYOND_STEPS = ("on_train_begin", "on_save", "on_train_end")


def test_a_fault_in_any_call_at_the_beginning_and_the_end_leaves_no_trace(model_folder, tmp_path, calls):
    trainer = everything("sft", tmp_path, model_folder)
    account = {"every": 1, "history": "split"}
    watch(trainer, short_probes(1), every=1, influence=account, on_error="warn")
    alert = SqueezingAlert(trainer)
    trainer.add_callback(alert)
    (tmp_path / "checkpoint-0").mkdir()
    ours = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, GuardedCallback)]

    def fire(event):
        for callback in ours:
            getattr(callback, event)(trainer.args, trainer.state, trainer.control)

    for event in BEYOND_STEPS:
        calls.phase = event
        fire(event)
    before = ends_with(trainer)
    calls.phase = "faults"
    for event in BEYOND_STEPS:
        assert len(calls.seen[event]) >= {"on_train_begin": 40, "on_save": 1, "on_train_end": 2}[event]
        for call in sample(calls.seen[event]):
            calls.armed = call
            for callback in ours:
                callback._begin()
            alert._judged = None
            fire(event)
            assert calls.armed is None
            after = ends_with(trainer)
            assert [name for name in before if before[name] != after[name]] == [], calls.hit[-1]


# ---- what is said, and what goes on ----------------------------------------------------------------------------------


def fail(*_, **__):
    torch.rand(1)  # a fault does not come alone
    raise Fault("of an\nunforeseen shape")


def watched(kind, model_folder, folder, *, on_error="warn", influence=True, **options):
    trainer = build_trainer(kind, model_folder, folder, **options)
    account = {"every": 1, "training_tokens": ()} if influence else False
    return trainer, watch(trainer, short_probes(1), every=1, influence=account, on_error=on_error)


def test_explaining_ends_and_watching_goes_on_where_the_tape_fails(model_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(LossTape, "_record", fail)
    trainer, _ = watched("sft", model_folder, tmp_path)
    trainer.train()
    run = load_run(tmp_path)
    assert (run.observed_steps, run.explained_steps) == ([0, 1, 2, 3], [])
    (failure,) = run.meta["failures"]
    assert (failure["step"], failure["part"]) == (0, "explaining steps")
    assert said(caplog, "step 0: explaining steps failed", "Fault: of an", ERRORS_FILE)
    assert said(caplog, "explaining steps was off from step 0 to the end at step 3")
    trace = (run.path / ERRORS_FILE).read_text(encoding="utf-8")
    assert "in fail" in trace
    assert trace.count("Traceback") == 1


def test_a_loss_that_the_tape_cannot_see_ends_explaining_alone(model_folder, tmp_path, caplog):
    trainer, _ = watched("sft", model_folder, tmp_path)
    compute = trainer.compute_loss
    seen = []

    def hidden(model, inputs, **options):  # as of a release of TRL whose loss goes another way
        hooks, model._forward_hooks = model._forward_hooks, {}
        seen.append(len(hooks))
        try:
            return compute(model, inputs, **options)
        finally:
            model._forward_hooks = hooks

    trainer.compute_loss = hidden
    trainer.train()
    assert seen[0] == 1
    assert load_run(tmp_path).observed_steps == [0, 1, 2, 3]
    assert said(caplog, "explaining steps failed", "no loss was seen")


@pytest.fixture(scope="module")
def alone(model_folder, tmp_path_factory):
    """What the run of `watched` ends with when nobody watches."""
    trainer = build_trainer("sft", model_folder, tmp_path_factory.mktemp("alone"))
    trainer.train()
    return ends_with(trainer)


class Stopping(GuardedCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True
        raise Fault


def test_control_flags_that_a_failing_event_set_are_taken_back(model_folder, tmp_path, alone):
    trainer = build_trainer("sft", model_folder, tmp_path)
    trainer.add_callback(Stopping(trainer))
    trainer.train()
    assert ends_with(trainer) == alone


@pytest.mark.parametrize(("where", "name"), [(scoring, "_token_scores"), (LogRows, "add"), (RunLogWriter, "write")])
def test_watching_ends_and_training_goes_on(where, name, model_folder, tmp_path, monkeypatch, caplog, alone):
    trainer, watcher = watched("sft", model_folder, tmp_path, influence=False)
    right, asked = getattr(where, name), []

    def fails_later(*arguments, **options):
        asked.append(1)
        return fail() if len(asked) > 2 else right(*arguments, **options)

    monkeypatch.setattr(where, name, fails_later)
    trainer.train()
    assert trainer.state.global_step == 3
    assert ends_with(trainer) == alone
    assert watcher.failed_at is not None
    assert said(caplog, "observing probes failed", "Fault")
    assert said(caplog, "observing probes was off from step")
    monkeypatch.setattr(where, name, right)
    trainer.train()  # a new run is watched again
    assert load_run(tmp_path).observed_steps == [0, 1, 2, 3]
    assert "failures" not in load_run(tmp_path).meta


@pytest.mark.parametrize("part", ["observing", "explaining"])
def test_on_error_raise_ends_the_run_and_leaves_no_hook(part, model_folder, tmp_path, monkeypatch):
    if part == "observing":
        monkeypatch.setattr(scoring, "_token_scores", fail)
    else:
        monkeypatch.setattr(influence, "account_of_probes", fail)
    trainer, _ = watched("sft", model_folder, tmp_path, on_error="raise")
    with pytest.raises(Fault):
        trainer.train()
    assert len(trainer.model._forward_hooks) == 0


@pytest.mark.parametrize("wrong", ["ignore", None, True])
def test_other_values_of_on_error_are_named(wrong, model_folder, tmp_path):
    with pytest.raises(ValueError, match="on_error is"):
        watched("sft", model_folder, tmp_path, on_error=wrong)


def test_random_numbers_drawn_by_what_the_user_gives_are_given_back():
    torch.manual_seed(0)
    before = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    with keeping_random():
        np.random.rand()
        random.random()
        torch.rand(1)
    assert (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())) == before


def test_a_removed_probe_callback_is_one_clear_word(model_folder, tmp_path, caplog):
    trainer, watcher = watched("sft", model_folder, tmp_path)
    trainer.remove_callback(watcher)
    trainer.train()
    assert len(said(caplog, "explaining steps failed", "ProbeCallback that keeps the run log was removed")) == 1
    assert trainer.state.global_step == 3


def test_a_model_that_was_replaced_is_told(model_folder, tmp_path, caplog):
    trainer, _ = watched("sft", model_folder, tmp_path, influence=False)
    trainer.model = build_trainer("sft", model_folder, tmp_path / "other").model
    trainer.train()
    assert said(caplog, "trainer.model was replaced")
    assert load_run(tmp_path).observed_steps == []


# ---- a log that cannot be written ------------------------------------------------------------------------------------


def removed(folder):
    shutil.rmtree(folder)


def replaced_by_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("in the way")


def part_in_the_way(folder):
    (folder / "sequences" / "step_000000002.parquet").mkdir(parents=True)


class AtStep(TrainerCallback):
    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


@pytest.mark.parametrize("happens", [removed, replaced_by_a_file, part_in_the_way])
def test_a_log_that_is_lost_does_not_end_the_run(happens, model_folder, tmp_path, caplog):
    trainer, watcher = watched("sft", model_folder, tmp_path)
    trainer.add_callback(AtStep(1, lambda: happens(tmp_path / "dynamics")))
    trainer.train()
    assert trainer.state.global_step == 3
    assert watcher.failed_at == 2
    assert len(said(caplog, "step 2: observing probes failed")) == 1
    assert len(said(caplog, "observing probes was off from step 2 to the end at step 3", "nothing of it")) == 1
    if happens is part_in_the_way:
        assert load_run(tmp_path).observed_steps == [0, 1]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_was_written_before_the_disk_was_full_stays_and_a_resumed_run_goes_on(
    error, model_folder, tmp_path, monkeypatch, caplog
):
    replace, full = Path.replace, []

    def refuse(file, target):
        if full and "dynamics" in str(file):
            raise OSError(error, "the disk says no")
        return replace(file, target)

    monkeypatch.setattr(Path, "replace", refuse)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer, _ = watched("sft", model_folder, tmp_path, **saving)
    trainer.add_callback(AtStep(2, lambda: full.append(1)))
    trainer.train()
    assert trainer.state.global_step == 4
    assert load_run(tmp_path).observed_steps == [0, 1, 2]
    assert said(caplog, "observing probes failed", "the disk says no")
    full.clear()
    resumed, _ = watched("sft", model_folder, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert load_run(tmp_path).observed_steps == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("file", ["out", "out/dynamics", "log"])
def test_a_folder_that_cannot_be_written_is_refused_at_attach(file, model_folder, tmp_path):
    trainer = build_trainer("sft", model_folder, tmp_path / "out")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    if (tmp_path / file).is_dir():
        (tmp_path / file).rmdir()
    (tmp_path / file).write_text("in the way")
    before = list(trainer.callback_handler.callbacks)
    folder = tmp_path / "log" / "below" if file == "log" else None
    with pytest.raises(
        (NotADirectoryError, ValueError), match=r"the run log cannot be written to|is a file; give a folder"
    ):
        watch(trainer, short_probes(1), log_folder=folder)
    assert trainer.callback_handler.callbacks == before


# ---- rows and names --------------------------------------------------------------------------------------------------


class Recording(TrainerCallback):
    """Notes that a row came only between the beginning and the end of training, and stood last in the history."""

    def __init__(self):
        self.begun, self.rows = False, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert self.begun
        assert logs.items() <= state.log_history[-1].items()  # transformers' progress bar takes total_flos out of logs
        assert state.log_history[-1]["step"] == state.global_step
        self.rows.append(state.log_history[-1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sft", {"logging_steps": 2, "max_steps": 4}),
        ("plain", {"logging_steps": 1}),
        ("dpo", {"logging_steps": 100}),
        ("sft", {"logging_steps": 1, "eval_on_start": True}),
    ],
)
def test_the_trainers_own_row_stands_first_and_every_callback_sees_a_consistent_log(
    kind, options, model_folder, tmp_path
):
    before, after = Recording(), Recording()
    options = dict(options)
    evaluates = options.pop("eval_on_start", False)
    trainer = build_trainer(kind, model_folder, tmp_path, callbacks=[before], **options)
    trainer.args.eval_on_start, trainer.eval_dataset = evaluates, trainer.train_dataset
    watch(trainer, short_probes(1), every=1)
    trainer.add_callback(after)
    trainer.train()
    history = trainer.state.log_history
    assert (evaluates and "eval_loss" in history[0]) or "loss" in history[0] or "train_loss" in history[0]
    observed = [row["step"] for row in history if "probe/chosen_logp" in row]
    assert sorted(observed) == load_run(tmp_path).observed_steps
    assert before.rows == after.rows
    assert [row for row in history if row not in before.rows] == (
        [row for row in history if "probe/chosen_logp" in row] if options.get("logging_steps") == 100 else []
    )


def test_two_probe_sets_have_names_of_their_own(model_folder, tmp_path):
    trainer = build_trainer("sft", model_folder, tmp_path)
    first = watch(trainer, make_probes(1), every=1)
    second = watch(trainer, make_probes(2), every=1, log_folder=tmp_path / "held out", influence={"every": 1})
    with pytest.raises(ValueError, match="InfluenceCallback"):
        watch(trainer, make_probes(3), log_folder=tmp_path / "third", influence=True)
    with pytest.raises(ValueError, match="named 'held_out'"):
        watch(trainer, make_probes(3), log_folder=tmp_path / "other" / "held out")
    third = watch(trainer, make_probes(3), every=1, log_folder=tmp_path / "more" / "held out", name="more")
    alerts = [SqueezingAlert(trainer, watcher=watcher) for watcher in (first, second)]
    assert [alert.watcher for alert in alerts] == [first, second]
    trainer.train()
    rows = trainer.state.log_history
    for watcher, suffix in ((first, ""), (second, ".held_out"), (third, ".more")):
        values = {row["step"]: row[f"probe/chosen_logp{suffix}"] for row in rows if f"probe/chosen_logp{suffix}" in row}
        of_log = load_run(watcher.log_folder).steps.set_index("step")["probe/chosen_logp"].to_dict()
        assert values == of_log
    assert any("influence/explained.held_out" in row for row in rows)
    assert not any("influence/explained" in row for row in rows)
