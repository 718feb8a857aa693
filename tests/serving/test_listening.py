"""`python -m app serve` as a process: its start, its end, and what it refuses to begin."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from app.serving.listening import listen
from tests.helpers import PATIENCE, REPOSITORY, Command, until
from tests.serving.servers import NANO, drawn, exported, files

SECRET = "0123456789abcdef0123"


def listens(host: str, port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection((host, port)).close()
        return True
    return False


@contextlib.contextmanager
def started(*words: object, **environment: str) -> Iterator[tuple[subprocess.Popen, str, Path]]:
    """A server in a process; yields it, its address and the file of its output."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "app",
                    "serve",
                    "--device=cpu",
                    "--port=0",
                    *map(str, words),
                ],
                cwd=REPOSITORY,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            until(
                lambda: "serving: " in log.read_text() or process.poll() is not None,
                "the server listens",
            )
            found = re.search(r"serving: (http://\S+)", log.read_text())
            assert found, log.read_text()
            yield process, found[1], log
        finally:
            process.kill()
            process.wait()


@pytest.mark.system
def test_a_server_drains_at_sigterm_and_is_back_after_kill_9() -> None:
    """What was begun is answered; it ends with 143, and what it printed names no key."""
    with started("--checkpoint", NANO, SAM3_API_KEY=SECRET) as (process, address, log):
        assert httpx.get(f"{address}/v1/models").status_code == 401
        parts = urlsplit(address)
        with socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE) as client:
            data = {"prompt": [f"thing {number}" for number in range(20)]}
            request = httpx.Request(
                *("POST", f"{address}/v1/predict"), files=files(drawn(1), drawn(2)), data=data
            )
            body = request.read()
            head = [
                *("POST /v1/predict HTTP/1.1", "Host: localhost", f"X-API-Key: {SECRET}"),
                f"Content-Type: {request.headers['content-type']}",
                *(f"Content-Length: {len(body)}", "Expect: 100-continue", "", ""),
            ]
            client.sendall("\r\n".join(head).encode())
            assert client.recv(100).startswith(b"HTTP/1.1 100")  # it is being answered
            process.send_signal(signal.SIGTERM)
            until(lambda: not listens(parts.hostname, parts.port), "no other is taken")
            client.sendall(body)
            answer = b"".join(iter(lambda: client.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200"), answer[:500]
        assert len(json.loads(answer.partition(b"\r\n\r\n")[2])["results"]) == 2
        assert process.wait(PATIENCE) == 143
        said = log.read_text()
    assert SECRET not in said
    assert "Traceback" not in said

    port = address.rpartition(":")[2]
    with started("--checkpoint", NANO, "--port", port) as (process, again, _):
        assert again == address
        process.kill()
        process.wait()
    with started("--checkpoint", NANO, "--port", port) as (_, again, _):
        assert httpx.get(f"{again}/ready").status_code == 200


def test_an_exported_folder_is_served_without_torch(tmp_path: Path) -> None:
    program = """
import json, sys
from app.serving.api import create_app
from app.serving.engine import Asked, Engine
from app.serving.listening import Server
from app.serving.loading import Source
from app.serving.settings import Limits, Settings
from app.serving.versions import Models
from app.serving import uploads
import asyncio, pathlib
engine = Engine(Source(pathlib.Path(sys.argv[1]), "tiny").load, Settings())
create_app(Models([engine]), Settings())
image = uploads.check(pathlib.Path(sys.argv[2]).read_bytes(), Limits())
found = asyncio.run(engine.find(image, engine.queries([Asked("red", 0.0)], 5)))
again = asyncio.run(engine.find(image, engine.queries([Asked("red", 0.0)], 5)))
alone = engine.finder.predict(sys.argv[2], "red", threshold=0.0, max_detections=5)
assert found.scores.tolist() == again.scores.tolist() == alone.scores.tolist() != []
assert found.masks == again.masks == alone.masks
print(json.dumps([engine.about.prompts, engine.about.resolution, "torch" in sys.modules]))
"""
    image = tmp_path / "it.png"
    image.write_bytes(drawn(3))
    words = [sys.executable, "-c", program, exported(tmp_path / "folder"), image]
    done = subprocess.run([*map(str, words)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["red", "green"], 8, False]


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["--host", "0.0.0.0"], {}, "SAM3_API_KEY"),
        (["--host", "::"], {}, "--open"),
        (["--host", "0.0.0.0"], {"SAM3_API_KEY": "short"}, "has 5 characters"),
        (["--checkpoint", "nowhere"], {}, "nowhere: no such checkpoint"),
        (["--checkpoint", NANO, "--checkpoint", NANO], {}, "--name nano"),
        (["--checkpoint", NANO, "--name", "a/b"], {}, "--name a/b"),
        (["--checkpoint", NANO, "--name", "a", "--name", "b"], {}, "--name: 2 for 1 model"),
    ],
)
def test_what_it_refuses_to_begin(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    words: list[object],
    environment: dict[str, str],
    said: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = command("serve", "--port", 0, *words)
    assert done.code == 2
    assert said in done.err
    assert "short" not in done.err


def test_answers_are_sent_without_a_delay() -> None:
    """Nagle's algorithm would hold the end of each back for 40 ms, until it is acknowledged."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # which asyncio asks for


def test_a_port_that_is_taken_is_named(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command("serve", "--port", port)
    assert done.code == 2
    assert f"--port {port}" in done.err
