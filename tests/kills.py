"""A process that kills itself, for real, at a place in its work: no clock decides where."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from app.__main__ import main

EVENTS = ("open", "os.", "shutil.", "tempfile.")
RELATIVE = ("os.remove", "os.rmdir", "os.scandir")  # rmtree names files within an open folder


def before_operation(number: int, folder: Path) -> Callable[[], int]:
    """Kill this process before its operation of that number on a file under `folder`.

    Returns:
        A function that returns how many operations there have been.
    """
    done = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        if event.startswith(EVENTS) and (event in RELATIVE or str(folder) in repr(arguments)):
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    return lambda: done


def within_a_file(size: int) -> None:
    """Kill this process as soon as a file that it writes would become longer than `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def run_command(
    words: Sequence[object],
    folder: Path,
    kill_at: int = -1,
    longest: int | None = None,
    output: Path | None = None,
) -> int | None:
    """Run `app WORDS` in a child that is forked from this process.

    Args:
        folder: whose file operations count.
        kill_at: the file operation before which it is killed.
        longest: bytes of a file, at which it is killed instead.
        output: file that takes what it prints.

    Returns:
        How many file operations it had; None where it was killed.
    """
    sys.stdout.flush()
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as pipe:
            operations = pipe.read()
        _, status = os.waitpid(child, 0)
        ends = (0, signal.SIGKILL) if longest is None else (0, signal.SIGKILL, signal.SIGXFSZ)
        assert status in ends, f"{words[0]} ended with {status}; see {output}"
        return int(operations) if status == 0 else None
    code = 1
    sys.argv = ["app", *map(str, words)]
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    if longest is not None:
        within_a_file(longest)
    count = before_operation(kill_at, folder)
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os.write(writing, str(count()).encode())
        os._exit(code)
