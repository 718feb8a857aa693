"""A shard of images → its parts: processes read and decode beside the model, a thread writes.

The model is never to wait; how long it did is told.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from app.console import counted, duration, plain
from app.datasets.images import ImageError, open_image
from app.datasets.levels import Levels
from app.datasets.square import to_square
from app.errors import UserError
from app.inference.detections import Detections
from app.inference.finder import Prepared
from app.inference.predictor import Predictor
from app.inference.settings import Settings
from app.launch.shards import Shard
from app.scale.parts import Parts, Row, failed_row, folder_of, row_of
from app.scale.sources import Item, Unreachable, count, items, read, release, shown
from app.signals import StopRequest, leave_to_parent

log = logging.getLogger("app")
PART_IMAGES, PART_SECONDS = 1000, 60.0  # a part ends with the first that is reached
AHEAD = 1000  # names that are known before their images are read
PREFETCHED = 4  # batches a reader
MOST_READERS = 8
TOLD_SECONDS = 30.0  # between two lines that tell how far it is


@dataclass
class Tally:
    """Count what a run has done.

    Attributes:
        waited: seconds that the model waited for images.
        unreachable: images that may be had another time.
    """

    images: int = 0
    objects: int = 0
    failed: int = 0
    unreachable: list[str] = field(default_factory=list)
    waited: float = 0.0
    begun: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float:
        """Return images a second."""
        return self.images / max(time.monotonic() - self.begun, 1e-9)


@dataclass(frozen=True)
class Read:
    """Hold an image as it came: prepared for the model, or why it could not be read."""

    item: Item
    prepared: Prepared | None
    problem: str = ""
    is_lasting: bool = True


class Images(Dataset[Read]):
    """Read and decode an image, in whatever process is asked."""

    def __init__(self, side: int, levels: Levels | None) -> None:
        self.side, self.levels = side, levels

    def __getitem__(self, item: Any) -> Read:
        try:
            image = open_image(Path(item.name), self.levels, read(item))
            square = to_square(image, self.side)
            return Read(item, Prepared(square, image.width, image.height))
        except ImageError as error:
            return Read(item, None, error.reason)
        except Unreachable as error:
            return Read(item, None, str(error), is_lasting=False)
        except OSError as error:
            return Read(item, None, error.strerror or str(error))


def predict_shard(
    source: str,
    shard: Shard,
    output: Path,
    settings: Settings,
    predictor: Predictor,
    kind: str,
    *,
    stop: StopRequest,
    batch_size: int = 1,
    readers: int | None = None,
) -> Tally:
    """Predict on what is left of a shard, and mark it once all is done.

    Args:
        source: as `sources.items` takes it.
        kind: of `parts.KINDS`.
        stop: where it is asked for, what is found is written first.
        readers: processes that read and decode; None: by the cores.

    Raises:
        UserError: the source, or results of other settings in the folder.
        Stopped: all is written.
    """
    identity = {**settings.identity(), "source": shown(source), "kind": kind}
    parts = Parts(folder_of(output, shard), kind, identity)
    tally = Tally()
    if (mark := parts.mark) is not None:
        log.info("shard %s: was done before: %s", shard, counted(mark.images, "image"))
        return tally
    before = parts.names()
    if before:
        log.info("shard %s: %s were done before", shard, counted(len(before), "image"))
    left = (item for item in items(source, shard) if item.name not in before)
    data = Images(predictor.config.resolution, predictor.levels)
    with (
        closing(_Ahead(left, AHEAD)) as sampler,
        stop.deferred(),
        ThreadPoolExecutor(1) as writer,
    ):
        loader = _loader(data, sampler, readers)
        told = _Told(source, shard, len(before))
        rows, written, last = list[Row](), list[Future[None]](), time.monotonic()
        known = set(before)
        for batch in _batches(loader, batch_size, tally):
            rows += _found(predictor, settings, batch, tally, known)
            if len(rows) >= PART_IMAGES or time.monotonic() - last > PART_SECONDS or stop.asked:
                written.append(writer.submit(parts.add, rows))
                rows, last = [], time.monotonic()
                for each in [each for each in written if each.done()]:
                    each.result()
                    written.remove(each)
            told.tell(tally)
            if stop.asked:
                break
        written.append(writer.submit(parts.add, rows))
        for each in written:
            each.result()
        if not (stop.asked or tally.unreachable):
            parts.finish()
    return tally


def tell(tally: Tally, shard: Shard, output: Path, price: float | None) -> None:
    """Say how fast it was, and what a million images would take and cost."""
    if not tally.images:
        return
    seconds = time.monotonic() - tally.begun
    log.info(
        "shard %s: %s, %s, %d could not be read, in %s: %s",
        *(shard, counted(tally.images, "image"), counted(tally.objects, "object")),
        *(tally.failed, duration(seconds), output),
    )
    million = 1e6 / tally.rate
    cost = "" if price is None else f", {price * million / 3600:.2f} at {price:g} an hour"
    log.info(
        "%.1f images a second; the model waited for images %.0f %% of the time; a million: %s%s",
        *(tally.rate, 100 * tally.waited / seconds, duration(million), cost),
    )


def _loader(data: Images, sampler: _Ahead, readers: int | None) -> DataLoader[Read]:
    if readers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        readers = max(1, min(MOST_READERS, cores - 1))
    return DataLoader(
        data,
        sampler=sampler,
        batch_size=None,
        num_workers=readers,
        prefetch_factor=PREFETCHED if readers else None,
        worker_init_fn=leave_to_parent if readers else None,
        pin_memory=False,
    )


def _batches(loader: DataLoader[Read], size: int, tally: Tally) -> Iterator[list[Read]]:
    """Yield images as they come, in their order; count how long they were waited for."""
    batch: list[Read] = []
    images = iter(loader)
    place = None
    while True:
        asked = time.monotonic()
        one = next(images, None)
        tally.waited += time.monotonic() - asked
        if one is not None:
            if place is not None and one.item.place != place:
                release(place)
            place = one.item.place if one.item.member is not None else None
            batch.append(one)
        if batch and (one is None or len(batch) == size):
            yield batch
            batch = []
        if one is None:
            if place is not None:
                release(place)
            return


def _found(
    predictor: Predictor,
    settings: Settings,
    batch: Sequence[Read],
    tally: Tally,
    known: set[str],
) -> list[Row]:
    """Return the rows of a batch's images; one whose name was there before is passed over."""
    fresh: dict[str, Read] = {}
    for each in batch:
        if each.item.name in known or each.item.name in fresh:
            log.warning("%s: is there twice; the first counts", plain(each.item.name))
        else:
            fresh[each.item.name] = each
    ready = {name: each.prepared for name, each in fresh.items() if each.prepared is not None}
    limits = settings.limits()
    del limits["tile"], limits["overlap"]
    results: Sequence[Detections] = ()
    if ready:
        results = predictor.predict_batch([*ready.values()], settings.prompts, **limits)
    rows = [row_of(name, found) for name, found in zip(ready, results, strict=True)]
    tally.objects += sum(map(len, results))
    for name, each in fresh.items():
        if name in ready:
            continue
        if each.is_lasting:
            rows.append(failed_row(name, each.problem))
            tally.failed += 1
            log.error("failed: %s: %s", plain(name), each.problem)
        else:
            tally.unreachable.append(name)
            log.error("left: %s", each.problem)
    known.update(row["name"] for row in rows)
    tally.images += len(fresh)
    return rows


