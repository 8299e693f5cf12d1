"""Contract with TRL's GRPO trainer: what `llm_dynamics/_trl.py` and `trainers/nthr/trainer.py` rely on.

A failure here means that an upgrade changed something private: each message says what, and where to look.
"""

import inspect
import math
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import grpo_trainer
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from llm_dynamics import _trl
from llm_dynamics.likelihood.head import unwrap_model
from tests.trainers.runs import MIXED, QUESTIONS, Script, build, rewarding, run, tiny_model

NTHR = "trainers/nthr/trainer.py"
LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def plain(tmp_path, **settings):
    return build(tmp_path, GRPOTrainer, **{"script": Script()} | settings)


def one_batch(tmp_path, **settings):
    """A trainer after one step on it, and the batch that its loss took, weights as they were."""
    trainer = plain(tmp_path, learning_rate=0.0, **settings)
    (rollout,) = run(trainer)
    trainer.model.train()
    return trainer, rollout.batch


# ---- methods that are overridden or wrapped --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "where"),
    [
        ("_generate_and_score_completions", ["self", "inputs"], f"{NTHR} overrides it, _trl wraps it"),
        (
            "_calculate_rewards",
            ["self", "inputs", "prompts", "completions", "completion_ids_list"],
            f"{NTHR} overrides it, _trl wraps it",
        ),
        (
            "_get_per_token_logps_and_entropies",
            ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
            "_trl.recording_logp_passes wraps it",
        ),
        ("_compute_loss", ["self", "model", "inputs"], f"{NTHR} overrides it"),
    ],
)  # fmt: skip
def test_methods_have_the_names_and_parameters_that_overrides_use(name, parameters, where):
    method = getattr(GRPOTrainer, name, None)
    assert method is not None, f"GRPOTrainer.{name} is gone: {where}"
    seen = list(inspect.signature(method).parameters)[: len(parameters)]
    assert seen == parameters, f"GRPOTrainer.{name} begins with {seen}, not {parameters}: {where}"


def test_rewards_come_gathered_from_all_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_trainer, "gather", lambda values: torch.cat([values, values + 10]))
    trainer = plain(tmp_path, rewards=[rewarding(*MIXED), rewarding(2.0)])
    rewards = trainer._calculate_rewards([{"prompt": "a"}] * 8, ["a"] * 8, ["b"] * 8, [[5]] * 8)
    assert rewards.shape == (16, 2), (
        f"_calculate_rewards returns {tuple(rewards.shape)} where two processes with 8 responses and 2 functions make "
        f"(16, 2): it no longer gathers; {NTHR} takes groups from the global rewards"
    )
    assert rewards[:8, 0].tolist() == list(MIXED), f"rewards are no longer in the order of responses: see {NTHR}"


def test_a_generation_calls_rewards_once_and_returns_what_we_read(tmp_path):
    trainer = plain(tmp_path, script=Script(tools=True))
    (rollout,) = run(trainer)
    needed = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "tool_mask"}
    missing = needed - rollout.batch.keys()
    assert not missing, f"the batch lacks {sorted(missing)}: see {NTHR}, rollouts/rows.py and nthr/token_log.py"
    assert rollout.batch["advantages"].shape == (8,), (
        f"advantages are {tuple(rollout.batch['advantages'].shape)}, not (8,): {NTHR} expects one per response"
    )
    for name in ("completion_mask", "tool_mask"):
        assert rollout.batch[name].shape == rollout.batch["completion_ids"].shape, (
            f"{name} is no (B, T) mask: see {NTHR}"
        )
    assert rollout.rewards_per_func.shape == (8, 1), "rewards are no (B, F) tensor: see _trl.recording_rollouts"
    prompts = [row["prompt"] for row in rollout.inputs]
    assert prompts == [prompts[0]] * 4 + [prompts[4]] * 4 != [prompts[0]] * 8, (
        "the responses of a question are no longer consecutive in a generation: rollouts/groups.py cuts groups by place"
    )


