"""Images that are asked about several times, and end by themselves.

A session keeps the file alone: its features are in the engine's cache, and are encoded again where
they fell out of it. So sessions hold no memory of a GPU, and any version can answer them.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

from app.serving.refusals import Problem, Refused
from app.serving.settings import Limits
from app.serving.uploads import Uploaded


@dataclass
class Session:
    """Hold an image and when it was last asked about.

    Attributes:
        model: as the client named it; None: the default.
        asked: monotonic seconds.
    """

    id: str
    image: Uploaded
    model: str | None
    asked: float


class Sessions:
    """The sessions of a server, used by its event loop alone."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: OrderedDict[str, Session] = OrderedDict()  # the longest unasked first
        self._bytes = 0

    def begin(self, image: Uploaded, model: str | None) -> Session:
        """Return a new session; those longest unasked end where there are too many."""
        self._end_old()
        session = Session(secrets.token_urlsafe(16), image, model, time.monotonic())
        self._open[session.id] = session
        self._bytes += len(image.data)
        limits = self._limits
        while len(self._open) > limits.sessions or self._bytes > limits.session_bytes:
            self._end(next(iter(self._open)))
        return session

    def get(self, id: str) -> Session:
        """Return a session, which lives on from now.

        Raises:
            Refused: there is none, or it has ended.
        """
        self._end_old()
        if id not in self._open:
            remedy = f"begin one by POST /v1/sessions; each ends {self._limits.session_seconds:g} s"
            problem = Problem("id", "no such session", f"{remedy} after its last question")
            raise Refused(404, "No such session, or it has ended.", [problem])
        session = self._open[id]
        session.asked = time.monotonic()
        self._open.move_to_end(id)
        return session

    def end(self, id: str) -> None:
        """End a session; raise Refused as `get` does."""
        self.get(id)
        self._end(id)

    def __len__(self) -> int:
        self._end_old()
        return len(self._open)

    def _end(self, id: str) -> None:
        self._bytes -= len(self._open.pop(id).image.data)

    def _end_old(self) -> None:
        before = time.monotonic() - self._limits.session_seconds
        while self._open and (first := next(iter(self._open.values()))).asked < before:
            self._end(first.id)
