"""Runs whose steps cannot be explained are refused when the callback is attached: by name, with the way out."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.training_args import OptimizerNames
from trl import RewardConfig, RewardTrainer

from llm_dynamics.callbacks import InfluenceCallback, ProbeCallback, watch
from tests.conftest import FIRST, PREFERENCES
from tests.training import build_trainer, make_probes, save_tiny_model, weights_of


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def trainer(model_folder, tmp_path):
    return build_trainer("sft", model_folder, tmp_path)


@pytest.fixture(scope="module")
def probes():
    return make_probes(2)


def assert_untouched(trainer, folder):
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, InfluenceCallback | ProbeCallback)]
    assert not trainer.model._forward_hooks
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    assert not (folder / "dynamics").exists()


def deepspeed(trainer):
    trainer.is_deepspeed_enabled = True
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=2)),
        mixed_precision="no",
        device=trainer.accelerator.device,
    )


def reentrant(trainer):
    trainer.args.gradient_checkpointing = True
    trainer.args.gradient_checkpointing_kwargs = {"use_reentrant": True}


def setting(name):
    return lambda trainer: setattr(trainer.args, name, True)


def in_float16(trainer):
    trainer.model.half()


def one_layer_in_float16(trainer):
    trainer.model.model.norm.half()


def mixed_by_accelerate(precision):
    def change(trainer):
        trainer.accelerator = SimpleNamespace(
            mixed_precision=precision, state=SimpleNamespace(), device=trainer.accelerator.device, autocast=nullcontext
        )

    return change


def layer_by_layer(trainer):
    trainer.optimizer = LayerWiseDummyOptimizer(optimizer_dict={})


def named_optimizer(name):
    return lambda trainer: setattr(trainer.args, "optim", OptimizerNames(name))


UNEXPLAINABLE = {
    "float16_weights": (in_float16, "the trained weights are float16: .*second moment underflow"),
    "float16_layer": (one_layer_in_float16, "the trained weights are float16"),
    "fp16_of_accelerate": (mixed_by_accelerate("fp16"), r"float16 mixed precision.*use bf16"),
    "fp8_of_accelerate": (mixed_by_accelerate("fp8"), r"fp8 mixed precision"),
    "layerwise_object": (layer_by_layer, "LayerWiseDummyOptimizer steps layer by layer inside backward"),
    "layerwise_galore": (named_optimizer("galore_adamw_layerwise"), "galore_adamw_layerwise steps layer by layer"),
    "layerwise_lomo": (named_optimizer("adalomo"), "adalomo steps layer by layer inside backward"),
    "deepspeed": (deepspeed, "DeepSpeed partitions optimizer state"),
    "quantised": (lambda trainer: setattr(trainer.model, "is_quantized", True), "the model is quantised"),
    "fp16": (setting("fp16"), r"float16 mixed precision.*use bf16"),
    "torch_compile": (setting("torch_compile"), r"torch_compile.*turn it off"),
    "liger": (setting("use_liger_kernel"), r"Liger kernels.*turn use_liger_kernel off"),
    "reentrant": (reentrant, r'reentrant gradient checkpointing.*"use_reentrant": False'),
    "offloading": (setting("activation_offloading"), "turn activation_offloading off"),
    "data_parallel": (lambda trainer: setattr(trainer.args, "_n_gpu", 2), r"nn.DataParallel.*accelerate launch"),
}


@pytest.mark.parametrize("case", UNEXPLAINABLE)
def test_a_run_that_cannot_be_explained_is_refused_and_may_be_watched(case, trainer, probes, tmp_path):
    change, message = UNEXPLAINABLE[case]
    accelerator = trainer.accelerator
    change(trainer)
    for attach in (
        lambda: watch(trainer, probes, influence=True),
        lambda: trainer.add_callback(InfluenceCallback(trainer, probes)),
    ):
        with pytest.raises(NotImplementedError, match=rf"cannot be explained: .*{message}.*watch\(trainer, probes\)"):
            attach()
        trainer.accelerator, changed = accelerator, trainer.accelerator
        assert_untouched(trainer, tmp_path)
        trainer.accelerator = changed
    assert isinstance(watch(trainer, probes), ProbeCallback)  # the way out


class Rounded(torch.autograd.Function):
    """Rounds, with the gradient passed straight through."""

    @staticmethod
    def forward(ctx, x):
        return (x * 64).round() / 64

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class RoundedLinear(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, Rounded.apply(self.weight), self.bias)


class RoundedNorm(LlamaRMSNorm):
    def forward(self, x):
        return Rounded.apply(super().forward(x))


class RoundedEmbedding(nn.Embedding):
    def forward(self, ids):
        return nn.functional.embedding(ids, Rounded.apply(self.weight), self.padding_idx)


class SparseLinear(nn.Linear):
    def forward(self, x):
        flat = x.flatten(0, -2)
        return torch.sparse.mm(self.weight.to_sparse(), flat.T).T.unflatten(0, x.shape[:-1])


UNDERIVABLE = {
    "weight": (lambda model: model.model.layers[1].mlp.down_proj, RoundedLinear, r"layers\.1\.mlp\.down_proj"),
    "norm": (lambda model: model.model.norm, RoundedNorm, r"norm"),
    "embedding": (lambda model: model.get_input_embeddings(), RoundedEmbedding, r"embed_tokens"),
    "sparse": (lambda model: model.model.layers[0].self_attn.o_proj, SparseLinear, r"layers\.0\.self_attn\.o_proj"),
}


@pytest.mark.parametrize("case", UNDERIVABLE)
def test_a_layer_without_a_forward_derivative_is_named_when_the_callback_is_attached(case, trainer, probes, tmp_path):
    find, kind, name = UNDERIVABLE[case]
    find(trainer.model).__class__ = kind
    state, weights = torch.get_rng_state(), weights_of(trainer)
    modes = [module.training for module in trainer.model.modules()]
    with pytest.raises(NotImplementedError, match=rf"{name} \(tests.*{kind.__name__}\) has no forward-mode derivative"):
        watch(trainer, probes, influence=True)
    assert_untouched(trainer, tmp_path)
    assert not [m for m in trainer.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert torch.equal(torch.get_rng_state(), state)
    assert weights_of(trainer) == weights
    assert [module.training for module in trainer.model.modules()] == modes
    assert isinstance(watch(trainer, probes), ProbeCallback)


def test_float16_weights_that_are_not_trained_do_not_matter(model_folder, tmp_path, probes):
    trainer = build_trainer("sft", model_folder, tmp_path, lora=True)
    for parameter in trainer.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.half()
    InfluenceCallback(trainer, probes)


def test_non_reentrant_checkpointing_is_explained(trainer, probes):
    trainer.args.gradient_checkpointing_kwargs = {"use_reentrant": False}
    watch(trainer, probes, influence=True)


def test_fsdp_is_refused_as_for_probes(trainer, probes, tmp_path):
    trainer.is_fsdp_enabled = True
    with pytest.raises(NotImplementedError, match=r"FSDP version 1 flattens the parameters.*train with DDP"):
        InfluenceCallback(trainer, probes)
    assert_untouched(trainer, tmp_path)


def test_a_reward_trainer_is_refused(model_folder, tmp_path, probes):
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1),
        RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    with pytest.raises(NotImplementedError, match=r"RewardTrainer trains a scalar score head.*Watch the policy"):
        InfluenceCallback(trainer, probes)
    assert_untouched(trainer, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0; allowed: 1, 2"),
        ({"every": True}, "every is True"),
        ({"tokens_every": 0}, "tokens_every is 0"),
        ({"rule": "simpson"}, "rule is 'simpson'; allowed: 'start', 'midpoint', 'gauss2'"),
        ({"detail": "word"}, "detail is 'word'; allowed: 'family', 'probe', 'token'"),
        ({"history": "all"}, "history is 'all'; allowed: 'total', 'split'"),
        ({"split_by": "length"}, "split_by is 'length'; allowed: 'sign', 'role'"),
        ({"families": ("chosen", "best")}, r"families: \['best'\].*'chosen'"),
        ({"families": ()}, r"families is empty.*'chosen'.*or None for all"),
        ({"training_tokens": ("best",)}, r"training_tokens: \['best'\].*'chosen'"),
        ({"families": ("chosen",), "training_tokens": ("rejected",)}, r"training_tokens: \['rejected'\].*'chosen'"),
        ({"map_probes": ("p9/chosen",)}, rf"map_probes: \['p9/chosen'\].*'{FIRST}/chosen'"),
        ({"families": ("chosen",), "map_probes": (f"{FIRST}/rejected",)}, rf"map_probes: \['{FIRST}/rejected'\]"),
    ],
)
def test_an_argument_out_of_range_is_named_with_what_is_allowed_and_nothing_is_attached(
    options, message, trainer, probes, tmp_path
):
    with pytest.raises(ValueError, match=message):
        watch(trainer, probes, influence=options)
    assert_untouched(trainer, tmp_path)
    with pytest.raises(ValueError, match=message):
        InfluenceCallback(trainer, probes, **options)
    assert_untouched(trainer, tmp_path)


def test_an_argument_that_does_not_exist_leaves_nothing_attached(trainer, probes, tmp_path):
    with pytest.raises(TypeError, match="evry"):
        watch(trainer, probes, influence={"evry": 1})
    assert_untouched(trainer, tmp_path)


def test_a_refusal_leaves_the_probes_that_were_watched_before(trainer, probes):
    callback = watch(trainer, probes)
    with pytest.raises(ValueError, match="detail is 'word'"):
        InfluenceCallback(trainer, probes, detail="word")
    assert callback in trainer.callback_handler.callbacks


def test_a_second_account_of_the_same_trainer_is_refused(trainer, probes):
    watch(trainer, probes, influence=True)
    with pytest.raises(ValueError, match="the trainer has an InfluenceCallback"):
        InfluenceCallback(trainer, probes)


def test_things_that_are_no_trainer_or_probe_set_are_named(trainer, tmp_path):
    with pytest.raises(TypeError, match="trainer must be a transformers or TRL trainer; seen dict"):
        InfluenceCallback({}, make_probes())
    with pytest.raises(TypeError, match=r"probes must be a ProbeSet.*list"):
        InfluenceCallback(trainer, PREFERENCES)
    assert_untouched(trainer, tmp_path)
