"""`NTHRGRPOTrainer` in real runs of TRL, against definitions written out as loops."""

import contextlib
import io
import math

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from llm_dynamics import ProbeSet, _trl, load_run, watch
from llm_dynamics.trainers.nthr import NTHRConfig, NTHRGRPOTrainer
from llm_dynamics.trainers.nthr import trainer as module
from tests.conftest import PREFERENCES
from tests.likelihood.models import ARCHITECTURES
from tests.trainers.runs import (
    MIXED,
    QUESTIONS,
    Each,
    Script,
    build,
    grpo_advantages,
    loss_rows,
    model_like,
    our_rows,
    responses_of,
    rewarding,
    run,
    same_weights,
    shaped_by_hand,
    tiny_model,
    tokenizer,
    weights_of,
)

# Scores are float32 sums of some hundred products: 1e-4 of their size against float64. Advantages have no such error
# once the same tokens are selected.
SCORE = {"rel": 1e-4, "abs": 1e-4}
NAMES = ("frac_downweighted", "score_mean", "threshold", "eta", "p")
STILL = {"learning_rate": 0.0}
"""The weights of the rollout are those after training, so that scores can be recomputed."""
OFTEN = {"num_iterations": 2}
"""TRL then makes a pass for the old policy's log-probs."""


def lora(**settings):
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **settings)


def counted(batch):
    """Places (i, t) of the tokens that the loss takes."""
    mask = batch["completion_mask"].bool()
    if "tool_mask" in batch:
        mask = mask & batch["tool_mask"].bool()
    return [tuple(place) for place in mask.nonzero().tolist()]


def expected(trainer, batch, rewards, temperature=1.0, dtype=torch.float64, padded=False, **options):
    """What a batch's advantages must be, the trainer's weights being those of the rollout."""
    before = grpo_advantages(rewards, options.get("size", 4))
    seen = responses_of(trainer.model, batch, temperature, dtype, padded)
    length = batch["completion_ids"].shape[1]
    found = shaped_by_hand(trainer.args.nthr_method, rewards, before, seen, length, **options)
    assert found.margin > 1e-3, "a score lies at its threshold: draw another script"
    return found


def agrees(trainer, batch, shaped):
    """Compare the advantages that reached the loss, and the scores they were made of, with the definition."""
    assert batch["advantages"].shape == batch["completion_ids"].shape
    places = counted(batch)
    assert places
    for i, t in places:
        assert float(batch["advantages"][i, t]) == pytest.approx(shaped.advantages[i][t], abs=1e-4), (i, t)
    kept = trainer.shaped
    for (i, t), score in shaped.scores.items():
        assert float(kept.scores[i, t]) == pytest.approx(score, **SCORE), (i, t)
    scored = {tuple(place) for place in (~kept.scores.isnan()).nonzero().tolist()}
    assert scored == set(shaped.scores)
    for group, tau in shaped.thresholds.items():
        rows = kept.thresholds[group * kept.groups.size : (group + 1) * kept.groups.size]
        assert rows.tolist() == pytest.approx([tau] * len(rows), **SCORE)
    if trainer.args.nthr_method == "nthr":
        assert {tuple(place) for place in kept.selected.nonzero().tolist()} == shaped.selected


# ---- nothing is changed where nothing is asked ----------------------------------------------------------------------


@pytest.fixture(scope="module", params=_trl.LOSSES_BY_TOKEN)
def grpo(request, tmp_path_factory):
    """A run of TRL's trainer, per loss."""
    settings = {"loss_type": request.param, "max_steps": 2, "steps_per_generation": 2}
    trainer = build(tmp_path_factory.mktemp("grpo"), GRPOTrainer, per_device_eval_batch_size=8, **settings)
    run(trainer)
    return trainer, settings


@pytest.mark.parametrize("off", [{"nthr_method": "none"}, {"nthr_beta": math.inf}])
def test_switched_off_it_is_trl_bit_for_bit(grpo, off, tmp_path):
    plain, settings = grpo
    trainer = build(tmp_path, **settings, **off)
    run(trainer)
    assert same_weights(trainer, plain)
    mine, theirs = loss_rows(trainer), loss_rows(plain)
    if settings["loss_type"] == "vespo" and "nthr_beta" in off:
        # the one metric that TRL takes over tokens where advantages are (B, T), over responses where they are (B,)
        for row in (*mine, *theirs):
            assert row.pop("vespo/phi_seq_mean")
    assert mine == theirs
    assert any(row["loss"] != "0.0" for row in loss_rows(plain))
    moved = [
        not torch.equal(value, plain.model.state_dict()[name]) for name, value in tiny_model().state_dict().items()
    ]
    assert any(moved)


@pytest.mark.parametrize("loss_type", _trl.LOSSES_BY_TOKEN)
@pytest.mark.filterwarnings("ignore:importance_sampling_level='sequence':UserWarning")  # the case that it is about
def test_at_sequence_level_weights_are_those_of_trl(loss_type, tmp_path):
    settings = {
        "loss_type": loss_type, "importance_sampling_level": "sequence", "max_steps": 3, "num_iterations": 2,
        "optim": "sgd",  # Adam would blow up the rounding of gradients that are almost zero
    }  # fmt: skip
    plain = build(tmp_path, GRPOTrainer, script=Script(), **settings)
    trainer = build(tmp_path, script=Script(), nthr_beta=math.inf, **settings)
    run(plain)
    run(trainer)
    mine = weights_of(trainer)
    for name, value in weights_of(plain).items():
        assert torch.allclose(mine[name], value, rtol=0, atol=1e-6), name
    start = tiny_model().state_dict()
    assert max(float((value - start[name]).abs().max()) for name, value in mine.items()) > 1e-4


