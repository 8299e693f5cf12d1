"""Runs of every odd kind that users have: the books still balance, and watching never ends training."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from llm_dynamics.callbacks import watch
from llm_dynamics.probes import ProbeSet
from llm_dynamics.runlog import load_run
from tests import training
from tests.callbacks.explained import CHOSEN, GENTLE, by_family, explain, short_probes
from tests.conftest import FIRST, PREFERENCES, SECOND
from tests.training import build_trainer, make_probes, save_tiny_model

END = "<|im_end|>"
PAIR = ("chosen", "rejected")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def assert_balanced(run, *, atol=2e-4, remainder=0.02):
    """Shares add up, the remainder is small in every family, and training tokens add up to their causes."""
    shares = by_family(run)
    whole = shares.groupby(["step", "family"]).sum().abs().max()
    assert shares.xs("remainder", level="cause").abs().max() < remainder * whole
    assert (run.accounts["explained"] > 0.999).all()
    tokens = run.training_tokens.query("kind == 'family'").groupby(["step", "target"])["share"].sum()
    labels = shares[shares.index.get_level_values("cause").isin(["up", "down"])].groupby(["step", "family"]).sum()
    assert len(tokens)
    assert (tokens - labels.rename_axis(["step", "target"]).reindex(tokens.index)).abs().max() < atol
    return shares


def prepared(build, tmp_path, *, influence=None, probes=None):
    """A run of the trainer that `build` makes, every step explained."""
    trainer = build(tmp_path)
    watch(trainer, probes or short_probes(), every=1, influence={"every": 1} | (influence or {}))
    trainer.train()
    return load_run(tmp_path)


# ---- models -----------------------------------------------------------------------------------------------------


def test_the_padding_token_inside_a_text_is_a_token_like_any_other(folder, tmp_path, monkeypatch):
    """Chat models pad with the token that ends a turn: its embedding has no gradient, and moves as the tied head."""
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token=END)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def chat(rows):
        return [{name: text.replace(" ", END, 1) for name, text in row.items()} for row in rows]

    monkeypatch.setattr(training, "PREFERENCES", chat(PREFERENCES))
    probes = ProbeSet.from_preference_dataset(chat(PREFERENCES[:2]), families=PAIR)
    accounts = [
        explain("dpo", tmp_path / "model", tmp_path / detail, probes=probes, influence={"detail": detail})[1]
        for detail in ("family", "probe")
    ]
    shares = assert_balanced(accounts[0])
    by_probe = accounts[1].influence.groupby(["step", "family", "cause"])["share"].mean()
    assert (shares - by_probe).abs().max() < 2e-4  # reverse mode and forward mode


def test_a_mixture_of_experts_is_explained(folder, tmp_path):
    """Grouped matrix products have no forward derivative; a step so small sends no token to other experts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer, run = explain("sft", tmp_path / "model", tmp_path / "run", learning_rate=1e-5)
    shares = assert_balanced(run)
    assert shares.xs("other", level="cause").abs().max() > 10 * shares.xs("rounding", level="cause").abs().max()
    assert trainer.model.config._experts_implementation not in (None, "eager")  # as it was


class OddHead(LlamaForCausalLM):
    """A model that post-processes its logits in a way of its own."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        logits = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs).logits
        logits = logits / 2 + logits.tanh()
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_a_model_whose_batches_cannot_be_replayed_has_causes_and_no_tokens(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(training, "AutoModelForCausalLM", OddHead)
    with caplog.at_level(logging.WARNING):
        _, run = explain("plain", folder, tmp_path)
    assert "training batches of OddHead cannot be replayed" in caplog.text
    assert (run.accounts["explained"] > 0.999).all()
    assert by_family(run).xs("up", level="cause").abs().min() > 1e-3
    assert len(run.training_tokens) == 0
    assert run.influence["own_share"].isna().all()


def test_bfloat16_weights_are_replayed_without_a_warning(folder, tmp_path, caplog):
    def build(output_dir):
        trainer = build_trainer("sft", folder, output_dir, **GENTLE)
        trainer.model.to(torch.bfloat16)
        return trainer

    with caplog.at_level(logging.WARNING):
        run = prepared(build, tmp_path)
    assert "replaying" not in caplog.text
    shares = assert_balanced(run)
    assert shares.xs("precision", level="cause").abs().max() > 1e-3  # what bfloat16 made of the gradient
    assert run.influence["own_share"].abs().max() < 20  # gradients that cancelled exactly once made hundreds of nats


# ---- losses -----------------------------------------------------------------------------------------------------


def own_loss(outputs, labels, num_items_in_batch=None):
    """The usual loss, by a function of the user's own: the model is called without labels."""
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def test_labels_that_are_held_back_from_the_model_are_found(folder, tmp_path):
    def build(output_dir):
        trainer = build_trainer("sft", folder, output_dir, **GENTLE)
        trainer.compute_loss_func = own_loss
        return trainer

    run = prepared(build, tmp_path / "own")
    assert_balanced(run)
    _, usual = explain("sft", folder, tmp_path / "usual")
    columns = ["step", "prompt_id", "prompt", "response", "n_tokens"]
    assert run.training_examples[columns].equals(usual.training_examples[columns])
    ours, theirs = (log.influence.query("cause == 'up'")["own_share"] for log in (run, usual))
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()  # Adam's first step magnifies rounding
    assert theirs.abs().max() > 0.1


