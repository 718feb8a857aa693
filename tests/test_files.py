from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import files
from app.errors import UserError, nearest
from app.files import (
    atomic_folder,
    atomic_path,
    claim,
    exists_problem,
    flatten,
    free_folder,
    give_up,
    hash_file,
    last_folder,
    locked,
    open_file,
    open_own,
    parse_json,
    read_json,
    short_hash,
    write_csv,
    write_json,
    write_text,
)
from tests.helpers import REPOSITORY


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


def test_a_new_folder_replaces_nothing_that_came_meanwhile(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    said = pytest.raises(UserError, match="another process wrote it meanwhile")
    with said, atomic_folder(folder, replace=False) as second:
        (second / "x").write_text("2")
        write_json(folder / "x", "1")
    assert read_json(folder / "x") == "1"
    said = pytest.raises(UserError, match="another process is writing it")
    with atomic_folder(folder), said, atomic_folder(folder, replace=False):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


CLAIMED = """
import sys
from pathlib import Path
from app.files import claim
claim(Path(sys.argv[1]))
print("claimed", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_is_given_up_may_be_claimed(tmp_path: Path) -> None:
    def other() -> str:
        words = [sys.executable, "-c", CLAIMED, str(tmp_path)]
        done = subprocess.run(words, input="", capture_output=True, text=True, cwd=REPOSITORY)
        return done.stdout + done.stderr

    claim(tmp_path)
    assert "another process is at work here" in other()
    give_up(tmp_path)
    assert "claimed" in other()


def test_a_claimed_folder_is_refused_until_its_process_ends(tmp_path: Path) -> None:
    words = [sys.executable, "-c", CLAIMED, tmp_path]
    with subprocess.Popen(words, stdin=-1, stdout=-1, cwd=REPOSITORY) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        with pytest.raises(UserError, match="another process is at work here"):
            claim(tmp_path)
        other.kill()
    claim(tmp_path)
    claim(tmp_path)
    assert free_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("kind", ["link", "second name", "pipe", "folder"])
def test_our_own_files_are_no_others(tmp_path: Path, kind: str) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.write_text("years of work")
    if kind == "link":
        ours.symlink_to(theirs)
    elif kind == "second name":
        ours.hardlink_to(theirs)
    elif kind == "pipe":
        os.mkfifo(ours)
    else:
        ours.mkdir()
    with pytest.raises(UserError, match="remove it"):
        open_own(ours)
    assert theirs.read_text() == "years of work"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path / "socket", Path("/dev/zero")):
        with pytest.raises(OSError, match="no regular file"):
            open_file(path)
        with pytest.raises(UserError, match=rf"{path}: cannot be read \(is no regular file"):
            read_json(path)
        with pytest.raises(OSError, match="no regular file"):
            hash_file(path)
    with pytest.raises(UserError, match="is a folder, not a file"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 70 + "]" * 70, "nested more than 64 deep"),
        ('{"a]]]]\\"]]": ' * 70 + "1" + "}" * 70, "nested more than 64 deep"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_json_is_bounded_in_depth(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_json(tmp_path / "a.json")


def test_sound_json_is_within_the_bounds(tmp_path: Path) -> None:
    values = ["[" * 99, '\\"[' * 99, "9" * 99, -(2**63), 0.1 + 0.2, [[[[1]]]] * 99, {"\\": "]"}]
    write_json(tmp_path / "a.json", values)
    assert read_json(tmp_path / "a.json") == values
    with pytest.raises(UserError, match="more than the 10 bytes"):
        read_json(tmp_path / "a.json", most=10)


@settings(max_examples=300, deadline=None)
@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_the_depth_of_json_is_counted_as_it_is(value: object) -> None:
    def depth(node: object) -> int:
        inside = node.values() if isinstance(node, dict) else node
        return 1 + max(map(depth, inside), default=0) if isinstance(node, list | dict) else 0

    data = json.dumps(value).encode()
    deep = depth(value)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "MAX_DEPTH", deep)
        assert not files._is_deep(data)
        patched.setattr(files, "MAX_DEPTH", deep - 1)
        assert files._is_deep(data) or not deep


def test_text_that_utf8_cannot_encode_is_written_spelt(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.png")
    write_text(tmp_path / "a", name)
    write_csv(tmp_path / "b", ["name"], [{"name": name}])
    assert (tmp_path / "a").read_text() == "\\udcff.png"
    assert (tmp_path / "b").read_text() == "name\n\\udcff.png\n"


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


HOLDER = """
import sys
from pathlib import Path
from app.files import locked
with locked(Path(sys.argv[1])) as held:
    print(held, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    path.touch() if kind == "file" else path.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with locked(path, wait=False) as held:
            assert held is False
        holder.kill()
        with locked(path) as held:  # waits, and the dead holder has let go
            assert held is True
    with locked(path, wait=False) as held:
        assert held is True


def test_a_disk_without_locks_is_told_apart(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path) as held:
        assert held is None
    with atomic_folder(tmp_path / "set") as temporary:
        (temporary / "x").touch()
    assert (tmp_path / "set" / "x").is_file()


def test_flatten() -> None:
    node = {"a": {"b": 1, "c": {}}, "d": [{"e": 2}, 3], "f": [4], "g": None}
    assert flatten(node) == {"a.b": 1, "d": [{"e": 2}, 3], "f": [4], "g": None}
    assert flatten(node, lists=True) == {"a.b": 1, "d.0.e": 2, "d.1": 3, "f": [4], "g": None}


def test_hashes_of_text_and_of_paths_that_are_not_text() -> None:
    assert short_hash("a", 8) == hashlib.sha256(b"a").hexdigest()[:8]
    assert short_hash(os.fsdecode(b"\xff"), 12) == hashlib.sha256(b"\xff").hexdigest()[:12]


def test_what_to_do_about_an_output_that_exists() -> None:
    assert exists_problem(Path("out"), "holds a run") == (
        "--output-dir out: holds a run. Replace it with --overwrite, or name another folder."
    )
    problem = exists_problem(
        Path("out"), "is full", option="--output", instead="Go on with --resume"
    )
    assert problem == (
        "--output out: is full. Go on with --resume, replace it with --overwrite, or name another "
        "folder."
    )


def test_outputs_that_nobody_named_are_numbered(tmp_path: Path) -> None:
    """What is missing or empty is free; the last one is the newest that is not."""
    folder = tmp_path / "train"
    assert free_folder(folder) == folder
    assert last_folder(folder) is None
    for name in ("train", "train-2", "train-3"):
        assert free_folder(folder) == tmp_path / name
        (tmp_path / name).mkdir()
        assert free_folder(folder) == tmp_path / name  # made, and nothing is in it yet
        (tmp_path / name / "file").touch()
        assert last_folder(folder) == tmp_path / name
    (tmp_path / "train-2" / "file").unlink()
    assert free_folder(folder) == tmp_path / "train-2"


def test_numbers_of_too_many_digits_are_floats() -> None:
    assert parse_json("9" * 6000) == math.inf
    assert parse_json(f'{{"area": -{"9" * 40}}}') == {"area": -1e40}
    assert parse_json("9" * 20) == 10**20 - 1
