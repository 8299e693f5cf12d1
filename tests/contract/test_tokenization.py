"""Contract with TRL: a probe's ids are the ids that the trainers make of the same row."""

import importlib.resources
import json

import numpy as np
import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from llm_dynamics import _trl, watch
from llm_dynamics.demo.tiny import build_tiny_model
from llm_dynamics.probes import ProbeSet, TruncationRule, encode_probes

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode is deprecated"),
    pytest.mark.filterwarnings("ignore:.*probes dropped while encoding"),
]
COMMON = {"bf16": False, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2}
# "lon" + "g" merge across the boundary; the last row already ends with EOS.
MERGING = [
    {"prompt": "How lon", "chosen": "g should I boil an egg?", "rejected": "g is it?"},
    {"prompt": "Why is the sky", "chosen": " blue?<|im_end|>", "rejected": " red?"},
]


def with_bos(tokenizer):
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    return tokenizer


def as_completions(rows):
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]


def sft_rows(rows, tokenizer, tmp_path, **config):
    trainer = SFTTrainer(
        build_tiny_model(len(tokenizer)),
        args=SFTConfig(output_dir=str(tmp_path), completion_only_loss=True, **COMMON, **config),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return list(trainer.train_dataset)


def dpo_trainer(rows, tokenizer, tmp_path, **config):
    build_tiny_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    return DPOTrainer(
        str(tmp_path / "model"),
        args=DPOConfig(output_dir=str(tmp_path / "out"), **COMMON, **config),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def assert_same_as_sft(encoded, sft):
    assert len(encoded) == len(sft)
    for probe, row in zip(encoded, sft, strict=True):
        assert list(probe.input_ids) == row["input_ids"]
        assert [-100] * len(probe.prompt_ids) + list(probe.response_ids) == row["labels"]


@pytest.mark.parametrize("bos", [False, True])
def test_plain_rows_encode_as_in_sft(preference_rows, tokenizer, tmp_path, bos):
    tokenizer = with_bos(tokenizer) if bos else tokenizer
    rows = as_completions([*preference_rows, *MERGING])
    encoded = encode_probes(ProbeSet.from_prompt_completion(rows), tokenizer)
    assert encoded.boundary_merges == 1
    assert_same_as_sft(encoded, sft_rows(rows, tokenizer, tmp_path))


def test_chat_rows_encode_as_in_sft(chat_preference_rows, tokenizer, tmp_path):
    rows = as_completions(chat_preference_rows)
    encoded = encode_probes(ProbeSet.from_prompt_completion(rows), tokenizer)
    assert_same_as_sft(encoded, sft_rows(rows, tokenizer, tmp_path))


def test_a_template_that_renders_the_prompt_alone_differently_encodes_as_in_sft(
    chat_preference_rows, tokenizer, tmp_path
):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think></think>{% endif %}"
    )
    rows = as_completions(chat_preference_rows)
    encoded = encode_probes(ProbeSet.from_prompt_completion(rows), tokenizer)
    assert encoded.boundary_merges == len(rows)
    assert_same_as_sft(encoded, sft_rows(rows, tokenizer, tmp_path))


@pytest.mark.parametrize(("mode", "max_length"), [("keep_start", 16), ("keep_end", 30)])
def test_truncated_rows_encode_as_in_sft(preference_rows, tokenizer, tmp_path, mode, max_length):
    rows = as_completions(preference_rows)
    rule = TruncationRule(max_length, mode)
    encoded = encode_probes(ProbeSet.from_prompt_completion(rows), tokenizer, truncation=rule)
    assert encoded.n_truncated > 0
    sft = sft_rows(rows, tokenizer, tmp_path, max_length=max_length, truncation_mode=mode)
    # SFT keeps rows whose prompt is cut off entirely; their first token has no context, so no probe can score it.
    assert_same_as_sft(encoded, [row for row in sft if row["labels"][0] == -100])


def test_rows_whose_prompt_fills_the_length_are_dropped_as_in_sft(preference_rows, tokenizer, tmp_path):
    rows = as_completions(preference_rows)
    lengths = [len(probe.prompt_ids) for probe in encode_probes(ProbeSet.from_prompt_completion(rows), tokenizer)]
    limit = max(lengths)
    encoded = encode_probes(ProbeSet.from_prompt_completion(rows), tokenizer, truncation=TruncationRule(limit))
    assert encoded.dropped
    assert_same_as_sft(encoded, sft_rows(rows, tokenizer, tmp_path, max_length=limit))


def assert_same_as_dpo(probes, encoded, dpo):
    by_id = {probe.probe_id: probe for probe in encoded}
    for prompt_id, row in zip(probes.prompt_ids, dpo, strict=True):
        for family in ("chosen", "rejected"):
            probe = by_id[f"{prompt_id}/{family}"]
            assert list(probe.prompt_ids) == row["prompt_ids"]
            assert list(probe.response_ids) == row[f"{family}_ids"]


def implicit(rows):
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]


