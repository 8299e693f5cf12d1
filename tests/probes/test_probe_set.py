import json
import re
from pathlib import Path

import datasets
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llm_dynamics.probes import (
    FAMILY_ORDER,
    HH_COLUMNS,
    HH_DROP_IF,
    DroppedProbe,
    Probe,
    ProbeSet,
    encode_probes,
)
from llm_dynamics.probes import rows as reading

HH_FILE = Path(__file__).parents[2].parent / "shared/data/hh_helpful_probes_train.jsonl"
HH_ROW = {
    "prompt": "\n\nHuman: How do I boil an egg?\n\nAssistant:",
    "chosen": " Ten minutes in water.",
    "chosen_initial": "  In a pot. \n",
    "chosen_selfr": "@@@ Original Sentence: In water.",
    "chosen_gptsemantic": "In water for ten minutes.",
    "chosen_gptformat": "Two hours in sand.",
    "rejected": " No idea.",
    "reject_gptsemantic": "I do not know.",
    "reject_gptformat": "I never fly.",
    "irr_train": " The sky is blue.",
    "irr_test": " Use a soft cloth.",
    "irr_hum": "The cat sat down.",
    "random_permute": "water. Ten in minutes",
    "random_nonhum": "cloth. soft Use a ",
}
HELD_OUT = [
    {"prompt": "Where do cats sleep?", "chosen": "On whatever you wanted to use next."},
    {"prompt": "Who wrote this?", "chosen": "A person with too little time."},
]
OFFLINE = ("other_train", "other_test", "ungrammatical", "random", "random_tokens")


def hh_rows():
    broken = {**HH_ROW, "prompt": "\n\nHuman: Why?\n\nAssistant:", "rejected": "", "chosen_initial": " "}
    good = {**HH_ROW, "prompt": "\n\nHuman: Who?\n\nAssistant:", "chosen_selfr": "Ten minutes, in water."}
    return [HH_ROW, broken, good]


def id_of(prompt, family=None):
    return reading.prompt_id(prompt) + (f"/{family}" if family else "")


def by_family(probes, family):
    return {probe.prompt_id: probe for probe in probes if probe.family == family}


@pytest.fixture
def full_set(preference_rows, tokenizer):
    return ProbeSet.from_preference_dataset(
        preference_rows, families=("chosen", "rejected", *OFFLINE), held_out=HELD_OUT, tokenizer=tokenizer
    )


# -- Reading preference and completion data


def test_a_preference_set_has_chosen_and_rejected_by_row(preference_rows):
    probes = ProbeSet.from_preference_dataset(preference_rows)
    assert len(probes) == 2 * len(preference_rows)
    assert probes[1] == Probe(
        id_of(preference_rows[0]["prompt"], "rejected"),
        id_of(preference_rows[0]["prompt"]),
        preference_rows[0]["prompt"],
        preference_rows[0]["rejected"],
        "rejected",
        source_row=0,
    )
    assert probes.families == ("chosen", "rejected")
    assert probes.prompt_ids == tuple(id_of(row["prompt"]) for row in preference_rows)


def test_any_container_of_rows_gives_the_same_set(preference_rows):
    expected = ProbeSet.from_preference_dataset(preference_rows)
    assert ProbeSet.from_preference_dataset(datasets.Dataset.from_list(preference_rows)) == expected
    assert ProbeSet.from_preference_dataset(pd.DataFrame(preference_rows)) == expected
    assert ProbeSet.from_preference_dataset(iter(preference_rows)) == expected


def test_rows_without_a_prompt_and_without_a_common_beginning_are_no_implicit_prompts():
    rows = [{"question": "How?", "chosen": "Like this.", "rejected": "No."}]
    with pytest.raises(ValueError, match=r"question.*share no beginning"):
        ProbeSet.from_preference_dataset(rows)


def test_an_implicit_prompt_is_announced(preference_rows, caplog):
    rows = [{key: f"{row['prompt']} {row[key]}" for key in ("chosen", "rejected")} for row in preference_rows]
    ProbeSet.from_preference_dataset(rows)
    assert "no column 'prompt'" in caplog.text
    assert "taken as the prompt" in caplog.text