@pytest.mark.parametrize("kernel", ["last_layer", "exact"])
@pytest.mark.parametrize(
    "settings",
    [
        {"lora": lora(lora_dropout=0.3), "num_iterations": 2},
        {"lora": lora(lora_dropout=0.3), "beta": 0.1, "num_iterations": 2},
        {"dropout": 0.2},
        {"gradient_checkpointing": True, "dropout": 0.2},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    ],
    ids=["lora_dropout", "lora_reference", "dropout", "checkpointing", "accumulation"],
)
def test_scoring_draws_no_random_number_and_leaves_the_model_as_it_was(settings, kernel, tmp_path):
    settings = {"max_steps": 2, **settings}
    dropout = settings.pop("dropout", 0.0)
    plain = build(tmp_path, GRPOTrainer, model=tiny_model(dropout), **settings)
    trainer = build(tmp_path, model=tiny_model(dropout), nthr_beta=math.inf, nthr_kernel=kernel, **settings)
    run(plain)
    run(trainer)
    assert trainer.shaped is not None
    assert not trainer.shaped.selected.any()
    assert (~trainer.shaped.scores.isnan()).any()
    assert same_weights(trainer, plain)
    assert loss_rows(trainer) == loss_rows(plain)


def test_minus_infinity_selects_every_penalised_wrong_token(tmp_path):
    trainer = build(tmp_path, script=Script(), nthr_beta=-math.inf, nthr_eta="0.25")
    (rollout,) = run(trainer)
    for i, t in counted(rollout.batch):
        assert bool(trainer.shaped.selected[i, t]) == (MIXED[i] == 0)
        factor = 1 if MIXED[i] else 0.25
        assert float(rollout.batch["advantages"][i, t]) == pytest.approx(factor * grpo_advantages(MIXED)[i], abs=1e-5)
    (row,) = our_rows(trainer)
    assert row["nthr/frac_downweighted"] == 1.0
    for value in row.values():
        assert value is None or math.isfinite(value), row  # reporters take finite numbers only


# ---- advantages ------------------------------------------------------------------------------------------------------

METHODS = {
    "nthr": ({"nthr_beta": 0.1}, {"beta": 0.1}),
    "nthr_beta_1": ({}, {}),
    "nthr_fixed": ({"nthr_beta": 0.05, "nthr_eta": "0.3"}, {"beta": 0.05, "eta": "0.3"}),
    "nthr_p": ({"nthr_beta": 0.1, "nthr_eta": "p"}, {"beta": 0.1, "eta": "p"}),
    "nthr_1-p": ({"nthr_beta": 0.1, "nthr_eta": "1-p"}, {"beta": 0.1, "eta": "1-p"}),
    "nthr_others": ({"nthr_beta": 0.2, "nthr_include_self": False}, {"beta": 0.2, "include_self": False}),
    "thr": ({"thr_q": 0.3, "nthr_beta": 0.2}, {"q": 0.3, "beta": 0.2}),
    "thr_others": (
        {"thr_q": -0.3, "nthr_beta": 0.2, "nthr_include_self": False},
        {"q": -0.3, "beta": 0.2, "include_self": False},
    ),
    "pos_only": ({}, {}),
    "w_reinforce": ({"w_reinforce_weight": 0.2}, {"weight": 0.2}),
    "nsr": ({}, {}),
}


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("tapped", [False, True], ids=["extra_pass", "tapped"])
def test_advantages_in_the_loss_are_those_of_the_definition(case, tapped, tmp_path):
    settings, options = METHODS[case]
    method = case.split("_")[0] if case.startswith(("nthr", "thr")) else case
    rewards = (1, 0, 0, 1, 0, 1, 1, 1)
    settings = settings | STILL | (OFTEN if tapped else {})
    trainer = build(tmp_path, script=Script(), rewards=rewards, nthr_method=method, **settings)
    (rollout,) = run(trainer)
    assert ("old_per_token_logps" in rollout.batch) == tapped
    shaped = expected(trainer, rollout.batch, rewards, **options)
    agrees(trainer, rollout.batch, shaped)
    if case in ("nthr", "nthr_fixed", "nthr_p", "nthr_1-p", "nthr_others"):
        assert 0 < len(shaped.selected) < len(shaped.scores)


