"""Resumed runs: what cannot be known is said, and a log that does not fit is refused."""

import contextlib
import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from llm_dynamics.callbacks import DisplacementCallback, watch
from llm_dynamics.callbacks.moment_file import FILE, load_history
from llm_dynamics.runlog import RunLogError, RunLogWriter, load_run, schema
from tests.callbacks.explained import by_family, short_probes
from tests.trainers.runs import Script
from tests.trainers.runs import build as build_grpo
from tests.training import build_trainer, save_tiny_model

SAVED = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def prepare(model_folder, output_dir, *, history="split", **options):
    trainer = build_trainer("sft", model_folder, output_dir, **SAVED | options)
    influence = {"every": 1, "history": history, "training_tokens": ()}
    watch(trainer, short_probes(), every=2, influence=influence)
    return trainer


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """Four steps of SFT with momentum split by labels, and a checkpoint at 2."""
    folder = tmp_path_factory.mktemp("finished")
    prepare(model_folder, folder).train()
    return folder


def resume(model_folder, output_dir, **options):
    trainer = prepare(model_folder, output_dir, **options)
    trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-2"))
    return load_run(output_dir)


# ---- the labels of momentum -----------------------------------------------------------------------------------------


def test_the_checkpoint_holds_the_moment_by_label_and_nothing_of_a_run_that_does_not_split_it(
    model_folder, finished, tmp_path
):
    tensors = load_file(finished / "checkpoint-2" / FILE)
    trainer = build_trainer("sft", model_folder, tmp_path)
    trained = [parameter.shape for parameter in trainer.model.parameters()]
    assert sorted(tensor.shape for tensor in tensors.values()) == sorted(trained * (len(tensors) // len(trained)))
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.abs().max() > 0 for tensor in tensors.values())
    prepare(model_folder, tmp_path, history="total").train()
    assert (tmp_path / "checkpoint-2").is_dir()
    assert not list(tmp_path.rglob(FILE))


@pytest.mark.parametrize("how", ["moved", "by_true"])
def test_the_history_is_found_wherever_the_checkpoint_lies(how, model_folder, finished, tmp_path, caplog):
    copy = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(copy / "checkpoint-4")
    checkpoint = True
    if how == "moved":
        checkpoint = str((copy / "checkpoint-2").rename(tmp_path / "elsewhere"))
    trainer = prepare(model_folder, copy)
    trainer.train(resume_from_checkpoint=checkpoint)
    run = load_run(copy)
    assert run.meta["resumed_at"] == [2]
    assert run.accounts["note"].isna().all()
    pd.testing.assert_frame_equal(run.influence, load_run(finished).influence, check_exact=True)
    assert "which tokens filled its momentum" not in caplog.text


@pytest.mark.parametrize("left", ["nothing", "other_parameters"])
def test_without_its_history_a_resumed_run_leaves_the_past_in_momentum_and_says_so(
    left, model_folder, finished, tmp_path, caplog
):
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "checkpoint-2" / FILE).unlink()
    if left == "other_parameters":
        prepare(model_folder, tmp_path / "lora", lora=True, max_steps=2).train()
        shutil.copy(tmp_path / "lora" / "checkpoint-2" / FILE, copy / "checkpoint-2" / FILE)
    run, whole = resume(model_folder, copy), load_run(finished)
    assert "what is older than step 2 stays in the cause `momentum`" in caplog.text
    notes = run.accounts.set_index("step")["note"]
    assert notes[[1, 2]].isna().all()
    assert all("momentum are known from step 2 on" in notes[step] for step in (3, 4))

    ours, theirs = by_family(run), by_family(whole)
    labelled = [label for label in ours.index.levels[2] if label.startswith("momentum_")]
    assert labelled
    assert not set(ours[3].index.get_level_values("cause")) & set(labelled)  # step 3: all of it is of the past
    assert set(labelled) <= set(ours[4].index.get_level_values("cause"))  # step 4: what step 3 added has its label
    for step in (3, 4):
        mine, known = (
            shares[step][lambda s: s.index.get_level_values("cause").str.startswith("momentum")]
            for shares in (ours, theirs)
        )
        # the books balance as ever: what has no label any more is in `momentum`, and nothing else has changed
        np.testing.assert_allclose(mine.groupby("family").sum(), known.groupby("family").sum(), rtol=1e-4, atol=1e-6)
        assert mine[:, "momentum"].abs().min() > 1e-4 > known[:, "momentum"].abs().max()
    pd.testing.assert_frame_equal(run.sequences, whole.sequences, check_exact=True)

    # a checkpoint of the run that went on knows as much
    again = prepare(model_folder, copy, max_steps=5)
    again.train(resume_from_checkpoint=str(copy / "checkpoint-4"))
    assert "known from step 2 on" in load_run(copy).accounts.set_index("step")["note"][5]


