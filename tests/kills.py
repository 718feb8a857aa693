"""A process that kills itself, for real, at a place in its work: no clock decides where."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