class _Ahead:
    """Yield what a generator makes in a thread, at most so many things ahead.

    Args:
        left: the generator; what it raises is raised here.
    """

    def __init__(self, left: Iterator[Item], size: int) -> None:
        self._queue: queue.Queue[Item | BaseException | None] = queue.Queue(size)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(left,), daemon=True)
        self._thread.start()

    def _fill(self, left: Iterator[Item]) -> None:
        end: BaseException | None = None
        try:
            for item in left:
                if not self._put(item):
                    return
        except BaseException as error:  # told where the items are taken
            end = error
        self._put(end)

    def _put(self, thing: Item | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(thing, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Item]:
        while (thing := self._queue.get()) is not None:
            if isinstance(thing, Unreachable):
                raise UserError(str(thing))
            if isinstance(thing, BaseException):
                raise thing
            yield thing

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(5)


class _Told:
    """Tells now and then how far a shard is; how many images it has is counted meanwhile."""

    def __init__(self, source: str, shard: Shard, before: int) -> None:
        self.shard, self.before = shard, before
        self._total: int | None = None
        self._last = time.monotonic()
        threading.Thread(target=self._count, args=(source,), daemon=True).start()

    def _count(self, source: str) -> None:
        with suppress(UserError, OSError, Unreachable):  # told where the images are taken
            self._total = count(source, self.shard)

    def tell(self, tally: Tally) -> None:
        """Log a line, if the last is long ago."""
        if time.monotonic() - self._last < TOLD_SECONDS:
            return
        self._last = time.monotonic()
        left = ""
        if self._total is not None:
            number = max(self._total - self.before - tally.images, 0)
            left = f"; {number} left, {duration(number / tally.rate)}"
        log.info(
            "shard %s: %s, %.1f a second%s",
            *(self.shard, counted(self.before + tally.images, "image"), tally.rate, left),
        )
