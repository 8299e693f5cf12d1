"""After the fact, numbers are those that a watched run has, and those of the kernel."""

import json
import re
import shutil
import sys

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_dynamics import cli, load_run, watch
from llm_dynamics.kernel import token_kernel
from llm_dynamics.posthoc import kernel_of_files, score_checkpoints
from llm_dynamics.posthoc.checkpoints import in_order
from llm_dynamics.posthoc.kernel import _texts
from llm_dynamics.posthoc.loading import load_checkpoint, load_tokenizer
from llm_dynamics.probes import Probe, ProbeSet, encode_probes
from tests.conftest import PREFERENCES
from tests.training import build_trainer, make_probes, save_tiny_model

ROWS = [{"prompt": row["prompt"], "response": " " + row["chosen"]} for row in PREFERENCES[:3]]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def watched(model_folder, tmp_path_factory):
    """A watched run of three steps that saved a checkpoint after each."""
    out = tmp_path_factory.mktemp("watched")
    trainer = build_trainer("sft", model_folder, out, save_strategy="steps", save_steps=1)
    watch(trainer, make_probes(2), every=1)
    trainer.train()
    return out


def run_cli(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["llm-dynamics", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out, captured.err


def test_scored_checkpoints_have_the_log_of_the_watched_run(watched, tmp_path):
    names = [str(watched / f"checkpoint-{step}") for step in (1, 2, 3)]
    scored = score_checkpoints(names, make_probes(2), tmp_path)
    seen = load_run(watched)
    for table in ("sequences", "tokens"):
        expected = getattr(seen, table).query("step > 0").reset_index(drop=True)
        pd.testing.assert_frame_equal(getattr(scored, table), expected, rtol=1e-5, atol=1e-5)
    assert scored.steps["probe/chosen_delta"].iloc[0] == 0.0
    assert scored.meta["checkpoints"] == dict(zip("123", names, strict=True))


def test_a_reference_stands_beside(watched, model_folder, tmp_path):
    names = [str(watched / "checkpoint-3")]
    scored = score_checkpoints(names, make_probes(2), tmp_path, reference=str(model_folder))
    before = load_run(watched).sequences.query("step == 0")["logp_sum"]
    assert scored.sequences["ref_logp_sum"].tolist() == pytest.approx(before.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("names", "steps", "ordered"),
    [
        (["a/checkpoint-5", "a/checkpoint-10/"], [5, 10], None),
        (["a/checkpoint-1000", "a/checkpoint-500"], [500, 1000], ["a/checkpoint-500", "a/checkpoint-1000"]),
        (["base", "a/checkpoint-5"], [0, 1], None),
        (["a/checkpoint-5", "b/checkpoint-5"], [0, 1], None),
        (["one"], [0], None),
    ],
)
def test_steps_and_order_come_from_names_where_they_can(names, steps, ordered):
    assert in_order(names) == (steps, ordered or names)


def test_the_log_of_a_training_run_is_not_touched(watched, model_folder):
    before = load_run(watched).observed_steps
    with pytest.raises(ValueError, match="is the log of a training run: choose another output folder"):
        score_checkpoints([str(model_folder)], make_probes(1), watched)
    assert load_run(watched).observed_steps == before


def test_what_does_not_load_is_named(model_folder, tmp_path):
    with pytest.raises(ValueError, match="no model at 'nowhere'"):
        score_checkpoints(["nowhere"], make_probes(1), tmp_path, tokenizer=str(model_folder))
    with pytest.raises(ValueError, match="no tokenizer at 'nowhere'"):
        score_checkpoints(["nowhere"], make_probes(1), tmp_path)
    with pytest.raises(ValueError, match="device is 'banana': "):
        score_checkpoints([str(model_folder)], make_probes(1), tmp_path, device="banana")
    with pytest.raises(ValueError, match="dtype is 'int8'; allowed: float32"):
        score_checkpoints([str(model_folder)], make_probes(1), tmp_path, dtype="int8")


@pytest.mark.parametrize("rows", ["tokens", "responses"])
def test_the_table_of_two_files_is_the_token_kernel(model_folder, rows):
    table, kernel = kernel_of_files(str(model_folder), ROWS, ROWS[:2], rows=rows)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    probes = [Probe(str(i), str(i), row["prompt"], row["response"], "chosen") for i, row in enumerate(ROWS)]
    encoded = list(encode_probes(probes, tokenizer))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = token_kernel(model, encoded, encoded[:2], train_rows=rows, probe_rows=rows).values
    torch.testing.assert_close(kernel.values, expected)
    assert table["kernel"].tolist() == pytest.approx(expected.flatten().tolist(), rel=1e-5)
    assert len(table) == expected.numel()
    if rows == "tokens":
        one = table[(table["probe"] == 1) & (table["train"] == 2) & (table["m"] == 0)]
        assert one["train_token"].tolist() == [tokenizer.decode([token]) for token in encoded[2].response_ids]
        assert set(one["probe_token"]) == {tokenizer.decode([encoded[1].response_ids[0]])}
    else:
        assert table["probe_text"].tolist() == [ROWS[i]["response"] for i in table["probe"]]
        assert table["train_text"].tolist() == [ROWS[i]["response"] for i in table["train"]]


def test_score_on_the_command_line(watched, model_folder, tmp_path, monkeypatch, capsys):
    probes = make_probes(2).save(tmp_path / "probes.parquet")
    names = [watched / "checkpoint-1", watched / "checkpoint-3"]
    status, out, _ = run_cli(monkeypatch, capsys, "score", probes, *names, "-o", tmp_path / "out", "--json")
    rows = json.loads(out)
    assert status == 0
    assert {row["step"] for row in rows} == {1, 3}
    assert rows[0]["logp_sum"] == pytest.approx(load_run(tmp_path / "out").sequences["logp_sum"].iloc[0])
    status, out, _ = run_cli(monkeypatch, capsys, "compare", f"a={tmp_path / 'out'}", f"b={watched}")
    assert status == 0
    assert "chosen" in out
    status, out, _ = run_cli(monkeypatch, capsys, "compare", f"a={tmp_path / 'out'}", f"b={watched}", "--json")
    assert {row["run"] for row in json.loads(out)} == {"a", "b"}
    status, _, err = run_cli(monkeypatch, capsys, "score", probes, "nowhere", "-o", tmp_path / "no")
    assert status == 1
    assert "no tokenizer at 'nowhere'" in err


def test_explain_by_tokens_on_the_command_line(model_folder, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROWS[0] | {"response": " A\x1b[31m b"}) + "\n")
    status, out, _ = run_cli(monkeypatch, capsys, "explain", model_folder, rows, rows, "--tokens", "--top", 3)
    assert status == 0
    assert "token pairs" in out
    assert "\x1b" not in out


def test_scoring_counts_on_stderr_what_is_done(watched, tmp_path, monkeypatch):
    seen = []
    update = Progress.update
    monkeypatch.setattr(Progress, "update", lambda self, task, **kw: seen.append(kw) or update(self, task, **kw))
    probes = make_probes(2).save(tmp_path / "probes.parquet")
    monkeypatch.setattr(sys, "argv", ["llm-dynamics", "score", str(probes), str(watched / "checkpoint-1"), "-o", "out"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main()
    assert seen[-1] == {"completed": 8, "total": 8}
    assert [kw["completed"] for kw in seen] == sorted(kw["completed"] for kw in seen)


def test_explain_on_the_command_line(model_folder, tmp_path, monkeypatch, capsys):
    train, probes = (tmp_path / f"{name}.jsonl" for name in ("train", "probes"))
    train.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    probes.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    table = tmp_path / "deep" / "kernel.parquet"
    status, out, _ = run_cli(monkeypatch, capsys, "explain", model_folder, train, probes, "-o", table, "--top", 2)
    assert status == 0
    assert "2 strongest of 6 pairs" in out
    kept = pd.read_parquet(table)
    strongest = kept.loc[kept["kernel"].abs().idxmax()]
    for name in ("probe_text", "train_text"):  # texts, shortened: a number tells nothing
        assert strongest[name].strip()[:8] in out
    assert "they rise together" in out
    status, out, _ = run_cli(monkeypatch, capsys, "explain", model_folder, train, probes, "--json")
    assert [row["kernel"] for row in json.loads(out)] == pytest.approx(kept["kernel"].tolist(), rel=1e-6)
    probes.write_text('{"prompt": "Hello"}\n')
    status, _, err = run_cli(monkeypatch, capsys, "explain", model_folder, train, probes)
    assert status == 1
    assert "probes: no column with a response; seen: 'prompt'" in err


# ---- as the run saw it -----------------------------------------------------------------------------------------------

CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["chosen"]}],
    }
    for row in PREFERENCES
]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ style or '' }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RUNS = {
    "truncation": ("dpo", {"max_length": 24, "truncation_mode": "keep_start"}),
    "autocast": ("sft", {"bf16": True}),
    "template arguments": ("grpo", {"chat_template_kwargs": {"style": "briefly"}}),
    "an adapter": ("sft", {"lora": True}),
}


