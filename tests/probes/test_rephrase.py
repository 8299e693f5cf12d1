import json
import socket
import threading
from contextlib import suppress
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
    refusal = r"\(model 'm'\) failed: status 401: .*kettle"
    with Endpoint(lambda _: "Fine.", failures=100, status=401) as endpoint, pytest.raises(RuntimeError, match=refusal):
        OpenAIRephraser(endpoint.url, "m").rephrase(REQUESTS)
    with Endpoint(lambda _: "Fine.", failures=100) as endpoint, pytest.raises(RuntimeError, match="failed: status 503"):
        OpenAIRephraser(endpoint.url, "m", max_retries=2).rephrase(REQUESTS[:1])
    assert len(endpoint.requests) == 3


def test_an_endpoint_that_is_not_there_is_named():
    with Endpoint(lambda _: "Fine.") as endpoint:
        pass
    rephraser = OpenAIRephraser(endpoint.url, "m", max_retries=0, timeout=5)
    with pytest.raises(RuntimeError, match=f"{endpoint.url} .*ConnectionRefusedError.*Check that it is running"):
        rephraser.rephrase(REQUESTS[:1])


def test_only_what_is_given_is_sent_and_only_to_the_address_given(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.setenv(name, "X-Secret: not-for-this-endpoint")
    for name in ("OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/elsewhere")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Endpoint(lambda _: "Fine.") as endpoint:
        OpenAIRephraser(endpoint.url + "/", "m").rephrase(REQUESTS[:1])
        OpenAIRephraser(endpoint.url, "m", api_key="given").rephrase(REQUESTS[:1])
    assert [headers["Authorization"] for headers in endpoint.headers] == [None, "Bearer given"]
    assert "not-for-this-endpoint" not in str([headers.items() for headers in endpoint.headers])


SECRETS = [
    "http://me:hunter2@host/v1",
    "http://hunter2@host/v1",
    "http://me:hunter2/v1@host",
    "http://host/v1?k=hunter2",
]


@pytest.mark.parametrize("url", [*SECRETS, "http://host/v1#hunter2", ("http://hunter2@host",)])
def test_what_may_be_a_password_in_the_address_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="base_url must") as refused:
        OpenAIRephraser(url, "m")
    assert "hunter2" not in str(refused.value)
    assert refused.value.__context__ is None


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "file:///etc/passwd", "http:///v1", "http://h:port/v1", "http://h\n/v1"]
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match=r"base_url is .*give an address such as"):
        OpenAIRephraser(url, "m")


@pytest.mark.parametrize("key", ["hunter2\r\nX: y", "hünter2", b"hunter2"])
def test_a_key_that_no_header_takes_is_refused_and_not_repeated(key):
    with pytest.raises(ValueError, match="api_key must be one line") as refused:
        OpenAIRephraser("http://host/v1", "m", key)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    "options", [{"timeout": 0}, {"timeout": float("inf")}, {"max_retries": -1}, {"concurrency": 0}]
)
def test_senseless_bounds_are_refused(options):
    with pytest.raises(ValueError, match="OpenAIRephraser: timeout="):
        OpenAIRephraser("http://host/v1", "m", **options)


HEAD = b"HTTP/1.1 200 OK\r\n"
REDIRECT = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://user:hunter2@elsewhere.example/v1\r\n\r\n"


def reply(content):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


MISBEHAVING = {
    "redirect": ([REDIRECT], "a redirect to the host elsewhere.example; prompts are sent to the address given alone"),
    "another status": ([b"HTTP/1.1 204 No Content\r\n\r\n"], "status 204"),
    "key echoed": ([b"HTTP/1.1 403 No\r\n\r\n", b"no such key: given-key" * 50], r"no such key: \*\*\*"),
    "no HTTP": ([b"SSH-2.0-OpenSSH_9.6\r\n"], "BadStatusLine"),
    "no JSON": ([reply(b"<html>given-key")], r"no chat completion: '<html>\*\*\*'"),
    "no UTF-8": ([reply(b"\xff\xfe{}")], "no chat completion"),
    "deep JSON": ([reply(b"[" * 200_000)], "no chat completion"),
    "a list": ([reply([])], "no chat completion"),
    "null": ([reply(None)], "no chat completion"),
    "no choices": ([reply({"object": "error"})], "no chat completion"),
    "choices null": ([reply({"choices": None})], "no chat completion"),
    "choices of texts": ([reply({"choices": ["Fine."]})], "no chat completion"),
    "no message": ([reply({"choices": [{"text": "Fine."}]})], "no chat completion"),
    "message null": ([reply({"choices": [{"message": None}]})], "no chat completion"),
    "content of parts": ([reply({"choices": [{"message": {"content": [{"text": "a"}]}}]})], "no chat completion"),
    "content a number": ([reply({"choices": [{"message": {"content": 3}}]})], "no chat completion"),
    "a length that it does not keep": ([HEAD + b"Content-Length: 99\r\n\r\n{}"], "IncompleteRead|no chat completion"),
    "huge": ([HEAD + b"\r\n", *[b"x" * 2**20] * 6], "longer than 4194304 bytes"),
    "huge header": ([HEAD + b"X: " + b"x" * 100_000], "LineTooLong"),
    "silence": ([b"", None], "no whole reply within 0.3 s"),
    "drip": ([HEAD + b"\r\n", *[b" "] * 400], "no whole reply within 0.3 s"),
    "dripping header": ([HEAD, *[b"X"] * 400], "no whole reply within 0.3 s"),
    "dripping chunks": ([HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 400], "no whole reply"),
    "endless 100": ([b"HTTP/1.1 100 Continue\r\n\r\n"] * 400, "no whole reply within 0.3 s"),
}


@pytest.mark.parametrize("name", MISBEHAVING)
def test_an_endpoint_that_misbehaves_is_one_error_that_names_it(name):
    sent, message = MISBEHAVING[name]
    done = threading.Event()

    def serve(listener):
        connection, _ = listener.accept()
        with connection, suppress(OSError), connection.makefile("rb") as request:
            while (line := request.readline().lower()) != b"\r\n":
                if line.startswith(b"content-length"):
                    length = int(line.split()[1])
            request.read(length)
            for part in sent:
                done.wait(2 if part is None else 0.01 if len(sent) > 100 else 0)
                connection.sendall(part or b"")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        timeout = 0.3 if "whole reply" in message else 30
        rephraser = OpenAIRephraser(url, "m", "given-key", max_retries=0, timeout=timeout)
        with pytest.raises(RuntimeError, match=message) as raised:
            rephraser.rephrase(REQUESTS[:1])
        done.set()
        server.join()
    assert str(raised.value).startswith(f"The endpoint {url} (model 'm') failed: ")
    assert "given-key" not in str(raised.value)
    assert "hunter2" not in str(raised.value)
    assert "given-key" not in rephraser.description


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