def test_a_new_run_of_the_same_trainer_begins_its_history_anew(model_folder, finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    trainer = prepare(model_folder, copy)
    trainer.train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    trainer.train()
    run = load_run(copy)
    assert "resumed_at" not in run.meta
    assert run.explained_steps == [1, 2, 3, 4]
    assert run.accounts["note"].isna().all()
    causes = set(run.influence.query("step == 1")["cause"])  # transformers keeps the optimizer, and so its momentum
    assert not [cause for cause in causes if cause.startswith("momentum_")]


# ---- when it last measured ------------------------------------------------------------------------------------------


def quietly(train, **options):
    """Train without the tables of completions that GRPO prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return train(**options)


def measured_steps(trainer):
    return [row["step"] for row in trainer.state.log_history if "lld/questions" in row]


def test_displacement_without_a_run_log_goes_on_in_its_rhythm(tmp_path):
    def prepared(max_steps=5):
        trainer = build_grpo(tmp_path, script=Script(), max_steps=max_steps, save_strategy="steps", save_steps=2)
        trainer.add_callback(DisplacementCallback(trainer, every=4))
        return trainer

    trainer = prepared()
    quietly(trainer.train)
    assert measured_steps(trainer) == [1, 5]
    resumed = prepared()
    quietly(resumed.train, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert measured_steps(resumed) == [1, 5]
    quietly(resumed.train)  # a new run of the same trainer
    assert measured_steps(resumed) == [1, 5]


# ---- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["probes", "schema"])
def test_a_log_that_does_not_fit_is_refused_with_both_shown_and_stays_as_it_is(
    changed, model_folder, finished, tmp_path
):
    copy = shutil.copytree(finished, tmp_path / "run")
    meta = copy / "dynamics" / "meta.json"
    probes = short_probes()
    shown = [str(copy / "dynamics")]
    if changed == "schema":
        said = json.loads(meta.read_text(encoding="utf-8"))
        meta.write_text(json.dumps(said | {"schema_version": 99}), encoding="utf-8")
        shown += ["schema version 99", "reads 1"]
    else:
        shown += [probes.fingerprint(), short_probes(1).fingerprint()]
        probes = short_probes(1)
    before = {file: file.read_bytes() for file in (copy / "dynamics").rglob("*.*")}
    trainer = build_trainer("sft", model_folder, copy, **SAVED)
    watch(trainer, probes, every=2)
    with pytest.raises(RunLogError) as refused:
        trainer.train(resume_from_checkpoint=str(copy / "checkpoint-2"))
    assert [words for words in shown if words not in str(refused.value)] == []
    assert {file: file.read_bytes() for file in (copy / "dynamics").rglob("*.*")} == before


# ---- damaged files --------------------------------------------------------------------------------------------------


def flip(file):
    content = bytearray(file.read_bytes())
    content[-100] ^= 1  # of a tensor
    file.write_bytes(content)


def other_metadata(**about):
    def spoil(file):
        save_file(load_file(file), file, metadata=about)

    return spoil


DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-10]),
    "empty": lambda file: file.write_bytes(b""),
    "garbage": lambda file: file.write_bytes(b"\xff" * 100),
    "a flipped bit": flip,
    "no metadata": lambda file: save_file(load_file(file), file),
    "entries are no JSON": other_metadata(entries="[", since="0"),
    "entries are numbers": other_metadata(entries="[1, 2]", since="0"),
    "no step": other_metadata(entries="[]", since="soon"),
    "a tensor is missing": other_metadata(entries='[["up", "x"], ["up", "y"]]', since="0", digest="0"),
}


@pytest.mark.parametrize("spoil", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_moment_file_is_named_and_not_used(finished, model_folder, tmp_path, caplog, spoil):
    shutil.copy(finished / "checkpoint-2" / FILE, tmp_path / FILE)
    parameters = dict(build_trainer("sft", model_folder, tmp_path).model.named_parameters())
    assert load_history(tmp_path, parameters) is not None
    assert caplog.text == ""
    spoil(tmp_path / FILE)
    assert load_history(tmp_path, parameters) is None
    assert f"{tmp_path / FILE} is damaged and is not used" in caplog.text


def test_a_run_resumes_though_moment_file_and_first_part_are_damaged_and_loses_nothing_good(
    model_folder, finished, tmp_path, caplog
):
    copy = shutil.copytree(finished, tmp_path / "run")
    flip(copy / "checkpoint-2" / FILE)
    first = copy / "dynamics" / "sequences" / schema.part_name(0)
    first.write_bytes(first.read_bytes()[:100])
    kept = {file.name: file.read_bytes() for file in (copy / "dynamics" / "sequences").iterdir()}
    resume(model_folder, copy)
    assert f"{copy / 'checkpoint-2' / FILE} is damaged" in caplog.text
    assert f"changes are not counted from step 0 of the run log: cannot read {first}" in caplog.text
    after = {file.name: file.read_bytes() for file in (copy / "dynamics" / "sequences").iterdir()}
    assert {name: after[name] for name in (schema.part_name(0), schema.part_name(2))} == {
        name: kept[name] for name in (schema.part_name(0), schema.part_name(2))
    }
    run = load_run(copy, errors="warn")
    with pytest.warns(UserWarning, match="step_000000000"):
        _ = run.sequences
    pd.testing.assert_series_equal(
        run.sequences["logp_sum"], load_run(finished).sequences.query("step > 0")["logp_sum"].reset_index(drop=True)
    )


def test_a_run_in_the_folder_of_a_live_one_says_so_once(model_folder, tmp_path, caplog):
    busy = RunLogWriter(tmp_path / "dynamics")
    busy.claim()
    prepare(model_folder, tmp_path, max_steps=1, save_strategy="no").train()
    assert load_run(tmp_path / "dynamics-2").meta["finished_at_step"] == 1
    said = [record for record in caplog.records if "another run that has not ended" in record.getMessage()]
    assert len(said) == 1
    assert str(tmp_path / "dynamics-2") in said[0].getMessage()
    assert [entry.name for entry in (tmp_path / "dynamics").iterdir()] == [".lock"]


@pytest.mark.parametrize("kind", ["thesis", "checkpoints", "empty name"])
def test_a_log_folder_of_others_is_refused_when_watching_begins(model_folder, tmp_path, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ("checkpoint-5" if kind == "checkpoints" else "thesis.txt")).touch()
    trainer = build_trainer("sft", model_folder, tmp_path / "mine")
    with pytest.raises(ValueError, match="log_folder"):
        watch(trainer, short_probes(), log_folder="" if kind == "empty name" else tmp_path / "mine")
    assert len(list((tmp_path / "mine").iterdir())) == 1