@pytest.mark.filterwarnings("ignore:.*probes dropped while encoding")
@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_scored_and_explained_as_its_run_saw_rows(name, model_folder, tmp_path, caplog):
    kind, settings = RUNS[name]
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in CHAT]) if kind == "grpo" else None
    out = tmp_path / "run"
    trainer = build_trainer(
        kind, model_folder, out, rows=rows, max_steps=2, save_strategy="steps", save_steps=2, **settings
    )
    trainer.processing_class.chat_template = TEMPLATE
    probes = ProbeSet.from_prompt_completion(CHAT[:3]) if kind == "grpo" else make_probes(2)
    watch(trainer, probes, every=2)
    trainer.train()
    caplog.clear()
    scored = score_checkpoints([str(out / "checkpoint-2")], probes, tmp_path / "scored")
    assert caplog.text == ""
    seen = load_run(out)
    expected = seen.sequences.query("step == 2").reset_index(drop=True)
    pd.testing.assert_frame_equal(
        scored.sequences.drop(columns="ref_logp_sum"), expected.drop(columns="ref_logp_sum"), rtol=1e-5, atol=1e-5
    )
    assert scored.probes["prompt_ids"].map(list).tolist() == seen.probes["prompt_ids"].map(list).tolist()
    for key in ("forms", "truncation", "rendering", "n_truncated"):
        assert scored.meta[key] == seen.meta[key]
    if name == "an adapter":
        table, kernel = kernel_of_files(str(out / "checkpoint-2"), ROWS[:1], ROWS[:1])
        assert all("lora" in parameter for parameter in kernel.parameters)
        assert (table["kernel"] > 0).all()
    if name == "autocast":
        score_checkpoints([str(out / "checkpoint-2")], probes, tmp_path / "exact", dtype="float32")
        assert "scored in float32, watched in float32 under bf16 autocast" in caplog.text