def test_an_implicit_prompt_is_extracted(preference_rows):
    rows = [{name: row["prompt"] + "\n" + row[name] for name in ("chosen", "rejected")} for row in preference_rows]
    probes = ProbeSet.from_preference_dataset(rows)
    assert [probe.prompt for probe in probes[::2]] == [row["prompt"] + "\n" for row in preference_rows]


def test_conversational_rows_keep_their_messages(chat_preference_rows):
    for rows in (chat_preference_rows, datasets.Dataset.from_list(chat_preference_rows)):
        probes = ProbeSet.from_preference_dataset(rows, families=("chosen", "ungrammatical"))
        assert probes[0].prompt == tuple(chat_preference_rows[0]["prompt"])
        assert probes[0].response == chat_preference_rows[0]["chosen"][0]["content"]


def test_completions_are_the_chosen_family(preference_rows):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows]
    probes = ProbeSet.from_prompt_completion(rows, families=("chosen", "other_train"), seed=3)
    assert probes.families == ("chosen", "other_train")
    assert probes[0].response == rows[0]["completion"]


def test_a_column_may_hold_several_texts_or_none():
    rows = [
        {"prompt": "a", "chosen": "b c", "chosen_semantic": ["c b", "bc"], "more": "cb"},
        {"prompt": "d", "chosen": "e f", "chosen_semantic": None, "more": None},
    ]
    columns = {"chosen": "chosen", "chosen_semantic": ["chosen_semantic", "more"]}
    probes = ProbeSet.from_records(rows, columns=columns)
    names = [probe.probe_id for probe in probes if probe.family == "chosen_semantic"]
    assert names == [id_of("a", f"chosen_semantic{suffix}") for suffix in ("", "-2", "-3")]
    summary = probes.summary().loc["chosen_semantic"]
    assert (summary["n"], summary["prompts"], summary["not_given"], summary["dropped"]) == (3, 1, 2, 0)


def test_a_writers_column_that_bears_the_familys_name_is_used(preference_rows):
    rows = [{**row, "chosen_semantic": "In other words."} for row in preference_rows]
    probes = ProbeSet.from_preference_dataset(rows, families=("chosen", "chosen_semantic"))
    assert by_family(probes, "chosen_semantic")[id_of(rows[0]["prompt"])].response == "In other words."


# -- Offline families


def test_other_train_is_never_the_rows_own(full_set, preference_rows):
    chosen = {probe.prompt_id: probe.response for probe in full_set if probe.family == "chosen"}
    for prompt_id, probe in by_family(full_set, "other_train").items():
        assert probe.response in set(chosen.values()) - {chosen[prompt_id]}


def test_other_test_comes_from_the_held_out_rows(full_set):
    responses = {probe.response for probe in by_family(full_set, "other_test").values()}
    assert responses <= {row["chosen"] for row in HELD_OUT}


def test_random_is_the_words_of_other_test_shuffled(full_set):
    other = by_family(full_set, "other_test")
    for prompt_id, probe in by_family(full_set, "random").items():
        assert sorted(probe.response.split()) == sorted(other[prompt_id].response.split())
        assert probe.response != other[prompt_id].response
    assert full_set.metadata["families"]["random"]["words_of"] == "other_test"


def test_random_without_a_held_out_split_says_that_it_used_other_train(preference_rows):
    probes = ProbeSet.from_preference_dataset(preference_rows, families=("chosen", "other_train", "random"))
    other = by_family(probes, "other_train")
    for prompt_id, probe in by_family(probes, "random").items():
        assert sorted(probe.response.split()) == sorted(other[prompt_id].response.split())
    assert probes.metadata["families"]["random"]["words_of"] == "other_train"
    assert "other_train" in probes.summary().loc["random", "made_by"]