def test_truncated_responses_are_masked_whole(tmp_path):
    trainer = plain(tmp_path, script=Script(truncated=(1,), tools=True), mask_truncated_completions=True)
    (rollout,) = run(trainer)
    counted = rollout.batch["completion_mask"].bool().any(dim=1).tolist()
    assert counted == [i != 1 for i in range(8)], (
        f"with mask_truncated_completions the mask counts {counted}: {NTHR} takes the loss's tokens from it"
    )


# ---- the pass of the old policy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "made"),
    [
        ({}, False),
        ({"num_iterations": 2}, True),
        ({"steps_per_generation": 2, "per_device_train_batch_size": 4}, True),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, False),
    ],
)
def test_the_old_policys_log_probs_are_the_very_tensor_that_their_pass_returned(settings, made, tmp_path):
    trainer = plain(tmp_path, lora=LORA, beta=0.1, **settings)
    passes = []
    original = trainer._get_per_token_logps_and_entropies

    def recording(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        result = original(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        if not torch.is_grad_enabled():
            passes.append((model, logits_to_keep, result))
        return result

    trainer._get_per_token_logps_and_entropies = recording
    (rollout,) = run(trainer)
    batch = rollout.batch
    old, shape = batch.get("old_per_token_logps"), tuple(batch["completion_ids"].shape)
    assert (old is not None) == made, (
        f"old_per_token_logps {'missing' if made else 'present'} with {settings}: TRL changed when it makes the pass "
        f"that {NTHR} taps, and that llds_coef needs (see NTHRConfig.__post_init__)"
    )
    assert len(passes) == 1 + made, (
        f"{len(passes)} log-prob passes a generation, not {1 + made}: overriding the method on the instance no longer "
        "catches TRL's calls, or there are others; see _trl.recording_logp_passes"
    )
    for model, kept, result in passes:
        assert model is trainer.model, "the pass is made with another object than trainer.model: the tap skips it"
        assert kept == shape[1], f"logits_to_keep is {kept}, not T = {shape[1]}: see _trl.recording_logp_passes"
        assert isinstance(result, tuple), "the method no longer returns a tuple: see _trl.recording_logp_passes"
        assert tuple(result[0].shape) == shape, f"log-probs are {tuple(result[0].shape)}, not (B, T) = {shape}"
    if made:
        assert passes[0][2][0] is old, (
            "old_per_token_logps is no longer the very tensor that the first pass returned (copied, moved or computed "
            f"after the reference): {NTHR} would fall back to a pass of its own"
        )
    assert passes[-1][2][0] is batch["ref_per_token_logps"], (
        "the last pass is not the reference's: the tap tells the policy's from the reference's by identity"
    )


def test_the_fused_head_runs_the_backbone_through_its_hooks(tmp_path):
    trainer, batch = one_batch(tmp_path, lora=LORA)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].shape[1]
    backbone = unwrap_model(trainer.model).base_model
    with torch.no_grad(), _trl.completion_states(backbone, length) as states:
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length, batch_size=3)[0]
        trainer.model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
    assert [len(part) for part in states] == [3, 3, 2, 8], (
        f"hooks on base_model saw {[len(part) for part in states]} rows, not chunks of batch_size: TRL no longer runs "
        "the backbone as a module or in chunks in order; see _trl.completion_states"
    )
    tapped, extra = torch.cat(states[:3]), states[3]
    assert torch.allclose(tapped, extra, atol=1e-5), (
        "the fused and the plain forward give other hidden states (positions, masks?): see trainers/nthr/states.py"
    )
    weight = trainer.model.get_output_embeddings().weight
    made = (tapped @ weight.T).log_softmax(-1).gather(2, batch["completion_ids"][..., None])[..., 0]
    real = batch["completion_mask"].bool()
    assert torch.allclose(made[real], logps[real], atol=1e-4), (
        "log-probs do not follow from the tapped states: the slice of completion_states no longer matches the fused "
        "head's shift"
    )


