"""Write messages to stdout, errors to stderr, and show progress.

Progress is a bar with time left on a terminal, and plain lines with time left otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from app.errors import UserError

log = logging.getLogger("app")
EVERY = 10.0  # seconds between plain lines of progress
TimeLeft = Callable[[], float | None]  # in seconds; None where it is not known yet


def log_to_stdout() -> None:
    """Print what the tool logs to stdout, without time or level, and nowhere else."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def show_problems(error: UserError) -> None:
    """Print a line for each problem to stderr; one that begins with a blank continues the last."""
    for problem in error.problems:
        print(problem if problem.startswith(" ") else f"error: {problem}", file=sys.stderr)


@contextlib.contextmanager
def progress(
    title: str, total: int, done: int = 0, *, time_left: TimeLeft | None = None
) -> Iterator[Callable[[int, str], None]]:
    """Yield `advance(done, detail)`, which shows progress and the time left.

    Args:
        time_left: of a whole that this work is a part of; that of this work alone unless given.
    """
    if sys.stderr.isatty():
        yield from _bar(title, total, done, time_left)
    else:
        yield from _lines(title, total, done, time_left)


def _bar(
    title: str, total: int, done: int, time_left: TimeLeft | None
) -> Iterator[Callable[[int, str], None]]:
    # Here, because an exported folder's runtime is used from Python without rich.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[detail]}"),
        TimeRemainingColumn() if time_left is None else TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done, detail="", left="")

        def advance(now: int, detail: str) -> None:
            left = _left(time_left()) if time_left is not None else ""
            bar.update(task, completed=now, detail=detail, left=left)

        yield advance


def _lines(
    title: str, total: int, done: int, time_left: TimeLeft | None
) -> Iterator[Callable[[int, str], None]]:
    start = last = time.monotonic()

    def advance(now: int, detail: str) -> None:
        nonlocal last
        if time.monotonic() - last < EVERY or now <= done:
            return
        last = time.monotonic()
        own = (last - start) / (now - done) * (total - now)
        left = _left(own if time_left is None else time_left())
        log.info("%s", ", ".join(filter(None, [f"{title} {now}/{total}", detail, left])))

    yield advance


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"{duration(seconds)} left"


def counted(number: int, noun: str) -> str:
    """Return "1 object", "2 objects", "1 class", "2 classes"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith(('s', 'x')) else 's'}"


def duration(seconds: float) -> str:
    """Return seconds as text: "42 s", "3 min 5 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