def test_random_tokens_encode_to_themselves(full_set, tokenizer):
    encoded = {probe.probe_id: probe for probe in encode_probes(full_set, tokenizer)}
    for prompt_id, probe in by_family(full_set, "random_tokens").items():
        ids = encoded[probe.probe_id].response_ids
        assert ids == probe.response_ids
        assert len(ids) == len(encoded[f"{prompt_id}/chosen"].response_ids)
        assert ids[-1] == tokenizer.eos_token_id


def test_a_one_word_chosen_has_no_ungrammatical_and_it_is_counted():
    rows = [
        {"prompt": "a", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "b", "chosen": "Not yet.", "rejected": "x"},
    ]
    with pytest.warns(UserWarning, match="1 probes dropped .ungrammatical: 1 x chosen has fewer than two"):
        probes = ProbeSet.from_preference_dataset(rows, families=("chosen", "ungrammatical"))
    assert by_family(probes, "ungrammatical")[id_of("b")].response == "yet. Not"


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(6)), st.integers(0, 2))
def test_probes_do_not_depend_on_the_order_of_the_rows(order, seed):
    rows = [{"prompt": f"Question {i}?", "chosen": f" answer {i} is here", "rejected": f" no {i}"} for i in range(6)]
    families = ("chosen", "other_train", "other_test", "ungrammatical", "random")

    def contents(rows):
        probes = ProbeSet.from_preference_dataset(rows, families=families, held_out=HELD_OUT, seed=seed, n_prompts=4)
        return {(probe.prompt, probe.family, probe.response) for probe in probes}

    assert contents(rows) == contents([rows[i] for i in order])


def test_new_rows_leave_old_probes_alone_bar_the_partners_they_become(preference_rows):
    families = ("chosen", "ungrammatical", "random", "other_train")
    new = {"prompt": "What is new?", "chosen": "This row is entirely new.", "rejected": "Nothing."}
    before = ProbeSet.from_preference_dataset(preference_rows, families=families, held_out=HELD_OUT)
    after = {
        probe.probe_id: probe
        for probe in ProbeSet.from_preference_dataset([*preference_rows, new], families=families, held_out=HELD_OUT)
    }
    for probe in before:
        assert after[probe.probe_id] == probe or after[probe.probe_id].response == new["chosen"]


def test_the_seed_changes_the_draws(preference_rows):
    sets = [
        ProbeSet.from_preference_dataset(preference_rows, families=("chosen", "ungrammatical"), seed=seed)
        for seed in (0, 1, 0)
    ]
    assert sets[0] != sets[1]
    assert sets[0] == sets[2]
    assert sets[0].fingerprint() == sets[2].fingerprint() != sets[1].fingerprint()


# -- The join


def join_rows():
    return [
        {"prompt": "A:", "chosen": " b c ", "rejected": "d  ", "writing": "  e f\n"},
        {"prompt": "B:", "chosen": "\ng h", "rejected": " i", "writing": "j"},
    ]


def test_reference_join_keeps_trained_texts_and_gives_others_the_chosen_whitespace():
    probes = ProbeSet.from_preference_dataset(join_rows(), columns={"chosen_semantic": "writing"})
    by_id = {probe.probe_id: probe.response for probe in probes}
    assert by_id[id_of("A:", "chosen")] == " b c "
    assert by_id[id_of("A:", "rejected")] == "d  "
    assert by_id[id_of("A:", "chosen_semantic")] == " e f"
    assert by_id[id_of("B:", "chosen_semantic")] == "\nj"
    assert probes.metadata["join"] == "reference"


def test_reference_join_holds_for_built_families():
    probes = ProbeSet.from_preference_dataset(join_rows(), families=("chosen", "other_train", "ungrammatical"))
    by_id = {probe.probe_id: probe.response for probe in probes}
    assert by_id[id_of("A:", "other_train")] == " g h"
    assert by_id[id_of("B:", "other_train")] == "\nb c"
    assert by_id[id_of("B:", "ungrammatical")] == "\nh g"


