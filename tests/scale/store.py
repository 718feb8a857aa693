"""A store on loopback that serves files of a folder as a web server does, and fails as asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Faults:
    """What goes wrong next: `fail` answers are 503, `cut` ones end early, `gone` ones are none."""

    def __init__(self) -> None:
        self.fail = self.cut = 0
        self.always: set[str] = set()
        self.asked: list[str] = []


class _Handler(SimpleHTTPRequestHandler):
    faults: Faults

    def do_GET(self) -> None:
        faults = self.faults
        faults.asked.append(self.path)
        if faults.fail or any(name in self.path for name in faults.always):
            faults.fail = max(faults.fail - 1, 0)
            self.send_error(503)
        elif faults.cut and self.path.endswith((".jpg", ".png", ".tar")):
            faults.cut -= 1
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Faults]]:
    """Yield the address of a folder, and what goes wrong there."""
    faults = Faults()
    handler = partial(type("Handler", (_Handler,), {"faults": faults}), directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", faults
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
