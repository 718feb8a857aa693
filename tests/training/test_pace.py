"""Time left: near the truth from a tenth of the run on, and never twice what was told before."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from app.training.pace import Pace

RECORDED = Path(__file__).with_name("recorded_durations.json")
LINE = 10.0  # seconds between two lines


class Piece(NamedTuple):
    """A piece of work: seconds that passed before it, and its own."""

    kind: Any
    before: float
    seconds: float


class Told(NamedTuple):
    """What was told when: both in seconds, with the truth."""

    at: float
    left: float
    truth: float


def _recorded() -> list[Piece]:
    """Return the work of a real run in its order, as `record_durations.py` noted it."""
    return [Piece(*piece) for piece in json.loads(RECORDED.read_text())]


def _replay(work: list[Piece]) -> Iterator[Told]:
    """Replay a run by its recorded times; tell the time left after each piece of work."""
    now = 0.0
    pace = Pace({}, clock=lambda: now)
    end = sum(piece.before + piece.seconds for piece in work)
    remaining = Counter(piece.kind for piece in work if piece.kind != "end")
    for kind, before, seconds in work:
        now += before
        if kind == "update":
            now += seconds
            pace.add(kind, seconds)
        elif kind != "end":
            with pace.timed(kind):
                now += seconds
        remaining[kind] -= 1
        left = pace.left(remaining)
        if left is not None and kind != "end":  # nothing is told any more
            yield Told(now, left, end - now)


def _lines(told: list[Told]) -> list[Told]:
    """Return what a log shows: a line each 10 seconds."""
    lines: list[Told] = []
    for each in told:
        if not lines or each.at - lines[-1].at >= LINE:
            lines.append(each)
    return lines


def test_a_recorded_run() -> None:
    """Within a quarter of the truth from a tenth on; within 3 s at the end, which is the report."""
    work = _recorded()
    end = sum(piece.before + piece.seconds for piece in work)
    told = [each for each in _replay(work) if each.at >= end / 10]
    assert len(told) > 100
    for each in told:
        assert each.left == pytest.approx(each.truth, rel=0.25, abs=3.0)


@pytest.mark.parametrize("seed", range(5))
def test_a_machine_that_others_use(seed: int) -> None:
    """Steps that take up to ten times as long, for a while: no line is twice the one before."""
    chance, slow = random.Random(seed), 1.0
    work: list[Piece] = []
    for kind, before, seconds in _recorded():
        if chance.random() < 0.03:
            slow = chance.choice([1.0, 2.0, 10.0])
        work.append(Piece(kind, before * slow, seconds * slow))
    lines = _lines(list(_replay(work)))
    assert len(lines) > 20
    for one, other in itertools.pairwise(lines):
        assert other.left < 2 * one.left


def test_the_first_update_of_a_process_does_not_count() -> None:
    """It chooses kernels; a run that goes on has a first one again, and keeps what it knew."""
    durations: dict[str, list[float]] = {}
    pace = Pace(durations)
    pace.add("update", 30.0)
    assert pace.left({"update": 10}) is None
    pace.add("update", 1.0)
    assert pace.left({"update": 10}) == pytest.approx(10)
    resumed = Pace(json.loads(json.dumps(durations)))
    resumed.add("update", 30.0)
    assert resumed.left({"update": 10}) == pytest.approx(10)


def test_a_validation_under_way_is_less_and_less() -> None:
    now = 0.0
    pace = Pace({"update": [1, 1.0], "validation": [1, 20.0]}, clock=lambda: now)
    with pace.timed("validation"):
        now = 5.0
        assert pace.left({"update": 10, "validation": 2}) == pytest.approx(10 + 40 - 5)
        now = 50.0  # longer than the one before
        assert pace.left({"update": 10, "validation": 2}) == pytest.approx(10 + 40 - 20)