def test_as_is_join_changes_nothing():
    probes = ProbeSet.from_preference_dataset(join_rows(), columns={"chosen_semantic": "writing"}, join="as_is")
    assert [probe.response for probe in probes][:3] == [" b c ", "d  ", "  e f\n"]
    assert probes.metadata["join"] == "as_is"


def test_an_unknown_join_is_refused(preference_rows):
    with pytest.raises(ValueError, match="join is 'glue'; allowed: 'reference', 'as_is'"):
        ProbeSet.from_preference_dataset(preference_rows, join="glue")


def test_reference_join_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="no column is given for 'chosen' or 'rejected'"):
        ProbeSet.from_records([{"prompt": "a", "x": "b"}], columns={"human_random": "x"})


# -- The file of the paper


def test_hh_like_records_are_read_with_their_traps(tmp_path):
    path = tmp_path / "hh.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in hh_rows()) + "\n\n")
    with pytest.warns(UserWarning, match="4 probes dropped") as caught:
        probes = ProbeSet.from_jsonl(path, columns=HH_COLUMNS, drop_if=HH_DROP_IF)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    summary = probes.summary()
    assert summary["dropped"].to_dict() == {
        **dict.fromkeys(probes.families, 0),
        "rejected": 1,
        "chosen_initial": 1,
        "chosen_selfr": 2,
    }
    assert "'@@@'" in summary.loc["chosen_selfr", "drop_reasons"]
    assert summary.loc["rejected", "drop_reasons"] == "empty response: 1"
    by_id = {probe.probe_id: probe.response for probe in probes}
    assert by_id[id_of(HH_ROW["prompt"], "chosen_semantic")] == " In water for ten minutes."
    assert by_id[id_of(HH_ROW["prompt"], "chosen_initial")] == " In a pot."
    assert by_id[id_of(HH_ROW["prompt"], "other_train-2")] == " Use a soft cloth."
    assert "other_test" not in probes.families
    assert probes.metadata["source"]["file"] == "hh.jsonl"


@pytest.mark.skipif(not HH_FILE.exists(), reason="the released probe file is not here")
def test_the_released_file_is_read_as_it_is():
    with pytest.warns(UserWarning, match="398 probes dropped"):
        probes = ProbeSet.from_jsonl(HH_FILE, columns=HH_COLUMNS, drop_if=HH_DROP_IF)
    assert probes.summary()["n"].to_dict() == {
        "chosen": 500,
        "rejected": 499,
        "chosen_initial": 479,
        "chosen_semantic": 500,
        "rejected_semantic": 500,
        "chosen_format": 500,
        "rejected_format": 500,
        "chosen_selfr": 124,
        "other_train": 1000,
        "human_random": 500,
        "ungrammatical": 500,
        "random": 500,
    }
    assert all(probe.response[0].isspace() and not probe.response[1].isspace() for probe in probes)


def test_drop_if_takes_a_test_too(preference_rows):
    def is_rude(text):
        return "obviously" in text

    with pytest.warns(UserWarning, match="is_rude is true"):
        probes = ProbeSet.from_preference_dataset(preference_rows, drop_if={"rejected": is_rude})
    assert len(by_family(probes, "rejected")) == len(preference_rows) - 1


def test_nothing_is_built_from_a_dropped_response(tokenizer):
    rows = [{"prompt": f"q{i}", "chosen": f"good words {i}", "rejected": "no"} for i in range(3)]
    rows[0]["chosen"], rows[1]["chosen"] = "BAD bad words", "a \ud83d b"
    with pytest.warns(UserWarning, match="probes dropped") as caught:
        probes = ProbeSet.from_preference_dataset(
            [*rows, {"prompt": "q3", "chosen": "more words", "rejected": "no"}],
            families=("chosen", "ungrammatical", "other_train", "random_tokens"),
            drop_if={"chosen": "BAD"},
            tokenizer=tokenizer,
        )
    assert "ungrammatical: 2 x no chosen response to build from" in str(caught[0].message)
    assert probes.prompt_ids == (id_of("q2"), id_of("q3"))
    assert not any("BAD" in probe.response for probe in probes)


