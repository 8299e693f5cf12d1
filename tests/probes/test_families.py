import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm_dynamics.demo.tiny import build_tiny_tokenizer
from llm_dynamics.probes import FAMILIES, FAMILY_ORDER
from llm_dynamics.probes.families import PartnerPool, RandomTokens, check_families, shuffle_words, stable_hash
from llm_dynamics.probes.tokenization import encode_response

TOKENIZER = build_tiny_tokenizer(["How long should I boil an egg? About ten minutes."], vocab_size=300)
CHAT = ({"role": "user", "content": "How long?"},)
words = st.lists(st.sampled_from(["an", "egg", "is", "not", "a", "hen", "yet"]), min_size=1, max_size=8).map(" ".join)


def test_the_registry_covers_every_family_in_order():
    assert tuple(FAMILIES) == FAMILY_ORDER
    assert FAMILY_ORDER[:3] == ("chosen", "rejected", "chosen_initial")
    assert len(FAMILY_ORDER) == 14
    assert {family.needs for family in FAMILIES.values()} == {"column", "writer", "offline"}
    assert all(family.description and family.how for family in FAMILIES.values())


def test_families_come_back_in_canonical_order():
    assert check_families(["random", "rejected", "chosen"]) == ("chosen", "rejected", "random")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["chosen", "nonsense"], "Unknown family 'nonsense'; known: chosen, rejected"),
        (["argmax"], "'argmax' is not a probe family.*every probe"),
        (["chosen", "chosen"], "listed twice"),
        ([], "No family was asked for"),
        ("chosen", "give a sequence"),
    ],
)
def test_bad_family_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        check_families(names)


@given(words, st.integers(0, 3))
def test_a_shuffle_keeps_the_words_and_never_their_order(text, seed):
    shuffled = shuffle_words(text, seed=seed, family="ungrammatical", prompt="p")
    if len(set(text.split())) < 2:
        assert shuffled is None
    else:
        assert sorted(shuffled.split()) == sorted(text.split())
        assert shuffled.split() != text.split()
        assert shuffled == shuffle_words(text, seed=seed, family="ungrammatical", prompt="p")


def test_shuffles_depend_on_seed_family_and_prompt():
    text = " ".join(map(str, range(30)))
    variants = {
        shuffle_words(text, seed=seed, family=family, prompt=prompt)
        for seed in (0, 1)
        for family in ("ungrammatical", "random")
        for prompt in ("p", "q")
    }
    assert len(variants) == 8


pairs = st.lists(st.tuples(st.sampled_from("abcdef"), words), min_size=1, max_size=12)


@given(pairs, st.integers(0, 3), st.randoms())
def test_a_partner_is_another_prompts_and_independent_of_order(candidates, seed, shuffler):
    prompt, own = candidates[0]
    drawn = PartnerPool(candidates).draw(prompt, avoid=[own], seed=seed, family="other_train")
    allowed = {response for other, response in candidates if other != prompt and response.strip() != own.strip()}
    assert drawn in allowed if allowed else drawn is None
    shuffled = list(candidates)
    shuffler.shuffle(shuffled)
    assert PartnerPool(shuffled).draw(prompt, avoid=[own], seed=seed, family="other_train") == drawn


@given(pairs, st.tuples(st.sampled_from("xyz"), words))
def test_one_more_candidate_changes_a_draw_only_to_itself(candidates, extra):
    assume(extra[0] != "p")
    before = PartnerPool(candidates).draw("p", avoid=[], seed=0, family="other_train")
    after = PartnerPool([*candidates, extra]).draw("p", avoid=[], seed=0, family="other_train")
    assert after in (before, extra[1])


def test_partners_are_drawn_evenly():
    pool = PartnerPool([(f"q{i}", f"response {i}") for i in range(10)])
    draws = [pool.draw(f"p{i}", avoid=[], seed=0, family="other_train") for i in range(2000)]
    counts = [draws.count(f"response {i}") for i in range(10)]
    assert min(counts) > 140  # binomial(2000, 0.1): mean 200, sd 13
    assert max(counts) < 260


@settings(deadline=None)
@given(words.map(lambda text: " " + text), st.integers(0, 5), st.sampled_from(["How long?", CHAT]))
def test_random_tokens_have_the_length_and_the_ending_of_chosen(chosen, seed, prompt):
    ids = RandomTokens(TOKENIZER).draw(prompt, chosen, seed=seed)
    _, reference = encode_response(prompt, chosen, TOKENIZER)
    ending = [TOKENIZER.eos_token_id] if isinstance(prompt, str) else reference[-2:]
    assert len(ids) == len(reference)
    assert list(ids[-len(ending) :]) == ending
    assert not set(ids[: -len(ending)]) & set(TOKENIZER.all_special_ids)
    assert ids == RandomTokens(TOKENIZER).draw(prompt, chosen, seed=seed)


def test_random_tokens_keep_what_a_template_puts_before_the_response(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ message['content'] }}",
        "{% if message['role'] == 'assistant' %}<think></think>{% endif %}{{ message['content'] }}",
    )
    _, reference = encode_response(CHAT, "Ten minutes.", tokenizer)
    ids = RandomTokens(tokenizer).draw(CHAT, "Ten minutes.", seed=0)
    opening = tokenizer("<think></think>")["input_ids"]
    assert list(ids[: len(opening)]) == reference[: len(opening)] == opening
    assert list(ids[len(opening) : -2]) != reference[len(opening) : -2]
    assert len(ids) == len(reference)


def test_random_tokens_are_uniform_over_ordinary_tokens():
    drawn = RandomTokens(TOKENIZER).draw("p", "egg? " * 3000, seed=0)[:-1]
    ordinary = set(range(len(TOKENIZER))) - set(TOKENIZER.all_special_ids)
    counts = {token: drawn.count(token) for token in ordinary}
    assert set(drawn) <= ordinary
    expected = len(drawn) / len(ordinary)
    chi_squared = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi_squared < len(ordinary) + 5 * (2 * len(ordinary)) ** 0.5


def test_random_tokens_of_a_response_without_content_are_none():
    assert RandomTokens(TOKENIZER).draw("p", "<|im_end|>", seed=0) is None


def test_a_vocabulary_of_special_tokens_only_is_refused():
    class Special:
        all_special_ids = (0, 1)

        def get_vocab(self):
            return {"a": 0, "b": 1}

    with pytest.raises(ValueError, match="no token that is not special"):
        RandomTokens(Special())


def test_draws_leave_the_global_random_state_alone():
    random.seed(7)
    state = random.getstate()
    shuffle_words("a b c d", seed=0, family="random", prompt="p")
    RandomTokens(TOKENIZER).draw("p", " egg", seed=0)
    assert random.getstate() == state


def test_the_hash_is_the_same_in_every_process():
    assert stable_hash(0, "other_train", "How long?") == 0x8928E47605D4BD35
