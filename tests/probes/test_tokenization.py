import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_dynamics.demo.tiny import build_tiny_tokenizer
from llm_dynamics.probes import EncodedProbe, Probe, TruncationRule, encode_probes
from llm_dynamics.probes.tokenization import NO_CONTEXT, NO_RESPONSE_LEFT, common_prefix_length, decode_ids

TOKENIZER = build_tiny_tokenizer(["How long should I boil an egg? About ten minutes."], vocab_size=300)
CHAT = ({"role": "user", "content": "How long?"},)


def text_probe(prompt="How long?", response=" Ten minutes.", name="a", **more):
    return Probe(name, name, prompt, response, "chosen", **more)


def test_plain_text_ends_with_eos_once():
    bare, ended = encode_probes([text_probe(), text_probe(response=" Ten minutes.<|im_end|>", name="b")], TOKENIZER)
    assert bare.response_ids == ended.response_ids
    assert bare.response_ids.count(TOKENIZER.eos_token_id) == 1
    assert TOKENIZER.decode(bare.input_ids) == "How long? Ten minutes.<|im_end|>"


def test_chat_goes_through_the_template():
    (probe,) = encode_probes([Probe("a", "a", CHAT, "Ten.", "chosen")], TOKENIZER)
    assert TOKENIZER.decode(probe.prompt_ids) == "<|im_start|>user\nHow long?<|im_end|>\n<|im_start|>assistant\n"
    assert TOKENIZER.decode(probe.response_ids) == "Ten.<|im_end|>\n"


def test_another_chat_template_and_its_arguments_are_used():
    template = "{{ greeting }}{% for m in messages %}|{{ m['content'] }}{% endfor %}"
    (probe,) = encode_probes(
        [Probe("a", "a", CHAT, "Ten.", "chosen")],
        TOKENIZER,
        chat_template=template,
        chat_template_kwargs={"greeting": "Hello"},
    )
    assert TOKENIZER.decode(probe.input_ids) == "Hello|How long?|Ten."


def test_a_merge_across_the_boundary_moves_it_and_is_counted():
    encoded = encode_probes([text_probe("How lo", "ng?"), text_probe("How long", "?", "b")], TOKENIZER)
    assert encoded.boundary_merges == 1
    prompt = TOKENIZER("How lo")["input_ids"]
    whole = TOKENIZER("How long?<|im_end|>")["input_ids"]
    assert len(encoded[0].prompt_ids) == common_prefix_length(prompt, whole) < len(prompt)
    assert list(encoded[0].input_ids) == whole


@settings(deadline=None, max_examples=60)
@given(
    st.text("abc egg?\n", min_size=1, max_size=12),
    st.text("abc egg?\n", max_size=12),
    st.integers(2, 20),
    st.sampled_from(["keep_start", "keep_end"]),
)
def test_truncation_keeps_one_end_and_counts_what_it_cuts(prompt, response, max_length, mode):
    probe = text_probe(prompt, response)
    (full,) = (encode_probes([probe], TOKENIZER)) if _scorable(probe) else (None,)
    if full is None:
        return
    rule = TruncationRule(max_length, mode)
    kept = full.input_ids[:max_length] if mode == "keep_start" else full.input_ids[-max_length:]
    n_response = len(full.response_ids)
    if mode == "keep_start":
        n_response = max(0, len(kept) - len(full.prompt_ids))
    if n_response == 0 or n_response >= len(kept):
        with pytest.raises(ValueError, match="None of the 1 probes can be scored"):
            encode_probes([probe], TOKENIZER, truncation=rule)
        return
    encoded = encode_probes([probe], TOKENIZER, truncation=rule)
    assert encoded[0].input_ids == kept
    assert len(encoded[0].response_ids) == n_response
    assert encoded[0].n_cut == len(full.input_ids) - len(kept)
    assert encoded.n_truncated == (encoded[0].n_cut > 0)
    assert encoded.truncation == rule


