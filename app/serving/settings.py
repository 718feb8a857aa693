"""What a server may be asked for, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from app.datasets.editing import LabelFile
from app.serving.rounds import Ring


@dataclass(frozen=True)
class Limits:
    """Hold the most that a request, and all of them together, may take.

    Attributes:
        body_bytes: of a request.
        held_bytes: of the requests that are being received or answered, together.
        body_seconds: that a client may take to send a request, and its headers.
        seconds: that an answer may take.
        pixels: of an image; looked at before it is decoded.
        images: of a request.
        frames: of a film.
        queue: images that are decoded, wait or are looked at; further ones are refused.
        sessions: open ones; the one that was longest not asked ends for a new one.
        session_bytes: of the files of all sessions.
        session_seconds: after which a session ends that is not asked.
        cache_bytes: of the features of images that were seen before.
    """

    body_bytes: int = 64 << 20
    held_bytes: int = 1 << 30
    body_seconds: float = 60.0
    seconds: float = 60.0
    pixels: int = 1 << 26
    images: int = 16
    frames: int = 3000
    queue: int = 64
    sessions: int = 200
    session_bytes: int = 1 << 30
    session_seconds: float = 600.0
    cache_bytes: int = 512 << 20


@dataclass(frozen=True)
class Settings:
    """Hold how a server answers.

    Attributes:
        key: that a client must know; None: none.
        hosts: names that a client without a key may have called the server by, beside localhost
            and numbers.
        max_batch: images that a GPU sees together, at most.
        max_wait_ms: that the first of them waits for the others.
        canary, shadow: as of `versions.Models`.
        mlflow: address of the registry.
        poll_seconds: after which it is asked again what its aliases stand for.
        label_studio, label_studio_key: address of the Label Studio whose images are fetched, and
            its token.
        label: of the folder whose images the page at /label labels; None: none.
        ring: whose rounds are begun from there, or by Label Studio; None: none.
    """

    key: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    max_batch: int = 8
    max_wait_ms: float = 5.0
    canary: tuple[str, float] | None = None
    shadow: str | None = None
    mlflow: str | None = field(default=None, repr=False)
    poll_seconds: float = 30.0
    label_studio: str | None = None
    label_studio_key: str | None = field(default=None, repr=False)
    label: LabelFile | None = None
    ring: Ring | None = None
    limits: Limits = Limits()