# -- Bad input


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, r"rows is empty \(zero rows\)"),
        ("text", {}, "rows is a str; give a datasets.Dataset"),
        (["text"], {}, "row 0 is a str; each row must be a dictionary"),
        ([{"question": "a", "chosen": "b"}], {}, "no column 'prompt'; seen: 'question', 'chosen'"),
        ([{"prompt": "a", "chosen": "b"}], {}, "no column 'rejected'; seen: 'prompt', 'chosen'"),
        ([{"prompt": 3, "chosen": "b", "rejected": "c"}], {}, "no row can be read: 1 x the prompt is a int"),
        ([{"prompt": [], "chosen": "b", "rejected": "c"}], {}, "the prompt is an empty list"),
        ([{"prompt": "a", "chosen": 1.5, "rejected": 2}], {}, "No probe is left: chosen: 1 x a float"),
        ([{"prompt": "a\ud800", "chosen": "b", "rejected": "c"}], {}, "prompt is not valid Unicode"),
        ([{"chosen": "ab", "rejected": ""}], {}, "an empty 'chosen' or 'rejected'"),
        ([{"prompt": "a", "chosen": " ", "rejected": ""}], {}, "No probe is left: chosen: 1 x empty response; rej"),
        (None, {"families": ("chosen", "nonsense")}, "Unknown family 'nonsense'"),
        (None, {"families": ("chosen", "argmax")}, "'argmax' is not a probe family"),
        (None, {"columns": {"nonsense": "chosen"}}, "Unknown family 'nonsense'"),
        (None, {"drop_if": {"nonsense": "x"}}, "Unknown family 'nonsense'"),
        (None, {"columns": {"human_random": "absent"}}, "no column 'absent'; seen: 'prompt'"),
        (None, {"n_prompts": 7}, "n_prompts is 7 and there are 6 prompts"),
        (None, {"n_prompts": 0}, "n_prompts is 0; allowed: 1, 2, ... or None"),
        (None, {"families": ("other_test",)}, "pass its rows as `held_out=...`"),
        (None, {"families": ("chosen_semantic",)}, "'chosen_semantic' needs a writer"),
        (None, {"families": ("random_tokens",)}, "pass the trainer's tokenizer"),
        ([{"prompt": "a", "chosen": "b c", "rejected": "c"}], {"families": ("other_train",)}, "there is only one"),
    ],
)
def test_bad_input_says_what_was_seen(preference_rows, rows, options, message):
    with pytest.raises(ValueError, match=message):
        ProbeSet.from_preference_dataset(preference_rows if rows is None else rows, **options)


def test_splits_are_refused_by_name(preference_rows):
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(preference_rows))
    with pytest.raises(ValueError, match=r"the splits \['train'\]; choose one, e.g. dataset\['train'\]"):
        ProbeSet.from_preference_dataset(splits)


def test_held_out_prompts_that_are_trained_on_are_refused(preference_rows):
    leaky = [*HELD_OUT, {"prompt": preference_rows[5]["prompt"] + " ", "chosen": "x y"}]
    with pytest.raises(
        ValueError, match=r"1 of the 3 held-out prompts are also training prompts, e.g. 'How do I clean"
    ):
        ProbeSet.from_preference_dataset(preference_rows, families=("other_test",), held_out=leaky, n_prompts=1)


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "2 messages.*exactly one"),
        ([{"role": "user", "content": "a"}], "role is 'user'; a response must come from 'assistant'"),
        ([{"role": "assistant", "content": None, "tool_calls": [1]}], "only plain text.*tool_calls"),
    ],
)
def test_a_conversational_response_is_one_assistant_message(completion, message):
    rows = [{"prompt": [{"role": "user", "content": "Hi"}], "completion": completion}]
    with pytest.raises(ValueError, match=message):
        ProbeSet.from_prompt_completion(rows)


