"""Every touchpoint with a private part of TRL or transformers, and nothing else.

Read against TRL 1.16.0 and transformers 5.23.0; each function here has a contract test in
`tests/contract/test_trl.py`, which says what changed when an upgrade breaks it.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import get_json_schema
from transformers.utils.hub import hf_api
from trl import GRPOTrainer, RLOOTrainer
from trl.models.utils import disable_gradient_checkpointing as disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from llm_dynamics.likelihood.preserve import adapter_off, has_adapter, keeping_trainable


@contextmanager
def _in_place_of(owner: Any, **methods: Any) -> Iterator[None]:
    """Put functions in the place of an instance's methods, and at the end what stood there before."""
    before = {name: vars(owner)[name] for name in methods if name in vars(owner)}
    vars(owner).update(methods)
    try:
        yield
    finally:
        for name in methods:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)  # the class's own is seen again


def add_to_next_row(trainer: Trainer, metrics: Mapping[str, float]) -> bool:
    """Put metrics into the trainer's next log row, beside the loss.

    TRL's trainers average `_metrics["train"][key]` over the values since the last row. A state is no average: the list
    is replaced, so that the row holds the latest observation.

    Args:
        trainer: Any trainer.
        metrics: Finite values by name.

    Returns:
        False where the trainer has no such store (a plain `transformers.Trainer`), and nothing was done.
    """
    store = getattr(trainer, "_metrics", None)
    if not isinstance(store, dict) or "train" not in store:
        return False
    for name, value in metrics.items():
        store["train"][name] = [value]
    return True


def append_metric(trainer: Trainer, training: bool, name: str, value: float) -> None:
    """Add a value to a TRL trainer's metric, which its next row averages; NaN values are left out of the average.

    Args:
        trainer: A TRL trainer.
        training: Whether it belongs to training rows, rather than to those of evaluation.
        name: Of the metric.
        value: In nats or whatever the metric is in.
    """
    trainer._metrics["train" if training else "eval"][name].append(value)  # type: ignore[attr-defined]


def takes_images(trainer: GRPOTrainer) -> bool:
    """Tell whether the trainer's model is a vision-language model."""
    return bool(trainer._is_vlm)


