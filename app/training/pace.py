"""The time that a run has left, from how long each kind of its work has taken so far."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

Kind = Literal["update", "validation", "save"]
GROWTH = 1.3  # most that the time left grows in WINDOW seconds, so that one slow step says little
WINDOW = 10.0  # seconds


class Pace:
    """Time the work of a run, and estimate the time left: mean duration × what remains, by kind.

    The first update of a process is not counted: it allocates memory and chooses kernels.

    Args:
        durations: how many of each kind were timed, and their seconds; updated in place, so that a
            run that goes on keeps what it knew.
        clock: returns seconds.
    """

    def __init__(
        self, durations: dict[str, list[float]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._durations, self._clock = durations, clock
        self._running: tuple[Kind, float] | None = None  # what is under way, and since when
        self._warm = False
        self._last: tuple[float, float] | None = None  # when the time left was told, and what

    @contextlib.contextmanager
    def timed(self, kind: Kind) -> Iterator[None]:
        """Time one piece of work; what raises is not counted."""
        begun = self._clock()
        self._running = kind, begun
        try:
            yield
            self.add(kind, self._clock() - begun)
        finally:
            self._running = None

    def add(self, kind: Kind, seconds: float) -> None:
        """Count one piece of work that took `seconds`."""
        if kind == "update" and not self._warm:
            self._warm = True
            return
        count, total = self._durations.get(kind, (0, 0.0))
        self._durations[kind] = [count + 1, total + seconds]

    def left(self, remaining: Mapping[Kind, int]) -> float | None:
        """Return the seconds left; None as long as no update was timed.

        Args:
            remaining: how many of each kind are still to come, with the one under way.
        """
        if "update" not in self._durations:
            return None
        means = {kind: total / count for kind, (count, total) in self._durations.items()}
        seconds = sum(count * means.get(kind, 0.0) for kind, count in remaining.items())
        now = self._clock()
        if self._running is not None:
            kind, begun = self._running
            seconds -= min(now - begun, means.get(kind, 0.0))
        if self._last is not None:
            then, told = self._last
            share = min((now - then) / WINDOW, 1.0)
            seconds = min(seconds, told * GROWTH**share)
        self._last = now, seconds
        return seconds
