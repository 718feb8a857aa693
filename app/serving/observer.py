"""What the server tells of its work to whoever keeps figures; here nobody does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from app.inference.detections import Detections
from app.inference.finder import Query
from app.serving.uploads import Uploaded

if TYPE_CHECKING:
    from app.serving.engine import Engine


class Observer:
    """Is told what happens, from any thread. `metrics.Figures` counts it."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Contain the work of a stage: decode, encode, prompts or masks."""
        del name
        yield

    def waited(self, seconds: float) -> None:
        """Note how long an image has waited for the model."""

    def batch(self, size: int) -> None:
        """Note how many images a model has seen together."""

    def cache(self, hit: bool) -> None:
        """Note whether an image had been seen before."""

    def waiting(self, engine: Engine, images: int) -> None:
        """Note how many images an engine has now, from decoding to masks."""

    def answered(
        self, engine: Engine, image: Uploaded, queries: Sequence[Query], detections: Detections
    ) -> None:
        """Note what the queries, one after the other, have found in an image."""

    def shadowed(self, engine: Engine, agreement: float | None) -> None:
        """Note how a shadow's answer agrees with the one that was given; None: it gave none."""

    def responded(self, route: str, status: int, seconds: float) -> None:
        """Note an answer to a request: the path of its route, never the request's own."""

    def render(self) -> bytes:
        """Return the figures in Prometheus' text format."""
        return b""
