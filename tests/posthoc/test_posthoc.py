"""After the fact, numbers are those that a watched run has, and those of the kernel."""

import json
import sys

import pandas as pd
import pytest
import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_dynamics import cli, load_run, watch
from llm_dynamics.kernel import token_kernel
from llm_dynamics.posthoc import kernel_of_files, score_checkpoints
from llm_dynamics.posthoc.checkpoints import in_order
from llm_dynamics.probes import Probe, encode_probes
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
    assert "probes, row 0 has no prompt and response; seen: prompt" in err
