"""Training in bfloat16, accounts in float32: tokens add up to their labels, and what is lost between has a row."""

import pandas as pd
import pytest
import torch

from llm_dynamics.callbacks import watch
from llm_dynamics.callbacks.probe_account import REMAINDER
from llm_dynamics.callbacks.token_account import TokenAccount, with_tokens
from llm_dynamics.runlog import load_run
from tests import training
from tests.callbacks.explained import CHOSEN, GENTLE, by_family, explain, short_probes
from tests.callbacks.test_influence_edge_runs import OddHead
from tests.training import build_trainer, save_tiny_model

RUNS = {
    "sft": ("sft", {}),
    "dpo-lora": ("dpo", {"lora": True, "learning_rate": 5e-3}),
    "dpo-by-role": ("dpo", {"influence": {"split_by": "role"}}),
    "grpo": ("grpo", {}),
    "plain": ("plain", {}),  # its loss is inside the model's forward, past the float32 logits that accelerate hands out
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", RUNS)
def test_under_autocast_training_tokens_add_up_to_their_labels_and_precision_carries_the_rest(name, folder, tmp_path):
    kind, options = RUNS[name]
    _, run = explain(kind, folder, tmp_path, bf16=True, **options)
    shares = by_family(run)
    labels = run.training_tokens["c"].map(lambda c: "up" if c < 0 else "down")
    if name == "dpo-by-role":
        labels = labels.map({"up": "chosen", "down": "rejected"})
    summed = run.training_tokens.groupby(["step", "target", labels])["share"].sum()
    for key, share in summed.items():
        assert shares[key] == pytest.approx(share, rel=1e-9, abs=1e-9)
    precision = shares.xs("precision", level="cause")
    assert set(precision.index.get_level_values("family")) == {"chosen", "rejected"}  # whose tokens are told
    assert 1e-6 < precision.abs().max() < 0.1 * summed.abs().max()
    measured = run.family_influence().groupby(["step", "family"])["measured"].first()
    assert (shares.groupby(["step", "family"]).sum() - measured).abs().max() < 1e-9
    assert (run.accounts["explained"] > 0.999).all()
    assert run.accounts["note"].isna().all()


def test_rows_of_probes_say_so_in_a_note_instead(folder, tmp_path):
    """Adam's first step on one pair: gradients that cancel leave little but their rounding."""
    influence = {"detail": "probe", "training_tokens": ["chosen"]}
    _, run = explain("sft", folder, tmp_path, bf16=True, influence=influence, max_steps=1)
    assert "precision" not in set(run.influence["cause"])
    up = run.influence.query("family == 'chosen' and cause == 'up'")["share"].mean()
    tokens = run.training_tokens["share"]
    note = run.accounts["note"].iloc[0]
    missed = abs(up - tokens.sum()) > 0.01 * tokens.abs().sum()
    assert missed == pd.notna(note)
    if missed:
        assert f"training tokens in chosen add up to `up` less {up - tokens.sum():.3g} nats" in note


def test_an_account_in_float32_needs_no_such_row(folder, tmp_path):
    _, run = explain("dpo", folder, tmp_path, influence={"training_tokens": ["chosen"]}, max_steps=1)
    assert "precision" not in set(run.influence["cause"])
    assert run.accounts["note"].isna().all()


def test_a_model_that_is_run_whole_is_explained_outside_the_autocast_of_accelerate(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "AutoModelForCausalLM", OddHead)
    trainer, run = explain("plain", folder, tmp_path, bf16=True)
    assert (run.accounts["explained"] > 0.9995).all()
    assert trainer.model.forward.__wrapped__ is not None  # accelerate's, put back


def halved(gradient):
    return gradient / 2


def cut(gradient):
    return gradient.clamp(-1e-3, 1e-3)


def noisy(gradient):
    return gradient + 0.01 * torch.ones_like(gradient)


@pytest.mark.parametrize("hook", [halved, cut, noisy])
def test_a_hook_on_the_gradient_of_a_weight_is_noted(hook, folder, tmp_path):
    trainer = build_trainer("dpo", folder, tmp_path, **GENTLE | {"max_steps": 1, "optim": "sgd"})
    for name, parameter in trainer.model.named_parameters():
        if "mlp" in name or hook is not halved:
            parameter.register_hook(hook)
    influence = {"every": 1, "training_tokens": [*CHOSEN]}
    watch(trainer, short_probes(families=("chosen", "rejected")), every=1, influence=influence)
    trainer.train()
    run = load_run(tmp_path)
    assert "the gradient that was used is not that of the loss" in run.accounts["note"].iloc[0]


def test_the_row_of_precision_is_what_the_labels_lose():
    rows = [("chosen", "up", 2.0), ("chosen", "down", -1.0), ("chosen", REMAINDER, 0.1), ("other", "up", 5.0),
            ("other", REMAINDER, 0.0)]  # fmt: skip
    influence = pd.DataFrame(rows, columns=["family", "cause", "share"]).assign(measured=1.1)
    missed = {("chosen", "up"): 0.25, ("chosen", "down"): -0.5}
    tokens = TokenAccount(None, None, None, {("chosen", "up"): 1.0}, missed, {}, 0.0)
    frame = with_tokens(influence, tokens, coarse=True)
    assert list(zip(frame["family"], frame["cause"], frame["share"], strict=True)) == [
        ("chosen", "up", 1.75),
        ("chosen", "down", -0.5),
        ("chosen", "precision", -0.25),
        ("chosen", REMAINDER, 0.1),
        ("other", "up", 5.0),
        ("other", REMAINDER, 0.0),
    ]
    assert frame["own_share"].tolist()[0] == 1.0
    assert frame["own_share"].isna().sum() == 5
