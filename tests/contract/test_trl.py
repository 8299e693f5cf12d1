"""Contract with TRL and transformers: what `llm_dynamics/_trl.py` and the callbacks rely on, on real tiny trainers.

A failure here means that an upgrade changed something private: each message says what, and where to look.
"""

import dataclasses
import importlib.resources

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, SFTConfig, SFTTrainer

from llm_dynamics import _trl
from llm_dynamics.demo.tiny import build_tiny_model
from tests.training import KINDS, build_trainer, save_tiny_model

TRL_KINDS = ["sft", "dpo", "kto", "grpo"]
OWN_METRIC = {
    "sft": "mean_token_accuracy", "dpo": "rewards/chosen", "kto": "rewards/chosen", "grpo": "completions/mean_length"
}  # fmt: skip


class At(TrainerCallback):
    """Calls a function with the step at the beginning of training and after every optimizer step."""

    def __init__(self, act):
        self.act = act

    def on_train_begin(self, args, state, control, **kwargs):
        self.act(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.act(state.global_step)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def train(kind, model_folder, tmp_path, act, **arguments):
    """Train 4 steps, a log row every 2; `act(trainer, step)` is called at the start and after every step."""
    trainer = build_trainer(kind, model_folder, tmp_path, max_steps=4, logging_steps=2, **arguments)
    trainer.add_callback(At(lambda step: act(trainer, step)))
    trainer.train()
    return trainer.state.log_history


def loss_rows(history):
    return {row["step"]: row for row in history if "loss" in row}


# ---- add_to_next_row -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRL_KINDS)
def test_added_metrics_appear_once_beside_the_loss_and_only_the_latest_counts(kind, model_folder, tmp_path):
    def act(trainer, step):
        if step in (1, 2):  # both lie in the window of the row at step 2
            assert _trl.add_to_next_row(trainer, {"probe/x": 10.0 * step}), (
                f"{type(trainer).__name__} has no `_metrics['train']` any more: see _trl.add_to_next_row"
            )

    history = train(kind, model_folder, tmp_path, act)
    rows = loss_rows(history)
    assert OWN_METRIC[kind] in rows[2], f"TRL no longer logs {OWN_METRIC[kind]} beside the loss: see this test's list"
    assert rows[2].get("probe/x") == 20.0, (
        f"the row of the loss holds {rows[2].get('probe/x')} where the latest value is 20: TRL's `log` no longer "
        "averages the lists of `_metrics['train']` into it; see _trl.add_to_next_row"
    )
    holders = [row["step"] for row in history if "probe/x" in row]
    assert holders == [2], (
        f"the value was logged at steps {holders}: TRL does not clear `_metrics` after a row; see _trl.add_to_next_row"
    )


def test_a_plain_trainer_has_no_store_for_added_metrics(model_folder, tmp_path):
    trainer = build_trainer("plain", model_folder, tmp_path)
    assert not _trl.add_to_next_row(trainer, {"probe/x": 1.0}), (
        "transformers.Trainer has `_metrics` now: see whether _trl.add_to_next_row can use it, and where it is logged"
    )


# ---- log_row ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*TRL_KINDS, "plain"])
def test_a_row_of_its_own_takes_nothing_from_the_loss_row_of_the_same_step(kind, model_folder, tmp_path):
    def act(trainer, step):
        if step in (0, 2):
            _trl.add_to_next_row(trainer, {"probe/x": 1.0})
            _trl.log_row(trainer, {"probe/own": float(step)})

    history = train(kind, model_folder, tmp_path, act)
    own = [row for row in history if "probe/own" in row]
    assert [row["step"] for row in own] == [0, 2], (
        f"rows of their own at steps {[row['step'] for row in own]}, not 0 and 2: transformers.Trainer.log changed; "
        "see _trl.log_row"
    )
    for row in own:
        assert row.keys() <= {"probe/own", "step", "epoch", "num_input_tokens_seen"}, (
            f"the row holds {sorted(row)}: transformers.Trainer.log flushes more than it is given; see _trl.log_row"
        )
    rows = loss_rows(history)
    assert list(rows) == [2, 4], (
        f"loss rows at steps {list(rows)}, not 2 and 4: `control.should_log` no longer decides them, or is no longer "
        "what the callback handler resets; see _trl.log_row"
    )
    if kind != "plain":
        assert {OWN_METRIC[kind], "probe/x"} <= rows[2].keys(), (
            f"the loss row lacks metrics that TRL collected for it: {sorted(rows[2])}; see _trl.log_row"
        )


# ---- chat_template ---------------------------------------------------------------------------------------------------


def sft_trainer(tokenizer, tmp_path, **arguments):
    rows = [
        {
            "prompt": [{"role": "user", "content": "Why is the sky blue?"}],
            "completion": [{"role": "assistant", "content": "Because air scatters blue light."}],
        }
    ]
    return SFTTrainer(
        build_tiny_model(len(tokenizer)),
        args=SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, **arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def test_the_template_of_assistant_only_loss_is_found_on_the_trainer(tokenizer, tmp_path):
    templates = importlib.resources.files("trl").joinpath("chat_templates")
    tokenizer.chat_template = templates.joinpath("qwen3.jinja").read_text(encoding="utf-8")
    trainer = sft_trainer(tokenizer, tmp_path, assistant_only_loss=True)
    found = _trl.rendering(trainer)["chat_template"]
    assert found is not None, (
        "SFTTrainer keeps the template that it swaps in for assistant_only_loss elsewhere than in `chat_template`: "
        "see _trl.rendering"
    )
    assert "generation" in found, "`SFTTrainer.chat_template` is no training template any more: see _trl.rendering"
    assert found != trainer.processing_class.chat_template, (
        "SFTTrainer changes the tokenizer's own template now: _trl.rendering need not name it"
    )


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "plain"])
def test_without_assistant_only_loss_the_tokenizers_template_counts(kind, model_folder, tmp_path):
    found = _trl.rendering(build_trainer(kind, model_folder, tmp_path))
    assert found == {"chat_template": None, "chat_template_kwargs": None, "keep_prompt": False}, (
        f"{kind}: the trainer has a `chat_template` or template arguments of its own now; see _trl.rendering"
    )


