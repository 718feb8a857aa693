"""A pytest plugin: the tiers of the tests, and the limit that keeps the fast tier fast.

- unmarked: the fast tier. Each test takes seconds.
- `slow`: takes more than 5 s by design, such as an overfit or ten thousand fuzzed cases.
- `system`: needs more than this process, such as containers, servers, browsers or Slurm.

`pytest` alone runs the fast tier. `--all`, or anything that names tests (a path, -k, -m), chooses
from all tests.
"""

from __future__ import annotations

import builtins
import gc
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# CPU seconds that an unmarked test may take where no more runs than the machine has cores. Not wall
# time, which waiting decides; most tests take less than a tenth of it.
LIMIT = 10.0
MARKS = ("slow", "system")
_METER = pytest.StashKey["Meter"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers")
    group.addoption("--all", action="store_true", help="run the slow and the system tests as well")
    group.addoption(
        "--cpu-limit", type=float, help=f"of an unmarked test, in seconds; by default {LIMIT:g}"
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than 5 s by design")
    config.addinivalue_line("markers", "system: needs more than this process, such as a server")
    config.addinivalue_line("markers", "drawings: matplotlib draws, and not blank pictures")
    config.stash[_METER] = Meter()
    option = config.option
    named = config.args_source is pytest.Config.ArgsSource.ARGS or option.keyword or option.markexpr
    # Each of xdist's workers is called with the same words, and comes to the same choice.
    if not option.all and not named:
        option.markexpr = "not (" + " or ".join(MARKS) + ")"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long tests first in each worker's share, file by file.

    A long test that begins last makes all others wait. xdist cuts the list into equal parts, one a
    worker, before the workers that are done take from the others.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long: dict[Path, list[pytest.Item]] = {}
    quick = []
    for item in items:
        if _is_marked(item):
            long.setdefault(item.path, []).append(item)
        else:
            quick.append(item)
    shares: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for group in sorted(long.values(), key=len, reverse=True):
        min(shares, key=len).extend(group)
    ordered: list[pytest.Item] = []
    for number, share in enumerate(shares):
        room = (len(items) - len(ordered)) // (workers - number) - len(share)
        ordered += [*share, *quick[: max(room, 0)]]
        del quick[: max(room, 0)]
    items[:] = [*ordered, *quick]


def _is_marked(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(mark) for mark in MARKS)


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collection.

    Every run collects garbage, and would look through all of torch and pytest each time.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries report what is left at the exit as leaks


class Meter:
    """Count the CPU seconds of a test that are its own.

    Counted are the setup and the call, with the children that they waited for. Excused are fixtures
    that tests share and imports: whichever test comes first pays them for all.
    """

    def __init__(self) -> None:
        self._begun = self._excused = 0.0
        self._depth = 0

    @staticmethod
    def _now() -> float:
        """Return the CPU seconds of this process and of the children that it has waited for."""
        return sum(os.times()[:4])

    def start(self) -> None:
        """Begin at zero."""
        self._begun, self._excused, self._depth = self._now(), 0.0, 0

    def own(self) -> float:
        """Return the CPU seconds since the start, less the excused ones."""
        return self._now() - self._begun - self._excused

    @contextmanager
    def excused(self) -> Iterator[None]:
        """Excuse the block. Blocks within it are part of it."""
        begun = self._now()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._excused += self._now() - begun

    @contextmanager
    def without_imports(self) -> Iterator[None]:
        """Excuse the imports within the block."""
        load = builtins.__import__

        def excused_load(name: str, *args: Any, **kwargs: Any) -> Any:
            if name in sys.modules:
                return load(name, *args, **kwargs)
            with self.excused():
                return load(name, *args, **kwargs)

        builtins.__import__ = excused_load
        try:
            yield
        finally:
            builtins.__import__ = load


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    meter = item.config.stash[_METER]
    meter.start()
    with meter.without_imports():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    if fixturedef.scope == "function":
        return (yield)
    with request.config.stash[_METER].excused():
        return (yield)


def cpu_limit() -> float:
    """Return the CPU seconds that an unmarked test may take on this machine now.

    It is `LIMIT` where this process runs alone. Processes beside it share caches, memory and often
    a core's units: with three workers on two cores, tests took three times their CPU time.
    """
    return LIMIT * max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Fail an unmarked test that has taken more than its share."""
    config = item.config
    meter = config.stash[_METER]
    with meter.without_imports():
        result = yield
    spent, limit = meter.own(), config.option.cpu_limit or cpu_limit()
    item.user_properties.append(("cpu", round(spent, 2)))
    if spent > limit and not _is_marked(item):
        pytest.fail(
            f"took {spent:.1f} s of CPU, and a test without a mark may take {limit:.3g}: make it "
            "faster, or mark it as slow or system (CONTRIBUTING.md, tests)",
            pytrace=False,
        )
    return result
