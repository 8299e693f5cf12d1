"""Every recipe runs to its end on a tiny model, leaves a model and a log, and hands both to the next."""

import os
import signal
import socket
import subprocess
import sys

import pandas as pd
import pytest

from llm_dynamics.report import model_card_section
from llm_dynamics.runlog import load_run, load_runs
from tests.recipes.conftest import RECIPES, ROOT

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CI": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(RECIPES),
}


def finish(command, seconds):
    """Run a command to its end, or kill it with its children."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{command} hangs; it said:\n{process.communicate()[0][-4000:]}")
    if process.returncode != 0:
        pytest.fail(f"{command} failed; it said:\n{output[-4000:]}")
    return output


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """What the runs of `worker.py` left behind."""
    workspace = tmp_path_factory.mktemp("recipes")
    finish([sys.executable, "-m", "tests.recipes.worker", str(workspace)], seconds=240)
    return workspace


@pytest.mark.parametrize("name", ["sft", "extend", "dpo", "extend_dpo", "kto"])
def test_a_recipe_leaves_a_model_that_the_next_can_load(name, workspace):
    assert (workspace / name / "model.safetensors").is_file()
    assert (workspace / name / "tokenizer.json").is_file()


def test_the_chain_leaves_logs_of_the_same_probes_to_compare(workspace):
    runs = load_runs({name: workspace / name for name in ("sft", "dpo", "extend_dpo")})
    assert {name: run.observed_steps for name, run in runs.runs.items()} == {
        "sft": [0, 1, 2, 3],
        "dpo": [0, 1, 2],
        "extend_dpo": [0, 1, 2],
    }
    probes = {name: run.probes[["probe_id", "family", "response"]] for name, run in runs.runs.items()}
    pd.testing.assert_frame_equal(probes["sft"], probes["dpo"])
    pd.testing.assert_frame_equal(probes["sft"], probes["extend_dpo"])
    change = runs.delta_from_start().query("step == 2")
    assert set(change["family"]) == {"chosen", "rejected", "other_train", "ungrammatical", "random_tokens"}
    assert change["delta_logp_sum"].abs().min() > 0


@pytest.mark.parametrize(("name", "method"), [("sft", "SFT"), ("dpo", "DPO"), ("grpo", "GRPO"), ("nthr", "NTHR")])
def test_the_model_card_names_the_method_and_what_moved(name, method, workspace):
    card = (workspace / name / "README.md").read_text(encoding="utf-8")
    assert f"trained with {method}" in card
    assert card.count("\n## Learning dynamics\n") == 1
    assert card.endswith(model_card_section(load_run(workspace / name)))


def test_a_run_that_nobody_watched_has_the_card_of_trl(workspace):
    card = (workspace / "kto" / "README.md").read_text(encoding="utf-8")
    assert "trained with KTO" in card
    assert "Learning dynamics" not in card


def test_dpo_starts_where_sft_ended(workspace):
    # DPO started from the second step of SFT, which was resumed for a third one later
    end = load_run(workspace / "sft").sequences.query("step == 2").set_index("probe_id")["logp_sum"]
    start = load_run(workspace / "dpo").sequences.query("step == 0").set_index("probe_id")["logp_sum"]
    pd.testing.assert_series_equal(start, end, rtol=1e-4)


def test_a_resumed_recipe_continues_its_log(workspace):
    assert load_run(workspace / "sft").observed_steps == [0, 1, 2, 3]
    assert not list((workspace / "sft").glob("dynamics_before_*"))


def test_dpo_explains_its_steps_as_configured(workspace):
    run = load_run(workspace / "dpo")
    assert run.explained_steps == [1, 2]
    assert set(run.influence["cause"]) >= {"up", "down"}


def test_extend_trains_on_both_responses_and_can_evaluate(workspace):
    run = load_run(workspace / "extend")
    change = run.delta_from_start().query("step == 2").groupby("family")["delta_logp_sum"].mean()
    assert change["chosen"] > 0
    assert change["rejected"] > 0
    assert {"chosen_semantic", "other_test"} <= set(change.index)


def test_watching_can_be_turned_off(workspace):
    assert not (workspace / "kto" / "dynamics").exists()


def test_grpo_and_nthr_measure_displacement_of_the_same_questions(workspace):
    grpo, nthr = load_run(workspace / "grpo"), load_run(workspace / "nthr")
    assert len(grpo.displacements)
    assert len(nthr.displacements)
    assert "score" in nthr.nthr_tokens
    first = [run.rollouts.query("step == 1")["completion"].tolist() for run in (grpo, nthr)]
    assert first[0]
    assert first[0] == first[1]


@pytest.mark.distributed
def test_dpo_runs_on_two_processes_of_a_cpu(workspace):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "recipes/accelerate_configs/ddp_cpu.yaml", "--main_process_port", str(port)]
    command += ["recipes/dpo.py", "--config", "recipes/configs/smollm2_135m_dpo.yaml"]
    command += ["--model_name_or_path", str(workspace / "tiny"), "--output_dir", str(workspace / "two")]
    command += ["--max_steps", "2", "--per_device_train_batch_size", "2", "--watch_every", "1", "--watch_prompts", "3"]
    finish([*command, "--save_strategy", "no", "--logging_steps", "1"], seconds=180)
    run = load_run(workspace / "two")
    assert run.meta["world_size"] == 2
    assert run.observed_steps == [0, 1, 2]
    assert (workspace / "two" / "model.safetensors").is_file()
