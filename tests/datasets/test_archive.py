from __future__ import annotations

import os
import shutil
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from app.datasets import archive as archive_module
from app.datasets.archive import unzip
from app.errors import UserError


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
    ("a/" * 2000 + "b", "more than 64 folders deep"),
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
    monkeypatch.setattr(archive_module, "MAX_MEMBERS", 2)
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


def test_a_pipe_is_not_waited_for(archive: Path) -> None:
    os.mkfifo(archive)
    assert "no regular file" in refused(archive)[0]


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
