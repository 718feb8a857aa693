"""`python -m app serve` as a process: its start, its end, and what it refuses to begin."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.helpers import PATIENCE, REPOSITORY, Command, until
from tests.serving.servers import NANO, drawn, exported, files

SECRET = "0123456789abcdef0123"


@contextlib.contextmanager
def started(*words: object, **environment: str) -> Iterator[tuple[subprocess.Popen, str, Path]]:
    """A server in a process; yields it, its address and the file of its output."""
    import tempfile

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


def test_a_server_drains_at_sigterm_and_is_back_after_kill_9() -> None:
    """What was begun is answered; it ends with 143, and what it printed names no key."""
    with started("--checkpoint", NANO, SAM3_API_KEY=SECRET) as (process, address, log):
        headers = {"X-API-Key": SECRET}
        assert httpx.get(f"{address}/v1/models").status_code == 401
        answers: list[httpx.Response] = []

        def ask() -> None:
            many = [drawn(number, 300, 200) for number in range(16)]
            data = {"prompt": [f"thing {number}" for number in range(30)]}
            answers.append(
                httpx.post(
                    f"{address}/v1/predict",
                    files=files(*many),
                    data=data,
                    headers=headers,
                    timeout=300,
                )
            )

        asking = threading.Thread(target=ask)
        asking.start()
        until(
            lambda: (
                b"waiting" in httpx.get(f"{address}/metrics", headers=headers).content
                or asking.is_alive()
            ),
            "it is asked",
        )
        process.send_signal(signal.SIGTERM)
        asking.join(PATIENCE)
        assert process.wait(PATIENCE) == 143
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
        said = log.read_text()
    assert SECRET not in said
    assert "Traceback" not in said
    assert [answer.status_code for answer in answers] == [200]
    assert len(answers[0].json()["results"]) == 16

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


def test_a_port_that_is_taken_is_named(command: Command) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = command("serve", "--port", port)
    assert done.code == 2
    assert f"--port {port}" in done.err
