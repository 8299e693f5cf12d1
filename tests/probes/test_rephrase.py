import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from llm_dynamics.demo.tiny import build_tiny_model
from llm_dynamics.probes import FAMILIES, ChatModelRephraser, OpenAIRephraser, ProbeSet, RephraseRequest
from llm_dynamics.probes.rephrase import INSTRUCTIONS, writer_messages

WRITER_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.needs == "writer")
REQUESTS = [RephraseRequest("How long?", "About ten minutes.", name) for name in WRITER_FAMILIES]


class Endpoint:
    """A server on loopback that speaks /v1/chat/completions."""

    def __init__(self, answer, failures=0, status=503):
        self.requests = []
        self.headers = []
        self.failures = failures
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.requests.append((self.path, body))
                    endpoint.headers.append(self.headers)
                    failing = endpoint.failures > 0
                    endpoint.failures -= failing
                if failing:
                    return self.reply(status, {"error": {"message": "the kettle is on"}})
                text = answer(body["messages"][-1]["content"])
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                return self.reply(
                    200,
                    {
                        "id": "1",
                        "object": "chat.completion",
                        "created": 0,
                        "model": body["model"],
                        "choices": [] if text == "NOTHING" else [choice],
                    },
                )

            def reply(self, code, content):
                payload = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# -- What a writer is told


def test_every_writers_family_has_an_instruction():
    assert set(WRITER_FAMILIES) == {"chosen_initial", *INSTRUCTIONS}


@pytest.mark.parametrize("family", sorted(INSTRUCTIONS))
def test_an_instruction_shows_the_prompt_and_what_to_start_from(family):
    (message,) = writer_messages(RephraseRequest("How long?", "About ten minutes.", family))
    assert message["role"] == "user"
    assert "How long?" in message["content"]
    assert ("About ten minutes." in message["content"]) == (family != "human_random")
    assert "{" not in message["content"]


def test_the_initial_answer_is_asked_for_with_the_bare_prompt():
    chat = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "How long?"})
    assert writer_messages(RephraseRequest(" How long?\n", "x", "chosen_initial")) == [
        {"role": "user", "content": "How long?"}
    ]
    assert writer_messages(RephraseRequest(chat, "x", "chosen_initial")) == list(chat)


def test_a_family_that_no_writer_makes_is_refused():
    with pytest.raises(ValueError, match="'random' is not made by a writer; these are: chosen_initial"):
        writer_messages(RephraseRequest("p", "r", "random"))


# -- An endpoint


def test_an_endpoint_writes_in_order(preference_rows):
    with Endpoint(lambda text: "About: " + text.split("Response:\n")[-1] + "  ") as endpoint:
        rephraser = OpenAIRephraser(endpoint.url, "some-model", concurrency=3)
        probes = ProbeSet.from_preference_dataset(
            preference_rows, families=("chosen", "chosen_semantic", "rejected_format"), rephraser=rephraser
        )
    semantic = [probe.response for probe in probes if probe.family == "chosen_semantic"]
    assert semantic == ["About: " + row["chosen"] for row in preference_rows]
    format_ = [probe.response for probe in probes if probe.family == "rejected_format"]
    assert format_ == ["About: " + row["rejected"] for row in preference_rows]
    path, body = endpoint.requests[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["seed"], body["max_tokens"]) == ("some-model", 0, 512)
    assert endpoint.url in probes.metadata["families"]["chosen_semantic"]["writer"]
    assert "some-model" in probes.summary().loc["chosen_semantic", "made_by"]


def test_empty_answers_of_an_endpoint_are_counted_drops(preference_rows):
    with (
        Endpoint(lambda text: {"e": "NOTHING", "?": " "}.get(text[-1], None if "sky" in text else "Fine.")) as endpoint,
        pytest.warns(UserWarning, match=r"chosen_semantic: \d x the writer returned nothing"),
    ):
        probes = ProbeSet.from_preference_dataset(
            preference_rows,
            families=("chosen", "chosen_semantic"),
            rephraser=OpenAIRephraser(endpoint.url, "m", seed=None),
        )
    assert probes.summary().loc["chosen_semantic", "dropped"] >= 1
    assert "seed" not in endpoint.requests[0][1]


def test_a_busy_endpoint_is_asked_again():
    with Endpoint(lambda _: "Fine.", failures=2) as endpoint:
        assert OpenAIRephraser(endpoint.url, "m", concurrency=1).rephrase(REQUESTS[:1]) == ["Fine."]
    assert len(endpoint.requests) == 3


def test_an_endpoint_that_refuses_is_named_with_what_it_said():
    with Endpoint(lambda _: "Fine.", failures=100, status=401) as endpoint:
        rephraser = OpenAIRephraser(endpoint.url, "m", max_retries=0)
        with pytest.raises(RuntimeError, match=rf"{endpoint.url} \(model 'm'\) failed: AuthenticationError.*kettle"):
            rephraser.rephrase(REQUESTS)


def test_an_endpoint_that_is_not_there_is_named():
    with Endpoint(lambda _: "Fine.") as endpoint:
        pass
    rephraser = OpenAIRephraser(endpoint.url, "m", max_retries=0, timeout=5)
    with pytest.raises(
        RuntimeError, match=f"The endpoint {endpoint.url} .*APIConnectionError.*Check that it is running"
    ):
        rephraser.rephrase(REQUESTS[:1])