def test_a_text_prompt_of_message_responses_is_the_users_message(chat_preference_rows):
    probes = ProbeSet.from_preference_dataset([{**row, "prompt": "How?"} for row in chat_preference_rows])
    assert probes[0].prompt == ({"role": "user", "content": "How?"},)


def test_probes_carry_what_their_row_gives_to_the_chat_template(chat_preference_rows, tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [dict(row) for row in chat_preference_rows]
    rows[0] |= {"tools": json.dumps(tools), "chat_template_kwargs": {"style": "briefly"}}
    rows[1] |= {"tools": [], "chat_template_kwargs": float("nan")}  # [] is rendered; NaN is a data frame's "none"
    rows[2] |= {"tools": None, "chat_template_kwargs": {}}
    probes = ProbeSet.from_preference_dataset(rows, families=("chosen", "rejected", "ungrammatical"))
    by_prompt = {probe.prompt_id: probe.template for probe in probes}
    assert list(by_prompt.values())[:4] == [{"tools": tools, "style": "briefly"}, {"tools": []}, None, None]
    assert all(probe.template == by_prompt[probe.prompt_id] for probe in probes)
    loaded = ProbeSet.load(probes.save(tmp_path / "probes.parquet"))
    assert (loaded, loaded.fingerprint()) == (probes, probes.fingerprint())
    assert probes.fingerprint() != ProbeSet.from_preference_dataset(chat_preference_rows).fingerprint()
    assert all(
        probe.template == by_prompt[probe.prompt_id]
        for probe in probes.select(families=("chosen",)).add_family("rejected", responses=["a"] * 6)
    )


def test_a_set_without_template_arguments_is_a_file_of_the_first_format(preference_rows, tmp_path):
    path = ProbeSet.from_preference_dataset(preference_rows).save(tmp_path / "probes.parquet")
    header = json.loads(pq.read_schema(path).metadata[b"llm_dynamics.probe_set"])
    assert header["version"] == 1
    pq.write_table(pq.read_table(path).drop_columns("template"), path)  # as an earlier version wrote it
    assert ProbeSet.load(path) == ProbeSet.from_preference_dataset(preference_rows)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tools", {"x": 1}, "column 'tools': a dict; give a list of tool schemas"),
        ("tools", "[broken", "column 'tools': not valid JSON"),
        ("tools", [print], "'tools' and 'chat_template_kwargs' must be JSON values"),
        ("chat_template_kwargs", [1], "column 'chat_template_kwargs': a list; give a dictionary"),
    ],
)
def test_template_arguments_of_another_kind_are_refused(chat_preference_rows, column, value, message):
    with pytest.raises(ValueError, match=f"6 x {re.escape(message)}"):
        ProbeSet.from_preference_dataset([{**row, column: value} for row in chat_preference_rows])


@pytest.mark.parametrize("probes", ["chosen", {"a": 1}, [("a", "b")], [None], 3, None])
def test_what_is_no_probe_is_named(probes, tokenizer):
    with pytest.raises(TypeError, match=r"probes(\[0\])? is a \w+; give a ProbeSet, or a list of Probe"):
        ProbeSet(probes)
    with pytest.raises(TypeError, match=r"probes(\[0\])? is a \w+; give a ProbeSet, or a list of Probe"):
        encode_probes(probes, tokenizer)


@pytest.mark.parametrize("tokenizer", ["gpt2", None, AutoTokenizer])
def test_what_is_no_tokenizer_is_named(tokenizer, preference_rows):
    with pytest.raises(TypeError, match=r"processing_class is a \w+; give the tokenizer itself"):
        encode_probes(ProbeSet.from_preference_dataset(preference_rows), tokenizer)


@pytest.mark.parametrize(("line", "message"), [("{broken", "line 2: not valid JSON"), ("[1]", "line 2: a JSON list")])
def test_a_bad_line_of_a_file_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b"}\n' + line)
    with pytest.raises(ValueError, match=f"bad.jsonl, {message}"):
        ProbeSet.from_jsonl(path, columns={"chosen": "chosen"})


