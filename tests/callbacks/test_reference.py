"""The reference of the probes is the one that is in use, or the model at step 0, and the log says which."""

import logging

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from llm_dynamics import load_run, watch
from tests.training import KINDS, build_trainer, make_probes, save_tiny_model, weights_of


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # so that what moves between base and adapter is more than rounding
    model.save_pretrained(folder)
    return folder


def watched(trainer, resume=None, **options):
    callback = watch(trainer, make_probes(2), 1, **options)
    trainer.train(resume_from_checkpoint=resume)
    return load_run(callback.log_folder)


def adapted(kind, folder, output_dir, init, **arguments):
    """A trainer whose adapter is initialised as `init` says."""
    trainer = build_trainer(kind, folder, output_dir, **arguments)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=init)
    return KINDS[kind][0](
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=trainer.args,
        train_dataset=build_trainer(kind, folder, output_dir).train_dataset,
        processing_class=trainer.processing_class,
        peft_config=config,
    )


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_where_the_reference_was_computed_beforehand_it_is_the_model_at_step_0(kind, model_folder, tmp_path):
    runs = [
        watched(build_trainer(kind, model_folder, tmp_path / str(early), precompute_ref_log_probs=early))
        for early in (False, True)
    ]
    assert [run.meta["reference"] for run in runs] == ["reference model", "step 0"]
    kept, early = (run.sequences for run in runs)
    assert early["ref_logp_sum"].to_numpy() == pytest.approx(kept["ref_logp_sum"].to_numpy(), abs=1e-3)
    tokens = [run.tokens["ref_logp"].to_numpy() for run in runs]
    assert tokens[1] == pytest.approx(tokens[0], abs=1e-3)


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian", True])
def test_where_no_loss_takes_one_the_reference_is_what_training_began_with(init, model_folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "llm_dynamics"):
        run = watched(adapted("sft", model_folder, tmp_path, init, max_steps=2))
    rows = run.sequences
    first = rows[rows["step"] == 0]
    assert first["ref_logp_sum"].to_numpy() == pytest.approx(first["logp_sum"].to_numpy(), abs=1e-3)
    assert rows.groupby("probe_id")["ref_logp_sum"].nunique().eq(1).all()
    assert run.meta["reference"] == ("step 0" if init in ("pissa", "olora") else "adapter off")
    assert ("The reference is the model at step 0" in caplog.text) == (init in ("pissa", "olora"))


def test_a_loss_that_takes_another_than_the_initial_model_is_followed_and_said(model_folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "llm_dynamics"):
        run = watched(adapted("dpo", model_folder, tmp_path, "pissa", max_steps=1))
    assert run.meta["reference"] == "adapter off"
    assert "at step 0, the log ratio is not 0" in caplog.text
    first = run.sequences[run.sequences["step"] == 0]
    assert (first["logp_sum"] - first["ref_logp_sum"]).abs().max() > 0.1


def test_a_resumed_run_takes_the_model_at_step_0_from_its_log(model_folder, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "precompute_ref_log_probs": True}
    watched(build_trainer("dpo", model_folder, tmp_path, max_steps=2, **saving))
    resumed = build_trainer("dpo", model_folder, tmp_path, max_steps=4, **saving)
    run = watched(resumed, resume=str(tmp_path / "checkpoint-2"))
    assert run.sequences["step"].max() == 4
    assert run.meta["reference"] == "step 0"
    assert run.sequences.groupby("probe_id")["ref_logp_sum"].nunique().eq(1).all()
    tokens = run.tokens.groupby(["probe_id", "position"])["ref_logp"]
    assert tokens.nunique().eq(1).all()


def test_a_resumed_adapter_that_took_a_part_of_the_weights_keeps_the_model_at_step_0(model_folder, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    watched(adapted("sft", model_folder, tmp_path, "pissa", max_steps=1, **saving))
    resumed = adapted("sft", model_folder, tmp_path, "pissa", max_steps=2, **saving)
    run = watched(resumed, resume=str(tmp_path / "checkpoint-1"))
    assert run.meta["reference"] == "step 0"
    rows = run.sequences
    assert rows["step"].max() == 2
    assert rows.groupby("probe_id")["ref_logp_sum"].nunique().eq(1).all()


def test_a_reference_that_follows_the_policy_is_scored_each_time(model_folder, tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    run = watched(build_trainer("dpo", model_folder, tmp_path, **options))
    assert run.meta["reference"] == "reference model, synchronised"
    assert run.sequences.groupby("probe_id")["ref_logp_sum"].nunique().gt(1).all()


def native(folder, saved=None):
    """A model whose adapter transformers itself put in, and one that it loaded from a folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    if saved is None:
        return model
    model.save_pretrained(saved)
    model = AutoModelForCausalLM.from_pretrained(saved)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("kind", ["sft", "plain", "dpo"])
def test_adapters_that_transformers_put_in_are_watched_and_explained(kind, loaded, model_folder, tmp_path):
    def build(output_dir, saved):
        trainer = build_trainer(kind, model_folder, output_dir, max_steps=2)
        trainer_class = KINDS[kind][0]
        options = {"data_collator": trainer.data_collator} if kind == "plain" else {}
        data = build_trainer(kind, model_folder, output_dir).train_dataset
        model = native(model_folder, saved if loaded else None)
        return trainer_class(
            model=model, args=trainer.args, train_dataset=data, processing_class=trainer.processing_class, **options
        )

    alone = build(tmp_path / "alone", tmp_path / "a")
    alone.train()
    trainer = build(tmp_path / "watched", tmp_path / "b")
    run = watched(trainer, influence=True)
    assert weights_of(trainer) == weights_of(alone)
    assert run.meta["adapter"] == "transformers"
    assert run.meta["adapter_config"]["r"] == 4
    assert run.accounts["explained"].dropna().gt(0.99).all()
    if kind != "dpo":
        assert run.meta["reference"] == "adapter off"
