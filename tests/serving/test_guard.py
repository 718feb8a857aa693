"""Who may ask, how much and how slowly, on a real server; and what a client that leaves frees."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import pytest

from app.inference.finder import Encoded, Query
from app.inference.postprocess import Candidates
from app.serving.guard import OPEN
from app.serving.settings import Limits, Settings
from tests.helpers import until
from tests.serving.servers import Loaded, drawn, files, limited, problems, serving

KEY = "a key of many characters"


class Gated:
    """A finder that waits, before it answers, until it is let."""

    def __init__(self, finder) -> None:
        self._finder = finder
        self.gate, self.asked = threading.Event(), threading.Semaphore(0)

    def __getattr__(self, name: str):
        return getattr(self._finder, name)

    def ground(self, images: list[Encoded], query: Query) -> list[Candidates]:
        self.asked.release()
        assert self.gate.wait(60)
        return self._finder.ground(images, query)


@pytest.fixture
def gated(nano: Loaded) -> Iterator[Gated]:
    finder = Gated(nano.finder)
    yield finder
    finder.gate.set()


def by_key(nano: Loaded):
    settings = Settings(key=KEY)
    return serving(nano.engine(settings), settings=settings)


# --- who -----------------------------------------------------------------------------------------


def test_a_key_is_asked_for_but_where_nothing_is_told(nano: Loaded) -> None:
    with by_key(nano) as client:
        for path in ("/v1/models", "/metrics", "/nothing", "/v1/sessions/x/prompts"):
            answer = client.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "X-API-Key" in problems(answer)[0]["remedy"]
        for path in ("/health", "/ready", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200
            assert path in OPEN
        for headers in (
            {"Authorization": f"Bearer {KEY}"},
            {"authorization": f"bearer  {KEY}"},
            {"X-API-Key": KEY},
            {"Token": KEY},
        ):
            assert client.get("/v1/models", headers=headers).status_code == 200
        for wrong in (KEY[:-1], KEY + "x", "", "ü"):
            headers = {"X-API-Key": wrong.encode("latin-1")}
            assert client.get("/v1/models", headers=headers).status_code == 401
        assert (
            client.get("/v1/models", headers={"Authorization": f"Basic {KEY}"}).status_code == 401
        )
        answer = client.post(
            "/v1/predict", files=files(drawn(1)), data={"prompt": "a"}, headers={"X-API-Key": KEY}
        )
        assert answer.status_code == 200


def test_a_name_that_is_not_ours_is_refused(nano: Loaded) -> None:
    """A page whose name leads to this machine (DNS rebinding) calls it by that name."""
    settings = Settings(hosts=("annotate.example",))
    with serving(nano.engine(), settings=settings) as client:
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "::1"):
            answer = client.get("/v1/models", headers={"Host": host})
            assert answer.status_code == 421, host
        for host in (
            "localhost:8000",
            "127.0.0.1",
            "10.0.0.7:80",
            "[::1]:8000",
            "annotate.example",
        ):
            assert client.get("/v1/models", headers={"Host": host}).status_code == 200, host
    with by_key(nano) as client:  # no page knows the key
        headers = {"Host": "sam3.prod.svc", "X-API-Key": KEY}
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_pages_of_others_are_refused_and_told_nothing(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/predict",
        files=files(drawn(1)),
        data={"prompt": "a"},
        headers={"Origin": "https://evil.example"},
    )
    assert answer.status_code == 403
    assert client.get("/v1/models", headers={"Origin": "null"}).status_code == 403
    own = f"http://{client.base_url.netloc.decode()}"
    answer = client.get("/v1/models", headers={"Origin": own})
    assert answer.status_code == 200
    for name in answer.headers:
        assert not name.startswith("access-control"), name
    preflight = client.options("/v1/predict", headers={"Origin": own})
    assert preflight.status_code == 405


def test_every_answer_has_the_headers_of_a_careful_server(client: httpx.Client) -> None:
    refused = client.get("/v1/models", headers={"Host": "evil.example"})
    for answer in (client.get("/health"), client.get("/nothing"), refused):
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


# --- how much, and how slowly --------------------------------------------------------------------


def connected(client: httpx.Client) -> socket.socket:
    parts = urlsplit(str(client.base_url))
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


HEAD = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_body_that_is_too_large_is_refused_before_it_is_read(nano: Loaded) -> None:
    settings = limited(body_bytes=1 << 20)
    with serving(nano.engine(settings), settings=settings) as client:
        with connected(client) as connection:
            connection.sendall(HEAD + b"Content-Length: 1073741824\r\n\r\n")  # and not a byte of it
            assert read_all(connection).startswith(b"HTTP/1.1 413")
        with connected(client) as connection:
            connection.sendall(HEAD + b"Content-Length: " + b"9" * 60 + b"\r\n\r\n")
            assert read_all(connection).split()[1] in (b"413", b"400")

        def endless() -> Iterator[bytes]:
            for _ in range(1024):
                yield bytes(1 << 20)

        answer = None
        with contextlib.suppress(httpx.TransportError):  # it may be hung up on while it sends
            answer = client.post("/v1/predict", content=endless())
        assert answer is None or answer.status_code == 413
        assert client.app.state.held.nbytes == 0
        assert client.get("/health").status_code == 200


def test_what_all_send_together_is_bounded(nano: Loaded) -> None:
    settings = limited(held_bytes=100_000)
    with serving(nano.engine(settings), settings=settings) as client:
        with connected(client) as first, connected(client) as second:
            first.sendall(HEAD + b"Content-Length: 90000\r\n\r\n" + b" " * 80_000)
            until(lambda: client.app.state.held.nbytes == 80_000, "the first is held")
            second.sendall(HEAD + b"Content-Length: 90000\r\n\r\n" + b" " * 80_000)
            answer = read_all(second)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"retry-after: 5" in answer.lower()
        until(lambda: client.app.state.held.nbytes == 0, "both have left")


def test_slow_senders_are_hung_up_on_and_hold_no_place(nano: Loaded) -> None:
    settings = limited(body_seconds=0.3)
    with serving(nano.engine(settings), settings=settings) as client:
        with connected(client) as slow, connected(client) as headless, connected(client) as silent:
            slow.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
            headless.sendall(HEAD)
            assert client.get("/health").status_code == 200
            assert read_all(slow).startswith(b"HTTP/1.1 408")
            assert read_all(headless) == b""
            assert read_all(silent) == b""
        assert client.app.state.held.nbytes == 0


def test_a_connection_that_is_used_lives_longer_than_headers_may_take(nano: Loaded) -> None:
    settings = limited(body_seconds=0.3)
    server = serving(nano.engine(settings), settings=settings)
    with server as client, connected(client) as connection:
        for _ in range(4):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                part = connection.recv(65536)
                assert part, "it was hung up on"
                answer += part
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.15)


def test_a_client_that_leaves_frees_its_place(nano: Loaded, gated: Gated) -> None:
    settings = limited(queue=2)
    engine = replace(nano, finder=gated).engine(settings)  # type: ignore[arg-type]
    with serving(engine, settings=settings) as client:
        body = httpx.Request("POST", client.base_url, files=files(drawn(1)), data={"prompt": "a"})
        head = (
            f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
            f"{body.headers['content-type']}\r\nContent-Length: {len(body.read())}\r\n\r\n"
        )
        leaving = [connected(client) for _ in range(2)]
        for connection in leaving:
            connection.sendall(head.encode() + body.content)
        until(lambda: engine.waiting == 2, "both have a place")
        gated.asked.acquire(timeout=60)
        full = client.post("/v1/predict", files=files(drawn(2)), data={"prompt": "a"})
        assert full.status_code == 503
        assert int(full.headers["retry-after"]) >= 1
        assert "again" in problems(full)[0]["remedy"]
        for connection in leaving:
            connection.close()
        until(lambda: engine.waiting == 0, "their places are free")
        gated.gate.set()
        answer = client.post("/v1/predict", files=files(drawn(2)), data={"prompt": "a"})
        assert answer.status_code == 200
        # The first was at the model already; the second was passed over.
        assert not gated.asked.acquire(blocking=False) or not gated.asked.acquire(blocking=False)


def test_an_answer_that_takes_too_long_is_given_up(nano: Loaded, gated: Gated) -> None:
    settings = Settings(limits=Limits(seconds=0.2))
    engine = replace(nano, finder=gated).engine(settings)  # type: ignore[arg-type]
    with serving(engine, settings=settings) as client:
        answer = client.post("/v1/predict", files=files(drawn(1)), data={"prompt": "a"})
        assert answer.status_code == 504
        assert problems(answer)
        until(lambda: engine.waiting == 0, "its place is free")
        gated.gate.set()
