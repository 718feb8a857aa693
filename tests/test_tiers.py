"""The plugin of the tiers: what runs when, and that a test over the limit does fail."""

from __future__ import annotations

import pytest

THREE = """
import pytest

def test_quick(): pass

@pytest.mark.slow
def test_long(): pass

@pytest.mark.system
def test_outside(): pass
"""
# Half a second of CPU, wherever it is called.
WORK = """
import time
import pytest

def work():
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
"""
LIMITED = ("-p", "tests.tiers", "--cpu-limit=0.3")


@pytest.fixture(autouse=True)
def _no_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # to load them takes a second each


@pytest.fixture
def three(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\ntestpaths = tests\n")
    folder = pytester.mkdir("tests")
    (folder / "test_three.py").write_text(THREE)
    return pytester


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "quick"),
        (["--all"], "long outside quick"),
        (["-k", "long or quick"], "long quick"),
        (["-m", "system"], "outside"),
        (["tests/test_three.py"], "long outside quick"),
        (["tests/test_three.py::test_long"], "long"),
        (["tests", "-m", "not system"], "long quick"),
    ],
)
def test_what_is_chosen(three: pytest.Pytester, words: list[str], expected: str) -> None:
    done = three.inline_run("-p", "tests.tiers", *words)
    passed = {report.nodeid.rpartition("test_")[2] for report in done.listoutcomes()[0]}
    assert passed == set(expected.split())


def test_the_workers_choose_alike(three: pytest.Pytester) -> None:
    three.runpytest_inprocess("-p", "tests.tiers", "-p", "xdist", "-n1").assert_outcomes(passed=1)


def test_more_than_the_limit_fails(pytester: pytest.Pytester) -> None:
    """In the test, in a fixture of its own, and in a process that it waits for."""
    pytester.makepyfile(
        WORK
        + """
@pytest.fixture
def own():
    work()

def test_itself(): work()
def test_fixture(own): pass
def test_process():
    import os
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)

@pytest.mark.slow
def test_marked(own): pass
@pytest.mark.system
def test_outside(own): pass
"""
    )
    done = pytester.runpytest_inprocess(*LIMITED, "--all")
    done.assert_outcomes(failed=3, passed=2)
    done.stdout.fnmatch_lines(["*took 0.* s of CPU*make it faster, or mark it*"])


def test_what_is_shared_is_not_charged(pytester: pytest.Pytester) -> None:
    """Shared fixtures, also those that a test asks for as it runs, imports, and waiting."""
    pytester.makepyfile(costly=WORK + "work()")
    pytester.makepyfile(
        WORK
        + """
@pytest.fixture(scope="module")
def shared():
    work()

@pytest.fixture(scope="session")
def late():
    work()

def test_shared(shared): pass
def test_late(request): request.getfixturevalue("late")
def test_import():
    import costly
def test_waits(): time.sleep(0.5)
"""
    )
    pytester.runpytest_inprocess(*LIMITED).assert_outcomes(passed=4)