def test_the_plain_forward_can_skip_the_vocabulary():
    output = tiny_model()(input_ids=torch.tensor([[5, 6, 7, 8]]), logits_to_keep=1)
    assert output.logits.shape[1] == 1, (
        f"logits_to_keep=1 gives logits at {output.logits.shape[1]} positions: trainers/nthr/states.py would compute "
        "the whole vocabulary"
    )


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", _trl.LOSSES_BY_TOKEN)
def test_losses_take_advantages_by_token(loss_type, level, tmp_path):
    trainer, batch = one_batch(
        tmp_path, loss_type=loss_type, importance_sampling_level=level, num_iterations=2, beta=0.0
    )
    batch = dict(batch)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch["old_per_token_logps"].shape, generator=generator)
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + 0.05 * noise  # ratios other than 1
    weights = list(trainer.model.parameters())

    def loss_and_gradient(advantages):
        loss = trainer._compute_loss(trainer.model, batch | {"advantages": advantages})
        return loss.detach(), torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])

    rows = batch["advantages"]
    tokens = rows[:, None].expand_as(batch["completion_ids"]).clone()
    loss, gradient = loss_and_gradient(rows)
    by_token, gradient_by_token = loss_and_gradient(tokens)
    assert torch.allclose(loss, by_token, rtol=1e-5, atol=1e-7), (
        f"{loss_type} at {level} level: constant (B, T) advantages give {by_token.item()}, (B,) ones {loss.item()}; it "
        "must leave _trl.LOSSES_BY_TOKEN"
    )
    assert torch.allclose(gradient, gradient_by_token, rtol=1e-4, atol=1e-6), f"{loss_type}: as for its loss"
    length = batch["completion_mask"].sum(dim=1)
    row = int(length.argmax())
    effects = []
    for position in range(int(length[row])):
        changed = tokens.clone()
        changed[row, position] = 0
        effects.append(loss_and_gradient(changed)[1] - gradient_by_token)
    assert all(float(effect.norm()) > 1e-4 * float(gradient.norm()) for effect in effects), (
        f"{loss_type} at {level} level ignores the advantage of some token; it must leave _trl.LOSSES_BY_TOKEN"
    )
    differ = [float((a - effects[0]).norm()) > 1e-3 * float(effects[0].norm()) for a in effects[1:]]
    assert differ, "draw a longer response"
    if level == "token":
        assert all(differ), f"{loss_type} no longer tells tokens apart; it must leave _trl.LOSSES_BY_TOKEN"


def test_there_is_no_loss_that_we_do_not_know():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    named = set()
    for found in re.findall(r"self\.loss_type (?:==|!=|in) (\[[^\]]*\]|\"\w+\")", source):
        named |= set(re.findall(r"\"(\w+)\"", found))
    assert named == set(_trl.LOSSES_BY_TOKEN), (
        f"GRPOTrainer._compute_loss names the losses {sorted(named)}: see whether the new ones multiply (B, T) "
        "advantages token by token, then _trl.LOSSES_BY_TOKEN"
    )


@pytest.mark.parametrize("steps", [1, 2])
def test_the_loss_of_a_micro_batch_is_divided_by_the_accumulation_steps(steps, tmp_path):
    trainer = plain(
        tmp_path, gradient_accumulation_steps=steps, per_device_train_batch_size=8 // steps, loss_type="grpo"
    )
    seen = []
    compute_loss = GRPOTrainer._compute_loss
    trainer.compute_loss = lambda model, inputs, *_, **__: (
        seen.append(trainer.current_gradient_accumulation_steps) or compute_loss(trainer, model, inputs)
    )
    run(trainer)
    assert seen == [steps] * steps, (
        f"current_gradient_accumulation_steps is {seen} with {steps} accumulated micro-batches: {NTHR} divides the "
        "LLDS penalty by it"
    )


