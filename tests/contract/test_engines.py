"""Contract with accelerate's FSDP and DeepSpeed: where a run says how its parameters lie, and when it takes a step.

DeepSpeed itself is run by tests/distributed/test_deepspeed.py, where it is installed.
"""

import inspect
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from transformers import Trainer

from llm_dynamics import _trl
from llm_dynamics.callbacks import watch
from llm_dynamics.trainers.nthr.refusals import refuse_what_cannot_be_scored
from tests.trainers.runs import build
from tests.training import build_trainer, make_probes, save_tiny_model


def in_run(trainer, **plugins):
    """Give the trainer's accelerator state real plugins, as a launched run has them."""
    state = SimpleNamespace(**{"deepspeed_plugin": None, "fsdp_plugin": None} | plugins)
    trainer.accelerator = SimpleNamespace(state=state, mixed_precision="no", device=trainer.accelerator.device)
    trainer.is_deepspeed_enabled = state.deepspeed_plugin is not None
    trainer.is_fsdp_enabled = state.fsdp_plugin is not None
    return trainer


@pytest.fixture
def trainer(tmp_path):
    return build_trainer("sft", save_tiny_model(tmp_path / "model"), tmp_path / "out")


def test_the_plugins_lie_where_we_look(trainer):
    assert hasattr(AcceleratorState, "deepspeed_plugin"), "accelerate moved deepspeed_plugin: see _trl.is_zero3"
    source = inspect.getsource(AcceleratorState)
    assert "fsdp_plugin" in source, "accelerate moved fsdp_plugin: see _trl.is_fsdp2"
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        assert isinstance(getattr(trainer, name), bool), f"Trainer.{name} is gone: see callbacks/refusals.py"
    assert not _trl.is_zero3(trainer)
    assert not _trl.is_fsdp2(trainer)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_zero_stage_is_told(stage, trainer):
    run = in_run(trainer, deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage))
    assert _trl.is_zero3(run) == (stage == 3)
    with pytest.raises(NotImplementedError, match="DeepSpeed partitions optimizer state and gradients"):
        watch(run, make_probes(), influence=True)


@pytest.mark.parametrize("version", [1, 2])
def test_an_fsdp_version_is_told(version, trainer):
    run = in_run(trainer, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=version))
    assert _trl.is_fsdp2(run) == (version == 2)
    said = "FSDP shards weights and gradients" if version == 2 else "FSDP version 1 flattens the parameters"
    with pytest.raises(NotImplementedError, match=said):
        watch(run, make_probes(), influence=True)


@pytest.mark.parametrize(
    "plugins",
    [
        {"deepspeed_plugin": DeepSpeedPlugin(zero_stage=3)},
        {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2)},
    ],
    ids=["zero3", "fsdp2"],
)
def test_nthr_scores_sharded_models_by_their_last_layer_alone(plugins, tmp_path):
    refuse_what_cannot_be_scored(in_run(build(tmp_path), **plugins), evaluates=False)
    with pytest.raises(NotImplementedError, match=r"parameters are sharded: set 'last_layer'"):
        refuse_what_cannot_be_scored(in_run(build(tmp_path, nthr_kernel="exact"), **plugins), evaluates=False)


def test_under_deepspeed_the_step_is_taken_within_the_backward_pass():
    source = inspect.getsource(DeepSpeedEngineWrapper.backward)
    assert "self.engine.step()" in source, (
        "accelerate no longer steps DeepSpeed's engine within backward(): see DisplacementCallback, which scores as "
        "soon as there is a generation"
    )
    source = inspect.getsource(Trainer)
    assert source.index("on_pre_optimizer_step(") < source.index("self.optimizer.step()"), (
        "Trainer no longer calls on_pre_optimizer_step before the step: see DisplacementCallback"
    )