def test_a_lone_surrogate_is_dropped_and_counted():
    rows = [{"prompt": "a", "chosen": "b", "rejected": "\ud83d"}]
    with pytest.warns(UserWarning, match="not valid Unicode"):
        assert ProbeSet.from_preference_dataset(rows).families == ("chosen",)


@pytest.mark.parametrize(
    ("probes", "message"),
    [
        ([], "at least one probe"),
        ([Probe("a", "a", "p", "r", "chosen")] * 2, r"1 probe ids occur more than once, e.g. \['a'\]"),
        ([Probe("a", "a", "p", "r", "odd")], "Unknown family 'odd'"),
        ([Probe("a", "x", "p", "r", "chosen"), Probe("b", "x", "q", "r", "chosen")], "two different prompts"),
    ],
)
def test_a_set_refuses_probes_that_do_not_go_together(probes, message):
    with pytest.raises(ValueError, match=message):
        ProbeSet(probes)


# -- The set as an object


def test_summary_lists_every_family_in_order(full_set):
    summary = full_set.summary()
    assert tuple(summary.index) == full_set.families == tuple(f for f in FAMILY_ORDER if f in full_set.families)
    assert (summary["n"] == 6).all()
    assert summary.loc["chosen", "made_by"] == "column chosen"
    assert summary.loc["other_test", "made_by"].startswith("offline (pool chosen of the held-out rows")
    chosen = [probe.response for probe in full_set if probe.family == "chosen"]
    assert summary.loc["chosen", "mean_words"] == pytest.approx(sum(len(r.split()) for r in chosen) / 6)


def test_a_family_of_which_nothing_is_left_stays_in_the_summary():
    rows = [{"prompt": "a", "chosen": "b", "rejected": ""}]
    with pytest.warns(UserWarning, match="rejected: 1 x empty response"):
        probes = ProbeSet.from_preference_dataset(rows)
    assert probes.summary().loc["rejected", ["n", "dropped"]].tolist() == [0, 1]
    assert probes.dropped == (DroppedProbe(0, "rejected", "empty response"),)


def test_the_set_cannot_be_changed_through_its_metadata(full_set):
    full_set.metadata["seed"] = 99
    assert full_set.metadata["seed"] == 0


def test_select_restricts_families_and_prompts(full_set):
    ids = full_set.prompt_ids
    part = full_set.select(families=("rejected", "chosen"), prompt_ids=(ids[3], ids[1]))
    assert [probe.probe_id for probe in part] == [f"{ids[i]}/{f}" for i in (1, 3) for f in ("chosen", "rejected")]
    drawn = full_set.select(n_prompts=2, seed=5)
    assert len(drawn.prompt_ids) == 2
    assert drawn == full_set.select(n_prompts=2, seed=5)
    assert {full_set.select(n_prompts=2, seed=seed).prompt_ids for seed in range(8)} != {drawn.prompt_ids}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": ("human_random",)}, "No probe of family 'human_random'"),
        ({"families": ("odd",)}, "Unknown family"),
        ({"prompt_ids": ("p9",)}, r"No prompt \['p9'\] here; ids go from p[0-9a-f]{12} to p[0-9a-f]{12}"),
        ({"n_prompts": 99}, "there are 6 prompts"),
    ],
)
def test_select_refuses_what_is_not_there(full_set, options, message):
    with pytest.raises(ValueError, match=message):
        full_set.select(**options)


def test_select_keeps_the_account_of_what_was_dropped():
    rows = [{"prompt": str(i), "chosen": "b c", "rejected": "" if i == 1 else "d"} for i in range(3)]
    with pytest.warns(UserWarning, match="rejected: 1 x empty response"):
        probes = ProbeSet.from_preference_dataset(rows)
    assert len(probes.select(prompt_ids=(id_of("1"),)).dropped) == 1
    assert not probes.select(prompt_ids=(id_of("2"),)).dropped
    assert not probes.select(families=("chosen",)).dropped


