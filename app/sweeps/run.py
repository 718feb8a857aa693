"""The cells of a sweep, made: each by a process of its own, one after another or one a GPU.

A cell is an ordinary run. What is done is known by its folder, so that the same call does what is
left after any end; several calls on one folder share the work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from app.console import counted, duration
from app.errors import UserError
from app.evaluation.run_files import read_figures, read_rows
from app.files import lock, read_json, remove_unfinished, write_json
from app.signals import EXIT_CODE, StopRequest
from app.sweeps.plan import Cell, Plan

log = logging.getLogger("app")
LOGS, ENDED = "logs", "ended"  # folders of a sweep: what cells printed, and how they ended
POLL_SECONDS = 0.5
SHOWN = 5  # lines of a reason
MOST = 2_000  # characters of it
READ = 64 << 10  # bytes of the end of a log


class Watch(Protocol):
    """Looks at a cell while it is made, and may end it; see `search.Watched`."""

    def is_behind(self, cell: Cell, rows: Sequence[dict[str, float]]) -> bool: ...


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    output: IO[bytes]
    slot: Mapping[str, str]
    begun: float
    from_byte: int  # of its log
    scores: bool  # it is trained, and scored now
    pruned: bool = False


def is_done(plan: Plan, cell: Cell) -> bool:
    """Return whether a cell's run came to its end, and was scored."""
    return bool(read_figures(plan.figures_folder(cell)))


def ended(plan: Plan, cell: Cell) -> str | None:
    """Return why a cell ended before its end; None: it did not."""
    file = ended_file(plan, cell)
    content = read_json(file) if file.is_file() else None
    return str(content.get("reason")) if isinstance(content, dict) else None


def ended_file(plan: Plan, cell: Cell) -> Path:
    return plan.folder / ENDED / f"{cell.name}.json"


def log_file(plan: Plan, cell: Cell) -> Path:
    return plan.folder / LOGS / f"{cell.name}.log"


def is_at_work(plan: Plan, cell: Cell) -> bool:
    """Return whether a process makes the cell now, here or, where disks have locks, elsewhere."""
    file = log_file(plan, cell)
    if not file.is_file():
        return False
    with file.open("ab") as handle:
        return lock(handle.fileno(), wait=False) is False


def make(
    plan: Plan,
    cells: Sequence[Cell],
    *,
    stop: StopRequest,
    slots: Sequence[Mapping[str, str]] = ({},),
    again: bool = False,
    watch: Watch | None = None,
    forwards: bool = True,
    environment: Mapping[str, str] | None = None,
) -> list[Cell]:
    """Make what is left of cells; return those that ended before their end, or are refused.

    Args:
        stop: where it is asked for, the cells at work save and end.
        slots: what each of the cells that are made at a time has (`model.device.slots`).
        again: try those that ended before their end once more.
        watch: ends cells that are behind.
        forwards: signals reach this process alone, so that the cells must be told.
        environment: further variables of the cells' processes.

    Raises:
        Stopped: all is saved.
    """
    left = [
        cell for cell in cells if not is_done(plan, cell) and (again or ended(plan, cell) is None)
    ]
    if before := len(cells) - len(left):
        log.info("%d of %s were done before", before, counted(len(cells), "cell"))
    free, running, elsewhere = list(slots), list[_Running](), 0
    failed: list[Cell] = []
    durations: list[float] = []
    with stop.deferred():
        try:
            while (left or running) and not stop.asked:
                while left and free:
                    cell = left.pop(0)
                    if (begun := _begin(plan, cell, free[0], environment or {})) is None:
                        elsewhere += 1
                    else:
                        running.append(begun)
                        free.pop(0)
                time.sleep(POLL_SECONDS if running else 0)
                for each in [r for r in running if r.process.poll() is not None]:
                    running.remove(each)
                    free.append(each.slot)
                    durations.append(time.monotonic() - each.begun)
                    if _is_to_be_scored(plan, each):
                        each.output.close()
                        left.insert(0, each.cell)
                        continue
                    each_takes = statistics.mean(durations) / len(slots)
                    rest = len(left) + len(running)
                    _note(plan, each, failed, rest, rest * each_takes)
                for each in running:
                    _prune(plan, each, watch)
        finally:
            _stop(running, forwards=forwards)
    if elsewhere:
        log.info("%s at work elsewhere", counted(elsewhere, "cell"))
    return failed


