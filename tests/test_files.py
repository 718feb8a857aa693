from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from app import files
from app.errors import UserError, nearest
from app.files import atomic_folder, atomic_path, read_json, write_json
from tests.conftest import REPOSITORY


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(file) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as temporary:
        (temporary / "x").write_text("1")
        _ = 1 / 0
    assert not folder.exists()
    for text in ("1", "2"):
        with atomic_folder(folder) as temporary:
            (temporary / "x").write_text(text)
    assert (folder / "x").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_killed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    """A real process, killed for real between writing and moving into place."""
    write_json(tmp_path / "a.json", {"a": 1})
    code = (
        "import os, signal, sys; from pathlib import Path; from app.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as t:\n"
        "    t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.json"], cwd=REPOSITORY)
    assert done.returncode == -signal.SIGKILL
    assert read_json(tmp_path / "a.json") == {"a": 1}


KILLED_FOLDER = """
import os, signal, sys
from pathlib import Path
from app.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as t:
    (t / "x").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_of_a_folder_left_is_removed_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with atomic_folder(folder) as temporary:
        (temporary / "x").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED_FOLDER, folder], cwd=REPOSITORY)
    assert done.returncode == -signal.SIGKILL
    assert (folder / "x").read_text() == "old"
    assert len([*tmp_path.iterdir()]) == 2
    with atomic_folder(folder) as temporary:
        (temporary / "x").write_text("new")
    assert (folder / "x").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_writer_leaves_the_folder_of_one_that_lives_alone(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with atomic_folder(folder) as first:
        (first / "x").write_text("1")
        with atomic_folder(folder) as second:
            (second / "x").write_text("2")
        assert (first / "x").read_text() == "1"
    assert (folder / "x").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_without_an_exchange_the_old_folder_comes_back(tmp_path: Path, monkeypatch) -> None:
    """Some file systems cannot exchange: there two renames, and what lies aside is returned."""
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    folder = tmp_path / "set"
    for text in ("1", "2"):
        with atomic_folder(folder) as temporary:
            (temporary / "x").write_text(text)
    assert (folder / "x").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    folder.rename(tmp_path / ".set.part-abc.old")  # as a kill between the two leaves it
    with pytest.raises(ZeroDivisionError), atomic_folder(folder):
        assert (folder / "x").read_text() == "2"
        _ = 1 / 0
    assert (folder / "x").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_what_is_written_has_the_usual_permissions(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [])
    (tmp_path / "b").touch()
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b").stat().st_mode
    with atomic_folder(tmp_path / "c"):
        pass
    os.mkdir(tmp_path / "d")  # noqa: PTH102
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "d").stat().st_mode


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1,\n "b": }', "line 2, column 7"),
        (b"\xff\xfe", "UTF-8"),
        (b"", "line 1, column 1"),
        (b"[" * 100_000, "no dataset holds"),
        (b"1" * 5000, "no dataset holds"),
    ],
)
def test_broken_json_is_located(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_json(tmp_path / "x.json")


def test_a_byte_order_mark_is_taken(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_nearest() -> None:
    assert nearest("epoch", ["epochs", "seed"]) == " Did you mean 'epochs'?"
    assert nearest("zzz", ["epochs", "seed"]) == ""
