"""Pairs and questions in the forms they come in, from what is local."""

import json

import data
import datasets
import dpo
import kto
import pytest
import sft
import tasks
from common import check_checkpoint, check_model_folder, run
from data import PairArguments, load_pairs, load_rows, write_transcript
from extend_sft import extend
from tasks import TaskArguments, load_task
from trl import ScriptArguments

from llm_dynamics import WatchConfig
from llm_dynamics.probes.forms import OddRow, RowForm, read_transcript, split_transcripts

ASKED = "\n\nHuman: How do I boil an egg?\n\nAssistant: Soft or hard?\n\nHuman: Hard. \n\nAssistant:"
HH = {"chosen": f"{ASKED} Ten minutes.", "rejected": f"{ASKED} No idea."}
TURNS = [
    {"role": "user", "content": "How do I boil an egg?"},
    {"role": "assistant", "content": "Soft or hard?"},
    {"role": "user", "content": "Hard."},
]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def as_pair(row, *, chat, as_chat=False):
    return data.as_pair(row, RowForm.of([row], as_chat=as_chat, transcripts=True), chat=chat)


def says(text):
    return [{"role": "assistant", "content": text}]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ---- HH ---------------------------------------------------------------------------------------------------------


def test_a_transcript_is_split_byte_for_byte_after_its_last_assistant():
    prompt, chosen, rejected = split_transcripts(HH["chosen"], HH["rejected"])
    assert (prompt, chosen, rejected) == (ASKED, " Ten minutes.", " No idea.")
    assert prompt + chosen == HH["chosen"]


def test_transcripts_become_plain_pairs_or_chat_messages():
    assert tuple(as_pair(HH, chat=False).values()) == split_transcripts(HH["chosen"], HH["rejected"])
    assert as_pair(HH, chat=True) == {
        "prompt": TURNS,
        "chosen": says("Ten minutes."),
        "rejected": says("No idea."),
    }


def test_transcripts_that_part_before_the_last_answer_are_no_pair():
    other = {"chosen": HH["chosen"], "rejected": "\n\nHuman: Something else?\n\nAssistant: No idea."}
    empty = {"chosen": HH["chosen"], "rejected": ASKED}
    assert as_pair(other, chat=True) is None
    assert as_pair(empty, chat=False) is None
    with pytest.raises(OddRow, match="part before their last answer"):
        split_transcripts("no turns", "at all")


def test_messages_and_transcripts_turn_into_each_other():
    text = write_transcript(TURNS)
    assert text == ASKED.replace("Hard. ", "Hard.")
    assert read_transcript(text) == TURNS
    assert write_transcript([{"role": "system", "content": "Be brief."}, TURNS[0]]).startswith("Be brief.\n\nHuman:")


def test_hh_is_read_from_a_folder_laid_out_like_the_hub(tmp_path, caplog):
    broken = {"chosen": HH["chosen"], "rejected": "\n\nHuman: Other?\n\nAssistant: No."}
    write_jsonl(tmp_path / "hh" / "helpful-base" / "train.jsonl", [HH, broken])
    write_jsonl(tmp_path / "hh" / "helpful-base" / "test.jsonl", [HH] * 3)
    args = PairArguments(dataset_name=str(tmp_path / "hh"), dataset_config="helpful-base")
    assert load_pairs(args, chat=True).to_list() == [as_pair(HH, chat=True)]
    assert "1 of 2 rows" in caplog.text
    assert len(load_pairs(args, chat=False, held_out=True)) == 3


def test_short_names_ask_for_the_right_data_set(monkeypatch):
    asked = []
    monkeypatch.setattr("data.load_dataset", lambda *names, **options: asked.append((*names, options)) or [HH])
    load_pairs(PairArguments(dataset_name="hh_helpful_base", dataset_train_split="train[:5000]"), chat=False)
    load_pairs(PairArguments(dataset_name="ultrafeedback"), chat=True, held_out=True)
    load_pairs(PairArguments(dataset_name="some/pairs", dataset_config="large"), chat=True)
    assert asked == [
        ({"path": "Anthropic/hh-rlhf", "data_dir": "helpful-base", "name": None, "split": "train[:5000]"},),
        ({"path": "trl-lib/ultrafeedback_binarized", "name": None, "split": "test"},),
        ("some/pairs", {"name": "large", "split": "train"}),
    ]


