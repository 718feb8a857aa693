from __future__ import annotations

import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from app import files
from app.errors import UserError, nearest
from app.files import atomic_folder, atomic_path, read_json, unzip, write_json
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


# --- zips -----------------------------------------------------------------------------------------


def zipped(path: Path, *members: str | zipfile.ZipInfo, content: bytes = b"content") -> Path:
    """Zipfile writes any name and attribute that it is given."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member in members:
            file.writestr(member, content, zipfile.ZIP_DEFLATED)
    return path


def member(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def patched(path: Path, old: bytes, new: bytes) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


def refused(archive: Path, **limits: int) -> list[str]:
    """The problems; nothing is left beside the zip."""
    before = sorted(archive.parent.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        unzip(archive, archive.parent / "out", **limits)
    assert sorted(archive.parent.parent.rglob("*")) == before
    return caught.value.problems


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    return tmp_path / "sub" / "a.zip"


def test_a_sound_zip_is_unpacked_whole(tmp_path: Path, archive: Path) -> None:
    names = [
        "a.txt",
        "deep/er/b..txt",
        "empty/",
        "deep/ä .png",
        "A.txt",
        member("run.sh", 0o104755),
    ]
    unzip(zipped(archive, *names), tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert found == ["A.txt", "a.txt", "deep/er/b..txt", "deep/ä .png", "run.sh"]
    assert (out / "deep/er/b..txt").read_bytes() == b"content"
    assert (out / "empty").is_dir()
    assert not (out / "run.sh").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


ATTACKS: list[tuple[str | zipfile.ZipInfo, str]] = [
    ("../evil.txt", "'..'"),
    ("a/../../evil.txt", "'..'"),
    ("/etc/evil.txt", "absolute"),
    ("C:/evil.txt", "absolute"),
    ("c:evil.txt", "absolute"),
    ("..\\evil.txt", "backslash"),
    ("\\\\server\\evil.txt", "backslash"),
    (member("link", stat.S_IFLNK | 0o777), "is a link"),
    (member("pipe", stat.S_IFIFO | 0o600), "special file"),
    (member("disk", stat.S_IFBLK | 0o600), "special file"),
]


def test_every_member_that_is_no_plain_file_inside_is_named(archive: Path) -> None:
    problems = refused(zipped(archive, "fine.txt", *(attack for attack, _ in ATTACKS)))
    assert len(problems) == len(ATTACKS)
    for problem, (_, said) in zip(problems, ATTACKS, strict=True):
        assert problem.startswith(f"{archive}: member ")
        assert said in problem


def test_nul_in_a_name(archive: Path) -> None:
    patched(zipped(archive, "good.png_.exe"), b"png_", b"png\0")
    assert "NUL" in refused(archive)[0]


def test_encrypted_members_and_other_methods(archive: Path) -> None:
    zipped(archive, "a")
    data = archive.read_bytes()
    for flags, method, said in ((1, 8, "encrypted"), (0x40, 8, "encrypted"), (0, 9, "method 9")):
        place = data.index(b"PK\x01\x02") + 8
        archive.write_bytes(data[:place] + struct.pack("<HH", flags, method) + data[place + 4 :])
        assert said in refused(archive)[0]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_would_be_written_over_each_other(archive: Path) -> None:
    problems = refused(zipped(archive, "a/b", "a/b", "a//c", "a/./c", "d", "d/e", "f", "f/"))
    assert len(problems) == 4
    for name, said in (("a/b", "2 times"), ("a/c", "2 times"), ("d", "both"), ("f", "both")):
        assert any(f"'{name}'" in problem and said in problem for problem in problems)


def test_bombs(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zipped(archive, "zeros", content=bytes(11_000_000))
    assert "bomb" in refused(archive)[0]
    zipped(archive, *"abc", content=bytes(4_000_000))  # each harmless
    assert "unpacks to 12000000 bytes: must be at most" in refused(archive, max_bytes=11_999_999)[0]
    unzip(archive, archive.parent / "enough", max_bytes=12_000_000)
    monkeypatch.setattr(files, "MAX_MEMBERS", 2)
    assert "3 members" in refused(archive)[0]
    monkeypatch.undo()
    usage = shutil.disk_usage(archive)._replace(free=11_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "the disk has 11000000 left" in refused(archive)[0]


@pytest.mark.parametrize("claimed", [3, 4_000_000])
def test_a_header_that_lies_about_the_size(archive: Path, claimed: int) -> None:
    zipped(archive, "zeros", content=bytes(1_000_000))
    patched(archive, struct.pack("<I", 1_000_000), struct.pack("<I", claimed))
    assert "'zeros' is damaged" in refused(archive)[0]


def test_members_that_share_their_bytes(archive: Path) -> None:
    """The directory names one member twice; a zip of this kind holds petabytes in megabytes."""
    data = zipped(archive, "aa").read_bytes()
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry = data[start:end]
    twin = entry.replace(b"aa", b"ab")
    size = struct.pack("<HHI", 2, 2, 2 * len(entry))
    archive.write_bytes(data[:end] + twin + data[end : end + 8] + size + data[end + 16 :])
    assert "overlap" in refused(archive)[0]


def test_no_zip_a_part_of_one_and_damage(archive: Path) -> None:
    archive.write_text("<html>")
    assert "is no zip" in refused(archive)[0]
    whole = zipped(archive, "a", "b", content=os.urandom(1000)).read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    assert "cut short" in refused(archive)[0]
    archive.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    assert "'a' is damaged" in refused(archive)[0]
    assert "is empty" in refused(zipped(archive))[0]
    assert "cannot be read" in refused(archive.parent)[0]


def test_a_name_that_the_disk_refuses(archive: Path) -> None:
    assert "cannot be written (File name too long)" in refused(zipped(archive, "x" * 300))[0]
    assert "cannot be written (File exists)" in refused(zipped(archive, "."))[0]


def test_a_hundred_bad_members_are_counted(archive: Path) -> None:
    problems = refused(zipped(archive, *(f"../{number}" for number in range(100))))
    assert len(problems) == 21
    assert problems[-1].endswith("and 80 more problems")