def _begin(
    plan: Plan, cell: Cell, slot: Mapping[str, str], more: Mapping[str, str]
) -> _Running | None:
    """Start a cell; None where another process is at it."""
    file = log_file(plan, cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    output = file.open("ab")
    # The process inherits the lock, and holds it for as long as it lives.
    if lock(output.fileno(), wait=False) is False:
        output.close()
        return None
    from_byte = output.seek(0, os.SEEK_END)
    ended_file(plan, cell).unlink(missing_ok=True)
    remove_unfinished(ended_file(plan, cell))
    is_trained = bool(read_figures(plan.run_folder(cell)))
    words = plan.scoring_words(cell) if is_trained else [*plan.words(cell), "--resume=auto"]
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "train", *words],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env={**os.environ, **more, **slot},
        start_new_session=True,  # Ctrl-C is for this process, which tells them
    )
    return _Running(cell, process, output, slot, time.monotonic(), from_byte, is_trained)


def _is_to_be_scored(plan: Plan, one: _Running) -> bool:
    """Return whether a run came to its end that another process must score."""
    trained = one.process.returncode == 0 and not one.scores
    return trained and not is_done(plan, one.cell) and bool(read_figures(plan.run_folder(one.cell)))


def _note(plan: Plan, one: _Running, failed: list[Cell], left: int, seconds_left: float) -> None:
    """Note how a cell ended, and tell it."""
    one.output.close()
    cell, code = one.cell, one.process.returncode
    seconds = duration(time.monotonic() - one.begun)
    rest = f"; {left} left, {duration(seconds_left)}" if left else ""
    if code == 0 and is_done(plan, cell):
        log.info("%s: done in %s%s", cell.name, seconds, rest)
        return
    if code == EXIT_CODE and not one.pruned:
        return  # it was told to stop; its next start goes on
    reason = "pruned: behind the other trials" if one.pruned else _reason(plan, one)
    write = ended_file(plan, cell)
    write.parent.mkdir(parents=True, exist_ok=True)
    write_json(write, {"code": code, "reason": reason})
    if not one.pruned:
        failed.append(cell)
    log.info("%s: %s (%s)%s", cell.name, reason.splitlines()[0], seconds, rest)


def _reason(plan: Plan, one: _Running) -> str:
    """Return why a cell's process ended, in its own words where it has said some."""
    code = one.process.returncode
    if code < 0:
        return f"killed ({signal.Signals(-code).name}, often for want of memory)"
    with log_file(plan, one.cell).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(one.from_byte, size - READ))
        lines = file.read().decode("utf-8", "replace").splitlines()
    problems = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = problems[-SHOWN:] or [line for line in lines if line.strip()][-1:]
    return "\n".join(last)[:MOST] or f"ended with code {code}"


def _prune(plan: Plan, one: _Running, watch: Watch | None) -> None:
    """End a cell that is behind, by a signal on which it saves."""
    if watch is None or one.pruned:
        return
    with contextlib.suppress(UserError):  # the table is being written anew
        if watch.is_behind(one.cell, read_rows(plan.run_folder(one.cell))):
            one.pruned = True
            one.process.send_signal(signal.SIGTERM)


def _stop(running: Sequence[_Running], *, forwards: bool) -> None:
    """Wait for cells that are at work, once they are told to stop."""
    for each in running:
        if forwards:
            each.process.send_signal(signal.SIGTERM)
    for each in running:
        each.process.wait()
        each.output.close()
