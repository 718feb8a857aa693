"""A finder in a process of its own: one for each GPU, or with a share of a CPU's cores.

Features stay where they were computed; this process holds a name for them. Candidates come back as
detections, because a GPU makes their masks as well.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import multiprocessing
import signal
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from PIL import Image

from app.console import log_to_stdout
from app.datasets.levels import Levels
from app.deploy.runtime.runtime import Runtime
from app.deploy.runtime.square import to_pixels
from app.deploy.runtime.square import to_square as to_array
from app.errors import UserError
from app.inference.detections import Detections
from app.inference.finder import Encoded, Prepared, Query, StagedFinder
from app.inference.inputs import Sized
from app.model.score_counts import ScoreCounts
from app.serving.loading import Source, is_exported
from app.serving.model_thread import About, Load

log = logging.getLogger("app")


@dataclass(frozen=True)
class Known:
    """Hold what a process says of its finder once it is loaded."""

    about: About
    prompts: tuple[str, ...]
    threshold: float
    levels: Levels | None
    scores: ScoreCounts | None
    gathers: bool


@dataclass(eq=False)
class Kept:
    """Stand for features in another process, which are forgotten there when this is here."""

    number: int


class Elsewhere(StagedFinder):
    """Asks a finder in a process that it starts; one thread at a time asks it.

    Args:
        source: what the process loads.
        rank, processes: which of how many processes it is, that share GPUs or cores.

    Raises:
        UserError: as loading it does, or fewer GPUs than processes.
    """

    def __init__(self, source: Source, rank: int, processes: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, source, rank, processes), daemon=True
        )
        self._process.start()
        theirs.close()
        weakref.finalize(self, self._process.kill)
        self._forgotten: deque[int] = deque()
        self._is_exported = is_exported(source.path)
        known: Known = self._receive()
        self.about = known.about
        self.prompts, self.threshold, self.levels = known.prompts, known.threshold, known.levels
        self.scores, self._gathers = known.scores, known.gathers

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    @property
    def gathers(self) -> bool:
        """Whether images are seen faster together than one after the other."""
        return self._gathers

    def prepare(self, image: Image.Image) -> Prepared:
        """Return an image as a square (3, R, R) uint8."""
        side = self.about.resolution
        if self._is_exported:
            return Prepared(to_array(image, side), image.width, image.height)
        from app.datasets.square import to_square  # torch

        return Prepared(to_square(image, side).numpy(), image.width, image.height)

    def encode(self, images: Sequence[Prepared]) -> list[Encoded]:
        """Return names for what the model sees in each image."""
        encoded: list[Encoded] = self._ask("encode", images)
        for image in encoded:
            forget = weakref.finalize(image.features, self._forgotten.append, image.features.number)
            forget.atexit = False
        return encoded

    def ground(self, images: Sequence[Encoded], query: Query) -> list[Any]:
        """Return the detections of each image, in the place of candidates."""
        found: list[Any] = self._ask("ground", [image.features.number for image in images], query)
        return found

    def finish(self, candidates: Any, query: Query, image: Sized) -> Detections:
        """Return what `ground` has found."""
        del query, image
        found: Detections = candidates
        return found

    def release_memory(self) -> None:
        """Give back the memory that the process keeps for the next call."""
        self._ask("release")

    def _find(self, images: Sequence[Image.Image], query: Query) -> list[Detections]:
        return self.ground(self.encode([self.prepare(image) for image in images]), query)

    def _ask(self, what: str, *arguments: Any) -> Any:
        forgotten = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
        try:
            self._pipe.send((what, forgotten, arguments))
        except OSError:
            raise self._ended() from None
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer, error = self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if error is not None:
            raise error
        return answer

    def _ended(self) -> RuntimeError:
        self._process.join(5)
        return RuntimeError(f"a model's process has ended with {self._process.exitcode}")


def load_elsewhere(source: Source, processes: int) -> list[Load]:
    """Return what loads a source in each of several processes."""

    if not is_exported(source.path):
        import torch

        torch.set_num_threads(1)  # here threads resize an image each

    def load(rank: int) -> tuple[StagedFinder, About]:
        finder = Elsewhere(source, rank, processes)
        return finder, finder.about

    return [functools.partial(load, rank) for rank in range(processes)]


def _work(pipe: Connection, source: Source, rank: int, processes: int) -> None:
    """Load a finder and answer by it until the other side has ended."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server answers them, and then ends this
    log_to_stdout()
    try:
        finder, about = _load(source, rank, processes)
    except BaseException as error:
        pipe.send((None, error))
        return
    known = Known(
        about, finder.prompts, finder.threshold, finder.levels, finder.scores, finder.gathers
    )
    pipe.send((known, None))
    kept, numbers = dict[int, Encoded](), itertools.count()
    with contextlib.suppress(EOFError, OSError):  # the other side has ended
        while True:
            what, forgotten, arguments = pipe.recv()
            for number in forgotten:
                kept.pop(number, None)
            reply: tuple[Any, Exception | None]
            try:
                reply = _answer(finder, kept, numbers, what, *arguments), None
            except UserError as error:
                reply = None, type(error)(error.problems)  # without what was computed
            except Exception as error:
                log.exception("%s failed", what)
                reply = None, RuntimeError(f"{type(error).__name__}: {error}")
            pipe.send(reply)


def _load(source: Source, rank: int, processes: int) -> tuple[StagedFinder, About]:
    """Load a finder on the GPU of this rank, or with its share of the cores."""
    if is_exported(source.path):
        return source.load()
    import torch

    from app.model.device import choose_device

    gpus = torch.cuda.device_count() if choose_device(source.device).type == "cuda" else 0
    if 0 < gpus < processes:
        raise UserError(f"--num-gpus {processes}: this machine has {gpus}")
    if gpus:
        torch.cuda.set_device(rank)
    loaded = source.load()
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    return loaded


def _answer(
    finder: StagedFinder,
    kept: dict[int, Encoded],
    numbers: Iterator[int],
    what: str,
    *arguments: Any,
) -> list[Encoded] | list[Detections] | None:
    """Do what the other side asks for."""
    if what == "encode":
        prepared = [_taken(finder, image) for image in arguments[0]]
        names = []
        for image in finder.encode(prepared):
            number = next(numbers)
            kept[number] = image
            names.append(replace(image, features=Kept(number)))
        return names
    if what == "ground":
        asked, query = arguments
        images = [kept[number] for number in asked]
        finder.check_length(query.prompts)
        found = finder.ground(images, query)
        return [
            finder.finish(candidates, query, image)
            for candidates, image in zip(found, images, strict=True)
        ]
    finder.release_memory()
    return None


def _taken(finder: StagedFinder, image: Prepared) -> Prepared:
    """Return a square as its finder takes it."""
    if isinstance(finder, Runtime):
        return replace(image, pixels=to_pixels(image.pixels))
    import torch

    return replace(image, pixels=torch.from_numpy(image.pixels))
