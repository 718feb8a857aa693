"""The figures of a server, as Prometheus reads them at `/metrics`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric

from app.inference.detections import Detections
from app.inference.finder import Query
from app.model.score_counts import BINS
from app.serving.drift import Drift, each_prompt
from app.serving.observer import Observer
from app.serving.uploads import Uploaded

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from app.serving.engine import Engine
    from app.serving.keep import Keeper

CONTENT_TYPE = CONTENT_TYPE_LATEST
STAGES = ("decode", "queue", "encode", "prompts", "masks")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64)  # images encoded together
SHARES = (0, 0.25, 0.5, 0.75, 0.9, 0.99)  # of detections
FOUND = (0, 1, 2, 5, 10, 20, 50, 100)  # detections
WHO = ("model", "version")
CLASS, OTHER, BOXES = "class", "other", "boxes"  # kinds of prompts


class Figures(Observer):
    """Counts what a server does, in a registry of its own.

    No word that a client sent becomes a label: prompts are counted by their kind, and by name only
    where they are classes of the weights.

    Args:
        keeper: is offered each image; None: no image of a client is kept.
    """

    def __init__(self, keeper: Keeper | None = None) -> None:
        self._keeper = keeper
        own: dict[str, Any] = {"registry": CollectorRegistry(), "namespace": "sam3"}
        self._registry: CollectorRegistry = own["registry"]
        self._drifts: WeakKeyDictionary[Engine, Drift] = WeakKeyDictionary()
        self._requests = Counter(
            "requests", "Requests answered, by route and HTTP status", ["route", "status"], **own
        )
        self._request_seconds = Histogram(
            "request_seconds",
            "Seconds from a request's first byte to the answer's last",
            ["route"],
            buckets=SECONDS,
            **own,
        )
        self._stage_seconds = Histogram(
            "stage_seconds", "Seconds in a stage of a request", ["stage"], buckets=SECONDS, **own
        )
        for stage in STAGES:
            self._stage_seconds.labels(stage)
        self._queue = Gauge("queue_length", "Images that wait or are looked at now", WHO, **own)
        self._batches = Histogram("batch_images", "Images encoded together", buckets=SIZES, **own)
        self._cache = Counter(
            "cache_lookups", "Images looked up in the cache of features", ["result"], **own
        )
        for result in ("hit", "miss"):
            self._cache.labels(result)
        self._images = Counter("images", "Images answered", WHO, **own)
        self._empty_images = Counter(
            "empty_images", "Images in which nothing was found", WHO, **own
        )
        kind = (*WHO, "kind")
        about = "; kind: class (of the weights), other (words) or boxes"
        self._prompts = Counter("prompts", f"Prompts answered, one an image{about}", kind, **own)
        self._empty = Counter("empty_prompts", f"Prompts without a detection{about}", kind, **own)
        self._found = Histogram(
            "prompt_detections", "Detections of a prompt in an image", WHO, buckets=FOUND, **own
        )
        self._agreement = Histogram(
            "shadow_agreement",
            "Share of the detections that a shadow and the answer that was given both have",
            WHO,
            buckets=SHARES,
            **own,
        )
        self._unanswered = Counter(
            "shadow_unanswered", "Images that a shadow could not be asked about", WHO, **own
        )
        self._registry.register(_Drifts(self._drifts))
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """Return all figures, as text of CONTENT_TYPE."""
        return generate_latest(self._registry)

    def responded(self, route: str, status: int, seconds: float) -> None:
        """Count an answer to a request.

        Args:
            route: the path of the route, never the request's own.
        """
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block as one of STAGES."""
        with self._stage_seconds.labels(name).time():
            yield

    def waited(self, seconds: float) -> None:
        """Count how long an image has waited for the model."""
        self._stage_seconds.labels("queue").observe(seconds)

    def waiting(self, engine: Engine, images: int) -> None:
        """Tell how many images an engine has now, from decoding to masks."""
        self._queue.labels(engine.name, engine.version).set(images)

    def batch(self, size: int) -> None:
        """Count images that are seen together."""
        self._batches.observe(size)

    def cache(self, hit: bool) -> None:
        """Count an image whose features were looked up."""
        self._cache.labels("hit" if hit else "miss").inc()

    def answered(
        self, engine: Engine, image: Uploaded, queries: Sequence[Query], detections: Detections
    ) -> None:
        """Count what was found in an image."""
        who = engine.name, engine.version
        self._images.labels(*who).inc()
        self._empty_images.labels(*who).inc(not len(detections))
        drift = self._drifts.get(engine)
        if drift is None:
            drift = self._drifts[engine] = Drift(engine.finder)
        drift.add(queries, detections)
        for index, (query, prompt) in enumerate(each_prompt(queries)):
            has_boxes = query.boxes_xywh or query.negative_boxes_xywh
            kind = BOXES if has_boxes else CLASS if prompt in drift.classes else OTHER
            count = int((detections.prompt_ids == index).sum())
            self._prompts.labels(*who, kind).inc()
            self._empty.labels(*who, kind).inc(not count)
            self._found.labels(*who).observe(count)
        if self._keeper is not None:
            self._keeper.offer(engine.finder, image, queries, detections)

    def shadowed(self, engine: Engine, agreement: float | None) -> None:
        """Count how a shadow's answer agrees with the one that was given; None: it gave none."""
        who = engine.name, engine.version
        if agreement is None:
            self._unanswered.labels(*who).inc()
        else:
            self._agreement.labels(*who).observe(agreement)


