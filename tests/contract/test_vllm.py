"""Contract with TRL's vLLM path, in both of its modes, without vllm installed.

TRL's own `VLLMGeneration` runs; what it talks to is `tests/trainers/vllm_stand_in.py`: an engine with weights and
log-probs of its own. That our trainer leaves TRL's path as it is, and what it reads from it, is tested; vLLM is not.
"""

import inspect
import math
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOTrainer
from trl.generation import vllm_client, vllm_generation

from llm_dynamics import ProbeSet, load_run, watch
from llm_dynamics.trainers.nthr import NTHRGRPOTrainer
from tests.conftest import PREFERENCES
from tests.trainers.runs import (
    MIXED,
    QUESTIONS,
    build,
    grpo_advantages,
    loss_rows,
    responses_of,
    run,
    same_weights,
    shaped_by_hand,
    tokenizer,
)
from tests.trainers.vllm_stand_in import LLM, Client, Engine, install

MODES = ("colocate", "server")
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
STILL = {"learning_rate": 0.0}
"""The weights of the rollout are those after training."""
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
WHERE = "see llm_dynamics/trainers/nthr/trainer.py and tests/trainers/vllm_stand_in.py"


@pytest.fixture
def engine(monkeypatch):
    """An engine whose log-probs are not quite the policy's, and which could not score one token."""
    return install(monkeypatch, Engine(sharpness=1.3, unscored=[(1, 0)]))


def make(out, trainer_class=NTHRGRPOTrainer, **settings):
    """A trainer that generates with vLLM."""
    return build(out, trainer_class, use_vllm=True, max_completion_length=5, **settings)


def correcting(name):
    """Settings of a kind of importance sampling correction, whose limits are felt; None: without."""
    if name is None:
        return {"vllm_importance_sampling_correction": False}
    limits = {"vllm_importance_sampling_clip_max": 1.2, "vllm_importance_sampling_clip_min": 0.8}
    return {"vllm_importance_sampling_mode": name, **limits}


def settings_of(mode, correction):
    """Of a short run."""
    return {"vllm_mode": mode, "max_steps": 2, **correcting(correction)}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Runs of TRL's own trainer, and their engines, by mode and correction."""
    made = {}

    def of(mode, correction):
        if (mode, correction) not in made:
            with pytest.MonkeyPatch.context() as patch:
                engine = install(patch, Engine(sharpness=1.3, unscored=[(1, 0)]))
                trainer = make(tmp_path_factory.mktemp("plain"), GRPOTrainer, **settings_of(mode, correction))
                run(trainer)
            made[mode, correction] = trainer, engine
        return made[mode, correction]

    return of


# ---- nothing is changed where nothing is asked -----------------------------------------------------------------------


NONE, NOTHING_SELECTED = {"nthr_method": "none"}, {"nthr_beta": math.inf}
SWITCHED_OFF = [
    *((mode, correction, NONE) for mode in MODES for correction in (*CORRECTIONS, None)),
    ("colocate", "token_truncate", NOTHING_SELECTED),
    ("server", "sequence_mask", NOTHING_SELECTED),
    ("server", None, NOTHING_SELECTED),
]


@pytest.mark.parametrize(("mode", "correction", "off"), SWITCHED_OFF)
def test_switched_off_it_is_trl_bit_for_bit(mode, correction, off, plain, engine, tmp_path):
    theirs, their_engine = plain(mode, correction)
    trainer = make(tmp_path, **settings_of(mode, correction), **off)
    run(trainer)
    assert repr(engine.logps) == repr(their_engine.logps)  # as text: NaN equals NaN
    assert engine.params == their_engine.params
    assert same_weights(trainer, theirs)
    rows = loss_rows(theirs)
    assert loss_rows(trainer) == rows
    assert all(float(row["loss"]) != 0 for row in rows)
    assert all(math.isfinite(float(row["grad_norm"])) for row in rows)
    if correction is not None:
        assert all(float(row["sampling/sampling_logp_difference/mean"]) > 0.01 for row in rows)


