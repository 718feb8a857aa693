"""Stores on loopback that fail, cut and slow as asked: a web server, and what stands before S3."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

from tests.loopback import Quiet, serve

SLOW_SECONDS = 0.5  # between the halves of a slow answer
OF_ONE_CONNECTION = ("connection", "keep-alive", "transfer-encoding", "date", "server")


class Faults:
    """What goes wrong next: `fail` answers are 503, `cut` ones end early, `slow` ones pause.

    Answers about what is named in `always` are 503 whenever it is asked for.
    """

    def __init__(self) -> None:
        self.fail = self.cut = self.slow = 0
        self.always: set[str] = set()
        self.asked: list[str] = []
        self._lock = threading.Lock()

    def take(self, name: str) -> bool:
        """Return whether one of these is left, and count it."""
        with self._lock:
            left = getattr(self, name)
            setattr(self, name, max(left - 1, 0))
        return bool(left)

    def refuses(self, path: str) -> bool:
        return any(name in path for name in self.always) or self.take("fail")


def _write(handler: BaseHTTPRequestHandler, data: bytes, faults: Faults) -> None:
    """Send a body, in whole or in half, at once or not."""
    half = len(data) // 2
    handler.wfile.write(data[:half])
    if data and faults.take("cut"):
        handler.close_connection = True
        return
    if data and faults.take("slow"):
        time.sleep(SLOW_SECONDS)
    handler.wfile.write(data[half:])


class _Files(Quiet, SimpleHTTPRequestHandler):
    faults: Faults

    def do_GET(self) -> None:
        self.faults.asked.append(self.path)
        if self.faults.refuses(self.path):
            self.send_error(503)
        elif self.path.endswith((".jpg", ".png", ".tar")):
            path = Path(self.translate_path(self.path))
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            _write(self, data, self.faults)
        else:
            super().do_GET()


class _Proxy(Quiet):
    """Hands each request on to another server, and its answer back."""

    protocol_version = "HTTP/1.1"
    faults: Faults
    target: str

    def _hand_on(self) -> None:
        self.faults.asked.append(self.path)
        size = int(self.headers.get("Content-Length", 0))
        sent = self.rfile.read(size)
        if self.faults.refuses(self.path):
            self._answer(503, [], b"")
            return
        server = http.client.HTTPConnection(self.target)
        server.request(self.command, self.path, sent or None, dict(self.headers))
        answer = server.getresponse()
        kept = [each for each in answer.getheaders() if each[0].lower() not in OF_ONE_CONNECTION]
        self._answer(answer.status, kept, answer.read())
        server.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        _write(self, body, self.faults)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _hand_on


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Faults]]:
    """Yield the address of a folder, and what goes wrong there."""
    faults = Faults()
    handler = type("Handler", (_Files,), {"faults": faults})
    with serve(partial(handler, directory=str(folder))) as address:
        yield address, faults


@contextmanager
def before(address: str) -> Iterator[tuple[str, Faults]]:
    """Yield an address that answers as another does, and what goes wrong on the way."""
    faults = Faults()
    target = urlsplit(address).netloc
    with serve(type("Handler", (_Proxy,), {"faults": faults, "target": target})) as mine:
        yield mine, faults