@pytest.mark.parametrize("form", ["plain", "implicit", "chat", "implicit_chat"])
def test_preference_rows_encode_as_in_dpo(preference_rows, chat_preference_rows, tokenizer, tmp_path, form):
    plain = [{**row, "prompt": row["prompt"] + "\n"} for row in preference_rows]
    rows = {
        "plain": [*plain, *MERGING],
        "implicit": implicit(plain),
        "chat": chat_preference_rows,
        "implicit_chat": implicit(chat_preference_rows),
    }[form]
    probes = ProbeSet.from_preference_dataset(rows)
    trainer = dpo_trainer(rows, tokenizer, tmp_path)
    assert_same_as_dpo(probes, encode_probes(probes, tokenizer), trainer.train_dataset)


def test_a_boundary_that_only_one_of_a_pair_moves_leaves_the_same_ids(tokenizer, tmp_path):
    rows = [{"prompt": "How lon", "chosen": "g should I boil an egg?", "rejected": "ely it is."}]
    probes = ProbeSet.from_preference_dataset(rows)
    encoded = encode_probes(probes, tokenizer)
    row = dpo_trainer(rows, tokenizer, tmp_path).train_dataset[0]
    assert encoded.boundary_merges >= 1
    for probe, family in zip(encoded, ("chosen", "rejected"), strict=True):
        assert list(probe.input_ids) == row["prompt_ids"] + row[f"{family}_ids"]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_truncation_cuts_what_the_dpo_collator_cuts(preference_rows, tokenizer, tmp_path, mode):
    max_length = 30
    trainer = dpo_trainer(preference_rows, tokenizer, tmp_path, max_length=max_length, truncation_mode=mode)
    batch = trainer.data_collator(list(trainer.train_dataset))
    probes = ProbeSet.from_preference_dataset(preference_rows)
    encoded = encode_probes(probes, tokenizer, truncation=TruncationRule(max_length, mode))
    assert encoded.n_truncated > 0
    by_id = {probe.probe_id: probe for probe in encoded}
    names = [f"{name}/{family}" for family in ("chosen", "rejected") for name in probes.prompt_ids]
    dropped = dict(encoded.dropped)
    for name, ids, mask, is_response in zip(
        names, batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        n_prompt = int(((mask == 1) & (is_response == 0)).sum())
        if name in dropped:
            assert n_prompt == 0
            continue
        assert list(by_id[name].input_ids) == ids[mask == 1].tolist()
        assert len(by_id[name].prompt_ids) == n_prompt


# ---- every form of rows, as the trainers read it


def turns(row, response):
    return [*row["prompt"], *row[response]]


@pytest.mark.parametrize("form", ["messages", "conversations", "text", "transcript"])
def test_whole_rows_encode_as_in_sft(preference_rows, chat_preference_rows, tokenizer, tmp_path, form):
    rows = {
        "messages": [{"messages": turns(row, "chosen")} for row in chat_preference_rows],
        "conversations": [
            {"conversations": [{"from": m["role"], "value": m["content"]} for m in turns(row, "chosen")]}
            for row in chat_preference_rows
        ],
        "text": [{"text": f"{row['prompt']} {row['chosen']}"} for row in preference_rows],
        "transcript": [
            {"text": f"\n\nHuman: {row['prompt']}\n\nAssistant: {row['chosen']}"} for row in preference_rows
        ],
    }[form]
    encoded = encode_probes(ProbeSet.from_prompt_completion(rows), tokenizer)
    trained = sft_rows(rows, tokenizer, tmp_path)
    assert [list(probe.input_ids) for probe in encoded] == [row["input_ids"] for row in trained]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("form", ["explicit", "implicit"])
def test_pairs_encode_as_in_dpo(preference_rows, chat_preference_rows, tokenizer, tmp_path, chat, form):
    rows = chat_preference_rows if chat else preference_rows
    if form == "implicit":
        rows = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    encoded = iter(encode_probes(ProbeSet.from_preference_dataset(rows), tokenizer))
    for row in dpo_trainer(rows, tokenizer, tmp_path).train_dataset:
        for name in ("chosen_ids", "rejected_ids"):
            assert list(next(encoded).input_ids) == row["prompt_ids"] + row[name]


@pytest.mark.parametrize("kind", [bool, int, float, np.bool_, np.int64])
@pytest.mark.parametrize("chat", [False, True])
def test_rows_with_labels_encode_as_in_kto(preference_rows, chat_preference_rows, tokenizer, tmp_path, chat, kind):
    rows = chat_preference_rows if chat else preference_rows
    rows = [
        {"prompt": row["prompt"], "completion": row["rejected" if n % 3 else "chosen"], "label": not n % 3}
        for n, row in enumerate(rows)
    ]
    labelled = [{**row, "label": kind(row["label"])} for row in rows]
    probes = ProbeSet.from_prompt_completion(labelled)
    encoded = {probe.probe_id: list(probe.input_ids) for probe in encode_probes(probes, tokenizer)}
    found = [(probe.family == "chosen", encoded[probe.probe_id]) for probe in probes]
    if kind is bool:
        build_tiny_model(len(tokenizer)).save_pretrained(tmp_path / "model")
        trainer = KTOTrainer(
            str(tmp_path / "model"),
            args=KTOConfig(output_dir=str(tmp_path / "out"), desirable_weight=2.0, **COMMON),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        assert found == [(r["label"], r["prompt_ids"] + r["completion_ids"]) for r in trainer.train_dataset]
    assert [desirable for desirable, _ in found] == [row["label"] for row in rows]


# -- Tools and other arguments of the template

SHOWING = (
    "{% if tools is not none and tools is defined %}<tools>{{ tools | tojson }}</tools>\n{% endif %}{{ style or '' }}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SCHEMAS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
OF_ROWS = {
    "tools as JSON": [{"tools": json.dumps(SCHEMAS)}, {"tools": None}, {"tools": "[]"}],
    "tools": [{"tools": [{"name": "add"}]}, {"tools": None}, {"tools": []}],
    "arguments": [{"chat_template_kwargs": {"style": style}} for style in ("briefly", None, "at length")],
    "a template": [{"chat_template_kwargs": {"chat_template": "{{ 'T' }}" + SHOWING}}] * 3,
}


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_tools_and_template_arguments_of_rows_encode_as_in_training(chat_preference_rows, tokenizer, tmp_path, kind):
    tokenizer.chat_template = SHOWING
    for name, columns in OF_ROWS.items():
        rows = [{**row, **own} for row, own in zip(chat_preference_rows, columns, strict=False)]
        data = Dataset.from_list(rows)  # which fills in None for what a row lacks: so read the same rows from it
        probes = ProbeSet.from_preference_dataset(data)
        encoded = encode_probes(probes, tokenizer)
        assert len({probe.prompt_ids[:8] for probe in encoded}) > 1 or name == "a template"
        if kind == "dpo":
            assert_same_as_dpo(probes, encoded, dpo_trainer(rows, tokenizer, tmp_path / name).train_dataset)
            continue
        chosen = [probe for probe in encoded if probe.probe_id.endswith("/chosen")]
        data = data.rename_column("chosen", "completion").remove_columns("rejected")
        if kind == "sft":
            assert_same_as_sft(chosen, sft_rows(list(data), tokenizer, tmp_path))
            continue
        build_tiny_model(len(tokenizer)).save_pretrained(tmp_path / "model")
        trainer = KTOTrainer(
            str(tmp_path / "model"),
            args=KTOConfig(output_dir=str(tmp_path / "out"), **COMMON),
            train_dataset=data.add_column("label", [True, False, True]),
            processing_class=tokenizer,
        )
        for probe, row in zip(chosen, trainer.train_dataset, strict=True):
            assert (list(probe.prompt_ids), list(probe.response_ids)) == (row["prompt_ids"], row["completion_ids"])


def add(a: int, b: int) -> int:
    """
    Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


class Shop:
    """An environment with one tool."""

    def reset(self, **_):
        return None

    def buy(self, thing: str) -> str:
        """
        Buys something.

        Args:
            thing: What to buy.
        """
        return thing


class Bank(Shop):
    """An environment with another tool, too."""

    pay = staticmethod(add)


def rollout_trainer(rows, tokenizer, tmp_path, trainer_class=GRPOTrainer, config_class=GRPOConfig, **options):
    config = {name: options.pop(name) for name in ("chat_template_kwargs",) if name in options}
    return trainer_class(
        build_tiny_model(len(tokenizer)),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config_class(output_dir=str(tmp_path), num_generations=2, beta=0.0, **COMMON, **config),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=tokenizer,
        **options,
    )


def qwen3(tokenizer):
    templates = importlib.resources.files("trl").joinpath("chat_templates")
    tokenizer.chat_template = templates.joinpath("qwen3.jinja").read_text(encoding="utf-8")


OF_TRAINERS = {
    "tools": {"tools": [add]},
    "arguments": {"chat_template_kwargs": {"enable_thinking": False}},
    "tools and arguments": {"tools": [add], "chat_template_kwargs": {"enable_thinking": False}},
    "neither": {},
    "an environment": {"environment_factory": Shop},
    "an environment beside tools": {"environment_factory": Shop, "tools": [add]},
    "like environments": {"environment_factory": {"a": Shop, "b": Shop}},
}


@pytest.mark.parametrize("options", OF_TRAINERS.values(), ids=OF_TRAINERS)
def test_prompts_of_chat_rows_encode_as_in_grpo(chat_preference_rows, tokenizer, tmp_path, options):
    qwen3(tokenizer)
    trainer = rollout_trainer(chat_preference_rows, tokenizer, tmp_path, **options)
    trainer._batch_environments = [next(iter(getattr(trainer, "_env_tools", [None])))] * len(chat_preference_rows)
    trained, *_ = trainer._tokenize_prompts([row["prompt"] for row in chat_preference_rows])
    # what a row gives is not for a trainer that generates: it renders every prompt alike
    rows = [{**row, "tools": json.dumps(SCHEMAS)} for row in chat_preference_rows]
    callback = watch(trainer, ProbeSet.from_preference_dataset(rows, families=("chosen",)))
    assert [list(probe.prompt_ids) for probe in callback.encoded] == [list(ids) for ids in trained]


def test_prompts_encode_as_in_rloo(chat_preference_rows, tokenizer, tmp_path):
    tokenizer.chat_template = SHOWING
    options = {"chat_template_kwargs": {"style": "briefly", "tools": SCHEMAS}}
    trainer = rollout_trainer(chat_preference_rows, tokenizer, tmp_path, RLOOTrainer, RLOOConfig, **options)
    trained, *_ = trainer._tokenize_prompts([row["prompt"] for row in chat_preference_rows])
    callback = watch(trainer, ProbeSet.from_preference_dataset(chat_preference_rows, families=("chosen",)))
    assert [list(probe.prompt_ids) for probe in callback.encoded] == [list(ids) for ids in trained]


def test_a_prompt_that_a_response_would_change_stays_whole_where_the_trainer_generates(
    chat_preference_rows, tokenizer, tmp_path
):
    trainer = rollout_trainer(MERGING, tokenizer, tmp_path / "text")
    trained, *_ = trainer._tokenize_prompts([row["prompt"] for row in MERGING])
    callback = watch(trainer, ProbeSet.from_preference_dataset(MERGING, families=("chosen",)))
    assert [list(probe.prompt_ids) for probe in callback.encoded] == [list(ids) for ids in trained]
    assert callback.encoded.boundary_merges == 1
    assert tokenizer.decode(callback.encoded[0].response_ids) == "g should I boil an egg?<|im_end|>"
    tokenizer.chat_template = SHOWING.replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")
    trainer = rollout_trainer(chat_preference_rows, tokenizer, tmp_path / "chat")
    callback = watch(trainer, ProbeSet.from_preference_dataset(chat_preference_rows, families=("chosen",)))
    for probe, row in zip(callback.encoded, chat_preference_rows, strict=True):
        assert tokenizer.decode(probe.prompt_ids).endswith("assistant\n<think></think>")
        assert tokenizer.decode(probe.response_ids) == row["chosen"][0]["content"] + "<|im_end|>\n"


def test_environments_of_different_tools_are_refused_and_others_doubted(
    chat_preference_rows, tokenizer, tmp_path, caplog
):
    qwen3(tokenizer)
    trainer = rollout_trainer(chat_preference_rows, tokenizer, tmp_path, environment_factory={"a": Shop, "b": Bank})
    with pytest.raises(NotImplementedError, match=r"the environments \['a', 'b'\] have different tools"):
        watch(trainer, ProbeSet.from_preference_dataset(chat_preference_rows))
    assert _trl.prompts_are_made_elsewhere(trainer).startswith("an environment")
    trainer = rollout_trainer(chat_preference_rows, tokenizer, tmp_path, rollout_func=lambda prompts, trainer: {})
    watch(trainer, ProbeSet.from_preference_dataset(chat_preference_rows))
    assert "this run's prompts are made by a rollout_func" in caplog.text