def test_watched_it_ends_with_the_same_bytes_and_the_log_holds_what_the_engine_said(monkeypatch, tmp_path):
    ended = []
    for name in ("alone", "watched"):
        with monkeypatch.context() as patch:
            engine = install(patch, Engine(sharpness=1.3))
            trainer = make(tmp_path / name, vllm_mode="colocate", max_steps=2, nthr_beta=0.02)
            if name == "watched":
                probes = ProbeSet.from_preference_dataset(PREFERENCES, families=["chosen", "rejected"])
                watch(trainer, probes, every=1, displacement=True)
            said = []
            complete = engine.complete
            engine.complete = lambda *args, _said=said, _complete=complete, **kw: (
                _said.append(_complete(*args, **kw)) or _said[-1]
            )
            run(trainer)
            ended.append(trainer)
    alone, watched = ended
    assert same_weights(watched, alone)
    log = load_run(tmp_path / "watched")
    assert log.observed_steps == [0, 1, 2]
    assert set(log.displacements["step"]) == {1, 2}
    texts = [tokenizer().decode(ids) for ids, _ in said for ids in ids]
    assert log.rollouts["completion"].tolist() == texts


# ---- the weights that generate are those that are trained ------------------------------------------------------------


SCHEDULES = {
    "each_step": {"max_steps": 3},
    "iterations": {"max_steps": 4, "num_iterations": 2},
    "steps_per_generation": {"max_steps": 4, "steps_per_generation": 2, "per_device_train_batch_size": 4},
    "accumulation": {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
}
SENDING = [
    *(("colocate", None, schedule) for schedule in SCHEDULES),
    *(("server", LORA, schedule) for schedule in SCHEDULES),
    ("colocate", LORA, "each_step"),
    ("server", None, "each_step"),
]


def checking(trainer, engine):
    """Note the steps at which weights are sent and completions made; the engine's weights must be the policy's."""
    backend, sent, generated = trainer.vllm_generation, [], []
    sync, generate = backend.sync_weights, backend.generate

    def syncing():
        sent.append(trainer.state.global_step)
        sync()

    def generating(*args, **kwargs):
        generated.append(trainer.state.global_step)
        if hasattr(trainer.model, "merge_adapter"):
            trainer.model.merge_adapter()
        policy = {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
            for name, weight in trainer.model.named_parameters()
        }
        old = [name for name, weight in engine.model.named_parameters() if not torch.equal(weight, policy[name])]
        if hasattr(trainer.model, "merge_adapter"):
            trainer.model.unmerge_adapter()
        assert not old, f"the engine generates with old weights: {old}"
        return generate(*args, **kwargs)

    backend.sync_weights, backend.generate = syncing, generating
    return sent, generated


@pytest.mark.parametrize(("mode", "lora", "schedule"), SENDING)
def test_weights_are_sent_as_often_as_trl_sends_them_and_are_the_policys(mode, lora, schedule, monkeypatch, tmp_path):
    seen = []
    for trainer_class in (GRPOTrainer, NTHRGRPOTrainer):
        with monkeypatch.context() as patch:  # what TRL writes to the environment makes the next process one of many
            engine = install(patch, Engine())
            trainer = make(tmp_path, trainer_class, vllm_mode=mode, lora=lora, **SCHEDULES[schedule])
            seen.append(checking(trainer, engine))
            run(trainer)
    theirs, ours = seen
    assert ours == theirs
    assert theirs[0] == theirs[1], f"weights are sent at steps {theirs[0]}, used at {theirs[1]}: {WHERE}"
    assert len(theirs[0]) > 1 or schedule != "each_step"


def test_an_engine_that_sleeps_is_woken_with_new_weights(engine, tmp_path):
    trainer = make(tmp_path, vllm_mode="colocate", vllm_enable_sleep_mode=True, max_steps=2)
    run(trainer)
    assert len(engine.logps) == 2
    assert all(math.isfinite(float(row["loss"])) for row in loss_rows(trainer))


# ---- scores and advantages -------------------------------------------------------------------------------------------


def passes_of(trainer):
    """Count the passes that our trainer adds for hidden states."""
    made = []
    original = trainer._completion_states
    trainer._completion_states = lambda *args: made.append(1) or original(*args)
    return made


@pytest.mark.parametrize("correction", ["sequence_mask", None], ids=["corrected", "uncorrected"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["nthr", "thr"])
def test_scores_are_those_of_the_policy_not_of_the_engine(method, mode, correction, engine, tmp_path):
    options = {"nthr_method": method, "nthr_beta": 0.02}
    trainer = make(tmp_path, vllm_mode=mode, **STILL, **correcting(correction), **options)
    extra = passes_of(trainer)
    (rollout,) = run(trainer)
    assert len(extra) == (correction is None), (
        f"{len(extra)} passes for states: TRL makes one for old_per_token_logps exactly where it corrects; {WHERE}"
    )
    batch = rollout.batch
    seen = responses_of(trainer.model, batch)
    before = grpo_advantages(MIXED)
    found = shaped_by_hand(method, MIXED, before, seen, batch["completion_ids"].shape[1], beta=0.02)
    assert found.margin > 1e-3, "a score lies at its threshold: draw another seed of the engine"
    assert found.scores
    for (i, t), score in found.scores.items():
        assert float(trainer.shaped.scores[i, t]) == pytest.approx(score, rel=1e-4, abs=1e-4)
    assert batch["advantages"].shape == batch["completion_ids"].shape
    for i, t in batch["completion_mask"].nonzero().tolist():
        assert float(batch["advantages"][i, t]) == pytest.approx(found.advantages[i][t], abs=1e-4)
    assert {round(a, 3) for row in found.advantages for a in row} > {round(a, 3) for a in before}


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_the_loss_multiplies_token_advantages_by_the_ratio_of_policy_and_engine(correction, engine, tmp_path):
    trainer = make(tmp_path, vllm_mode="server", loss_type="grpo", nthr_beta=0.02, **STILL, **correcting(correction))
    losses = []
    compute_loss = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: losses.append((compute_loss(model, inputs), inputs)) or losses[-1][0]
    run(trainer)
    ((loss, batch),) = losses
    loss = float(loss.detach())
    mask = batch["completion_mask"].bool()
    policy = batch["old_per_token_logps"].double()
    for i, t in mask.nonzero().tolist():
        assert not batch["sampling_per_token_logps"].isnan()[i, t] or t == 0
    difference = (policy - batch["sampling_per_token_logps"].double()).nan_to_num(0.0)
    by_sequence = correction.startswith("sequence")
    total, felt = 0.0, 0
    for i in range(8):
        places = mask[i].nonzero()[:, 0].tolist()
        whole = math.exp(sum(float(difference[i, t]) for t in places))
        per_response = 0.0
        for t in places:
            ratio = whole if by_sequence else math.exp(float(difference[i, t]))
            limited = not 0.8 <= ratio <= 1.2
            felt += limited
            if limited:
                ratio = min(max(ratio, 0.8), 1.2) if correction.endswith("truncate") else 0.0
            per_response -= ratio * float(batch["advantages"][i, t])
        total += per_response / len(places) / 8
    assert loss == pytest.approx(total, rel=1e-4), (
        f"with {correction} the loss of (B, T) advantages is {loss}, by hand {total}: TRL changed how it corrects; "
        "see `importance_sampling_ratio` in GRPOTrainer._compute_loss, and docs/nthr.md"
    )
    assert 0 < felt < int(mask.sum())
    assert trainer.shaped.selected.any()
    assert batch["importance_sampling_ratio"].shape == (8, 1 if by_sequence else mask.shape[1])


def test_a_token_that_the_engine_could_not_score_stays_in_the_loss(engine, tmp_path):
    trainer = make(tmp_path, vllm_mode="colocate", nthr_beta=0.1, **STILL)
    (rollout,) = run(trainer)
    assert rollout.batch["sampling_per_token_logps"][1, 0].isnan()
    assert rollout.batch["completion_mask"][1, 0] == 1
    assert rollout.batch["advantages"].isfinite().all()
    assert trainer.shaped.scores[1, 0].isfinite()


def test_llds_compares_with_the_policy_that_rolled_out_not_with_the_engine(engine, tmp_path):
    settings = {"num_iterations": 2, "max_steps": 2, "llds_coef": 0.2, "nthr_method": "none", "logging_steps": 1}
    trainer = make(tmp_path, vllm_mode="server", **STILL, **settings)
    (rollout,) = run(trainer)
    far = (rollout.batch["old_per_token_logps"] - rollout.batch["sampling_per_token_logps"]).abs()
    assert float(far.nan_to_num(0.0).max()) > 0.1
    assert [float(row["llds/penalty"]) for row in trainer.state.log_history if "loss" in row] == [0.0, 0.0]


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_scores_what_the_engine_generates(mode, engine, tmp_path):
    held_out = Dataset.from_list([{"prompt": text} for text in QUESTIONS])
    settings = {"per_device_eval_batch_size": 8, "eval_dataset": held_out, "nthr_beta": 0.02}
    trainer = make(tmp_path, vllm_mode=mode, **settings)
    row = trainer.evaluate()
    assert len(engine.logps) == 2
    assert 0 < row["eval_nthr/p"] < 1
    assert math.isfinite(row["eval_nthr/threshold"])


# ---- what TRL's path is made of --------------------------------------------------------------------------------------


def test_the_stand_in_has_what_trl_asks_of_vllm():
    source = inspect.getsource(vllm_generation.VLLMGeneration)
    asked = set(re.findall(r"self\.llm\.(\w+)", source))
    assert asked == {"llm_engine", "generate", "reset_prefix_cache", "sleep", "wake_up"}, (
        f"VLLMGeneration uses {sorted(asked)} of vllm.LLM: bring tests/trainers/vllm_stand_in.py up to it"
    )
    assert not [name for name in asked - {"llm_engine"} if not hasattr(LLM, name)]
    asked = set(re.findall(r"self\.vllm_client\.(\w+)", source))
    used = {"init_communicator", "generate", "update_named_params", "reset_prefix_cache", "image_features"}
    assert asked == used, f"VLLMGeneration uses {sorted(asked)} of its client: bring the stand-in up to it"
    for name in (*used - {"image_features"}, "get_server_info", "__init__"):
        real = inspect.signature(getattr(vllm_client.VLLMClient, name)).parameters
        ours = inspect.signature(getattr(Client, name)).parameters
        unknown = set(ours) - set(real) - {"params"}
        assert not unknown, f"VLLMClient.{name} takes no {sorted(unknown)}: bring the stand-in up to it"


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (vllm_generation.VLLMGeneration, "generate", ["self", "prompts", "images", "num_generations", "profiler"]),
        (vllm_generation.VLLMGeneration, "sync_weights", ["self"]),
        (
            GRPOTrainer,
            "_generate_single_turn",
            ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
        ),
    ],
)
def test_methods_of_the_path_have_the_names_and_parameters_that_were_reviewed(owner, name, parameters):
    method = getattr(owner, name, None)
    assert method is not None, f"{owner.__name__}.{name} is gone: review TRL's vLLM path; {WHERE}"
    seen = list(inspect.signature(method).parameters)[: len(parameters)]
    assert seen == parameters, f"{owner.__name__}.{name} begins with {seen}: review TRL's vLLM path; {WHERE}"


def test_our_trainer_overrides_nothing_of_the_path():
    for name in ("_generate_single_turn", "_generate", "_prepare_inputs", "_get_per_token_logps_and_entropies"):
        assert getattr(NTHRGRPOTrainer, name) is getattr(GRPOTrainer, name), name


def test_the_batch_holds_what_the_correction_needs(engine, tmp_path):
    trainer = make(tmp_path, GRPOTrainer, vllm_mode="colocate")
    (rollout,) = run(trainer)
    shape = rollout.batch["completion_ids"].shape
    for name, expected in (
        ("old_per_token_logps", shape),
        ("sampling_per_token_logps", shape),
        ("importance_sampling_ratio", (8, 1)),
    ):
        assert name in rollout.batch, f"a batch under vLLM has no {name}: review TRL's vLLM path; {WHERE}"
        assert rollout.batch[name].shape == expected, f"{name} is {tuple(rollout.batch[name].shape)}: {WHERE}"
    said = [value for values in engine.logps[0] for value in values]
    got = rollout.batch["sampling_per_token_logps"][rollout.batch["completion_mask"].bool()].tolist()
    assert got == pytest.approx(said, nan_ok=True), "sampling_per_token_logps are not the engine's"
