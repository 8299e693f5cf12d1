"""What cannot be watched is refused when the callback is attached, with the reason and the way out."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from trl import RewardConfig, RewardTrainer

from llm_dynamics import load_run
from llm_dynamics.callbacks import ProbeCallback, watch
from tests.conftest import PREFERENCES
from tests.training import build_trainer, make_probes, save_tiny_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def trainer(model_folder, tmp_path):
    return build_trainer("sft", model_folder, tmp_path)


@pytest.fixture
def plain(model_folder, tmp_path):
    """Makes a plain trainer of any model, with the tokenizer unless told otherwise."""

    def build(model, **options):
        options = {"processing_class": AutoTokenizer.from_pretrained(model_folder)} | options
        return Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), **options)

    return build


def test_a_reward_trainer_is_refused_since_it_has_no_log_probabilities(model_folder, tmp_path):
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1),
        RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(PREFERENCES),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    with pytest.raises(NotImplementedError, match=r"RewardTrainer trains a scalar score head.*Watch the policy"):
        watch(trainer, make_probes())
    assert not any(isinstance(callback, ProbeCallback) for callback in trainer.callback_handler.callbacks)


def test_a_trainer_without_a_tokenizer_is_told_to_pass_one(model_folder, plain):
    trainer = plain(AutoModelForCausalLM.from_pretrained(model_folder), processing_class=None)
    with pytest.raises(ValueError, match="no tokenizer: pass `processing_class="):
        watch(trainer, make_probes())


@pytest.mark.parametrize("model_class", [LlamaModel, AutoModelForSequenceClassification])
def test_a_model_without_a_language_model_head_is_refused(model_class, model_folder, plain):
    trainer = plain(model_class.from_pretrained(model_folder))
    with pytest.raises(NotImplementedError, match=r"no language-model head.*AutoModelForCausalLM"):
        watch(trainer, make_probes())


def test_an_encoder_decoder_model_is_refused(plain):
    config = T5Config(vocab_size=320, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(NotImplementedError, match="encoder-decoder"):
        watch(plain(T5ForConditionalGeneration(config)), make_probes())


def test_a_prompt_learning_adapter_is_refused(model_folder, plain):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config)
    with pytest.raises(NotImplementedError, match="PromptTuningConfig is a prompt-learning adapter"):
        watch(plain(model), make_probes())


def with_fsdp(trainer, version):
    trainer.is_fsdp_enabled = True
    plugin = SimpleNamespace(fsdp_version=version)
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", device=trainer.accelerator.device
    )
    return trainer


def test_fsdp_1_is_refused_with_the_way_out(trainer):
    with pytest.raises(NotImplementedError, match=r"FSDP version 1 flattens the parameters.*fsdp_version: 2"):
        watch(with_fsdp(trainer, 1), make_probes())


def test_fsdp_2_is_watched_and_its_steps_are_not_explained(trainer):
    with pytest.raises(NotImplementedError, match="FSDP shards weights and gradients over processes"):
        watch(with_fsdp(trainer, 2), make_probes(), influence=True)
    assert isinstance(watch(trainer, make_probes()), ProbeCallback)


def with_zero_stage(trainer, stage):
    plugin = SimpleNamespace(zero_stage=stage)
    trainer.is_deepspeed_enabled = True
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=plugin), mixed_precision="no", device=trainer.accelerator.device
    )
    return trainer


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_watched_and_its_steps_are_not_explained(stage, trainer):
    with pytest.raises(NotImplementedError, match="DeepSpeed partitions optimizer state and gradients"):
        watch(with_zero_stage(trainer, stage), make_probes(), influence=True)
    assert isinstance(watch(trainer, make_probes()), ProbeCallback)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"max_overhead": 0.0}, "max_overhead is 0.0"),
        ({"max_overhead": -1.0}, "max_overhead is -1.0"),
        ({"token_budget_mb": -1.0}, "token_budget_mb is -1.0; allowed: a finite number from 0"),
        ({"squeeze_strength": 0.0}, "squeeze_strength is 0.0; allowed: a finite number above 0"),
        ({"reference": "base"}, "reference is 'base'; allowed"),
    ],
)
def test_an_argument_out_of_range_is_named_with_what_is_allowed(options, message, trainer):
    with pytest.raises(ValueError, match=message):
        watch(trainer, make_probes(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evry": 5}, r"watch\(\) has no argument 'evry'; did you mean 'every'\? There are: every, influence,"),
        ({"max_overhed": 0.1}, "did you mean 'max_overhead'"),
        (
            {"influence": {"rules": "gauss2"}},
            r"watch\(influence=\{...\}\) has no argument 'rules'; did you mean 'rule'",
        ),
        ({"displacement": {"qqq": 1}}, r"has no argument 'qqq'\. There are: every, correct_from, eps, on_error$"),
    ],
)
def test_a_misspelt_argument_is_named_with_the_nearest(options, message, trainer):
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(TypeError, match=message):
        watch(trainer, make_probes(), **options)
    assert trainer.callback_handler.callbacks == before


def test_things_that_are_no_trainer_or_probe_set_are_named(trainer):
    with pytest.raises(TypeError, match="trainer must be a transformers or TRL trainer; seen dict"):
        watch({}, make_probes())
    with pytest.raises(TypeError, match=r"probes must be a ProbeSet.*list"):
        watch(trainer, PREFERENCES)


def test_a_second_callback_on_the_same_log_folder_is_told_to_use_its_own(trainer, tmp_path):
    watch(trainer, make_probes(2))
    with pytest.raises(ValueError, match="log_folder"):
        watch(trainer, make_probes(4))
    assert isinstance(watch(trainer, make_probes(4), log_folder=tmp_path / "second"), ProbeCallback)


def test_a_refusal_leaves_no_run_log_behind(trainer, tmp_path):
    trainer.is_fsdp_enabled = True
    with pytest.raises(NotImplementedError):
        watch(trainer, make_probes())
    assert not (tmp_path / "dynamics").exists()


def test_watch_takes_the_path_of_a_saved_probe_set(trainer, tmp_path):
    probes = make_probes()
    assert watch(trainer, probes.save(tmp_path / "probes.parquet")).probes == probes


@pytest.mark.filterwarnings("ignore:.*probes dropped while encoding")
def test_probes_with_tokens_that_the_model_lacks_are_dropped_and_counted(trainer):
    tokenizer = trainer.processing_class
    tokenizer.add_tokens(["egg?", "Paris."])  # the model is not resized, and no training row was tokenised with them
    callback = watch(trainer, make_probes(3), 1)
    assert callback.encoded.dropped
    assert all("outside the model's vocabulary" in reason for _, reason in callback.encoded.dropped)
    trainer.train()
    meta = load_run(callback.log_folder).meta
    assert len(meta["dropped_probes"]) == len(callback.encoded.dropped)


def test_where_no_probe_is_left_the_embeddings_are_to_be_resized(plain):
    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match=r"vocabulary of 20.*resize_token_embeddings"):
        watch(plain(small), make_probes(2))


def test_probes_beyond_the_last_position_are_truncated_and_counted(plain):
    vocabulary = 320
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=1, n_head=4, n_positions=20))
    callback = watch(plain(model), make_probes(3))
    assert callback.truncation.max_length == 20
    assert callback.encoded.n_truncated > 0
    assert max(len(probe.input_ids) for probe in callback.encoded) == 20