# ---- reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_the_frozen_reference_is_found_on_the_trainer(kind, model_folder, tmp_path):
    trainer = build_trainer(kind, model_folder, tmp_path)
    assert _trl.reference_source(trainer) == _trl.MODEL
    assert _trl.loss_has_reference(trainer)
    with _trl.reference(trainer) as reference:
        pass
    assert isinstance(reference, torch.nn.Module), f"{kind}: `ref_model` is {reference!r}; see _trl.reference"
    assert reference is not trainer.model, f"{kind}: the reference is the trained model itself; see _trl.reference"
    own = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    assert all(torch.equal(own[name], value) for name, value in reference.state_dict().items()), (
        f"{kind}: the reference has other weights than the model it was loaded from; see _trl.reference"
    )


@pytest.mark.parametrize(
    ("kind", "lora", "options", "source", "in_loss"),
    [
        ("sft", False, {}, "none", False),
        ("plain", False, {}, "none", False),
        ("sft", True, {}, _trl.ADAPTER_OFF, False),
        ("grpo", False, {}, "none", False),
        ("grpo", True, {}, _trl.ADAPTER_OFF, False),
        ("grpo", False, {"beta": 0.1}, _trl.MODEL, True),
        ("rloo", False, {"beta": 0.1, "sync_ref_model": True}, _trl.SYNCHRONISED, True),
        ("dpo", True, {}, _trl.ADAPTER_OFF, True),
        ("kto", True, {}, _trl.ADAPTER_OFF, True),
        ("dpo", False, {"precompute_ref_log_probs": True}, "step 0", True),
        ("kto", False, {"precompute_ref_log_probs": True}, "step 0", True),
    ],
)
def test_where_the_reference_of_a_trainer_is(kind, lora, options, source, in_loss, model_folder, tmp_path):
    trainer = build_trainer(kind, model_folder, tmp_path, lora=lora, **options)
    assert _trl.reference_source(trainer) == source, f"{kind}, lora={lora}, {options}; see _trl.reference_source"
    assert _trl.loss_has_reference(trainer) is in_loss, f"{kind}, {options}; see _trl.loss_has_reference"


