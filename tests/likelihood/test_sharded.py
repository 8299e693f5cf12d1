"""Parameters that DeepSpeed partitions are gathered once, its hooks silent meanwhile; a stand-in plays DeepSpeed.

The real one runs in tests/distributed/test_deepspeed.py, where it is installed.
"""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llm_dynamics.likelihood import is_sharded, score_responses
from llm_dynamics.likelihood.head import unwrap_model
from llm_dynamics.likelihood.sharded import gathered, partitions_gathered
from tests.likelihood.models import build, make_responses


class Partitioned:
    """A model whose weights lie elsewhere, and DeepSpeed's way to get at them."""

    def __init__(self, model):
        self.model, self.gathers, self.fired = model, [], []
        self.whole = {}
        for number, weight in enumerate(model.parameters()):
            weight.ds_id, weight.ds_shape = number, weight.shape
            self.part(weight)
        for module in model.modules():
            hook = lambda *_: self.fired.append(1)  # noqa: E731
            hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
            module.register_forward_pre_hook(hook)
            module.register_forward_hook(hook)
        namespace = SimpleNamespace(zero=SimpleNamespace(GatheredParameters=self.gathering))
        self.module = namespace

    def part(self, weight):
        self.whole[weight.ds_id] = weight.data
        weight.data = torch.empty(0)
        weight.ds_status = SimpleNamespace(name="NOT_AVAILABLE")

    @contextmanager
    def gathering(self, weights):
        self.gathers += [len(weights)] if weights else []
        for weight in weights:
            assert weight.ds_status.name == "NOT_AVAILABLE", "gathered twice"
            weight.data = self.whole[weight.ds_id]
            weight.ds_status = SimpleNamespace(name="AVAILABLE")
        try:
            yield
        finally:
            for weight in weights:
                self.part(weight)


@pytest.fixture
def zero3(monkeypatch):
    made = Partitioned(build("llama_tied"))
    monkeypatch.setitem(sys.modules, "deepspeed", made.module)
    return made


def test_a_partitioned_model_has_the_scores_of_the_whole_one(zero3):
    expected = score_responses(build("llama_tied"), make_responses())
    assert is_sharded(zero3.model)
    scores = score_responses(zero3.model, make_responses())
    assert torch.equal(scores.logp_sum, expected.logp_sum)
    assert torch.equal(scores.tokens.entropy, expected.tokens.entropy)
    assert zero3.gathers == [len(zero3.whole)] * 2  # once to split the model, once to score
    assert all(weight.ds_status.name == "NOT_AVAILABLE" for weight in zero3.model.parameters())


def test_deepspeeds_hooks_are_silent_while_weights_are_gathered_and_others_are_not(zero3):
    others = []
    zero3.model.model.register_forward_hook(lambda *_: others.append(1))
    before = [list(module._forward_hooks.items()) for module in zero3.model.modules()]
    score_responses(zero3.model, make_responses())
    assert not zero3.fired
    assert others
    assert [list(module._forward_hooks.items()) for module in zero3.model.modules()] == before
    with partitions_gathered(nn.Linear(1, 1)):
        pass  # what is not partitioned is left alone


def test_hooks_are_silent_too_where_some_weights_are_whole_from_the_last_step(zero3):
    kept = next(zero3.model.parameters())
    kept.data, kept.ds_status = zero3.whole[0], SimpleNamespace(name="AVAILABLE")
    score_responses(zero3.model, make_responses())
    assert zero3.gathers == [len(zero3.whole) - 1] * 2
    assert not zero3.fired
    assert kept.ds_status.name == "AVAILABLE"


def test_contexts_within_each_other_gather_once(zero3):
    with gathered(zero3.model), gathered(zero3.model):
        assert all(weight.numel() for weight in zero3.model.parameters())
    assert sum(zero3.gathers) == len(zero3.whole)
    assert not any(weight.numel() for weight in zero3.model.parameters())


def test_weights_and_hooks_come_back_after_an_error(zero3):
    hooks = [len(module._forward_hooks) for module in zero3.model.modules()]
    with pytest.raises(RuntimeError, match="on purpose"), gathered(zero3.model):
        raise RuntimeError("on purpose")
    assert not any(weight.numel() for weight in zero3.model.parameters())
    assert [len(module._forward_hooks) for module in zero3.model.modules()] == hooks


def test_an_engine_around_a_reference_model_is_unwrapped():
    model = build("llama_tied")
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = model
    assert unwrap_model(engine) is model
