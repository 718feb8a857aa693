"""SIGTERM, Ctrl-C, a cluster's warning: the first asks a run to stop, the second ends it."""

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
    """Raise where a signal asked for a stop and all there was to save is saved; exit code 143."""


class StopRequest:
    """Note that a signal asked this process to stop.

    Outside of `deferred()` there is nothing to save, and a signal raises Stopped at once. Inside,
    the run itself calls `check` wherever it can stop.
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
        """Stop at the first signal, end at once at the second: a handler for `signal.signal`."""
        if self.asked:
            if "RANK" in os.environ and time.monotonic() - self._since < ECHO_SECONDS:
                return
            os._exit(EXIT_CODE)  # a save is whole or absent wherever it is cut off
        self.asked, self._since = True, time.monotonic()
        said = b"stopped: there was nothing to save\n"
        if self._is_deferred:
            said = b"stopping: the step is finished and saved; once more ends at once\n"
        if os.environ.get("RANK", "0") == "0":
            os.write(2, said)  # not by logging, which a handler may have interrupted
        if not self._is_deferred:
            raise Stopped


@contextlib.contextmanager
def watch() -> Iterator[StopRequest]:
    """Take `SIGNALS` for requests to stop; restore the handlers from before at the end."""
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
    """Block `SIGNALS`. Child processes inherit the block until they unblock themselves.

    Without it, a signal to the whole group while workers start would end them, and the run with
    them, because torch installs its own handlers before `leave_to_parent` runs.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_parent(_worker: int = 0) -> None:
    """Ignore `SIGNALS` in a worker that loads images, because its parent decides when it ends.

    Signals reach a whole process group, and torch's own handler would end the worker mid-step.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