def log_row(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Log a row of its own at the current step, without flushing or swallowing the trainer's next one.

    TRL's `log` would flush its metrics into this row, and the callback handler resets `should_log`, which would cost
    the loss row of the same step: so the base class's `log` is called, and the flag restored.

    Args:
        trainer: Any trainer.
        metrics: Finite values by name.
    """
    should_log = trainer.control.should_log
    try:
        Trainer.log(trainer, dict(metrics))
    finally:
        trainer.control.should_log = should_log


def tell_row(trainer: Trainer, row: Mapping[str, float], *, trackers: bool) -> None:
    """Let the trackers of `report_to`, or all other callbacks, see a row at the trainer's current step.

    Args:
        trainer: Any trainer.
        row: Finite values by name.
        trackers: Whether to tell transformers' own integrations, or all callbacks but them.
    """
    handler, control = copy.copy(trainer.callback_handler), trainer.control
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    handler.callbacks = [told for told in handler.callbacks if isinstance(told, kinds) == trackers]
    should_log = control.should_log
    try:
        handler.on_log(trainer.args, trainer.state, control, dict(row))
    finally:
        control.should_log = should_log


def rendering(trainer: Trainer) -> dict[str, Any]:
    """Return how a trainer turns prompts into token ids: keyword arguments of `encode_probes`.

    Args:
        trainer: Any trainer.

    Returns:
        `chat_template`: the template that SFT swaps in for `assistant_only_loss`, GRPO for tools; None: the
        tokenizer's. `chat_template_kwargs`: what a trainer that generates passes for every prompt, the schemas of its
        `tools` among it; None: each row gives its own (SFT, DPO, KTO). `keep_prompt`: whether it generates.

    Raises:
        NotImplementedError: Where environments with different tools give prompts of different schemas.
    """
    arguments = None
    if hasattr(trainer.args, "chat_template_kwargs"):
        given = trainer.args.chat_template_kwargs or {}
        arguments = dict(json.loads(given) if isinstance(given, str) else given)
        shared = getattr(trainer, "tools", None) or arguments.get("tools")
        by_environment = getattr(trainer, "_env_tools", {None: shared})
        schemas = [
            [tool if isinstance(tool, dict) else get_json_schema(tool) for tool in tools or ()]
            for tools in by_environment.values()
        ]
        if any(other != schemas[0] for other in schemas):
            raise NotImplementedError(
                f"the environments {list(by_environment)} have different tools, and which one a row takes is not known "
                "of a probe: its prompt would lack the schemas that are trained on. Watch a run of one environment."
            )
        arguments |= {"tools": schemas[0]} if schemas[0] else {}
    return {
        "chat_template": getattr(trainer, "chat_template", None),
        "chat_template_kwargs": arguments,
        "keep_prompt": isinstance(trainer, GRPOTrainer | RLOOTrainer),
    }


def prompts_are_made_elsewhere(trainer: Trainer) -> str | None:
    """Return what writes a part of a GRPO trainer's prompts that its rows do not hold; None: nothing does."""
    if getattr(trainer, "environment_factories", None) is not None:
        return "an environment, whose `reset` may add to each prompt"
    return "a rollout_func, which renders prompts itself" if getattr(trainer, "rollout_func", None) else None


MODEL, SYNCHRONISED = "reference model", "reference model, synchronised"
ADAPTER_OFF, ADAPTER_COPY = "adapter off", "adapter as it was given"


def loss_has_reference(trainer: Trainer) -> bool:
    """Tell whether the trainer's loss compares the policy with a reference (DPO, KTO, GRPO with beta > 0)."""
    return hasattr(trainer, "ref_model") and getattr(trainer.args, "beta", 1.0) != 0


def reference_source(trainer: Trainer) -> str:
    """Tell what the reference of a trainer is.

    Args:
        trainer: Any trainer.

    Returns:
        "reference model" (a frozen one that the trainer carries), "reference model, synchronised" (it follows the
        policy), "step 0" (its log-probs were computed before training, and it was not kept), "adapter as it was given"
        (TRL keeps a copy of a trained adapter under the name "ref"), "adapter off", or "none".
    """
    model: Any = trainer.model
    if getattr(trainer, "ref_model", None) is not None:
        return SYNCHRONISED if getattr(trainer.args, "sync_ref_model", False) else MODEL
    if getattr(trainer.args, "precompute_ref_log_probs", False) and not hasattr(model, "disable_adapter"):
        return "step 0"
    if not has_adapter(model):
        return "none"
    return ADAPTER_COPY if "ref" in model.peft_config else ADAPTER_OFF


@contextmanager
def reference(trainer: Trainer) -> Iterator[Any]:
    """Make the trainer's reference at hand, and leave no trace.

    Args:
        trainer: A trainer whose reference is a model, or its own model with other adapters.

    Yields:
        The model, which is the reference while the context is open.
    """
    model: Any = trainer.model
    source = reference_source(trainer)
    if source in (MODEL, SYNCHRONISED):
        yield trainer.ref_model  # type: ignore[attr-defined]
    elif source == ADAPTER_COPY:
        with keeping_trainable(model), use_adapter(model, adapter_name="ref"):
            yield model
    else:
        with adapter_off(model):
            yield model


@contextmanager
def recording_clip(trainer: Trainer) -> Iterator[list[float]]:
    """Record by what factor gradients are clipped, while the context is open.

    Every trainer clips through `trainer.accelerator.clip_grad_norm_`, which returns the norm before clipping; the
    factor follows as torch computes it, min(1, max_norm / (norm + 1e-6)).

    Args:
        trainer: Any trainer.

    Yields:
        A list that receives, at each clipping, the factor and the norm before it: [factor, norm].
    """
    accelerator = trainer.accelerator
    recorded: list[float] = []

    def clip(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        norm = original(parameters, max_norm, norm_type)
        if norm is not None:
            recorded[:] = [min(1.0, float(max_norm) / (float(norm) + 1e-6)), float(norm)]
        return norm

    original = accelerator.clip_grad_norm_
    with _in_place_of(accelerator, clip_grad_norm_=clip):
        yield recorded


@contextmanager
def outside_autocast(model: nn.Module) -> Iterator[None]:
    """Call the model's own forward, without the autocast that accelerate wraps around it, while the context is open.

    `Accelerator.prepare` puts a forward in its place that turns autocast on, whatever the caller's setting, and keeps
    the model's own in `_original_forward`.

    Args:
        model: The trainer's model.

    Yields:
        None.
    """
    own = vars(model).get("_original_forward")
    with _in_place_of(model, **({} if own is None else {"forward": own})):
        yield


def noting_checkpoint(trainer: Trainer) -> list[Path]:
    """Note from which checkpoint the trainer's runs go on: no callback is told.

    Args:
        trainer: Any trainer, before `train()`.

    Returns:
        A list that holds the folder that the last resumed run went on from, before its `on_train_begin`; a run that
        begins at step 0 leaves it as it is.
    """
    original = trainer._load_optimizer_and_scheduler
    noted: list[Path] = []

    def load(checkpoint: Any) -> Any:
        noted[:] = [Path(checkpoint)] if checkpoint else []
        return original(checkpoint)

    trainer._load_optimizer_and_scheduler = load  # type: ignore[method-assign]
    return noted


def name_and_paper(trainer_class: type[GRPOTrainer]) -> tuple[str, dict[str, str]]:
    """Return what TRL's model cards call a trainer's method, and its paper: `title`, `id` on arXiv, `citation`."""
    return trainer_class._name, dict(trainer_class._paper)


def open_trackers(trainer: Trainer) -> dict[str, Any]:
    """Return the trackers whose run transformers' own callbacks hold open, to add to these runs.

    Args:
        trainer: Any trainer.

    Returns:
        By name, in the order of the trainer's callbacks: "tensorboard": the `SummaryWriter`; "wandb", "trackio",
        "mlflow": the module, which has a run open.
    """
    found: dict[str, Any] = {}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            found["tensorboard"] = callback.tb_writer
        elif isinstance(callback, WandbCallback) and callback._initialized and callback._wandb.run is not None:
            found["wandb"] = callback._wandb
        elif isinstance(callback, TrackioCallback) and callback._initialized:
            found["trackio"] = callback._trackio
        elif isinstance(callback, MLflowCallback) and callback._initialized and callback._ml_flow.active_run():
            found["mlflow"] = callback._ml_flow  # without an active run, its functions would open one
    return found


def is_fsdp2(trainer: Trainer) -> bool:
    """Tell whether the run shards its parameters with FSDP2 (`fully_shard`), rather than FSDP1 or not at all."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return plugin is not None and getattr(plugin, "fsdp_version", 1) == 2


def is_zero3(trainer: Trainer) -> bool:
    """Tell whether the run partitions its parameters with DeepSpeed ZeRO-3."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def sampling_temperature(trainer: Trainer) -> float:
    """Return what the trainer's loss divides logits by: the sampling temperature of GRPO and RLOO, 1 elsewhere."""
    return float(getattr(trainer, "temperature", 1.0)) if isinstance(trainer, GRPOTrainer | RLOOTrainer) else 1.0


LOSSES_BY_TOKEN = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
"""Losses of `GRPOTrainer` that were seen to multiply (B, T) advantages token by token."""


@dataclass
class LogpPass:
    """One call that computed a rollout batch's log-probs.

    Attributes:
        logps: What it returned, (B, T).
        states: Input of the LM head at the positions that predict the completion, (B, T, d); None where not asked for.
    """

    logps: Tensor
    states: Tensor | None = None


@contextmanager
def recording_logp_passes(
    trainer: GRPOTrainer, backbone: nn.Module | None = None, policy: nn.Module | None = None
) -> Iterator[list[LogpPass]]:
    """Record the calls of the trainer's method that computes log-probs of completions, while the context is open.

    Args:
        trainer: A GRPO trainer.
        backbone: The part of the policy whose output the LM head takes: its output is kept, for the first call that is
            made with the policy.
        policy: The policy as it will be called, wrapped for training; None: the trainer's model.

    Yields:
        The passes made with the policy, in order. That of the old policy is the one whose `logps` is the very
        tensor that `_generate_and_score_completions` returns as `old_per_token_logps`.
    """
    original = trainer._get_per_token_logps_and_entropies
    passes: list[LogpPass] = []

    def compute(model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **kwargs: Any) -> Any:
        if model is not (trainer.model if policy is None else policy):
            return original(model, input_ids, attention_mask, logits_to_keep, **kwargs)
        wanted = backbone if not passes else None
        with completion_states(wanted, logits_to_keep) as states:
            result = original(model, input_ids, attention_mask, logits_to_keep, **kwargs)
        passes.append(LogpPass(result[0], torch.cat(states) if states else None))
        return result

    with _in_place_of(trainer, _get_per_token_logps_and_entropies=compute):
        yield passes


@contextmanager
def completion_states(backbone: nn.Module | None, length: int) -> Iterator[list[Tensor]]:
    """Keep what `backbone` puts out at the positions that predict the last `length` tokens, while the context is open.

    Args:
        backbone: Its forward returns an output with `last_hidden_state`, (b, P + T, d); None: nothing is kept.
        length: T.

    Yields:
        One (b, T, d) for each forward, in order, detached.
    """
    states: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states.append(output.last_hidden_state[:, -length - 1 : -1].detach().clone())

    if backbone is None:
        yield states
        return
    handle = backbone.register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


@dataclass
class Rollout:
    """What a GRPO trainer's last generation gave.

    Attributes:
        inputs: The rows of the data set, one per local completion.
        batch: The local tensors that the loss will take (`prompt_ids`, `completion_ids`, `advantages`...).
        rewards_per_func: Of the *global* batch, (B, F), NaN where a function gave none.
        training: Whether it was generated to be trained on, rather than in evaluation.
    """

    inputs: list[dict[str, Any]]
    batch: dict[str, Any]
    rewards_per_func: Tensor
    training: bool


ROW = "row_of_generation"
"""Key under which each micro-batch says which completions of its generation it holds, through TRL's shuffling."""


@contextmanager
def recording_rollouts(
    trainer: GRPOTrainer | RLOOTrainer,
    then: Callable[[Rollout, Tensor], None] | None = None,
    attempt: Callable[[Callable[[], None]], None] = lambda work: work(),
) -> Iterator[list[Rollout]]:
    """Record each generation of a GRPO or RLOO trainer, while the context is open.

    Args:
        trainer: The trainer.
        then: Called with each micro-batch that is about to be trained on: the generation that it is from, and which of
            its local completions it holds, (b,); the weights are still those before the optimizer step.
        attempt: Runs what is ours of a generation, within the trainer's own code; it may keep errors to itself.

    Yields:
        A list to which each generation is appended when it is scored; empty it to free the tensors.
    """
    generate, reward, prepare = (
        trainer._generate_and_score_completions,
        trainer._calculate_rewards,
        trainer._prepare_inputs,
    )
    rollouts: list[Rollout] = []
    rewards: list[Tensor] = []
    trained_on: list[Rollout] = []

    def calculate(*args: Any, **kwargs: Any) -> Tensor:
        scored = reward(*args, **kwargs)
        rewards[:] = [scored]
        return scored

    def generate_and_score(inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training = bool(trainer.model.training)  # type: ignore[union-attr]
        batch = generate(inputs)

        def keep() -> None:
            rollouts.append(Rollout(list(inputs), dict(batch), rewards.pop(), training))
            if training and then is not None:
                trained_on[:] = rollouts[-1:]
                ids = batch["completion_ids"]
                batch[ROW] = torch.arange(len(ids), device=ids.device)

        attempt(keep)
        return batch

    def prepare_inputs(inputs: Any) -> Any:
        batch = prepare(inputs)
        if then is not None and trainer.model.training and ROW in batch:  # type: ignore[union-attr]
            then(trained_on[0], batch[ROW])
        return batch

    with _in_place_of(
        trainer,
        _generate_and_score_completions=generate_and_score,
        _calculate_rewards=calculate,
        _prepare_inputs=prepare_inputs,
    ):
        yield rollouts


def leave_out_of_pushes(trainer: Trainer, folders: Callable[[], list[str]]) -> None:
    """Let no push of this trainer, at its end or with its checkpoints, upload these folders of its `output_dir`.

    transformers names what it leaves out itself, `checkpoint-*` and `_*`, and takes nothing more.

    Args:
        trainer: The trainer.
        folders: Gives glob patterns of paths below `output_dir`, when a push begins.
    """

    def leaving_out(push: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(push)
        def pushed(*args: Any, **kwargs: Any) -> Any:
            api = hf_api()
            upload = api.upload_folder

            def upload_folder(**told: Any) -> Any:
                return upload(**told | {"ignore_patterns": [*(told.get("ignore_patterns") or []), *folders()]})

            with _in_place_of(api, upload_folder=upload_folder):
                return push(*args, **kwargs)

        return pushed

    for name in ("push_to_hub", "_push_from_checkpoint"):
        setattr(trainer, name, leaving_out(getattr(trainer, name)))


def group_size(trainer: GRPOTrainer | RLOOTrainer, training: bool) -> int:
    """Return G, the completions of one question, in training or in evaluation."""
    return int((trainer.num_generations if training else trainer.num_generations_eval) or 1)


def summed_rewards(trainer: GRPOTrainer | RLOOTrainer, rewards_per_func: Tensor) -> Tensor:
    """Weight and sum the rewards of several functions as the trainer does: (B, F) to (B,); NaN where none gave one."""
    weighted = rewards_per_func * trainer.reward_weights.to(rewards_per_func.device)
    return weighted.nansum(dim=1).masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)
