"""The ring behind a server: a round is a process of its own, begun by a button or a webhook."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.serving.refusals import Problem, Refused

log = logging.getLogger("app")
SHOWN = 3  # of its last lines
SECONDS = 20.0  # that it may take to end


@dataclass(frozen=True)
class Ring:
    """Hold what a server knows of a ring.

    Attributes:
        settings: its YAML.
        every: labels of an image that begin a round.
        project: of Label Studio whose labels it takes; None: none.
    """

    settings: Path
    every: int
    project: int | None = None


class Rounds:
    """Begins rounds of a ring, one at a time.

    Args:
        ring: None: there is none, and asking for a round is refused.
    """

    def __init__(self, ring: Ring | None = None) -> None:
        self._ring = ring
        self._heard = 0  # labels since the last round
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._lines: deque[str] = deque(maxlen=SHOWN)

    def begin(self) -> None:
        """Begin a round; where one runs, it is that one.

        Raises:
            Refused: the server has no ring.
        """
        if self._ring is None:
            problem = Problem("", "it was started without one", "start it with --ring ring.yaml")
            raise Refused(409, "This server has no ring.", [problem])
        with self._lock:
            if self._process is not None and self._process.poll() is None:
                return
            self._lines.clear()
            self._heard = 0
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app", "ring", str(self._ring.settings)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C ends the server, which then ends this
            )
            threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def hear(self, action: str, project: int | None) -> bool:
        """Take in an event of Label Studio; return whether a round runs for it.

        What another project has labelled, or labels changed and deleted, begin none.
        """
        if self._ring is None or self._ring.project is None or project != self._ring.project:
            return False
        with self._lock:
            self._heard += action == "ANNOTATION_CREATED"
            is_due = action == "START_TRAINING" or self._heard >= self._ring.every
        if is_due:
            self.begin()
        return is_due

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if text := line.strip():
                    self._lines.append(text)
                    log.info("ring: %s", text)

    def state(self) -> dict[str, Any]:
        """Tell whether there is a ring, whether a round runs, how it ended, and its last lines."""
        with self._lock:
            code = None if self._process is None else self._process.poll()
            return {
                "available": self._ring is not None,
                "running": self._process is not None and code is None,
                "code": code,
                "lines": list(self._lines),
            }

    def close(self) -> None:
        """End the round that runs; the next one goes on where it was."""
        with self._lock:
            process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
