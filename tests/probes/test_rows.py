"""Rows in any container and form: what is read, what is dropped and counted, what is refused."""

import json
import random
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_dynamics.probes import ProbeSet
from llm_dynamics.probes.forms import forms
from llm_dynamics.probes.rows import REPEATED, STREAM_ROWS, read_jsonl, read_rows

PAIRS = [{"prompt": f"Question {i}?", "chosen": f" answer {i} is here", "rejected": f" no {i}"} for i in range(6)]


def user(text, **more):
    return {"role": "user", "content": text, **more}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


CHAT = [
    {"prompt": [user(r["prompt"])], "chosen": [says(r["chosen"])], "rejected": [says(r["rejected"])]} for r in PAIRS
]


# ---- forms


def test_the_last_answer_of_a_conversation_is_watched():
    talk = [{"role": "system", "content": "Be brief."}, user("a"), says("b"), user("c"), says("d")]
    for whole in (talk, [*talk, user("e")]):
        (row,) = read_rows([{"messages": whole}]).rows
        assert row.prompt == tuple(talk[:-1])
        assert row.first("chosen") == "d"
    (row,) = read_rows([{"chosen": talk}]).rows
    assert row.first("chosen") == "d"


def test_names_of_speakers_that_trl_renders_as_they_stand_are_mentioned(caplog):
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    probes = ProbeSet.from_prompt_completion(rows)
    assert probes[0].prompt == (user("a"),)
    assert "SFTTrainer renders the names as they stand" in caplog.text
    assert rows[0]["conversations"][0] == {"from": "human", "value": "a"}  # the user's rows stay


@pytest.mark.parametrize("rows", [PAIRS, [{"prompt": r["prompt"], "completion": r["chosen"]} for r in PAIRS]])
def test_as_chat_makes_what_the_recipes_train_on(rows):
    probes = ProbeSet.from_records(rows, columns={"chosen": "chosen"}, as_chat=True, families=("chosen", "other_train"))
    assert probes[0].prompt == (user("Question 0?"),)
    assert probes[0].response == "answer 0 is here"
    assert forms(probes, None)["prompts"] == "chat messages"
    transcripts = [{n: f"\n\nHuman: {r['prompt']}\n\nAssistant:{r[n]}" for n in ("chosen", "rejected")} for r in PAIRS]
    chat = ProbeSet.from_preference_dataset(transcripts, as_chat=True)
    assert [p.response for p in chat if p.family == "chosen"] == [r["chosen"].strip() for r in PAIRS]
    assert chat[0].prompt == (user("Question 0?"),)


@pytest.mark.parametrize("labels", [[True, None], ["yes", "no"], [1, 2], [-1, 1]])
def test_labels_that_are_not_ktos_are_mentioned_or_dropped(labels, caplog):
    rows = [{"prompt": str(n), "completion": "x", "label": label} for n, label in enumerate(labels)]
    if labels[0] is True:
        with pytest.warns(UserWarning, match="the label is None"):
            assert len(ProbeSet.from_prompt_completion(rows)) == 1
    else:
        assert ProbeSet.from_prompt_completion(rows).families == ("chosen",)
        assert "not KTO's True and False" in caplog.text


# ---- repeated prompts


@settings(deadline=None, max_examples=20)
@given(st.permutations([*range(6)] * 3), st.integers(1, 6))
def test_prompts_are_distinct_and_independent_of_order(order, n_prompts):
    probes = ProbeSet.from_preference_dataset([PAIRS[i] for i in order], n_prompts=n_prompts)
    assert len({probe.prompt for probe in probes}) == len(probes.prompt_ids) == n_prompts
    once = ProbeSet.from_preference_dataset(PAIRS, n_prompts=n_prompts)
    assert probes.fingerprint() == once.fingerprint()
    assert {probe.probe_id for probe in probes} == {probe.probe_id for probe in once}


def test_one_of_several_pairs_of_a_prompt_is_watched_and_the_others_are_counted():
    rows = [*PAIRS, {**PAIRS[0], "chosen": " another"}, {**PAIRS[0], "prompt": "Question 0? "}]
    probes = ProbeSet.from_preference_dataset(rows)
    assert len(probes.prompt_ids) == 6
    assert REPEATED in {item.reason for item in probes.dropped}
    assert ProbeSet.from_preference_dataset(rows[::-1]).fingerprint() == probes.fingerprint()


