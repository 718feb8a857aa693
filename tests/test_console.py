"""What a terminal shows of names that come from outside, and commands that can be pasted."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.console import LONGEST, Formatter, command, plain, show_problems
from app.errors import UserError
from tests.helpers import REPOSITORY

NASTY = [
    "x'; touch y; '",
    "a\nerror: all is lost",
    "\x1b]0;title\x07\x9b31m",
    "$(touch y) `touch y` ${HOME} !! \\",
    "--overwrite",
    "evil\u202etxt.exe",
    os.fsdecode(b"\xff'\x1b.png"),
    "",
]


@pytest.mark.parametrize("word", NASTY)
def test_a_printed_command_is_its_words_and_nothing_else(word: str, tmp_path: Path) -> None:
    line = command("printf", "%s\\0", word, Path("a b"))
    assert plain(line) == line
    done = subprocess.run(["bash", "-c", line], capture_output=True, cwd=tmp_path, check=True)
    assert done.stdout == os.fsencode(word) + b"\0a b\0"
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_no_name_acts_on_a_terminal(name: str) -> None:
    for shown in (plain(name), command(name)):
        shown.encode()
        assert len(shown.splitlines()) <= 1
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)


def test_names_of_all_scripts_stay_readable() -> None:
    for name in ("größe", "人", "می\u200cخواهم", "👩\u200d🚀", "a b", "C:\\x"):
        assert plain(name) == name


def test_each_line_of_a_log_is_covered_whatever_is_logged() -> None:
    logger, lines = logging.getLogger("of this test"), list[str]()
    handler = logging.Handler()
    handler.setFormatter(Formatter())
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.propagate = False
    logger.warning("%s: %d, %.2f", "a\nb", 3, 2.5)
    logger.warning("%s", UserError(["one\x1b", "two"]))
    logger.warning("%(name)s", {"name": Path("\x1b[31m")})
    logger.warning("ours\nstays")
    assert lines == ["a\\nb: 3, 2.50", "one\\x1b\\ntwo", "\\x1b[31m", "ours\nstays"]


def test_problems_are_a_line_each_and_not_without_an_end(capsys) -> None:
    show_problems(UserError(["'a\nb'", "  more\x1b", "y" * 10**7]))
    show_problems(UserError(["z"] * 10**5))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["error: 'a\\nb'", "  more\\x1b"]
    assert len(lines[2]) < LONGEST + 50
    assert lines[-1] == "error: and 99000 more problems"
    assert len(lines) == 3 + 1001


def test_whoever_reads_may_leave() -> None:
    """The work goes on, as where `head` has seen enough, and nothing is said of it."""
    code = (
        "import sys\nfrom app.console import log, log_to_stdout\nlog_to_stdout()\n"
        "for number in range(2000): log.info('line %s', number)\n"
        "print('done', file=sys.stderr)"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "line 0\n"
    writer.stdout.close()
    assert writer.stderr is not None
    assert writer.stderr.read() == "done\n"
    assert writer.wait() == 0