# ---- other pairs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [None, "How do I boil an egg?"], ids=["implicit", "beside"])
def test_ultrafeedback_has_its_prompt_inside_both_answers(prompt):
    row = {"chosen": TURNS[:1] + says("Ten."), "rejected": TURNS[:1] + says("No."), "score_chosen": 8.0}
    pair = as_pair(row | ({} if prompt is None else {"prompt": prompt}), chat=True)
    assert pair == {"prompt": TURNS[:1], "chosen": says("Ten."), "rejected": says("No."), "score_chosen": 8.0}
    assert as_pair(row, chat=False) == {
        "prompt": "\n\nHuman: How do I boil an egg?\n\nAssistant:",
        "chosen": " Ten.",
        "rejected": " No.",
        "score_chosen": 8.0,
    }


def test_a_text_prompt_with_one_message_each_becomes_chat():
    row = {"prompt": "How?", "chosen": says("So."), "rejected": says("No.")}
    assert as_pair(row, chat=True)["prompt"] == [{"role": "user", "content": "How?"}]


def test_text_answers_to_messages_become_messages():
    row = {"prompt": TURNS[:1], "chosen": " Ten.", "rejected": "No."}
    assert as_pair(row, chat=True) == {"prompt": TURNS[:1], "chosen": says("Ten."), "rejected": says("No.")}
    assert as_pair(row, chat=False)["chosen"] == " Ten."


def test_plain_pairs_stay_as_they_are():
    row = {"prompt": "Two and two is", "chosen": " four.", "rejected": " five."}
    assert as_pair(row, chat=True) == row
    assert as_pair(row, chat=False) == row


def test_answers_of_several_messages_are_no_pair():
    longer = [*says("Ten."), {"role": "user", "content": "Thanks."}, *says("Welcome.")]
    assert as_pair({"prompt": TURNS[:1], "chosen": longer, "rejected": says("No.")}, chat=True) is None


def test_the_built_in_pairs_need_no_network():
    args = PairArguments(dataset_name="polite_pairs")
    train, test = load_pairs(args, chat=True), load_pairs(args, chat=True, held_out=True)
    assert len(train) == 112
    assert {"prompt", "chosen", "rejected", "chosen_semantic", "human_random"} <= set(train.column_names)
    assert not {row["prompt"][-1]["content"] for row in train} & {row["prompt"][-1]["content"] for row in test}
    assert isinstance(load_pairs(args, chat=False)[0]["prompt"], str)


def test_a_file_is_the_split_train_and_no_other(tmp_path):
    row = {"prompt": "Two and two is", "chosen": " four.", "rejected": " five."}
    path = write_jsonl(tmp_path / "pairs.jsonl", [row] * 4)
    assert len(load_pairs(PairArguments(dataset_name=path), chat=False)) == 4
    assert len(load_pairs(PairArguments(dataset_name=path, dataset_train_split="train[:2]"), chat=False)) == 2
    with pytest.raises(ValueError, match="one file"):
        load_pairs(PairArguments(dataset_name=path), chat=False, held_out=True)