def test_chat_prompts_are_equal_whatever_the_order_of_keys_and_empty_keys():
    other = [
        {**row, "prompt": [{"content": row["prompt"][0]["content"], "role": "user", "name": None}]} for row in CHAT
    ]
    assert (
        ProbeSet.from_preference_dataset([*CHAT, *other]).fingerprint()
        == ProbeSet.from_preference_dataset(CHAT).fingerprint()
    )


def test_labelled_answers_of_one_prompt_are_its_pair():
    rows = [
        {"prompt": r["prompt"], "completion": r[n], "label": n == "chosen"}
        for r in PAIRS
        for n in ("chosen", "rejected")
    ]
    assert ProbeSet.from_prompt_completion(rows).fingerprint() == ProbeSet.from_preference_dataset(PAIRS).fingerprint()


# ---- containers


@pytest.mark.parametrize("rows", [PAIRS, CHAT], ids=["plain", "chat"])
def test_frames_with_arrays_and_streams_give_the_same_set(rows, tmp_path):
    expected = ProbeSet.from_preference_dataset(rows).fingerprint()
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    frame = pd.read_parquet(tmp_path / "rows.parquet")
    assert ProbeSet.from_preference_dataset(frame).fingerprint() == expected
    assert (
        ProbeSet.from_preference_dataset(IterableDataset.from_generator(lambda: iter(rows))).fingerprint() == expected
    )


def test_an_endless_stream_is_read_in_part_with_a_word(caplog):
    def forever():
        number = 0
        while number := number + 1:
            yield {**PAIRS[0], "prompt": str(number)}

    assert len(ProbeSet.from_preference_dataset(forever(), n_prompts=4).prompt_ids) == 4
    assert f"first {STREAM_ROWS} rows" in caplog.text


def test_reading_draws_nothing_from_the_global_random_state():
    def transform(batch):
        noise = [random.random() + np.random.rand() + float(torch.rand(())) for _ in batch["prompt"]]
        return {**batch, "chosen": [f"{text} {x}" for text, x in zip(batch["chosen"], noise, strict=True)]}

    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    ProbeSet.from_preference_dataset(Dataset.from_list(PAIRS).with_transform(transform))
    assert state() == before


# ---- files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_files_of_any_editor_are_read(tmp_path, encoding, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(end.join(json.dumps(row) for row in PAIRS).encode(encoding))
    assert read_jsonl(path) == PAIRS


@pytest.mark.parametrize("line", ['{"a": 1},', "[" * 100_000, "[{}]", '{"a": 1}{"b": 2}'])
def test_a_line_that_is_no_object_is_named(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" + line)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        read_jsonl(path)


# ---- odd rows


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"prompt": []}, "the prompt is an empty list"),
        ({"prompt": 3}, "the prompt is a int"),
        ({"prompt": None, "chosen": [], "rejected": []}, "no prompt|empty"),
        ({"tools": "[broken"}, "column 'tools': not valid JSON"),
        ({"chosen": [says("a"), user("b"), says("c")]}, "3 messages"),
        ({"chosen": [user("a")]}, "the message's role is 'user'"),
        ({"chosen": [says("a", tool_calls=[{"x": 1}])]}, "tool_calls"),
        ({"chosen": [says(None)]}, "content is a NoneType"),
        ({"chosen": 1.5}, "a float"),
    ],
)
def test_an_odd_row_is_dropped_and_counted_and_the_others_are_watched(odd, reason):
    with pytest.warns(UserWarning, match=reason):
        probes = ProbeSet.from_preference_dataset([*CHAT, {**CHAT[0], "prompt": [user("odd")], **odd}])
    assert {probe.prompt_id for probe in probes if probe.family == "chosen"} == set(
        ProbeSet.from_preference_dataset(CHAT).prompt_ids
    )
    assert any(item.source_row == len(CHAT) for item in probes.dropped)


def test_metadata_in_messages_is_no_oddity():
    rows = [{**row, "chosen": [{**row["chosen"][0], "language": "en", "turn": 1}]} for row in CHAT]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            ProbeSet.from_preference_dataset(rows).fingerprint() == ProbeSet.from_preference_dataset(CHAT).fingerprint()
        )