class _Drifts:
    """Tells the drift of each engine that is alive, at each request for figures."""

    def __init__(self, drifts: WeakKeyDictionary[Engine, Drift]) -> None:
        self._drifts = drifts

    def collect(self) -> Iterator[Metric]:
        """Yield the families; they are made anew, so that an engine that is gone has none."""
        labels = [*WHO, "prompt"]
        scores = HistogramMetricFamily(
            "sam3_class_score", "Scores of a class's detections in service", labels=labels
        )
        validation = HistogramMetricFamily(
            "sam3_validation_score", "The same on the validation images", labels=labels
        )
        index = GaugeMetricFamily(
            "sam3_drift_psi",
            "Population stability index of a class's newest scores; above 0.25 is a change",
            labels=labels,
        )
        share = GaugeMetricFamily(
            "sam3_class_found_share", "Share of the newest images with a class", labels=labels
        )
        validation_share = GaugeMetricFamily(
            "sam3_validation_found_share",
            "The same of the validation images, as the model found it there",
            labels=labels,
        )
        for engine, drift in list(self._drifts.items()):
            who = engine.name, engine.version
            for name, counts in drift.counts().items():
                scores.add_metric([*who, name], _cumulative(counts), None)
                if drift.validation is not None and name in drift.validation.counts:
                    known = drift.validation.counts[name]
                    validation.add_metric([*who, name], _cumulative(known), None)
            for family, values in (
                (index, drift.indices()),
                (share, drift.shares()),
                (validation_share, drift.validation_shares()),
            ):
                for name, value in values.items():
                    family.add_metric([*who, name], value)
        yield from (scores, validation, index, share, validation_share)


def _cumulative(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return a histogram's buckets as Prometheus counts them: all up to each bound."""
    sums = list(accumulate(counts))
    bounds = [f"{(index + 1) / BINS:g}" for index in range(BINS)]
    return [*zip(bounds, sums, strict=True), ("+Inf", sums[-1])]


class Requests:
    """Count each request with its route and status: ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self._app, self._observer = app, observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request by the app inside."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499  # the client is gone before there was an answer

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        begun = time.perf_counter()
        try:
            await self._app(scope, receive, told)
        except Exception:
            status = 500 if status == 499 else status
            raise
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._observer.responded(route, status, time.perf_counter() - begun)