def test_a_mixture_is_loaded_and_split_the_same_way_each_time(tmp_path):
    files = {}
    for name in ("a", "b"):
        rows = [{"prompt": f"{name}{n}", "chosen": "yes", "rejected": "no"} for n in range(5)]
        files[name] = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    parts = "".join(f"  - {{path: json, data_files: {path}, split: train}}\n" for path in files.values())
    (tmp_path / "mix.yaml").write_text(
        f"output_dir: x\nbf16: false\nuse_cpu: true\ntest_split_size: 0.3\ndatasets:\n{parts}"
    )
    args, *_ = dpo.make_parser().parse_args_and_config(["--config", str(tmp_path / "mix.yaml")])
    train, test = load_pairs(args, chat=False)["prompt"], load_pairs(args, chat=False, held_out=True)["prompt"]
    assert (len(train), len(test)) == (7, 3)
    assert sorted([*train, *test]) == sorted(f"{name}{n}" for name in "ab" for n in range(5))
    assert load_pairs(args, chat=False)["prompt"][:] == train[:]
    args.test_split_size = None
    assert len(load_pairs(args, chat=False)) == 10
    with pytest.raises(ValueError, match="has the splits train, not 'test'; set test_split_size"):
        load_pairs(args, chat=False, held_out=True)


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match="polite_pairs"):
        load_rows(ScriptArguments(), "train")
    with pytest.raises(ValueError, match="dataset_streaming"):
        load_rows(ScriptArguments(dataset_name="x/y", dataset_streaming=True), "train")
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": "no pair"}])
    with pytest.raises(ValueError, match=r"no row is a prompt with two answers; columns seen: \['text'\]"):
        load_pairs(PairArguments(dataset_name=path), chat=True)
    with pytest.raises(FileNotFoundError, match=r"no file missing\.jsonl"):
        load_rows(ScriptArguments(dataset_name="missing.jsonl"), "train")
    (tmp_path / "pairs.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"ends in '.txt'; allowed: .jsonl"):
        load_rows(ScriptArguments(dataset_name=str(tmp_path / "pairs.txt")), "train")


def test_a_broken_line_of_a_file_is_named(tmp_path):
    path = tmp_path / "cut.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": "a", "cho')
    with pytest.raises(ValueError, match=r"cut\.jsonl, line 3: not valid JSON"):
        load_rows(ScriptArguments(dataset_name=str(path)), "train")
    path.write_text("")
    with pytest.raises(ValueError, match=r"cut\.jsonl is empty"):
        load_rows(ScriptArguments(dataset_name=str(path)), "train")


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    (tmp_path / "checkpoint-24").mkdir()
    for given in (None, "true", str(tmp_path / "checkpoint-24")):
        check_checkpoint(given)
    with pytest.raises(FileNotFoundError, match=r"no folder .*checkpoint-12; there are: .*checkpoint-24$"):
        check_checkpoint(str(tmp_path / "checkpoint-12"))


def test_plain_text_for_a_model_with_a_chat_template_is_mentioned(tmp_path, caplog):
    row = {"prompt": "Two and two is", "chosen": " four.", "rejected": " five."}
    args = PairArguments(dataset_name=write_jsonl(tmp_path / "pairs.jsonl", [row]))
    load_pairs(args, chat=False)
    assert "chat template" not in caplog.text
    load_pairs(args, chat=True)
    assert "trained on as they stand, without it. Add --as_chat" in caplog.text


def test_plain_text_becomes_chat_messages_where_that_is_asked_for(tmp_path, caplog):
    row = {"prompt": "Two and two is ", "chosen": " four.", "rejected": " five.", "chosen_semantic": " 4."}
    args = PairArguments(dataset_name=write_jsonl(tmp_path / "pairs.jsonl", [row]), as_chat=True)
    (pair,) = load_pairs(args, chat=True).to_list()
    assert pair == {
        "prompt": [{"role": "user", "content": "Two and two is"}],
        "chosen": says("four."),
        "rejected": says("five."),
        "chosen_semantic": " 4.",
    }
    assert "as they stand" not in caplog.text
    assert as_pair(HH, chat=True, as_chat=True) == as_pair(HH, chat=True)
    both_inside = {"chosen": "Two and two is 4.", "rejected": "Two and two is 5."}
    assert as_pair(both_inside, chat=True, as_chat=True)["chosen"] == says("4.")
    with pytest.raises(ValueError, match="as_chat is True, and the model has no chat template"):
        load_pairs(args, chat=False)


def test_extend_holds_both_responses_once_each():
    pairs = datasets.Dataset.from_list([as_pair(HH, chat=True) | {"extra": 1}] * 2)
    rows = extend(pairs)
    assert rows.column_names == ["prompt", "completion"]
    assert [row["completion"] for row in rows] == [says("Ten minutes.")] * 2 + [says("No idea.")] * 2
    assert all(row["prompt"] == TURNS for row in rows)


def test_rows_of_sft_are_trained_on_as_trl_does(tmp_path):
    rows = {
        "messages": {"messages": TURNS + says("Ten.")},
        "conversations": {"conversations": [{"from": m["role"], "value": m["content"]} for m in TURNS + says("Ten.")]},
        "completion": {"prompt": TURNS, "completion": says("Ten.")},
    }
    for name, row in rows.items():
        args = PairArguments(dataset_name=write_jsonl(tmp_path / f"{name}.jsonl", [row] * 2))
        pairs = load_pairs(args, chat=True, needs=("chosen",))
        assert pairs[0]["prompt"] == TURNS
        assert pairs[0]["chosen"] == says("Ten.")
        whole = {"prompt": TURNS, "completion": says("Ten.")} if name == "completion" else rows["messages"]
        assert sft.chosen_only(pairs).to_list() == [whole] * 2
        (plain, _) = load_pairs(args, chat=False, needs=("chosen",)).to_list()
        assert plain == {"prompt": ASKED.replace("Hard. ", "Hard."), "chosen": " Ten."}
    args = PairArguments(dataset_name=write_jsonl(tmp_path / "text.jsonl", [{"text": "Two and two is four."}]))
    (text,) = load_pairs(args, chat=False, needs=("chosen",)).to_list()
    assert (text["prompt"], text["chosen"]) == ("Two and two", " is four.")
    assert sft.chosen_only(datasets.Dataset.from_list([text])).to_list() == [{"text": "Two and two is four."}]
    args.as_chat = True
    with pytest.raises(ValueError, match="a text each, without turns"):
        load_pairs(args, chat=True, needs=("chosen",))


def test_rows_of_kto_keep_their_labels(tmp_path):
    rows = [{"prompt": f"q{n}", "completion": f" a{n}", "label": n % 3 == 0} for n in range(4)]
    args = PairArguments(dataset_name=write_jsonl(tmp_path / "kto.jsonl", rows))
    pairs = load_pairs(args, chat=False, needs=())
    assert sorted(kto.labelled(pairs).to_list(), key=lambda row: row["prompt"]) == rows
    probes = WatchConfig(watch_families=["chosen", "rejected"]).build_probes(pairs, None)
    assert {(p.prompt, p.family) for p in probes} == {(f"q{n}", "rejected" if n % 3 else "chosen") for n in range(4)}


# ---- tasks ------------------------------------------------------------------------------------------------------


def test_products_come_with_a_right_and_a_wrong_answer_to_watch():
    task = load_task(TaskArguments(), seed=3)
    question, answer = task.questions[0], task.answers[0]
    assert len(task.questions) == len(task.answers) == 64
    assert question["prompt"] == answer["prompt"]
    (reward,) = task.rewards
    given = [says(answer[name]) for name in ("chosen", "rejected")]
    assert reward(given, answer=[question["answer"]] * 2) == [1.0, 0.0]


def test_math_asks_for_a_boxed_answer_and_watches_the_solution(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_need", lambda *names: None)
    row = {"problem": "What is 1+1?", "level": "Level 1", "type": "Algebra", "solution": "It is $\\boxed{2}$."}
    path = write_jsonl(tmp_path / "math.jsonl", [row])
    task = load_task(TaskArguments(task="math", dataset_name=path), seed=0)
    assert task.questions[0]["solution"] == row["solution"]
    assert "\\boxed{}" in task.questions[0]["prompt"][0]["content"]
    assert task.answers == [{"prompt": task.questions[0]["prompt"], "completion": row["solution"]}]
    assert [reward.__name__ for reward in task.rewards] == ["accuracy_reward"]


@pytest.mark.parametrize("task", ["products", "leg_counting"])
def test_a_data_set_that_a_task_does_not_read_is_refused(task):
    with pytest.raises(ValueError, match=f"dataset_name is 'foo/bar', and the task {task} makes its own questions"):
        load_task(TaskArguments(task=task, dataset_name="foo/bar"), seed=0)


@pytest.mark.parametrize(("task", "package"), [("math", "math-verify"), ("leg_counting", "reasoning-gym")])
def test_a_missing_package_is_named_with_its_command(task, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"{package}: pip install"):
        load_task(TaskArguments(task=task), seed=0)


def test_reasoning_gym_scores_its_own_answers():
    pytest.importorskip("reasoning_gym")
    task = load_task(TaskArguments(task="leg_counting", task_size=5), seed=1)
    (reward,) = task.rewards
    right = [says(row["completion"]) for row in task.answers]
    assert reward(right, entry=task.questions["entry"][:]) == [1.0] * 5
    assert WatchConfig(watch_prompts=3).build_probes(task.answers, None).families[-1] == "ungrammatical"
    assert max(reward([says("no tags")] * 5, entry=task.questions["entry"][:])) < 1
    with pytest.raises(ValueError, match="leg_counting"):
        load_task(TaskArguments(task="no_such_game"), seed=0)


def test_math_verify_rewards_equal_answers(tmp_path):
    pytest.importorskip("math_verify")
    row = {"problem": "Half?", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
    task = load_task(TaskArguments(task="math", dataset_name=write_jsonl(tmp_path / "m.jsonl", [row])), seed=0)
    (reward,) = task.rewards
    given = [says("So \\boxed{0.5}"), says("So \\boxed{2}")]
    assert reward(given, solution=[row["solution"]] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("name", ["./here", "/nowhere/model", "models/misspelt", "runs/sft", "a/b/c", "there/model"])
def test_a_model_folder_that_is_not_there_is_not_looked_for_at_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_model_folder(name)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-0.5B", "saved", None])
def test_hub_ids_and_folders_that_are_there_pass(name, tmp_path, monkeypatch):
    (tmp_path / "saved").mkdir()
    monkeypatch.chdir(tmp_path)
    check_model_folder(name)


def test_what_a_check_refuses_ends_a_recipe_in_one_line_and_all_else_is_raised(monkeypatch):
    with pytest.raises(SystemExit, match=r"error: model_name_or_path: there is no folder \./missing"):
        run(lambda: check_model_folder("./missing"))
    with pytest.raises(SystemExit, match="error: watch_every is -1"):
        run(lambda: WatchConfig(watch_every=-1))
    with pytest.raises(ValueError, match="invalid literal"):
        run(lambda: int("three"))
    monkeypatch.setenv("LLM_DYNAMICS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="watch_every is -1"):
        run(lambda: WatchConfig(watch_every=-1))
