"""Write messages to stdout, errors to stderr, and show progress.

Progress is a bar with time left on a terminal, and plain lines with time left otherwise. Names that
come from outside are shown so that a terminal does nothing with them: no line is faked, no colour
or title changes.
"""

from __future__ import annotations

import contextlib
import logging
import numbers
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, TextIO

from app.errors import UserError

log = logging.getLogger("app")
LONGEST = 20_000  # characters of a name or a problem that are shown
MOST_PROBLEMS = 1000
EVERY = 10.0  # seconds between plain lines of progress
TimeLeft = Callable[[], float | None]  # in seconds; None where it is not known yet


# What acts on a terminal, or hides what a line says: controls, ends of lines, marks that turn the
# direction of writing or are not seen, halves of surrogate pairs. Joiners are part of some scripts.
_ACTS = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
_HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # the others are bytes of a file's name


def plain(words: object) -> str:
    """Return a name from outside on one line, for a terminal or a log: `\\x1b` for an escape."""
    text = str(words)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}… ({len(text)} characters)"
    return _ACTS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def command(*words: object) -> str:
    """Return a command to be printed, which a shell reads as exactly these words.

    A word with characters that act on a terminal becomes bash's `$'…'`, in which they are spelt.
    """
    return " ".join(map(_quote, words))


def _quote(word: object) -> str:
    text = str(word)
    if not _ACTS.search(text):
        return shlex.quote(text)
    spelt = (
        chr(byte) if 32 <= byte < 127 and chr(byte) not in "\\'" else f"\\x{byte:02x}"
        for byte in os.fsencode(_HALF.sub("?", text))
    )
    return f"$'{''.join(spelt)}'"


class Formatter(logging.Formatter):
    """Formats a message as it is, and what was put into it by `plain`."""

    def __init__(self) -> None:
        super().__init__("%(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text; its arguments alone may come from outside."""
        shown = logging.makeLogRecord(record.__dict__)
        if isinstance(record.args, Mapping):
            shown.args = {key: _shown(value) for key, value in record.args.items()}
        else:
            shown.args = tuple(map(_shown, record.args or ()))
        return super().format(shown)


def _shown(value: object) -> object:
    return value if isinstance(value, numbers.Number) else plain(value)


if TYPE_CHECKING:
    _Handler = logging.StreamHandler[TextIO]
else:
    _Handler = logging.StreamHandler  # which takes no types below Python 3.11, as on a Jetson


class _Lines(_Handler):
    """Writes lines for as long as they are read: `./train.sh | head` trains on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Write to nowhere from now on where the reader has left; else report as usual."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)
            return
        write_to_nowhere(self.stream)


def write_to_nowhere(stream: TextIO) -> None:
    """Lose what is written from now on, as whoever reads it has left; Python would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def log_to_stdout() -> None:
    """Print what the tool logs to stdout, without time or level, and nowhere else."""
    handler = _Lines(sys.stdout)
    handler.setFormatter(Formatter())
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def show_problems(error: UserError) -> None:
    """Print a line for each problem to stderr; one that begins with a blank continues the last."""
    for problem in map(plain, error.problems[:MOST_PROBLEMS]):
        print(problem if problem.startswith(" ") else f"error: {problem}", file=sys.stderr)
    if (rest := len(error.problems) - MOST_PROBLEMS) > 0:
        print(f"error: and {rest} more problems", file=sys.stderr)


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