def test_only_a_given_key_is_sent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not-for-this-endpoint")
    with Endpoint(lambda _: "Fine.") as endpoint:
        OpenAIRephraser(endpoint.url, "m").rephrase(REQUESTS[:1])
        OpenAIRephraser(endpoint.url, "m", api_key="given").rephrase(REQUESTS[:1])
    assert [headers["Authorization"] for headers in endpoint.headers] == ["Bearer none", "Bearer given"]


def test_a_missing_client_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install llm-dynamics\[rephrase\]"):
        OpenAIRephraser("http://127.0.0.1/v1", "m")


# -- A local model


@pytest.mark.filterwarnings("ignore:.*the writer returned nothing")
def test_a_local_model_writes_every_family(tiny_model, tokenizer, preference_rows):
    probes = ProbeSet.from_preference_dataset(
        preference_rows[:3],
        families=("chosen", *WRITER_FAMILIES),
        rephraser=ChatModelRephraser(tiny_model, tokenizer, max_new_tokens=8, batch_size=2, temperature=1.0),
    )
    assert set(probes.families) == {"chosen", *WRITER_FAMILIES}
    assert "LlamaForCausalLM (temperature 1.0, seed 0)" in probes.metadata["families"]["chosen_initial"]["writer"]


def test_greedy_texts_do_not_depend_on_the_batch(tiny_model, tokenizer):
    together = ChatModelRephraser(tiny_model, tokenizer, max_new_tokens=6, batch_size=7).rephrase(REQUESTS)
    alone = ChatModelRephraser(tiny_model, tokenizer, max_new_tokens=6, batch_size=1).rephrase(REQUESTS)
    assert together == alone
    assert len(together) == len(REQUESTS)


def test_sampling_is_seeded_and_leaves_everything_as_it_was(tiny_model, tokenizer):
    tiny_model.train()
    tokenizer.padding_side = "right"
    torch.manual_seed(3)
    state = torch.get_rng_state()
    texts = [
        ChatModelRephraser(tiny_model, tokenizer, max_new_tokens=6, temperature=1.0, seed=seed).rephrase(REQUESTS)
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_model.training
    assert tokenizer.padding_side == "right"


def test_a_model_is_loaded_from_its_path(tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = ChatModelRephraser(tiny_model, tokenizer, max_new_tokens=4).rephrase(REQUESTS[:2])
    assert ChatModelRephraser(tmp_path, max_new_tokens=4).rephrase(REQUESTS[:2]) == expected


def test_a_model_that_says_nothing_gives_counted_drops(tokenizer, preference_rows):
    model = build_tiny_model(len(tokenizer))
    model.generation_config.eos_token_id = list(range(len(tokenizer)))  # every first token ends the text
    tokenizer.add_special_tokens({"additional_special_tokens": tokenizer.convert_ids_to_tokens(range(len(tokenizer)))})
    with pytest.warns(UserWarning, match="6 probes dropped .human_random: 6 x the writer returned nothing"):
        probes = ProbeSet.from_preference_dataset(
            preference_rows,
            families=("chosen", "human_random"),
            rephraser=ChatModelRephraser(model, tokenizer, max_new_tokens=4),
        )
    assert probes.summary().loc["human_random", ["n", "dropped"]].tolist() == [0, 6]


def test_a_local_model_needs_a_tokenizer_with_a_template(tiny_model, tokenizer):
    with pytest.raises(ValueError, match="a model without its tokenizer"):
        ChatModelRephraser(tiny_model)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        ChatModelRephraser(tiny_model, tokenizer)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}])
def test_senseless_generation_settings_are_refused(tiny_model, tokenizer, options):
    with pytest.raises(ValueError, match="must be at least 1"):
        ChatModelRephraser(tiny_model, tokenizer, **options)


# -- Any other writer


def test_a_writer_that_loses_a_text_is_refused(preference_rows):
    class Forgetful:
        def rephrase(self, requests):
            return ["x"] * (len(requests) - 1)

    with pytest.raises(ValueError, match=r"Forgetful\.rephrase returned 5 texts for 6 requests"):
        ProbeSet.from_preference_dataset(preference_rows, families=("chosen_selfr",), rephraser=Forgetful())


def test_rows_without_the_text_to_start_from_are_not_sent_to_the_writer():
    class Counting:
        description = "a test"

        def __init__(self):
            self.seen = []

        def rephrase(self, requests):
            self.seen += requests
            return ["Fine." for _ in requests]

    rows = [{"prompt": "a", "chosen": " b c", "rejected": ""}, {"prompt": "d", "chosen": " e f", "rejected": " g"}]
    families = ("chosen", "chosen_initial", "rejected_semantic")
    writer = Counting()
    with pytest.warns(UserWarning, match="rejected_semantic: 1 x no rejected response to build from"):
        probes = ProbeSet.from_preference_dataset(rows, families=families, rephraser=writer)
    assert [(r.family, r.response) for r in writer.seen] == [
        ("chosen_initial", "b c"),
        ("chosen_initial", "e f"),
        ("rejected_semantic", "g"),
    ]
    assert {probe.response for probe in probes if probe.family != "chosen"} == {" Fine."}
