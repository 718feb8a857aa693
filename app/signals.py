"""SIGTERM, Ctrl-C, a cluster's warnings: the first asks for an end, the second makes one."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
EXIT_CODE = 143
# torchrun hands on to its processes what a terminal or a cluster has sent them already.
ECHO_SECONDS = 2.0


class Stopped(BaseException):
    """A signal asked for an end; whatever there was to save is saved. Exit code 143."""


class StopRequest:
    """Whether a signal has asked this process to stop.

    Where there is nothing to save, it raises Stopped at once; within `deferred()` it is noted, and
    the run ends at the next place that is good to stop at.
    """

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0
        self._is_deferred = False

    def check(self) -> None:
        """Raise Stopped if the run was asked to stop."""
        if self.asked:
            raise Stopped

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Note a signal rather than raise at once; raise at the end of the block."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        self.check()

    def on_signal(self, _number: int, _frame: Any) -> None:
        """What the first signal and the second do: a handler for `signal.signal`."""
        if self.asked:
            if "RANK" in os.environ and time.monotonic() - self._since < ECHO_SECONDS:
                return
            os._exit(EXIT_CODE)  # a save is whole or absent wherever it is cut off
        self.asked, self._since = True, time.monotonic()
        if not self._is_deferred:
            raise Stopped
        if os.environ.get("RANK", "0") == "0":
            # Not by logging, which a handler may have interrupted.
            os.write(2, b"stopping: the step is finished and saved; once more ends at once\n")


@contextlib.contextmanager
def watch() -> Iterator[StopRequest]:
    """Take `SIGNALS` for requests to stop; what handled them before does again afterwards."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python takes no handler there
        yield request
        return
    before = {number: signal.signal(number, request.on_signal) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def blocked_signals() -> Iterator[None]:
    """Let `SIGNALS` wait; a process that is started within waits for ever, or until it asks.

    Or one that reaches the group while processes start would end them, and the run with them:
    torch gives them its own handlers before they come to `leave_to_parent`.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(_worker: int = 0) -> None:
    """Ignore `SIGNALS`, in a process that loads images: its parent decides when it ends.

    They reach a whole process group; torch's own handler would end the loading mid-step.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