def test_frame_and_dataset_hold_every_field(full_set, chat_preference_rows):
    frame = full_set.to_frame()
    assert frame["probe_id"].tolist() == [probe.probe_id for probe in full_set]
    assert frame["source_row"].tolist() == [probe.source_row for probe in full_set]
    dataset = full_set.to_dataset()
    assert dataset["response"][:] == frame["response"].tolist()
    assert [ids is None for ids in dataset["response_ids"]] == [p.response_ids is None for p in full_set]
    chat = ProbeSet.from_preference_dataset(chat_preference_rows)
    assert chat.to_dataset()[0]["prompt"] == chat_preference_rows[0]["prompt"]
    assert chat.to_frame()["prompt"][0] == "user: How long should I boil an egg?"


def test_a_dataset_of_both_kinds_of_prompts_is_refused():
    probes = ProbeSet(
        [
            Probe("a", "a", "p", "r", "chosen"),
            Probe("b", "b", ({"role": "user", "content": "p"},), "r", "chosen"),
        ]
    )
    with pytest.raises(ValueError, match="Some prompts are chat messages and others text"):
        probes.to_dataset()


# -- add_family


def test_adding_families_one_by_one_gives_the_same_set(full_set, preference_rows, tokenizer):
    grown = ProbeSet.from_preference_dataset(preference_rows)
    for family in reversed(OFFLINE):
        grown = grown.add_family(family, held_out=HELD_OUT, tokenizer=tokenizer)
    assert grown == full_set
    assert grown.fingerprint() == full_set.fingerprint()


def test_given_responses_are_joined_and_counted(preference_rows):
    probes = ProbeSet.from_preference_dataset([{**row, "chosen": " " + row["chosen"]} for row in preference_rows])
    with pytest.warns(UserWarning, match="1 probes dropped .human_random: 1 x empty") as caught:
        grown = probes.add_family(
            "human_random", responses={probes.prompt_ids[1]: "The cat.", probes.prompt_ids[2]: ["a", ""]}
        )
    assert caught[0].filename == __file__
    assert [p.response for p in grown if p.family == "human_random"] == [" The cat.", " a"]
    assert grown.summary().loc["human_random", "not_given"] == 4
    listed = probes.add_family("human_random", responses=[f"text {i}" for i in range(6)])
    assert by_family(listed, "human_random")[probes.prompt_ids[5]].response == " text 5"
    assert len(probes.families) == 2


def test_other_train_may_draw_from_more_than_the_set(preference_rows):
    probes = ProbeSet.from_preference_dataset(preference_rows, n_prompts=1)
    with pytest.raises(ValueError, match="there is only one"):
        probes.add_family("other_train")
    grown = probes.add_family("other_train", training_rows=preference_rows)
    whole = ProbeSet.from_preference_dataset(
        preference_rows, n_prompts=1, families=("chosen", "rejected", "other_train")
    )
    assert grown == whole


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chosen", {}, "already in the set"),
        ("odd", {}, "Unknown family"),
        ("argmax", {}, "not a probe family"),
        ("human_random", {}, "needs a writer"),
        ("human_random", {"responses": ["a"]}, "1 responses for 6 prompts"),
        ("human_random", {"responses": {"p9": "a"}}, r"not in the set: \['p9'\]"),
        ("human_random", {"responses": "text"}, "responses is one text"),
        ("other_test", {}, "held_out"),
        ("ungrammatical", {"join": "glue"}, "join is 'glue'"),
    ],
)
def test_add_family_refuses_what_it_cannot_do(preference_rows, name, options, message):
    probes = ProbeSet.from_preference_dataset(preference_rows)
    with pytest.raises(ValueError, match=message):
        probes.add_family(name, **options)


def test_offline_families_need_a_chosen_response(preference_rows):
    probes = ProbeSet.from_preference_dataset(preference_rows, families=("rejected",))
    with pytest.raises(ValueError, match="no row has one"):
        probes.add_family("ungrammatical")
    with pytest.raises(ValueError, match="'chosen' must come from the data"):
        probes.add_family("chosen")