def _scorable(probe):
    prompt = TOKENIZER(probe.prompt)["input_ids"]
    whole = TOKENIZER(probe.prompt + probe.response + TOKENIZER.eos_token)["input_ids"]
    return common_prefix_length(prompt, whole) > 0


@pytest.mark.parametrize(
    ("mode", "prompt", "reason"),
    [("keep_start", "How long should I boil an egg?" * 3, NO_RESPONSE_LEFT), ("keep_end", "How?", NO_CONTEXT)],
)
def test_what_cannot_be_scored_is_dropped_counted_and_named(mode, prompt, reason):
    long_one = text_probe(prompt, " Ten." if mode == "keep_start" else " Ten minutes." * 20, "long")
    with pytest.warns(UserWarning, match="1 probes dropped while encoding: 1 x .*first: long"):
        encoded = encode_probes([long_one, text_probe()], TOKENIZER, truncation=TruncationRule(20, mode))
    assert encoded.dropped == (("long", reason),)
    assert [probe.probe_id for probe in encoded] == ["a"]


def test_an_empty_prompt_leaves_the_first_token_without_context():
    with pytest.raises(ValueError, match=r"no token before the response.*BOS"):
        encode_probes([text_probe("")], TOKENIZER)


def test_zero_probes_are_an_error():
    with pytest.raises(ValueError, match="no probes to encode"):
        encode_probes([], TOKENIZER)


def test_given_response_ids_are_used_as_they_are():
    ids = (50, 60, 70, TOKENIZER.eos_token_id)
    probe = text_probe(response=decode_ids(TOKENIZER, ids), response_ids=ids)
    encoded = encode_probes([probe], TOKENIZER)
    assert encoded[0] == EncodedProbe("a", tuple(TOKENIZER("How long?")["input_ids"]), ids, 0)
    assert encoded.boundary_merges == 0


@pytest.mark.parametrize("ids", [(50, 61), (50, 10**6)])
def test_response_ids_of_another_tokenizer_are_refused(ids):
    probe = text_probe(response=decode_ids(TOKENIZER, (50, 60)), response_ids=ids)
    with pytest.raises(ValueError, match=r"'a'.*encoded with another tokenizer"):
        encode_probes([probe], TOKENIZER)


def test_a_tokenizer_without_eos_is_refused_for_text(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"Set `tokenizer.eos_token`"):
        encode_probes([text_probe()], tokenizer)


def test_a_tokenizer_without_template_is_refused_for_chat(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"Set `tokenizer.chat_template`"):
        encode_probes([Probe("a", "a", CHAT, "Ten.", "chosen")], tokenizer)


def test_a_multimodal_processor_is_refused():
    class Processor(transformers.ProcessorMixin):
        def __init__(self):
            pass

    with pytest.raises(NotImplementedError, match=r"processor.tokenizer"):
        encode_probes([text_probe()], Processor())


@pytest.mark.parametrize("max_length", [0, 1, -3, 2.5, True])
def test_a_senseless_max_length_is_refused(max_length):
    with pytest.raises(ValueError, match=r"TruncationRule.max_length is .*>= 2"):
        TruncationRule(max_length)


def test_an_unknown_truncation_mode_is_refused():
    with pytest.raises(ValueError, match="'keep_middle'; allowed: 'keep_start', 'keep_end'"):
        TruncationRule(10, "keep_middle")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(st.lists(st.sampled_from([("a", " b"), ("How long", "?"), ("x y", " egg egg")]), min_size=1, max_size=4))
def test_the_encoded_set_is_a_sequence_in_the_given_order(pairs):
    probes = [text_probe(*pair, name=str(i)) for i, pair in enumerate(pairs)]
    encoded = encode_probes(probes, TOKENIZER)
    assert [probe.probe_id for probe in encoded] == [probe.probe_id for probe in probes]
    assert len(encoded) == len(probes)
    assert encoded[0:1] == (encoded[0],)
