"""Servers on loopback for tests, and images to send to them."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from app.inference.finder import StagedFinder
from app.serving.api import create_app
from app.serving.engine import Engine
from app.serving.listening import Server, listen
from app.serving.loading import Source
from app.serving.model_thread import About
from app.serving.observer import Observer
from app.serving.settings import Limits, Settings
from app.serving.versions import Models
from tests.helpers import REPOSITORY, until

NANO = REPOSITORY / "app" / "assets" / "nano"
SCENE = REPOSITORY / "examples" / "scene.png"


@dataclass(frozen=True)
class Loaded:
    """A finder that several engines of a test module share."""

    finder: StagedFinder
    about: About

    def engine(self, settings: Settings | None = None, **about: Any) -> Engine:
        """An engine of it, which may have another name or version."""
        return Engine(lambda: (self.finder, replace(self.about, **about)), settings or Settings())


def load_nano() -> Loaded:
    return Loaded(*Source(NANO, "nano", device="cpu").load())


@contextlib.contextmanager
def serving(
    *engines: Engine,
    settings: Settings | None = None,
    aliases: dict | None = None,
    shadow: str | None = None,
    observer: Observer | None = None,
) -> Iterator[httpx.Client]:
    """Serve in a thread of this process; yield a client of it. The engines end with it."""
    settings = settings or Settings()
    with listen("127.0.0.1", 0) as listener:
        app = create_app(Models(engines, aliases, shadow=shadow), settings, observer)
        server = Server(app, settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started or not thread.is_alive(), "the server listens")
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(base_url=address, timeout=60) as client:
                client.app = app  # type: ignore[attr-defined]
                yield client
        finally:
            server.should_exit = True
            thread.join()


def limited(**limits: Any) -> Settings:
    return Settings(limits=Limits(**limits))


def scene() -> bytes:
    return SCENE.read_bytes()


def drawn(number: int, width: int = 90, height: int = 70, form: str = "PNG") -> bytes:
    """One of many images, of noise with a disc."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 90, (height, width, 3), dtype=np.uint8)
    rows, columns = np.ogrid[:height, :width]
    x, y, r = random.integers(15, 50), random.integers(15, 50), random.integers(8, 15)
    color = [(220, 40, 30), (40, 60, 220), (40, 200, 60)][number % 3]
    pixels[(columns - x) ** 2 + (rows - y) ** 2 < r * r] = color
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def files(*images: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    """Parts of a form."""
    return [("image", (f"{number}.png", data, "image/png")) for number, data in enumerate(images)]


def problems(answer: httpx.Response) -> Sequence[dict[str, str]]:
    """The problems of an error, after a look at its form."""
    body = answer.json()
    assert set(body) == {"error", "problems"}, body
    assert body["error"].endswith((".", "?"))
    assert all(set(problem) == {"field", "message", "remedy"} for problem in body["problems"])
    return body["problems"]


def exported(folder: Path) -> Path:
    """An ONNX folder of a few operators."""
    from tests.deploy.tiny import write_folder

    return write_folder(folder)
