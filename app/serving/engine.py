"""Answers for one version of a model: the way of an image from its file to detections.

A place in the queue; its features from the cache, or its pixels decoded in a pool's thread; the
model's thread encodes and grounds (`model_thread.py`); a pool's thread makes the masks.

What is found is what `Finder.predict` finds. On a CPU it is so to the bit, because each image is
seen alone; a GPU sees those together that wait together, and rounds by how many they are.
"""

from __future__ import annotations

import asyncio
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from app.datasets.images import ImageError, open_image
from app.errors import UserError
from app.inference.detections import Detections
from app.inference.finder import Encoded, MemoryShort, Prepared, Query
from app.inference.inputs import Box
from app.model.vocabulary import unknown_words
from app.serving.model_thread import Job, Load, ModelThread, Seen
from app.serving.observer import Observer
from app.serving.refusals import busy
from app.serving.settings import Settings
from app.serving.uploads import Uploaded, unreadable

LEAD = 1  # jobs that wait where an image was seen, before it is seen anew elsewhere


@dataclass(frozen=True)
class Asked:
    """Hold a prompt of a request.

    Attributes:
        text: a noun phrase; None: what the boxes show.
        threshold: 0..1; None: that of the weights.
        boxes, negative_boxes: x, y, w, h in pixels.
    """

    text: str | None
    threshold: float | None = None
    boxes: tuple[Box, ...] = ()
    negative_boxes: tuple[Box, ...] = ()