def test_tensors_by_token_and_by_response_stay_beside_their_response():
    ids = torch.arange(24).view(8, 3)
    batch = {
        "completion_ids": ids, "advantages": ids.float() * 2, "response_advantages": ids[:, 0].float(),
        "num_items_in_batch": torch.tensor(7), "nothing": None,
    }  # fmt: skip
    torch.manual_seed(0)
    shuffled = shuffle_sequence_dict(batch)
    assert not torch.equal(shuffled["completion_ids"], ids), "shuffle_sequence_dict no longer shuffles: seed this test"
    parts = split_tensor_dict(shuffled, 2)
    for part in parts:
        assert part["completion_ids"].shape == (4, 3), "split_tensor_dict no longer splits the first dimension"
        assert torch.equal(part["advantages"], part["completion_ids"].float() * 2), (
            f"(B, T) advantages part from their responses in shuffle_sequence_dict or split_tensor_dict: see {NTHR}"
        )
        assert torch.equal(part["response_advantages"], part["completion_ids"][:, 0].float()), (
            f"extra (B,) tensors part from their responses in shuffle_sequence_dict or split_tensor_dict: see {NTHR}, "
            "which sends `response_advantages` to the LLDS penalty in this way"
        )
    together = torch.cat([part["completion_ids"] for part in parts])
    assert sorted(together[:, 0].tolist()) == ids[:, 0].tolist(), (
        "responses were lost or doubled on their way to the loss"
    )


def test_the_loss_gets_every_tensor_that_a_generation_returned(tmp_path):
    trainer = plain(tmp_path, steps_per_generation=2, per_device_train_batch_size=4, max_steps=2)
    generate = trainer._generate_and_score_completions

    def adding(inputs):
        batch = generate(inputs)
        batch["response_advantages"] = batch["completion_ids"][:, 0].clone()
        return batch

    trainer._generate_and_score_completions = adding
    seen = []
    compute_loss = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: seen.append(dict(inputs)) or compute_loss(model, inputs)
    trainer.train()
    assert len(seen) == 2, "compute_loss no longer goes through self._compute_loss: NTHRGRPOTrainer adds LLDS there"
    for inputs in seen:
        assert "response_advantages" in inputs, f"the loss gets no keys that TRL does not know: see {NTHR}"
        assert torch.equal(inputs["response_advantages"], inputs["completion_ids"][:, 0]), (
            f"keys that TRL does not know are not shuffled with the others: see {NTHR}"
        )


# ---- attributes ------------------------------------------------------------------------------------------------------


def test_rewards_are_weighted_and_summed_as_the_trainer_does(tmp_path):
    first, second = (1.0, None, 0.5, 0.0, 1.0, 1.0, None, 0.0), (0.0, None, None, 1.0, 1.0, 0.0, 1.0, 0.0)
    trainer = plain(tmp_path, rewards=[rewarding(*first), rewarding(*second)], reward_weights=[2.0, 0.5])
    (rollout,) = run(trainer)
    weights = getattr(trainer, "reward_weights", None)
    assert isinstance(weights, torch.Tensor), "GRPOTrainer.reward_weights is no tensor: see _trl.summed_rewards"
    assert weights.tolist() == [2.0, 0.5], "GRPOTrainer.reward_weights are not those given: see _trl.summed_rewards"
    ours = _trl.summed_rewards(trainer, rollout.rewards_per_func)
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert float(ours.nanmean()) == pytest.approx(row["reward"], rel=1e-6), (
        f"TRL logs a mean reward of {row['reward']}, _trl.summed_rewards makes {float(ours.nanmean())}: it combines "
        "rewards otherwise"
    )
    groups = ours.view(-1, 4)
    centred = ours - groups.nanmean(dim=1).repeat_interleave(4)
    advantages = rollout.batch["advantages"]
    assert torch.equal(advantages.sign(), centred.nan_to_num(0.0).sign()), (
        f"the signs of advantages do not follow from the summed rewards: {NTHR} calls responses wrong by these"
    )
    assert float(advantages[1]) == 0, f"a response without a reward has an advantage: {NTHR} counts on 0"


