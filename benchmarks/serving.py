"""Images a second of the server, beside one that answers a request at a time; exits 1 below goals.

    .venv/bin/python -m benchmarks.serving                  # nano on the CPU
    .venv/bin/python -m benchmarks.serving --checkpoint outputs/mine/weights/best --requests 300

The other server is what one writes first: FastAPI, the same predictor, a lock around it. Both get
the same requests on loopback: JPEGs of 0.1 to 2 megapixels, each asked for several times, as where
a person labels, with one or two prompts. Ours is asked last for what the memory of a long run is.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import psutil
import uvicorn
from fastapi import FastAPI, File, Form, UploadFile
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NANO = ROOT / "app" / "assets" / "nano"
CLIENTS = (1, 8, 64)
SIZES = ((400, 300), (640, 480), (1024, 768), (1600, 1200))
WORDS = ("circle", "red thing", "cross", "blue circle", "hexagon")
LEAST = 1.5  # times the other's images a second, at 8 and 64 clients
GOAL = 2.0
GROWTH = 1.1  # of the memory, from the first fifth of a long run to its end


@dataclass(frozen=True)
class Load:
    """What clients do.

    Attributes:
        bodies: of the requests, in their order.
        kind: their Content-Type.
    """

    bodies: Sequence[bytes]
    kind: str


@dataclass(frozen=True)
class Speed:
    """What came of it: images a second, and the milliseconds that half and 99 % took at most."""

    rate: float
    p50: float
    p99: float


def main() -> None:
    if sys.argv[1:2] == ["locked"]:
        serve_locked(sys.argv[2], int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=str(NANO))
    parser.add_argument("--requests", type=int, default=400, help="of each number of clients")
    parser.add_argument("--repeats", type=int, default=4, help="of each image, about")
    parser.add_argument("--long", type=int, default=5000, help="requests while memory is measured")
    parser.add_argument("--processes", type=int, default=2, help="of ours: --num-gpus")
    options = parser.parse_args()
    speeds: dict[str, dict[int, Speed]] = {}
    for name in ("locked", "ours"):
        with started(name, options.checkpoint, options.processes) as (address, process):
            run(address, make_load(8, 4, seed=99), 1)  # warm: prompts known, code loaded
            speeds[name] = {
                clients: run(
                    address, make_load(options.requests, options.repeats, clients), clients
                )
                for clients in CLIENTS
            }
            if name == "ours":
                grown = memory(address, process, options)
    missed = report(speeds) or grown > GROWTH
    sys.exit(1 if missed else 0)


def report(speeds: dict[str, dict[int, Speed]]) -> bool:
    """Print the table; return whether ours is below the least."""
    print("clients | a lock: images/s  p50  p99 ms | ours: images/s  p50  p99 ms | times")
    missed = False
    for clients in CLIENTS:
        one, ours = speeds["locked"][clients], speeds["ours"][clients]
        times = ours.rate / one.rate
        missed |= clients > 1 and times < LEAST
        print(
            f"{clients:7} | {one.rate:16.1f} {one.p50:5.0f} {one.p99:5.0f}    "
            f"| {ours.rate:13.1f} {ours.p50:5.0f} {ours.p99:5.0f}    | {times:.2f} (goal {GOAL:g})"
        )
    return missed


def memory(address: str, process: psutil.Process, options: argparse.Namespace) -> float:
    """Print the memory through a long run; return by how much it grew after its first fifth."""
    figures = []
    for part in range(5):
        run(address, make_load(options.long // 5, options.repeats, seed=1000 + part), 8)
        all_of_it = [process, *process.children(recursive=True)]
        figures.append(sum(each.memory_info().rss for each in all_of_it) / 1e6)
    shown = ", ".join(f"{figure:.0f}" for figure in figures)
    print(f"memory over {options.long} requests: {shown} MB")
    return figures[-1] / figures[0]


# --- requests ------------------------------------------------------------------------------------


def make_load(requests: int, repeats: int, seed: int) -> Load:
    """Return requests of images of mixed sizes, each asked for `repeats` times or so."""
    chosen = random.Random(seed)
    boundary = uuid4().hex
    images = [picture(seed * 10_000 + n, chosen) for n in range(max(1, requests // repeats))]
    bodies = []
    for _ in range(requests):
        words = chosen.sample(WORDS, chosen.choice((1, 1, 2)))
        bodies.append(form(boundary, chosen.choice(images), words))
    return Load(bodies, f"multipart/form-data; boundary={boundary}")


def picture(seed: int, chosen: random.Random) -> bytes:
    """Return a JPEG of soft noise with some discs and squares."""
    generator = np.random.default_rng(seed)
    width, height = chosen.choice(SIZES)
    small = generator.integers(60, 160, (height // 16, width // 16, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(small).resize((width, height)))
    rows, columns = np.ogrid[:height, :width]
    for _ in range(5):
        x, y = generator.integers(0, width), generator.integers(0, height)
        radius = generator.integers(height // 20, height // 6)
        inside = (columns - x) ** 2 + (rows - y) ** 2 < radius**2
        if generator.random() < 0.4:
            inside = (abs(columns - x) < radius) & (abs(rows - y) < radius)
        pixels[inside] = generator.integers(0, 255, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def form(boundary: str, image: bytes, words: Sequence[str]) -> bytes:
    """Return a body of a request."""
    head = f"--{boundary}\r\nContent-Disposition: form-data; name="
    parts = [f'{head}"prompt"\r\n\r\n{word}\r\n'.encode() for word in words]
    file = f'{head}"image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'.encode()
    return b"".join([*parts, file, image, f"\r\n--{boundary}--\r\n".encode()])


def run(address: str, load: Load, clients: int) -> Speed:
    """Send all requests by so many clients; each sends its next when it has its answer."""
    waiting, lock = iter(load.bodies), threading.Lock()
    seconds: list[float] = []
    failed: list[str] = []

    def client() -> None:
        connection = http.client.HTTPConnection(address, timeout=300)
        while True:
            with lock:
                body = next(waiting, None)
            if body is None or failed:
                return
            begun = time.perf_counter()
            connection.request("POST", "/v1/predict", body, {"Content-Type": load.kind})
            answer = connection.getresponse()
            content = answer.read()
            seconds.append(time.perf_counter() - begun)
            if answer.status != 200:
                failed.append(f"{answer.status} {content[:300]!r}")

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = time.perf_counter() - begun
    if failed:
        sys.exit(f"refused: {failed[0]}")
    quantiles = statistics.quantiles(seconds, n=100, method="inclusive")
    return Speed(len(seconds) / whole, 1000 * quantiles[49], 1000 * quantiles[98])


# --- servers -------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(name: str, checkpoint: str, processes: int) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server; yield its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = {
        "locked": ["benchmarks.serving", "locked", checkpoint, str(port)],
        "ours": [
            *("app", "serve", "--checkpoint", checkpoint, "--port", str(port)),
            *("--num-gpus", str(processes), "--cache-mb", "128"),
        ],
    }[name]
    process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            if process.poll() is not None:
                sys.exit(f"{name}: the server has ended")
            time.sleep(0.1)
        yield f"127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def serve_locked(checkpoint: str, port: int) -> None:
    """Serve the same predictor behind a lock, as FastAPI's own documentation would have it."""
    from app.inference.settings import Settings
    from app.inference.worker import load_predictor

    predictor = load_predictor(Settings(checkpoint=checkpoint))
    lock = threading.Lock()
    app = FastAPI()

    @app.post("/v1/predict")
    def predict(image: UploadFile = File(), prompt: list[str] = Form()) -> Any:  # noqa: B008
        opened = Image.open(image.file).convert("RGB")
        with lock:
            found = predictor.predict(opened, prompt)
        return {
            "scores": found.scores.tolist(),
            "boxes": found.boxes_xyxy.tolist(),
            "prompts": [found.prompts[index] for index in found.prompt_ids],
            "masks": found.masks,
        }

    uvicorn.run(app, port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    main()
