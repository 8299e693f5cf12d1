import json
from collections import Counter

import pytest

from llm_dynamics.demo.job import QUICK, build_demo_probes
from llm_dynamics.demo.preferences import REPHRASED, load_preferences
from llm_dynamics.probes import ProbeSet


def text_of(messages):
    """What the user or the assistant says; a system message may stand before it."""
    return messages[-1]["content"]


@pytest.fixture(scope="module")
def train():
    return load_preferences("train")


@pytest.fixture(scope="module")
def test():
    return load_preferences("test")


@pytest.fixture(scope="module")
def rows(train, test):
    return [*train, *test]


def test_there_are_at_least_a_hundred_pairs_on_two_topics(rows, train):
    assert len(rows) >= 100
    assert len(train) >= 100
    topics = Counter(row["topic"] for row in rows)
    assert len(topics) >= 2
    assert min(topics.values()) >= 20


def test_held_out_prompts_are_not_trained_on(train, test):
    seen = {text_of(row["prompt"]).casefold().strip() for row in train}
    assert len(seen) == len(train)
    assert not seen & {text_of(row["prompt"]).casefold().strip() for row in test}
    answers = {text_of(row["chosen"]) for row in train}
    assert not answers & {text_of(row["chosen"]) for row in test}


def test_at_least_forty_rows_have_two_rephrases(rows):
    counts = [sum(row[name] is not None for name in REPHRASED) for row in rows]
    assert sum(count >= 2 for count in counts) >= 40
    assert set(counts) <= {0, len(REPHRASED)}


def test_rows_have_the_conversational_form_of_trl(rows):
    for row in rows:
        assert [message["role"] for message in row["prompt"]] in (["user"], ["system", "user"])
        for name in ("chosen", "rejected"):
            assert [message["role"] for message in row[name]] == ["assistant"]
    assert json.loads(json.dumps(rows)) == rows


def test_no_text_is_empty_or_repeated_within_a_row(rows):
    for row in rows:
        texts = [text_of(row["chosen"]), text_of(row["rejected"]), row["human_random"]]
        texts += [row[name] for name in REPHRASED if row[name] is not None]
        assert all(text.strip() == text and text for text in texts), text_of(row["prompt"])
        assert len(set(texts)) == len(texts), text_of(row["prompt"])


def test_another_split_is_refused():
    with pytest.raises(ValueError, match=r"'valid'.*\"train\", \"test\""):
        load_preferences("valid")


def test_probe_sets_can_be_built_of_it(train):
    probes = ProbeSet.from_preference_dataset(train, families=["chosen", "rejected"])
    assert len(probes) == 2 * len(train)
    assert not probes.dropped


def test_the_demo_watches_at_least_eight_families_of_training_prompts(tokenizer, train):
    probes = build_demo_probes(tokenizer, QUICK)
    assert len(probes.families) >= 8
    assert len(probes) == len(probes.families) * QUICK.prompts
    assert not probes.dropped
    trained = {text_of(row["prompt"]) for row in train}
    assert {text_of(probe.prompt) for probe in probes} <= trained
