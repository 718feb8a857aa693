"""The one thread that asks a model; what needs no model is done beside it, by `engine.py`."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from app.inference.finder import Encoded, MemoryShort, Prepared, Query, StagedFinder
from app.inference.postprocess import Candidates
from app.serving.cache import FeatureCache
from app.serving.observer import Observer
from app.serving.refusals import busy
from app.serving.settings import Settings

log = logging.getLogger("app")
TRIES = 6  # of an image whose prompts do not fit a GPU's memory: half as many at once each time


@dataclass(frozen=True)
class About:
    """Hold what a server says of a model.

    Attributes:
        prompts: its classes, asked for where a request names none.
        vocabulary: all that it can be asked for; None: any words.
        size: name of the size.
        resolution: pixels of a side of the square that it sees.
        pin: upstream's commit.
        masks: whether it makes masks.
    """

    name: str
    version: str
    prompts: tuple[str, ...]
    vocabulary: tuple[str, ...] | None
    threshold: float
    size: str
    resolution: int
    pin: str
    masks: bool

    def with_prompts(self, names: tuple[str, ...]) -> About:
        """Return it with further prompts, which are no words."""
        vocabulary = None if self.vocabulary is None else (*self.vocabulary, *names)
        prompts = tuple(dict.fromkeys((*self.prompts, *names)))
        return replace(self, prompts=prompts, vocabulary=vocabulary)


# Makes the finder, and what is said of it.
Load = Callable[[], tuple[StagedFinder, About]]


@dataclass(frozen=True)
class Seen:
    """Hold what a model has made of an image.

    Attributes:
        image: its features, and its sides once it is upright.
        candidates: of each query.
    """

    image: Encoded
    candidates: list[Candidates]


@dataclass
class Job:
    """Hold what the model is to do for one image.

    Attributes:
        digest: of the image's file.
        queries: what to find.
        prepared, encoded: the image; one of them is there.
        keep: whether its features stay in the cache, since it may be asked about again.
        outcome: what the model has made of it, once it has.
        since: when it began to wait for the model, monotonic seconds.
    """

    digest: str
    queries: tuple[Query, ...]
    prepared: Prepared | None = None
    encoded: Encoded | None = None
    keep: bool = True
    outcome: Future[Seen] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class ModelThread:
    """Loads a finder and asks it, in a thread of its own.

    Args:
        load: called in the thread, because what it makes may belong to the thread.
        settings: of the server.

    Attributes:
        finder, about: what `load` has made.
        cache: of features, by the digest of an image's file.
        pace: seconds an image, lately.
        waiting: images that are decoded for it, wait for it, or that it is at; the engine counts.
    """

    def __init__(self, load: Load, settings: Settings) -> None:
        self.observer = Observer()
        self.cache = FeatureCache(settings.limits.cache_bytes)
        self.pace = 0.1
        self.waiting = 0
        self._max_wait = settings.max_wait_ms / 1000
        self._most = settings.max_batch  # images together; fewer once memory ran out
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(load,), name="model", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until it is loaded; raise UserError as `load` does."""
        self._ready.result()

    def do(self, job: Job) -> Future[Seen]:
        """Return the outcome of a job, which is done in its turn, unless it is cancelled before."""
        if not self.is_alive():
            raise RuntimeError("the model has ended")
        job.since = time.monotonic()
        self._jobs.put(job)
        return job.outcome

    def end(self) -> None:
        """Let the thread end, once it has done what waits."""
        self._jobs.put(None)

    def join(self) -> None:
        """Wait for its end."""
        self._thread.join()

    def is_alive(self) -> bool:
        """Return whether it runs, and can answer."""
        return self._thread.is_alive() and self.finder.alive

    def release_memory(self) -> None:
        """Give back the memory of what can be computed again."""
        self.cache.clear()
        self.finder.release_memory()

    def _run(self, load: Load) -> None:
        try:
            self.finder, self.about = load()
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while jobs := self._gather():
            begun = time.monotonic()
            # Those whose clients have left meanwhile are passed over.
            jobs = [job for job in jobs if job.outcome.set_running_or_notify_cancel()]
            if jobs:
                for job in jobs:
                    self.observer.waited(begun - job.since)
                self._answer(jobs)
                seconds = (time.monotonic() - begun) / len(jobs)
                self.pace += (seconds - self.pace) / 8

    def _gather(self) -> list[Job]:
        """Wait for a job, and on a GPU for those that come soon after; none: it is the end."""
        jobs: list[Job] = []
        until = None
        most = self._most if self.finder.gathers else 1
        while len(jobs) < most:
            try:
                job = self._jobs.get(
                    timeout=None if until is None else max(0.0, until - time.monotonic())
                )
            except queue.Empty:
                break
            if job is None:
                if jobs:
                    self._jobs.put(None)  # for the next call
                break
            jobs.append(job)
            until = until or time.monotonic() + self._max_wait
        return jobs

    def _answer(self, jobs: Sequence[Job], tries: int = 1) -> None:
        """Set the outcome of jobs. A failure ends the one that it is of, and not the thread."""
        try:
            results = self._see(jobs)
        except MemoryShort as error:
            shortage = str(error)  # the error itself holds what was computed
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].outcome.set_exception(error)
            else:
                for job in jobs:
                    self._answer([job])
            return
        else:
            for job, result in zip(jobs, results, strict=True):
                job.outcome.set_result(result)
            return
        self.release_memory()
        if len(jobs) > 1:
            self._most = half = len(jobs) // 2
            log.info("note: the GPU's memory is short: %d images are seen at once", half)
            self._answer(jobs[:half])
            self._answer(jobs[half:])
        elif tries < TRIES:
            self._answer(jobs, tries + 1)
        else:
            jobs[0].outcome.set_exception(busy(f"A GPU's memory is short: {shortage}", 10.0))

    def _see(self, jobs: Sequence[Job]) -> list[Seen]:
        """Return what the model makes of each job's image and queries."""
        self.observer.batch(len(jobs))
        unseen: dict[str, Prepared] = {}
        for job in jobs:
            job.encoded = job.encoded or self.cache.get(job.digest)
            if job.encoded is None and job.prepared is not None:
                unseen[job.digest] = job.prepared
        if unseen:
            with self.observer.stage("encode"):
                encoded = self.finder.encode(list(unseen.values()))
            kept = {job.digest for job in jobs if job.keep}
            for digest, features in zip(unseen, encoded, strict=True):
                if digest in kept:
                    self.cache.put(digest, features)
                for job in jobs:
                    if job.digest == digest:
                        job.encoded = features
        images = [job.encoded for job in jobs if job.encoded is not None]  # of all, by now
        groups: dict[Query, list[int]] = {}  # the places of the jobs that ask it
        for place, job in enumerate(jobs):
            for query in dict.fromkeys(job.queries):
                groups.setdefault(query, []).append(place)
        found: dict[tuple[int, Query], Candidates] = {}
        with self.observer.stage("prompts"):
            for query, places in groups.items():
                candidates = self.finder.ground([images[place] for place in places], query)
                found |= {
                    (place, query): each for place, each in zip(places, candidates, strict=True)
                }
        return [
            Seen(images[place], [found[place, query] for query in job.queries])
            for place, job in enumerate(jobs)
        ]
