"""An RTSP server of one film, for tests: MPEG-TS in RTP in its own connection (RFC 2326, 2250)."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PACKET = 7 * 188  # bytes of MPEG-TS in one of RTP
SECONDS = 10.0  # that the film is sent for


@contextlib.contextmanager
def serving(film: Path) -> Iterator[str]:
    """Yield the address at which a film of ten seconds is sent to the first client."""
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"rtsp://127.0.0.1:{listening.getsockname()[1]}/live"
    ended = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            with connection:
                _answer(connection, film, ended)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        ended.set()
        listening.close()
        thread.join(10)


def _answer(connection: socket.socket, film: Path, ended: threading.Event) -> None:
    received = b""
    while not ended.is_set():
        while b"\r\n\r\n" not in received:
            part = connection.recv(4096)
            if not part:
                return
            received += part
        request, _, received = received.partition(b"\r\n\r\n")
        lines = request.decode().splitlines()
        method = lines[0].split()[0]
        number = next(line.split(":")[1].strip() for line in lines if line.startswith("CSeq"))
        headers, body = [f"CSeq: {number}", "Session: 1"], ""
        if method == "OPTIONS":
            headers.append("Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN")
        elif method == "DESCRIBE":
            body = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=test\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\n"
            headers += ["Content-Type: application/sdp", f"Content-Length: {len(body)}"]
        elif method == "SETUP":
            headers.append("Transport: RTP/AVP/TCP;unicast;interleaved=0-1")
        connection.sendall(("\r\n".join(["RTSP/1.0 200 OK", *headers, "", ""]) + body).encode())
        if method == "PLAY":
            _send(connection, film.read_bytes(), ended)
            return


def _send(connection: socket.socket, data: bytes, ended: threading.Event) -> None:
    begun, number = time.monotonic(), 0
    parts = [data[at : at + PACKET] for at in range(0, len(data), PACKET)]
    for index, part in enumerate(parts):
        if ended.wait(max(begun + SECONDS * index / len(parts) - time.monotonic(), 0)):
            return
        header = struct.pack(
            ">BBHII", 0x80, 33, number, int(90_000 * SECONDS * index / len(parts)), 1
        )
        connection.sendall(struct.pack(">cBH", b"$", 0, len(header) + len(part)) + header + part)
        number = (number + 1) % 65536