def test_what_is_not_known_of_a_checkpoint_is_said(model_folder, watched, tmp_path, caplog):
    score_checkpoints([str(model_folder)], make_probes(1), tmp_path)
    assert "lies in no run that was watched: probes are encoded without truncation" in caplog.text
    kernel_of_files(str(model_folder), ROWS[:1], ROWS[:1])
    assert "lies in no run that was watched: rows are encoded without truncation" in caplog.text
    caplog.clear()
    score_checkpoints([str(watched / "checkpoint-1")], ProbeSet.from_prompt_completion(CHAT), tmp_path)
    assert "the trainer's rows are plain text, and the prompts of the probes are chat messages" in caplog.text
    caplog.clear()
    other = tmp_path / "other"
    shutil.copytree(watched / "dynamics", other / "dynamics")
    shutil.copytree(watched / "checkpoint-2", other / "checkpoint-2")
    meta = json.loads((other / "dynamics/meta.json").read_text())
    meta["truncation"] = {"max_length": 20, "mode": "keep_start"}
    (other / "dynamics/meta.json").write_text(json.dumps(meta))
    names = [str(watched / "checkpoint-1"), str(other / "checkpoint-2")]
    score_checkpoints(names, make_probes(1), tmp_path)
    assert "other/checkpoint-2 was trained on rows encoded otherwise than" in caplog.text
    meta["truncation"] = {"max_length": "many", "mode": "keep_start"}
    (other / "dynamics/meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"meta\.json: truncation or rendering are damaged"):
        score_checkpoints(names[1:], make_probes(1), tmp_path)


def message(role, content):
    return {"role": role, "content": content}


def test_explain_reads_rows_as_trainers_do(model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE
    asked, said = [message("user", "Red?")], [message("assistant", "Blue.")]
    tools = [{"name": "f"}]
    whole = tokenizer.apply_chat_template(asked + said, return_dict=True)["input_ids"]
    for row, ids in (
        ({"prompt": asked, "chosen": said}, whole),
        ({"chosen": asked + said, "rejected": [*asked, message("assistant", "No.")]}, whole),
        (
            {"prompt": asked, "completion": said, "tools": json.dumps(tools)},
            tokenizer.apply_chat_template(asked + said, tools=tools, return_dict=True)["input_ids"],
        ),
        (
            {"prompt": asked, "response": "Blue.", "chat_template_kwargs": {"style": "briefly"}},
            tokenizer.apply_chat_template(asked + said, style="briefly", return_dict=True)["input_ids"],
        ),
    ):
        assert list(encode_probes(_texts([row], "train"), tokenizer)[0].input_ids) == ids


# ---- checkpoints of every kind ---------------------------------------------------------------------------------------


def adapted(model_folder, *names):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


def test_adapters_are_loaded_with_their_base_and_trainable(model_folder, tmp_path, caplog):
    model = adapted(model_folder, "default", "other", "ref")
    model.save_pretrained(tmp_path / "several")
    loaded = load_checkpoint(str(tmp_path / "several"))
    trainable = {name for name, weight in loaded.named_parameters() if weight.requires_grad}
    assert trainable == {name for name, _ in loaded.named_parameters() if ".default." in name}
    assert "its default adapter is loaded; ['other'] are others" in caplog.text
    assert load_tokenizer(str(tmp_path / "several")).eos_token  # that of the base
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
    merged = tmp_path / "merged"
    model.merge_and_unload().save_pretrained(merged)
    torch.testing.assert_close(load_checkpoint(str(merged))(ids).logits, loaded(ids).logits, rtol=1e-4, atol=1e-5)
    adapted(model_folder, "one", "two").save_pretrained(tmp_path / "named")
    assert load_checkpoint(str(tmp_path / "named" / "two"))
    with pytest.raises(ValueError, match=r"it holds adapters in folders of their own: give one .*/one"):
        load_checkpoint(str(tmp_path / "named"))


def test_a_checkpoint_that_does_not_load_is_one_error_that_names_the_file(model_folder, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(model_folder, whole)
    for size in (0, 7, 5000):
        content = (model_folder / "model.safetensors").read_bytes()
        (whole / "model.safetensors").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"whole/model\.safetensors is truncated or damaged"):
            load_checkpoint(str(whole))
    AutoModelForCausalLM.from_pretrained(model_folder).model.save_pretrained(whole)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    state = {name: weight for name, weight in model.state_dict().items() if "layers.0.mlp" not in name}
    model.save_pretrained(whole, state_dict=state)
    with pytest.raises(ValueError, match=r"it lacks 3 weights of LlamaForCausalLM, such as model\.layers\.0\.mlp"):
        load_checkpoint(str(whole))
    model = adapted(model_folder, "default")
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is truncated or damaged"):
        load_checkpoint(str(tmp_path / "adapter"))
    file.write_bytes(content)
    config = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=r"an adapter on the base model '.*/gone': "):
        load_checkpoint(str(tmp_path / "adapter"))
    config.write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="its adapter names no base model"):
        load_checkpoint(str(tmp_path / "adapter"))


def test_a_models_own_code_runs_only_where_it_is_trusted(model_folder, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "own"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_model", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'own_model'\n"
        "class OwnLM(LlamaForCausalLM):\n    config_class = Own\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    probes = make_probes(1).save(tmp_path / "probes.parquet")
    arguments = ("score", probes, folder, "-o", tmp_path / "out", "--tokenizer", model_folder)
    status, _, err = run_cli(monkeypatch, capsys, *arguments)
    assert status == 1
    assert "add --trust_remote_code" in " ".join(err.split())
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert run_cli(monkeypatch, capsys, *arguments, "--trust_remote_code")[0] == 0


@pytest.mark.parametrize("checkpoints", ["runs/dpo/checkpoint-1", [1], [None]])
def test_what_is_no_list_of_checkpoints_is_named(checkpoints, tmp_path):
    with pytest.raises(TypeError, match=f"checkpoints is {re.escape(repr(checkpoints))}; give a list"):
        score_checkpoints(checkpoints, make_probes(1), tmp_path)
    with pytest.raises(TypeError, match="probes is a str; give a ProbeSet"):
        score_checkpoints(["a"], "probes.parquet", tmp_path)