# ---- adapters of the reference ---------------------------------------------------------------------------------------


def logits(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def move(model):
    """Change the adapter that is trained."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert ".default." in name, f"TRL trains {name}, no part of the adapter `default`"
                parameter.add_(0.05)


def test_a_fresh_adapter_is_switched_off_for_the_reference(model_folder, tmp_path):
    trainer = build_trainer("dpo", model_folder, tmp_path, lora=True)
    model = trainer.model
    before = logits(model)
    move(model)
    moved = logits(model)
    assert not torch.equal(moved, before)
    with _trl.reference(trainer):
        reference = logits(model)
    torch.testing.assert_close(reference, before, msg="the reference is not the model without its adapter; see "
                               "_trl.reference")  # fmt: skip
    assert torch.equal(logits(model), moved), "the adapter did not come back on; see _trl.reference"


def test_the_copy_of_an_adapter_passed_already_wrapped_is_the_reference(model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    plain = logits(base)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    wrapped = get_peft_model(base, adapter)
    before = logits(wrapped)
    assert not torch.allclose(before, plain)

    trainer_class, config_class = KINDS["dpo"]
    trainer = trainer_class(
        model=wrapped,
        args=config_class(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True),
        train_dataset=build_trainer("dpo", model_folder, tmp_path / "other").train_dataset,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    model = trainer.model
    assert set(model.peft_config) == {"default", "ref"}, (
        f"the adapters are {sorted(model.peft_config)}: TRL no longer keeps a copy called `ref` of an adapter that was "
        "passed already wrapped; see _trl.reference"
    )
    move(model)
    with _trl.reference(trainer):
        reference = logits(model)
    torch.testing.assert_close(reference, before, msg="the reference is not the adapter as it was passed; see "
                               "_trl.reference")  # fmt: skip
    assert model.active_adapter == "default", "the trained adapter is not active afterwards; see _trl.reference"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained, "the adapter does not train any more after the reference was used; see _trl.reference"
    assert not [name for name in trained if ".ref." in name], (
        "the reference copy would train after it was used; see _trl.reference"
    )


# ---- recording_clip --------------------------------------------------------------------------------------------------


class Clipped(TrainerCallback):
    """Records what `recording_clip` saw of every step, and the norm of the gradients that the optimizer is given."""

    def __init__(self):
        self.recorded, self.norms, self.context = [], [], None

    def on_step_begin(self, args, state, control, **kwargs):
        self.context = _trl.recording_clip(self.trainer)
        self.recorded.append(self.context.__enter__())

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.context.__exit__(None, None, None)
        gradients = [p.grad.flatten() for p in self.trainer.model.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat(gradients).norm()))


@pytest.mark.parametrize("kind", [*TRL_KINDS, "plain"])
@pytest.mark.parametrize("max_grad_norm", [0.2, 0.0])
def test_every_trainer_clips_through_its_accelerator(kind, max_grad_norm, model_folder, tmp_path):
    clipped = Clipped()
    trainer = build_trainer(kind, model_folder, tmp_path, max_steps=1, max_grad_norm=max_grad_norm, callbacks=[clipped])
    clipped.trainer = trainer
    trainer.train()
    assert clipped.recorded[0], (
        f"{type(trainer).__name__} does not clip through `accelerator.clip_grad_norm_`: see _trl.recording_clip"
    )
    (factor, norm), seen = clipped.recorded[0], clipped.norms[0]
    (logged,) = (row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row)
    assert norm == pytest.approx(float(logged), rel=1e-5), (
        "`accelerator.clip_grad_norm_` no longer returns the norm before clipping; see _trl.recording_clip"
    )
    assert factor * norm == pytest.approx(seen, rel=1e-5), (
        f"gradients of norm {norm} were scaled to {seen}, not by {factor}: clipping computes its factor otherwise; see "
        "_trl.recording_clip"
    )
    assert factor < 1 if max_grad_norm else factor == 1
    assert "clip_grad_norm_" not in vars(trainer.accelerator), "the class's own clipping is not seen again"


# ---- sampling_temperature --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "temperature"), [("sft", 1.0), ("dpo", 1.0), ("kto", 1.0), ("grpo", 0.7), ("rloo", 1.3)]
)
def test_log_probs_are_those_of_logits_divided_by_the_sampling_temperature(kind, temperature, model_folder, tmp_path):
    arguments = {} if temperature == 1.0 else {"temperature": temperature}
    trainer = build_trainer(kind, model_folder, tmp_path, **arguments)
    assert _trl.sampling_temperature(trainer) == temperature, (
        f"{type(trainer).__name__} keeps its temperature elsewhere than in `temperature`: see _trl.sampling_temperature"
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        model = trainer.model.eval()
        fused = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        plain = (model(input_ids=ids).logits[:, :-1] / temperature).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5, msg=lambda text: (
        f"{kind}: the loss sees other log-probs than of logits / temperature; see _trl.sampling_temperature. {text}"
    ))  # fmt: skip


# ---- facts that the callbacks rely on --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRL_KINDS)
def test_the_fused_head_is_in_place_when_training_begins(kind, model_folder, tmp_path):
    seen = []

    def act(trainer, step):
        if step == 0:
            labels = torch.tensor([[-100, 6, 7, 8]])
            with torch.no_grad():
                out = trainer.model(input_ids=torch.tensor([[5, 6, 7, 8]]), labels=labels, fused_lm_head=True)
            seen.append(getattr(out, "log_probs", None))

    train(kind, model_folder, tmp_path, act)
    assert seen[0] is not None, (
        f"{kind}: `model(..., labels=..., fused_lm_head=True)` gives no `log_probs` in on_train_begin: the fused head "
        "changed (trl.trainer.utils.add_fused_lm_head); what binds to it must move, see _trl.py"
    )


@pytest.mark.parametrize("config", [SFTConfig, DPOConfig])
def test_truncation_is_configured_by_the_names_that_the_callback_reads(config):
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    assert {"max_length", "truncation_mode"} <= defaults.keys(), (
        f"{config.__name__} lost max_length or truncation_mode: ProbeCallback reads them by name; move that to _trl.py"
    )
    assert defaults["truncation_mode"] == "keep_start", (
        f"{config.__name__} truncates by {defaults['truncation_mode']!r} now: see probes.TruncationRule"
    )


def test_the_models_own_forward_is_found_past_the_autocast_of_accelerate(tmp_path):
    trainer = build_trainer("sft", save_tiny_model(tmp_path / "model"), tmp_path / "run", bf16=True)
    model, seen = trainer.model, []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    ids = torch.tensor([[1, 2, 3]])
    for _ in range(2):  # a second `train()` prepares the model again
        trainer.accelerator.prepare_model(model)
        prepared = vars(model)["forward"]
        model(ids)
        assert seen.pop(), "no autocast of accelerate begins inside the model's forward: _trl.outside_autocast can go"
        with _trl.outside_autocast(model):
            model(ids)
        assert not seen.pop(), "accelerate keeps the model's own forward elsewhere: see _trl.outside_autocast"
        assert vars(model)["forward"] == prepared