def test_random_spares_as_many_tokens_of_each_group_but_others(tmp_path):
    options = {"script": Script(), "nthr_beta": 0.1, "nthr_eta": "0.25", **STILL}
    trainer = build(tmp_path, nthr_method="random", **options)
    (rollout,) = run(trainer)
    before = grpo_advantages(MIXED)
    shaped = expected(trainer, rollout.batch, MIXED, beta=0.1, eta="0.25")
    places = counted(rollout.batch)
    spared = set()
    for i, t in places:
        value = float(rollout.batch["advantages"][i, t])
        if value == pytest.approx(0.25 * before[i], abs=1e-5):
            spared.add((i, t))
        else:
            assert value == pytest.approx(before[i], abs=1e-5)
    assert all(MIXED[i] == 0 for i, _ in spared)
    for group in range(2):
        assert sum(i // 4 == group for i, _ in spared) == sum(i // 4 == group for i, _ in shaped.selected)
    assert spared
    assert spared != shaped.selected
    again = build(tmp_path, nthr_method="random", **options | {"script": Script()})
    assert torch.equal(run(again)[0].batch["advantages"], rollout.batch["advantages"])
    other = build(tmp_path, nthr_method="random", **options | {"script": Script(), "seed": 7})
    assert not torch.equal(run(other)[0].batch["advantages"], rollout.batch["advantages"])


class SameScript(Script):
    """The same completions at every generation."""

    def __call__(self, prompts, trainer):
        self.calls = 0
        return super().__call__(prompts, trainer)


def test_the_random_draw_changes_with_the_generation_and_survives_a_resume(tmp_path):
    settings = {"nthr_method": "random", "nthr_beta": 0.1, "nthr_eta": "0.25", **STILL}
    settings |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = run(build(tmp_path, script=SameScript(), **settings))
    drawn = [(one.batch["advantages"] * one.batch["completion_mask"]) for one in whole]
    assert not torch.equal(drawn[0], drawn[2])  # of the same questions
    assert not torch.equal(drawn[1], drawn[3])
    resumed = run(
        build(tmp_path, script=SameScript(), **settings), resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert len(resumed) == 2
    for one, other in zip(resumed, whole[2:], strict=True):
        assert torch.equal(one.batch["advantages"], other.batch["advantages"])


def test_scores_are_those_of_the_weights_that_rolled_out(tmp_path):
    trainer = build(tmp_path, script=Script(), nthr_beta=0.1, max_steps=2)
    before_second = {}
    trainer.add_callback(Each(trainer, lambda t: before_second.update(weights_of(t))))  # last: before the second step
    _, second = run(trainer)
    trainer.model.load_state_dict(before_second)
    agrees(trainer, second.batch, expected(trainer, second.batch, MIXED, beta=0.1))


@pytest.mark.parametrize(
    "name", [n for n in ARCHITECTURES if n not in ("llama_tied", "dynamic_rope", "longrope", "pythia")]
)
@pytest.mark.parametrize("tapped", [False, True], ids=["extra_pass", "tapped"])
def test_every_architecture_is_scored_by_what_its_own_head_takes(name, tapped, tmp_path):
    settings = {"temperature": 0.7, **STILL, **(OFTEN if tapped else {})}
    model = model_like(name)
    model.eval()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    trainer = build(tmp_path, model=model, script=Script(), nthr_beta=0.05, **settings)
    (rollout,) = run(trainer)
    padded = name.startswith("gpt")  # positions are absolute
    dtype = torch.float32 if "moe" in name else torch.float64  # torch multiplies no experts in float64
    shaped = expected(trainer, rollout.batch, MIXED, 0.7, dtype, padded, beta=0.05)
    assert shaped.selected
    agrees(trainer, rollout.batch, shaped)


@pytest.mark.parametrize("iterations", [1, 2])  # 1: the reference's pass is the only one
def test_lora_is_scored_with_its_adapter(iterations, tmp_path):
    settings = {"script": Script(), "lora": lora(), "nthr_beta": 0.1, "beta": 0.1, **STILL}
    trainer = build(tmp_path, **settings, num_iterations=iterations, max_steps=iterations)
    model = trainer.model
    with torch.no_grad():  # an adapter that does something, so that the reference's states are others
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(generator=torch.Generator().manual_seed(0))
    (rollout,) = run(trainer)
    assert "ref_per_token_logps" in rollout.batch
    shaped = expected(trainer, rollout.batch, MIXED, beta=0.1)
    agrees(trainer, rollout.batch, shaped)
    with model.disable_adapter():
        others = expected(trainer, rollout.batch, MIXED, beta=0.1)
    assert max(abs(others.scores[place] - score) for place, score in shaped.scores.items()) > 1.0


@pytest.mark.parametrize("vocab", ["full", "group"])
@pytest.mark.parametrize("tools", [False, True])
def test_tools_truncated_completions_and_the_vocabulary_of_a_group(vocab, tools, tmp_path):
    script = Script(truncated=(1, 3, 6), tools=tools, only_tools=(2,))
    rewards = (1, 0, 0, 1, 1, 0, 1, 0)
    trainer = build(
        tmp_path, script=script, rewards=rewards, mask_truncated_completions=True, nthr_vocab=vocab, nthr_beta=0.05,
        **STILL,
    )  # fmt: skip
    (rollout,) = run(trainer)
    places = counted(rollout.batch)
    assert {i for i, _ in places}.isdisjoint({1, 3, 6} | ({2} if tools else set()))
    vocabularies = None
    if vocab == "group":
        ids = rollout.batch["completion_ids"]
        vocabularies = [sorted({int(ids[i, t]) for i, t in places if i // 4 == group}) for group in range(2)]
    shaped = expected(trainer, rollout.batch, rewards, beta=0.05, vocabularies=vocabularies)
    assert set(shaped.thresholds) == {0, 1}
    agrees(trainer, rollout.batch, shaped)
    (row,) = our_rows(trainer)
    assert row["nthr/p"] == 0.5


def test_a_group_whose_correct_responses_are_all_masked_is_left_alone(tmp_path):
    settings = {"mask_truncated_completions": True, "nthr_beta": -math.inf}
    trainer = build(tmp_path, script=Script(truncated=(0, 3)), **settings)
    (rollout,) = run(trainer)
    for i, t in counted(rollout.batch):
        assert bool(trainer.shaped.selected[i, t]) == (i >= 4 and MIXED[i] == 0)
    assert trainer.shaped.thresholds[:4].isnan().all()


def test_everything_masked_breaks_nothing(tmp_path):
    trainer = build(tmp_path, script=Script(truncated=range(8)), mask_truncated_completions=True)
    (rollout,) = run(trainer)
    assert counted(rollout.batch) == []
    assert not trainer.shaped.selected.any()
    assert {our_rows(trainer)[0].get(f"nthr/{name}") for name in NAMES[:4]} == {None}


def test_reward_functions_are_weighted_and_none_counts_for_nothing(tmp_path):
    first = (1.0, 0.0, None, 1.0, None, 0.0, 1.0, 0.0)
    second = (0.0, 1.0, None, None, 1.0, 1.0, 1.0, None)
    weights = (0.7, 0.4)
    sums = [
        None if a is None and b is None else weights[0] * (a or 0) + weights[1] * (b or 0)
        for a, b in zip(first, second, strict=True)
    ]
    assert [None if r is None else r >= 0.5 for r in sums] == [True, False, None, True, False, False, True, False]
    trainer = build(
        tmp_path, script=Script(), rewards=[rewarding(*first), rewarding(*second)], reward_weights=list(weights),
        nthr_beta=0.1, **STILL,
    )  # fmt: skip
    (rollout,) = run(trainer)
    shaped = expected(trainer, rollout.batch, sums, beta=0.1)
    assert {i for i, _ in shaped.scores} == {1, 4, 5, 7}
    assert shaped.etas == {0: pytest.approx(1 / 3), 1: 0.5}
    agrees(trainer, rollout.batch, shaped)
    (row,) = our_rows(trainer)
    assert row["nthr/p"] == pytest.approx((2 / 3 + 1 / 4) / 2)


@pytest.mark.parametrize("method", ["w_reinforce", "nsr"])
def test_without_a_reward_a_response_has_no_advantage(method, tmp_path):
    rewards = (1, 0, None, 1, None, None, None, None)
    trainer = build(tmp_path, script=Script(), rewards=rewards, nthr_method=method, **STILL)
    (rollout,) = run(trainer)
    agrees(trainer, rollout.batch, expected(trainer, rollout.batch, rewards))


def test_rewards_of_many_values_only_penalties_are_touched_and_only_in_mixed_groups(tmp_path):
    # correct with a penalty (0.6), wrong without one (0.4 above its group's mean), a group that is all wrong
    rewards = (9.0, 0.6, 0.4, 0.7, 0.4, -9.0, 0.5, 0.45, 0.1, 0.4, 0.2, 0.3)
    trainer = build(
        tmp_path, script=Script(), rewards=rewards, nthr_beta=-math.inf, nthr_eta="0",
        per_device_train_batch_size=12, **STILL,
    )  # fmt: skip
    (rollout,) = run(trainer)
    before = grpo_advantages(rewards)
    assert before[1] < 0 < before[4]
    agrees(trainer, rollout.batch, expected(trainer, rollout.batch, rewards, beta=-math.inf, eta="0"))
    changed = {i for i, t in counted(rollout.batch) if float(rollout.batch["advantages"][i, t]) == 0}
    assert changed == {2, 5}


@pytest.mark.parametrize("batch", [2, 6])
def test_groups_of_two(batch, tmp_path):
    rewards = (1, 0, 0, 0, 0, 1)[:batch]
    trainer = build(
        tmp_path, script=Script(), rewards=rewards, num_generations=2, per_device_train_batch_size=batch,
        nthr_beta=0.02, nthr_eta="p", **STILL,
    )  # fmt: skip
    (rollout,) = run(trainer)
    shaped = expected(trainer, rollout.batch, rewards, size=2, beta=0.02, eta="p")
    assert shaped.selected
    agrees(trainer, rollout.batch, shaped)


# ---- where the hidden states come from -------------------------------------------------------------------------------


def count_passes(trainer, monkeypatch):
    """Count the extra passes, and all runs of the backbone over rows as long as the batch's, without gradient."""
    counts = {"extra": 0, "backbone": 0, "widths": []}
    extra = NTHRGRPOTrainer._completion_states

    def counting(self, *given):
        counts["extra"] += 1
        return extra(self, *given)

    monkeypatch.setattr(NTHRGRPOTrainer, "_completion_states", counting)

    def seen(_, __, output):
        if not torch.is_grad_enabled():
            counts["widths"].append(output.last_hidden_state.shape[:2])

    module.unwrap_model(trainer.model).base_model.register_forward_hook(seen)
    return counts


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2, "max_steps": 2},
        {"steps_per_generation": 2, "per_device_train_batch_size": 4, "max_steps": 2},
        {"num_iterations": 2, "gradient_checkpointing": True, "max_steps": 2},
        {"num_iterations": 2, "lora": lora(), "beta": 0.1, "max_steps": 2},
        {"num_iterations": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 3},
    ],
    ids=["iterations", "steps_per_generation", "checkpointing", "lora_reference", "accumulation"],
)
def test_the_old_policys_pass_gives_the_states_and_no_other_is_run(settings, tmp_path, monkeypatch):
    options = {"script": Script(), "nthr_beta": 0.1, **STILL}
    trainer = build(tmp_path, **options, **settings)
    counts = count_passes(trainer, monkeypatch)
    (rollout,) = run(trainer)
    batch = rollout.batch
    width = batch["prompt_ids"].shape[1] + batch["completion_ids"].shape[1]
    passes = sum(rows for rows, columns in counts["widths"] if columns == width)
    assert counts["extra"] == 0
    assert passes == 8 * (1 + ("beta" in settings))
    tapped = trainer.shaped.scores
    monkeypatch.setattr(module, "has_dropout", lambda model: True)
    again = build(tmp_path, **options | {"script": Script()}, **settings)
    run(again)
    assert counts["extra"] == 1
    same = torch.allclose(again.shaped.scores, tapped, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert same
    assert (~tapped.isnan()).any()


@pytest.mark.parametrize("kind", ["attention", "lora"])
def test_with_dropout_a_pass_of_its_own_is_run_without_it(kind, tmp_path, monkeypatch):
    model = tiny_model(0.1 if kind == "attention" else 0.0)
    adapter = lora(lora_dropout=0.5) if kind == "lora" else None
    trainer = build(tmp_path, model=model, lora=adapter, script=Script(), nthr_beta=0.1, max_steps=2, **STILL, **OFTEN)
    if kind == "lora":
        for name, value in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(0))
    counts = count_passes(trainer, monkeypatch)
    (rollout,) = run(trainer)
    assert counts["extra"] == 1
    agrees(trainer, rollout.batch, expected(trainer, rollout.batch, MIXED, beta=0.1))


@pytest.mark.parametrize("noise", ["dropout", "layerdrop", "router_jitter_noise", "neftune"])
def test_whatever_makes_a_training_pass_random_is_seen(noise, tmp_path):
    settings = {"neftune_noise_alpha": 5} if noise == "neftune" else {}
    trainer = build(tmp_path, script=Script(), nthr_beta=0.1, **STILL, **OFTEN, **settings)
    if noise != "neftune":
        setattr(trainer.model.model.layers[0], noise, 0.1)
    (rollout,) = run(trainer)
    if noise == "neftune":
        agrees(trainer, rollout.batch, expected(trainer, rollout.batch, MIXED, beta=0.1))
    else:
        assert module.has_dropout(trainer.model)
    assert not module.has_dropout(tiny_model())


def test_no_pass_is_run_where_no_group_is_mixed(tmp_path, monkeypatch):
    trainer = build(tmp_path, script=Script(), rewards=(1, 1, 1, 1, 0, 0, 0, 0))
    counts = count_passes(trainer, monkeypatch)
    (rollout,) = run(trainer)
    assert counts["extra"] == 0
    assert not rollout.batch["advantages"].any()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert len(history) == 1
    assert {history[0].get(f"nthr/{name}") for name in NAMES[:4]} == {None}
    assert history[0]["nthr/p"] == 0.5


def test_a_step_without_a_mixed_group_does_not_count_in_a_rows_average(tmp_path):
    values = iter([(1, 1, 1, 1, 0, 0, 0, 0), MIXED])

    def reward(completions, **_):
        return list(next(values))

    trainer = build(tmp_path, script=Script(), rewards=reward, max_steps=2, logging_steps=2, nthr_beta=0.1, **STILL)
    run(trainer)
    (row,) = our_rows(trainer)
    assert row["nthr/eta"] == 0.25
    assert row["nthr/p"] == pytest.approx((0.5 + 0.375) / 2)
    assert row["nthr/threshold"] == pytest.approx(float(trainer.shaped.thresholds.mean()))


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluated(trainer):
    with contextlib.redirect_stdout(io.StringIO()), _trl.recording_rollouts(trainer) as rollouts:
        trainer.evaluate()
    return rollouts


@pytest.mark.parametrize("generations", [None, 2, 1])
def test_evaluation_logs_under_its_own_name_and_leaves_the_draw_alone(generations, tmp_path):
    held_out = Dataset.from_list([{"prompt": text} for text in QUESTIONS])
    settings = {
        "nthr_method": "random", "nthr_beta": 0.1, "nthr_eta": "0.25", "max_steps": 2, **STILL,
        "per_device_eval_batch_size": 8, "num_generations_eval": generations, "eval_dataset": held_out,
    }  # fmt: skip
    plain, watched = (build(tmp_path, script=SameScript(), **settings) for _ in range(2))
    rollouts = evaluated(watched)
    assert len(rollouts) == 4 * (generations or 4) // 8 + (generations == 1)
    assert not any(rollout.training for rollout in rollouts)
    size = generations or 4
    assert watched.shaped.groups.size == size
    (row,) = [row for row in watched.state.log_history if "eval_loss" in row]
    assert row["eval_nthr/p"] == pytest.approx(0.375 if generations != 1 else 0.5, abs=0.13)
    if size > 1:
        assert math.isfinite(row["eval_nthr/threshold"])
        assert 0 <= row["eval_nthr/frac_downweighted"] <= 1
    assert not any(key.startswith("nthr/") for key in row)
    for mine, other in zip(run(watched), run(plain), strict=True):
        assert torch.equal(mine.batch["advantages"], other.batch["advantages"])


# ---- LLDS ------------------------------------------------------------------------------------------------------------


FALLING = (1, 0, 0, 1, 0, 0, 0, 0)
"""Rewards of a group that is all wrong: advantages of 0 count as worth keeping, and nothing holds them up."""


def llds_by_hand(model, micro_batches):
    """Mean over kept responses of 1/|y| sum of what each token's log-prob fell, in the turns that fell in all."""
    total, n_kept = torch.zeros(()), 0
    for inputs in micro_batches:
        for i in range(len(inputs["completion_ids"])):
            prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()].tolist()
            completion = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()].tolist()
            logp = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            turns = [[]]
            for t, token in enumerate(completion):
                if "tool_mask" not in inputs or inputs["tool_mask"][i, t]:
                    turns[-1].append(inputs["old_per_token_logps"][i, t] - logp[len(prompt) + t - 1, token])
                else:
                    turns.append([])
            if inputs["response_advantages"][i] >= 0:
                n_kept += 1
                fallen = [fall for turn in turns if turn and sum(turn) > 0 for fall in turn if fall > 0]
                total = total + sum(fallen) / max(1, sum(map(len, turns)))
    return total / n_kept


