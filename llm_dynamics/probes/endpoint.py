"""A writer of responses behind an HTTP endpoint. It is not trusted: bounded in time and size, followed nowhere."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from llm_dynamics.probes.rephrase import RephraseRequest, writer_messages

MOST_BYTES = 2**22
"""Longest reply that is read: some million words."""
_LONGEST_PAUSE = 60.0


class _Refused(Exception):
    """What an endpoint did, in words; whether it may be asked again, and after how many seconds if it says so."""

    def __init__(self, what: str, *, again: bool = False, pause: float | None = None) -> None:
        super().__init__(what)
        self.again = again
        self.pause = pause


class OpenAIRephraser:
    """Writes with any endpoint that speaks OpenAI's `/chat/completions` (vLLM, llama.cpp, Ollama, hosted services).

    Prompts and key go to this address and nowhere else: no environment variable is read (keys, organisations, proxies),
    no redirect is followed.

    Args:
        base_url: The endpoint, e.g. `http://localhost:8000/v1`. It is recorded as provenance: no password, no query.
        model: Name of the model there.
        api_key: Key, if the endpoint asks for one; None sends none.
        temperature: Sampling temperature.
        max_tokens: Longest text, in tokens.
        seed: Seed that is passed on; an endpoint may ignore it.
        timeout: Seconds until a request is given up, its reply included, however slowly that comes.
        max_retries: Retries, with growing pauses, after a lost connection, a timeout, 429 or 5xx.
        concurrency: Requests under way at once.

    Raises:
        ValueError: If an argument is out of range; the message repeats neither password nor key.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        *,
        temperature: float = 0.7,
        max_tokens: int = 512,
        seed: int | None = 0,
        timeout: float = 60.0,
        max_retries: int = 4,
        concurrency: int = 4,
    ) -> None:
        self._secure, self._host, self._port, self._path = _address(base_url)
        if api_key is not None and not (isinstance(api_key, str) and api_key.isascii() and api_key.isprintable()):
            raise ValueError("OpenAIRephraser: api_key must be one line of printable ASCII (it is not shown here).")
        if not 0 < timeout <= threading.TIMEOUT_MAX or max_retries < 0 or concurrency < 1:
            raise ValueError(
                f"OpenAIRephraser: timeout={timeout}, max_retries={max_retries}, concurrency={concurrency}; they must "
                "be seconds above 0, at least 0, and at least 1."
            )
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.seed = seed
        self.timeout = timeout
        self.max_retries = max_retries
        self.concurrency = concurrency
        self._api_key = api_key

    @property
    def description(self) -> str:
        """Model, endpoint and decoding, for the provenance of the texts."""
        return f"{self.model} at {self.base_url} (temperature {self.temperature}, seed {self.seed})"

    def rephrase(self, requests: Sequence[RephraseRequest]) -> list[str | None]:
        """Return one text per request, in order; None where the endpoint returned nothing.

        Raises:
            RuntimeError: If the endpoint cannot be reached, refuses, or replies something else than a completion,
                naming it and what it said.
        """
        stopped = threading.Event()
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(self._write, writer_messages(request), stopped) for request in requests]
            try:
                return [future.result() for future in futures]
            except _Refused as refused:
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise RuntimeError(
                    f"The endpoint {self.base_url} (model {self.model!r}) failed: {refused}. Check that it is running, "
                    "that the address ends as the service documents (often /v1), and the model name and key."
                ) from None

    def _write(self, messages: list[dict[str, Any]], stopped: threading.Event) -> str | None:
        """Ask until there is a reply, or no retry is left.

        Raises:
            _Refused: Where there is none.
        """
        options = {} if self.seed is None else {"seed": self.seed}
        asked = {"model": self.model, "messages": messages, "temperature": self.temperature}
        body = json.dumps({**asked, "max_tokens": self.max_tokens, **options}).encode()
        for attempt in range(self.max_retries + 1):
            try:
                return self._ask(body)
            except _Refused as refused:
                if not refused.again or attempt == self.max_retries:
                    raise
                if stopped.wait(min(0.5 * 2**attempt, 8.0) if refused.pause is None else refused.pause):
                    break  # another request failed for good
        return None

    def _ask(self, body: bytes) -> str | None:
        """Make one request.

        Raises:
            _Refused: For anything but a completion.
        """
        try:
            status, headers, reply = self._post(body)
        except (OSError, http.client.HTTPException) as error:
            raise _Refused(self._without_key(f"{type(error).__name__}: {error}"), again=True) from None
        if len(reply) > MOST_BYTES:
            raise _Refused(f"its reply is longer than {MOST_BYTES} bytes")
        if 300 <= status < 400:
            place = urlsplit(headers.get("Location", "")).hostname
            raise _Refused(
                f"status {status}, a redirect{f' to the host {place}' if place else ''}; prompts are sent to the "
                "address given alone: give the final one"
            )
        said = self._without_key(reply.decode("utf-8", "replace"))
        if status != 200:
            again = status == 429 or status >= 500
            raise _Refused(f"status {status}: {said[:300]}", again=again, pause=_pause(headers))
        try:
            completion = json.loads(said)
        except (ValueError, RecursionError):
            completion = None
        match completion:
            case {"choices": []}:
                return None
            case {"choices": [{"message": {"content": str() | None as text}}, *_]}:
                return (text or "").strip() or None
        raise _Refused(f"its reply is no chat completion: {said[:300]!r}")

    def _post(self, body: bytes) -> tuple[int, Any, bytes]:
        """Return status, headers and body of the reply, read to one byte above the most.

        Raises:
            OSError: Where the connection fails.
            TimeoutError: Where all of it takes longer than `timeout`.
            HTTPException: Where the reply is not HTTP.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeout)
        sockets: list[socket.socket] = []
        late = threading.Event()

        def cut() -> None:  # a socket's own timeout begins anew with every byte
            late.set()
            for open_socket in sockets:
                with suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, cut)
        timer.start()
        key = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
        try:
            connection.connect()
            sockets.append(connection.sock)
            connection.request("POST", self._path, body, {"Content-Type": "application/json", **key})
            with connection.getresponse() as response:
                reply = response.read(MOST_BYTES + 1)
            if not late.is_set():
                return response.status, response.headers, reply
        except (OSError, http.client.HTTPException):
            if not late.is_set():
                raise
        finally:
            timer.cancel()
            connection.close()
        raise TimeoutError(f"no whole reply within {self.timeout:g} s")

    def _without_key(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text


def _address(base_url: str) -> tuple[bool, str, int | None, str]:
    """Return of an endpoint whether it is HTTPS, its host, its port, and the path of its completions.

    Raises:
        ValueError: If it is no plain address; what may hold a password is not repeated.
    """
    if not isinstance(base_url, str) or "@" in base_url:
        raise ValueError(
            "OpenAIRephraser: base_url must be a text without user name or password, for it is recorded as provenance "
            "(it is not shown here). Pass the key as `api_key=`."
        )
    if "?" in base_url or "#" in base_url:
        raise ValueError("OpenAIRephraser: base_url must have no query and no fragment (it is not shown here).")
    address: tuple[str, str, int | None, str]
    try:
        parts = urlsplit(base_url)
        address = parts.scheme, parts.hostname or "", parts.port, f"{parts.path.rstrip('/')}/chat/completions"
    except ValueError:  # a port that is none
        address = "", "", None, ""
    scheme, host, port, path = address
    if scheme not in ("http", "https") or not host or not (base_url.isprintable() and base_url.isascii()):
        raise ValueError(
            f"OpenAIRephraser: base_url is {base_url!r}; give an address such as http://localhost:8000/v1."
        )
    return scheme == "https", host, port, path


def _pause(headers: Any) -> float | None:
    """Return the seconds that an endpoint asks to wait, within bounds; None where it asks for none."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with suppress(TypeError, ValueError):
            seconds = float(headers.get(name)) * unit
            if 0 <= seconds <= _LONGEST_PAUSE:
                return seconds
    return None