@pytest.mark.parametrize(("asked", "seen"), [(None, 4), (2, 2), (1, 1)])
def test_group_sizes_of_training_and_evaluation(asked, seen, tmp_path):
    held_out = Dataset.from_list([{"prompt": text} for text in QUESTIONS])
    trainer = plain(tmp_path, num_generations_eval=asked, per_device_eval_batch_size=4, eval_dataset=held_out)
    for name in ("num_generations", "num_generations_eval"):
        assert hasattr(trainer, name), f"GRPOTrainer.{name} is gone: see _trl.group_size"
    assert (_trl.group_size(trainer, True), _trl.group_size(trainer, False)) == (4, seen), "see _trl.group_size"
    with _trl.recording_rollouts(trainer) as rollouts:
        trainer.evaluate()
    assert [rollout.training for rollout in rollouts] == [False] * seen, (
        f"{len(rollouts)} generations in evaluation, or model.training does not tell: {NTHR} takes the mode from it"
    )
    prompts = [row["prompt"] for rollout in rollouts for row in rollout.inputs]
    for start in range(0, len(prompts), seen):
        assert len(set(prompts[start : start + seen])) == 1, (
            f"evaluation does not put the {seen} responses of a question side by side: see _trl.group_size"
        )


def test_metrics_of_both_modes_are_lists_whose_row_leaves_nan_out(tmp_path):
    trainer = plain(tmp_path)
    assert set(trainer._metrics) == {"train", "eval"}, (
        f"GRPOTrainer._metrics holds {sorted(trainer._metrics)}, not train and eval: see _trl.append_metric"
    )
    trainer.model.train()
    for value in (1.0, math.nan, 3.0):
        _trl.append_metric(trainer, True, "nthr/x", value)
    _trl.append_metric(trainer, True, "nthr/nothing", math.nan)
    _trl.append_metric(trainer, False, "nthr/y", 5.0)
    trainer.log({"loss": 0.0})
    row = trainer.state.log_history[-1]
    assert row["nthr/x"] == 2.0, (
        f"the row holds {row['nthr/x']}, not the mean of what is no NaN: see _trl.append_metric"
    )
    assert row.get("nthr/nothing") is None, f"NaN alone is logged as {row['nthr/nothing']}: see _trl.append_metric"
    assert "nthr/y" not in row, "metrics of evaluation come in rows of training: see _trl.append_metric"
    trainer.model.eval()
    trainer.log({"eval_loss": 0.0})
    assert trainer.state.log_history[-1].get("eval_nthr/y") == 5.0, (
        f"the row of evaluation is {trainer.state.log_history[-1]}: TRL no longer prefixes its metrics; see "
        "_trl.append_metric"
    )


def test_a_text_model_is_no_vision_model_and_the_temperature_is_known(tmp_path):
    trainer = plain(tmp_path, temperature=0.7)
    assert hasattr(trainer, "_is_vlm"), "GRPOTrainer._is_vlm is gone: see _trl.takes_images"
    assert not _trl.takes_images(trainer), "GRPOTrainer._is_vlm is true of a text model: see _trl.takes_images"
    assert trainer.temperature == 0.7, f"GRPOTrainer.temperature is gone: {NTHR} scores at the sampling temperature"


def test_checkpointing_can_be_switched_off_for_a_while(tmp_path):
    assert _trl.disable_gradient_checkpointing is disable_gradient_checkpointing
    model = tiny_model()
    model.gradient_checkpointing_enable()
    with _trl.disable_gradient_checkpointing(model, {"use_reentrant": False}):
        assert not model.is_gradient_checkpointing, "disable_gradient_checkpointing does nothing: see _trl.py"
    assert model.is_gradient_checkpointing, (
        f"disable_gradient_checkpointing does not switch it on again: {NTHR} would train without"
    )


def test_a_generation_happens_at_the_step_whose_weights_it_used(tmp_path):
    trainer = plain(tmp_path, num_iterations=2, max_steps=4)
    steps = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: steps.append(trainer.state.global_step) or generate(inputs)
    trainer.train()
    assert steps == [0, 2], (
        f"generations at steps {steps}, not [0, 2]: state.global_step no longer counts the updates before a "
        f"generation; {NTHR} seeds its random draw and starts LLDS by it, nthr/token_log.py names its parts by it"
    )