def test_a_loss_on_prompts_too_has_own_shares(folder, tmp_path):
    _, run = explain("sft", folder, tmp_path, completion_only_loss=False)
    assert_balanced(run)
    assert set(run.training_examples["prompt_id"].dropna()) == {FIRST, SECOND}
    assert run.influence.query("family == 'chosen' and cause == 'up'")["own_share"].abs().max() > 0.1


def test_noise_on_the_embeddings_is_repeated_in_own_shares_too(folder, tmp_path, caplog):
    probes = make_probes(4, families=PAIR)
    with caplog.at_level(logging.WARNING):
        _, run = explain("sft", folder, tmp_path, probes=probes, neftune_noise_alpha=5.0)
    assert "replaying" not in caplog.text
    assert_balanced(run)


def test_a_step_whose_completions_are_all_masked_has_an_account(folder, tmp_path):
    _, run = explain("grpo", folder, tmp_path, influence={"map_probes": CHOSEN[:1]}, mask_truncated_completions=True)
    assert run.accounts["explained"].isna().all()  # there is no share of nothing
    assert len(run.training_examples) == len(run.training_tokens) == 0


@pytest.mark.parametrize("history", ["total", "split"])
def test_a_step_that_skips_its_loss_does_not_end_training(history, folder, tmp_path):
    def build(output_dir):
        trainer = build_trainer("sft", folder, output_dir, max_steps=3, learning_rate=1e-3)
        compute_loss, calls = trainer.compute_loss, []

        def sometimes(model, inputs, **kwargs):
            loss = compute_loss(model, inputs, **kwargs)
            calls.append(loss)
            return torch.zeros((), requires_grad=True) if len(calls) == 2 else loss

        trainer.compute_loss = sometimes
        return trainer

    run = prepared(build, tmp_path, influence={"history": history})
    assert run.explained_steps == [1, 2, 3]
    assert (run.accounts["explained"].isna() | (run.accounts["explained"] > 0.999)).tolist() == [True] * 3
    assert run.accounts["explained"].isna().tolist() == [False, True, False]  # nothing moved: there is no share of it
    assert list(run.training_examples["step"].unique()) == [1, 3]


def test_weights_that_are_no_numbers_do_not_end_training(folder, tmp_path):
    def build(output_dir):
        trainer = build_trainer("dpo", folder, output_dir, **GENTLE | {"max_steps": 1})
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight.fill_(float("nan"))
        return trainer

    run = prepared(build, tmp_path, influence={"map_probes": CHOSEN[:1]})
    assert run.accounts["explained"].isna().all()
    assert run.explained_steps == [1]


# ---- probes -----------------------------------------------------------------------------------------------------


def test_prompts_of_the_same_tokens_share_their_own_examples(folder, tmp_path):
    rows = [{**PREFERENCES[0], "chosen": text, "rejected": "No."} for text in ("Ten minutes.", "Light.")]
    sets = [ProbeSet.from_preference_dataset([row], families=PAIR) for row in rows]
    probes = ProbeSet(
        replace(probe, prompt_id=prompt_id, probe_id=f"{prompt_id}/{probe.family}")
        for prompt_id, one in zip((FIRST, SECOND), sets, strict=True)
        for probe in one
    )
    assert len(probes.prompt_ids) == 2
    _, run = explain("dpo", folder, tmp_path, probes=probes, influence={"training_tokens": ["chosen", *CHOSEN]})
    own = run.training_examples.set_index(["step", "example"])["prompt_id"].notna()
    tokens = run.training_tokens.query("kind == 'probe'").join(own.rename("own"), on=["step", "example"])
    tokens = tokens[tokens["own"].astype(bool)]
    by_hand = tokens.groupby(["step", tokens["c"].map(lambda c: "up" if c < 0 else "down")])["share"].sum() / 2
    logged = run.influence.query("family == 'chosen'").dropna(subset="own_share").set_index(["step", "cause"])
    assert by_hand.abs().max() > 0.1
    assert (logged["own_share"].reindex(by_hand.index) - by_hand).abs().max() < 1e-3