class Engine:
    """Answers for one version of a model.

    Args:
        load: makes the finder, in the thread that will ask it, and what is said of it.
        settings: of the server.
        more: make finders of the same weights in processes of their own (`elsewhere.py`).

    Raises:
        UserError: as `load` does.
    """

    def __init__(self, load: Load, settings: Settings, more: Sequence[Load] = ()) -> None:
        self._limits = settings.limits
        self._models = [ModelThread(each, settings) for each in (load, *more)]
        for model in self._models:
            model.wait()
        self._places = 0  # taken; counted by the event loop alone
        self.finder, self.about = self._models[0].finder, self._models[0].about
        self.name, self.version = self.about.name, self.about.version
        # A version that another one took the place of ends with the last request that holds it.
        for model in self._models:
            weakref.finalize(self, model.end)

    @property
    def observer(self) -> Observer:
        """Who is told what happens."""
        return self._models[0].observer

    @observer.setter
    def observer(self, observer: Observer) -> None:
        for model in self._models:
            model.observer = observer

    @property
    def waiting(self) -> int:
        """Images that have a place, from decoding to masks."""
        return self._places

    @property
    def alive(self) -> bool:
        """Whether all that answers runs."""
        return all(model.is_alive() for model in self._models)

    def close(self) -> None:
        """End the models' threads, once they have done what waits."""
        for model in self._models:
            model.end()
        for model in self._models:
            model.join()

    def queries(self, asked: Sequence[Asked], max_detections: int) -> tuple[Query, ...]:
        """Return what to find, checked: prompts that differ in words alone are asked together.

        Args:
            asked: none: the weights' classes.

        Raises:
            UserError: nothing to find, or words that these weights cannot be asked for.
        """
        asked = asked or [Asked(prompt) for prompt in dict.fromkeys(self.finder.prompts)]
        if not asked:
            raise UserError("--prompt: these weights have no classes of their own; give prompts")
        words = [each.text for each in asked if each.text is not None]
        if unknown := unknown_words(self.about.vocabulary, words):
            raise UserError([f"--prompt {line}" for line in unknown])
        groups: dict[Asked, list[str]] = {}
        for each in asked:
            words = [] if each.text is None else [" ".join(each.text.split())]
            alike = replace(each, text=None if each.text is None else "")
            groups.setdefault(alike, []).extend(words)
        return tuple(
            self.finder.query(
                tuple(dict.fromkeys(words)),  # none: what the boxes show
                group.boxes,
                group.negative_boxes,
                group.threshold,
                max_detections,
            )
            for group, words in groups.items()
        )

    async def find(self, image: Uploaded, queries: Sequence[Query]) -> Detections:
        """Return what the queries find in an image, the highest score first.

        Raises:
            Refused: all places are taken, the image is damaged, or a GPU's memory is short.
            UserError: a box that covers nothing of the image, or what the model cannot be asked.
        """
        with self._place():
            seen = await self._ask(image, tuple(queries))
            detections = await asyncio.to_thread(self._finish, seen, queries)
        self.observer.answered(self, image, queries, detections)
        return detections

    async def see(self, image: Uploaded) -> Encoded:
        """Encode an image, to be asked about soon; raise Refused as `find` does."""
        with self._place():
            return (await self._ask(image, ())).image

    async def look(self, image: Image.Image, queries: Sequence[Query]) -> Detections:
        """Return what the queries find in a frame of a film, which is not kept.

        Args:
            image: upright RGB.

        Raises:
            Refused, UserError: as of `find`.
        """
        with self._place():
            prepared = await asyncio.to_thread(self.finder.prepare, image)
            job = Job(uuid.uuid4().hex, tuple(queries), prepared=prepared, keep=False)
            model = self._choose(job.digest)
            model.waiting += 1
            try:
                seen = await asyncio.wrap_future(model.do(job))
            finally:
                model.waiting -= 1
            return await asyncio.to_thread(self._finish, seen, queries)

    async def _ask(self, image: Uploaded, queries: tuple[Query, ...]) -> Seen:
        """Return what the model's thread has made of an image."""
        model = self._choose(image.digest)
        model.waiting += 1
        try:
            job = Job(image.digest, queries, encoded=model.cache.get(image.digest))
            self.observer.cache(job.encoded is not None)
            if job.encoded is None:
                job.prepared = await asyncio.to_thread(self._prepare, image)
            return await asyncio.wrap_future(model.do(job))
        finally:
            model.waiting -= 1

    def _choose(self, digest: str) -> ModelThread:
        """Return the one that has seen the image, unless it has more to do; else the idlest."""
        able = [model for model in self._models if model.is_alive()] or self._models
        idlest = min(able, key=lambda model: model.waiting)
        for model in able:
            if model.waiting <= idlest.waiting + LEAD and digest in model.cache:
                return model
        return idlest

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._places >= self._limits.queue:
            raise busy(
                "All places are taken.", self._places * self._models[0].pace / len(self._models)
            )
        self._places += 1
        self.observer.waiting(self, self._places)
        try:
            yield
        finally:
            self._places -= 1
            self.observer.waiting(self, self._places)

    def _prepare(self, image: Uploaded) -> Prepared:
        with self.observer.stage("decode"):
            try:
                return self.finder.prepare(
                    open_image(Path("image"), self.finder.levels, data=image.data)
                )
            except ImageError as error:
                raise unreadable(image.name, error) from None

    def _finish(self, seen: Seen, queries: Sequence[Query]) -> Detections:
        with self.observer.stage("masks"):
            try:
                parts = self._finish_all(seen, queries)
            except MemoryShort:
                self.finder.release_memory()
                parts = self._finish_all(seen, queries)
            return join(parts, queries[0].max_detections)

    def _finish_all(self, seen: Seen, queries: Sequence[Query]) -> list[Detections]:
        return [
            self.finder.finish(candidates, query, seen.image)
            for candidates, query in zip(seen.candidates, queries, strict=True)
        ]


def join(parts: Sequence[Detections], limit: int) -> Detections:
    """Return the detections of one image's queries as those of one, the highest scores first.

    Args:
        limit: most of them.
    """
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.prompts) for part in parts[:-1])])
    masks = [part.masks for part in parts if part.masks is not None]
    whole = Detections(
        boxes_xyxy=np.concatenate([part.boxes_xyxy for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        prompt_ids=np.concatenate(
            [part.prompt_ids + start for part, start in zip(parts, starts, strict=True)]
        ),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        masks=[mask for each in masks for mask in each] if masks else None,
        width=parts[0].width,
        height=parts[0].height,
        best_score=max((p.best_score for p in parts if p.best_score is not None), default=None),
    )
    return whole.select(np.argsort(-whole.scores, kind="stable")[:limit])