@pytest.mark.parametrize("method", ["none", "nthr"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("tools", [False, True])
def test_the_llds_gradient_is_added_from_the_second_update_on(method, accumulation, tools, tmp_path):
    # Without accumulation the micro-batches of a generation meet other row counts than the old policy's pass: log-probs
    # of the first update then differ by rounding, and must not count as a fall.
    coef = 3.0
    trainer = build(
        tmp_path, script=Script(tools=tools), rewards=FALLING, nthr_method=method, nthr_beta=0.1, llds_coef=coef,
        max_grad_norm=0.0, num_iterations=2, max_steps=2, per_device_train_batch_size=8 // accumulation,
        learning_rate=2e-2, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    taken, gradients, penalties = [], [], []
    compute_loss = trainer.compute_loss

    def recording(model, inputs, *args, **kwargs):
        taken.append(dict(inputs))
        return compute_loss(model, inputs, *args, **kwargs)

    def compare(trainer):
        names, weights = zip(*trainer.model.named_parameters(), strict=True)
        whole = [weight.grad.clone() for weight in weights]
        loss = sum(GRPOTrainer._compute_loss(trainer, trainer.model, dict(inputs)) for inputs in taken)
        base = torch.autograd.grad(loss, weights)
        penalty = llds_by_hand(trainer.model, taken)
        penalties.append(float(penalty.detach()))
        added = (
            torch.autograd.grad(penalty, weights, allow_unused=True) if penalty.requires_grad else [None] * len(base)
        )
        gradients.append((names, whole, base, added))
        taken.clear()

    trainer.compute_loss = recording
    trainer.add_callback(Each(trainer, compare))
    run(trainer)
    (names, first, base, _), (_, second, base_2, added) = gradients
    for name, whole, plain in zip(names, first, base, strict=True):
        assert torch.allclose(whole, plain, rtol=1e-5, atol=1e-8), name
    assert penalties[1] > 1e-4
    size = max(float(part.abs().max()) for part in added) * coef
    assert size > 1e-3
    for name, whole, plain, more in zip(names, second, base_2, added, strict=True):
        assert torch.allclose(whole, plain + coef * more, rtol=1e-4, atol=1e-5 * size), name
    rows = our_rows(trainer)
    assert rows[0]["llds/penalty"] == 0.0
    assert rows[1]["llds/penalty"] == pytest.approx(penalties[1], rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_llds_does_nothing_before_the_second_update_nor_in_evaluation(dropout, tmp_path):
    # Dropout, or other kernels for other batch shapes, make log-probs differ under the same weights. The penalty's
    # gradient is a step function of that difference: 1e-7 nats would count as much as a nat.
    settings = {"num_iterations": 2, "max_steps": 1, "steps_per_generation": 2, "per_device_train_batch_size": 4}
    held_out = Dataset.from_list([{"prompt": text} for text in QUESTIONS])
    plain = build(tmp_path, GRPOTrainer, model=tiny_model(dropout), script=Script(), **settings)
    trainer = build(
        tmp_path, model=tiny_model(dropout), script=Script(), nthr_method="none", llds_coef=100.0,
        per_device_eval_batch_size=8, eval_dataset=held_out, **settings,
    )  # fmt: skip
    run(plain)
    run(trainer)
    assert same_weights(trainer, plain)
    assert our_rows(trainer)[0]["llds/penalty"] == 0.0
    evaluated(trainer)
    (row,) = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert row["eval_llds/penalty"] == 0.0


def test_an_evaluation_between_updates_does_not_switch_llds_off(tmp_path):
    held_out = Dataset.from_list([{"prompt": text} for text in QUESTIONS])
    settings = {
        "rewards": FALLING, "nthr_method": "none", "llds_coef": 3.0, "num_iterations": 2, "max_steps": 2,
        "learning_rate": 2e-2, "per_device_eval_batch_size": 8, "eval_dataset": held_out,
    }  # fmt: skip
    penalties = []
    for schedule in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = build(tmp_path, script=SameScript(), **settings, **schedule)
        run(trainer)
        penalties.append([row["llds/penalty"] for row in our_rows(trainer)])
    assert penalties[0] == penalties[1]
    assert penalties[0][1] > 0


# ---- the run log -----------------------------------------------------------------------------------------------------


def watched(trainer, every=1):
    probes = ProbeSet.from_preference_dataset(PREFERENCES, families=["chosen", "rejected"])
    return watch(trainer, probes.select(prompt_ids=probes.prompt_ids[:2]), every=every)


def check_tables(run_log, step, rollout, shaped_by_hand, rewards, texts):
    """Compare one step's tables with the batch that they tell of."""
    batch = rollout.batch
    places = counted(batch)
    tokens = run_log.nthr_tokens.query("step == @step").reset_index(drop=True)
    assert list(zip(tokens["example"], tokens["position"], strict=True)) == places
    before = grpo_advantages(rewards)
    for row, (i, t) in zip(tokens.to_dict("records"), places, strict=True):
        assert row["token_id"] == int(batch["completion_ids"][i, t])
        assert row["token"] == tokenizer().decode([row["token_id"]])
        assert row["question"] == i // 4
        assert row["advantage_before"] == pytest.approx(before[i], abs=1e-5)
        assert row["advantage"] == pytest.approx(float(batch["advantages"][i, t]), abs=1e-6)
        assert row["selected"] == ((i, t) in shaped_by_hand.selected)
        score = shaped_by_hand.scores.get((i, t), math.nan)
        assert row["score"] == pytest.approx(score, nan_ok=True, **SCORE)
        tau = shaped_by_hand.thresholds.get(i // 4, math.nan)
        assert row["threshold"] == pytest.approx(tau, nan_ok=True, **SCORE)
    rows = run_log.rollouts.query("step == @step").to_dict("records")
    assert [row["example"] for row in rows] == list(range(len(rewards)))
    for i, row in enumerate(rows):
        assert row["prompt"] == texts[i]
        assert row["completion"] == tokenizer().decode(batch["completion_ids"][i][batch["completion_mask"][i].bool()])
        assert row["n_tokens"] == sum(place[0] == i for place in places)
        assert row["n_selected"] == sum(place[0] == i for place in shaped_by_hand.selected)
        assert row["reward"] == rewards[i]
        assert row["correct"] == (rewards[i] >= 0.5)
        assert row["success_rate"] == sum(rewards[i // 4 * 4 : i // 4 * 4 + 4]) / 4
        assert row["eta"] == pytest.approx(shaped_by_hand.etas.get(i // 4, math.nan), nan_ok=True)
    return tokens


def test_the_run_log_tells_of_every_token_of_the_batch_and_the_metrics_follow_from_it(tmp_path):
    rewards = (1, 0, 0, 1, 0, 0, 0, 0)
    trainer = build(tmp_path, script=Script(tools=True), rewards=rewards, nthr_beta=0.02, max_steps=2, **STILL)
    watched(trainer)
    rollouts = run(trainer)
    run_log = load_run(tmp_path)
    assert sorted(set(run_log.rollouts["step"])) == [1, 2]
    assert run_log.nthr_tokens["selected"].any()
    history = [row for row in trainer.state.log_history if "loss" in row]
    for step, rollout in enumerate(rollouts, start=1):
        questions = [one["prompt"] for one in rollout.inputs]
        tokens = check_tables(
            run_log, step, rollout, expected(trainer, rollout.batch, rewards, beta=0.02), rewards, questions
        )
        wrong = tokens[(tokens["advantage_before"] < 0) & tokens["threshold"].notna()]
        row = history[step - 1]
        assert row["nthr/frac_downweighted"] == pytest.approx(wrong["selected"].mean())
        assert row["nthr/score_mean"] == pytest.approx(wrong["score"].mean(), rel=1e-5)
        assert row["nthr/threshold"] == pytest.approx(wrong["threshold"].mean(), rel=1e-6)
        assert row["nthr/eta"] == 0.0
        assert row["nthr/p"] == 0.25
        assert wrong["selected"].sum() == run_log.rollouts.query("step == @step")["n_selected"].sum()


@pytest.mark.parametrize("method", ["none", "thr", "pos_only", "w_reinforce", "nsr", "random"])
def test_every_method_is_told_of(method, tmp_path):
    trainer = build(tmp_path, script=Script(), nthr_method=method, nthr_beta=0.1)
    watched(trainer)
    (rollout,) = run(trainer)
    tokens = load_run(tmp_path).nthr_tokens
    given = rollout.batch["advantages"]
    assert given.ndim == (1 if method == "none" else 2)
    values = [float(given[i] if method == "none" else given[i, t]) for i, t in counted(rollout.batch)]
    assert tokens["advantage"].tolist() == pytest.approx(values, abs=1e-6)
    assert tokens["score"].notna().any() == (method in ("thr", "random"))
    assert tokens["selected"].any() == (method == "random")


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (2, [1, 3]), (3, [1, 4])])
def test_rollouts_are_logged_as_often_as_the_probes_are_observed(every, steps, tmp_path):
    trainer = build(tmp_path, script=Script(), max_steps=4)
    watched(trainer, every)
    run(trainer)
    run_log = load_run(tmp_path)
    assert sorted(set(run_log.rollouts["step"])) == steps
    assert sorted(set(run_log.nthr_tokens["step"])) == steps


def test_the_step_of_a_part_is_the_first_that_used_its_generation(tmp_path):
    trainer = build(tmp_path, script=Script(), max_steps=4, num_iterations=2)
    watched(trainer)
    rollouts = run(trainer)
    table = load_run(tmp_path).nthr_tokens
    assert sorted(set(table["step"])) == [1, 3]
    for step, rollout in zip((1, 3), rollouts, strict=True):
        ids = [int(rollout.batch["completion_ids"][place]) for place in counted(rollout.batch)]
        assert table[table["step"] == step]["token_id"].tolist() == ids


@pytest.mark.parametrize("case", ["unwatched", "switched_off"])
@pytest.mark.parametrize("method", ["nthr", "none"])
def test_nothing_is_written_where_it_is_not_asked_for(case, method, tmp_path):
    trainer = build(tmp_path, script=Script(), nthr_method=method, nthr_log_tokens=case == "unwatched")
    if case == "switched_off":
        watched(trainer)
    run(trainer)
    assert not list(tmp_path.rglob("nthr_tokens/*.parquet"))
    assert not list(tmp_path.rglob("rollouts/*.parquet"))
    if case == "switched_off":
        assert load_run(tmp_path).nthr_tokens.empty
        assert load_run(tmp_path).rollouts.empty


def test_a_resume_drops_what_lies_beyond_its_checkpoint_and_writes_it_again(tmp_path):
    settings = {"script": Script(), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = build(tmp_path, **settings)
    watched(trainer)
    run(trainer)
    first = load_run(tmp_path).nthr_tokens
    again = build(tmp_path, **settings | {"max_steps": 3, "script": Script()})
    watched(again)
    (rollout,) = run(again, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    second = load_run(tmp_path)
    assert sorted(set(second.rollouts["step"])) == [1, 2, 3]
    assert sorted(set(second.nthr_tokens["step"])) == [1, 2, 3]
    assert second.nthr_tokens.query("step <= 2").equals(first.query("step <= 2"))
    ids = [int(rollout.batch["completion_ids"][place]) for place in counted(rollout.batch)]
    assert second.nthr_tokens.query("step == 3")["token_id"].tolist() == ids


def test_everything_masked_is_logged_without_tokens(tmp_path):
    trainer = build(tmp_path, script=Script(truncated=range(8)), mask_truncated_completions=True)
    watched(trainer)
    run(trainer)
    run_log = load_run(tmp_path)
    assert run_log.nthr_tokens.empty
    assert run_log.rollouts["n_tokens"].tolist() == [0] * 8
    assert run_log.rollouts["reward"].tolist() == list(MIXED)


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(error, words, *args, **kwargs):
    with pytest.raises(error) as info:
        NTHRGRPOTrainer(*args, **kwargs)
    for word in words:
        assert word in str(info.value), (word, str(info.value))


def config(tmp_path, **settings):
    arguments = {"num_generations": 4, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False}
    return NTHRConfig(str(tmp_path), report_to="none", **arguments | settings)


def test_no_reward_and_foreign_arguments_are_refused(tmp_path):
    rows = Dataset.from_list([{"prompt": "Hello."}])
    common = {"train_dataset": rows, "processing_class": tokenizer()}
    refused(ValueError, ["reward_funcs is None", "reward function"], tiny_model(), args=config(tmp_path), **common)
    refused(
        TypeError, ["args", "NTHRConfig", "GRPOConfig"], tiny_model(), rewarding(1),
        TrainingArguments(str(tmp_path), use_cpu=True, bf16=False), **common,
    )  # fmt: skip


def test_a_grpo_configuration_trains_as_an_nthr_configuration_does(tmp_path):
    settings = {
        "num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 2, "max_completion_length": 5,
        "learning_rate": 1e-2, "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False, "save_strategy": "no", "logging_steps": 1,
    }  # fmt: skip
    ends = []
    for config_class in (GRPOConfig, NTHRConfig):
        transformers.set_seed(0)
        trainer = NTHRGRPOTrainer(
            tiny_model(), rewarding(1, 0), config_class(str(tmp_path), **settings),
            train_dataset=Dataset.from_list([{"prompt": "Hello."}, {"prompt": "Why?"}]), processing_class=tokenizer(),
        )  # fmt: skip
        run(trainer)
        ends.append({name: value.tolist() for name, value in trainer.model.state_dict().items()})
        assert "nthr/eta" in {key for row in trainer.state.log_history for key in row}
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"nthr_eta": "2p"}, ["nthr_eta", "'2p'", "'2|0.5-p|'", "'p'", "'1-p'", "number"]),
        ({"nthr_eta": "nan"}, ["nthr_eta", "'nan'", "'p'"]),
        ({"nthr_method": "ntrh"}, ["nthr_method", "'ntrh'", "'nthr'", "'pos_only'", "'none'"]),
        ({"nthr_vocab": "some"}, ["nthr_vocab", "'some'", "'full'", "'group'"]),
        ({"nthr_kernel": "ntk"}, ["nthr_kernel", "'ntk'", "'last_layer'", "'exact'"]),
        ({"nthr_beta": math.nan}, ["nthr_beta", "nan", "-inf"]),
        ({"nthr_correct": math.nan}, ["nthr_correct", "nan"]),
        ({"llds_coef": -1.0}, ["llds_coef", "-1.0", "0"]),
        ({"llds_coef": 0.2}, ["llds_coef", "0.2", "num_iterations", "steps_per_generation"]),
        ({"num_generations": 1}, ["1"]),
        ({"nthr_kernel": "exact", "temperature": 0.7}, ["temperature", "0.7", "1.0"]),
        ({"nthr_kernel": "exact", "nthr_vocab": "group"}, ["nthr_vocab", "'group'", "'full'"]),
    ],
)
def test_settings_are_refused_with_their_value_and_what_is_allowed(settings, words, tmp_path):
    with pytest.raises(ValueError, match=r".") as info:
        config(tmp_path, **settings)
    for word in words:
        assert word in str(info.value), (word, str(info.value))


def test_a_loss_that_was_not_seen_to_take_token_advantages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_trl, "LOSSES_BY_TOKEN", ("grpo", "dapo"))
    with pytest.raises(ValueError, match=r"loss_type.*'bnpo'.*grpo, dapo"):
        config(tmp_path, loss_type="bnpo")


def test_vllm_that_is_not_installed_is_refused_by_trl(tmp_path):
    with pytest.raises(ImportError, match="vLLM"):
        build(tmp_path, use_vllm=True)


def test_the_exact_kernel_refuses_groups_that_lie_on_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(NTHRConfig, "world_size", property(lambda self: 2))
    sizes = {"per_device_train_batch_size": 6, "num_generations": 4}
    with pytest.raises(ValueError, match=r"nthr_kernel='exact'.*6 responses.*groups of 4"):
        build(tmp_path, nthr_kernel="exact", **sizes)
    build(tmp_path, nthr_kernel="exact", nthr_method="pos_only", **sizes)
    held_out = Dataset.from_list([{"prompt": text} for text in QUESTIONS])
    with pytest.raises(ValueError, match=r"nthr_kernel='exact'.*evaluation.*6 responses.*groups of 4"):
        build(tmp_path, nthr_kernel="exact", per_device_eval_batch_size=6, eval_strategy="steps", eval_dataset=held_out)


def test_models_that_take_images_are_refused_by_methods_that_score(tmp_path, monkeypatch):
    monkeypatch.setattr(_trl, "takes_images", lambda trainer: True)
    with pytest.raises(NotImplementedError, match=r"'nthr'.*LlamaForCausalLM.*images"):
        build(tmp_path)
    build(tmp_path, nthr_method="pos_only")


def test_the_extra_pass_runs_mixed_groups_alone_and_no_padding_behind_the_longest(tmp_path, monkeypatch):
    rewards = (1, 0, 0, 1, 1, 1, 1, 1)  # the second group is all correct
    trainer = build(tmp_path, script=Script(), rewards=rewards, nthr_beta=0.1, per_device_train_batch_size=8, **STILL)
    widths = []
    extra = NTHRGRPOTrainer._completion_states

    def counting(self, batch, groups):
        handle = module.unwrap_model(self.model).base_model.register_forward_hook(
            lambda _, __, output: widths.append(tuple(output.last_hidden_state.shape[:2]))
        )
        states = extra(self, batch, groups)
        handle.remove()
        assert (states[4:] == 0).all()
        assert states[:4].abs().sum() > 0
        longest = int(batch["completion_mask"][:4].sum(dim=1).max())
        assert widths == [(4, batch["prompt_ids"].shape[1] + longest)]
        return states

    monkeypatch.setattr(NTHRGRPOTrainer, "_completion_states", counting)
    (rollout,) = run(trainer)
    agrees(trainer, rollout.batch, expected(trainer, rollout.batch, rewards, beta=0.1))
    assert widths
