"""Files that are whole or absent: atomic writes, JSON in and out, zips that others made."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from app.errors import UserError

MAX_MEMBERS = 2_000_000  # of a zip
MAX_BYTES = 2 * 10**12  # unpacked, of a zip; what is free on the disk limits it as well
MAX_RATIO = 200  # unpacked to packed, of a member; JSON and blank images stay below 100
HARMLESS_BYTES = 10_000_000  # a member this small may have any ratio
LOCAL_HEADER_BYTES = 30  # before a member's data in a zip, at least
CHUNK_BYTES = 1 << 20
SHOWN_PER_ZIP = 20
# what zipfile raises on a member that its directory describes wrongly
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, NotImplementedError)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place only when the block succeeds.

    A failure or a kill leaves whatever stood at `path` before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; swap it into place only when the block succeeds.

    A failure or a kill at any moment leaves whatever stood at `path` before, whole. What killed
    writers left beside it is removed by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_up(path)
    with _locked_folder(path) as temporary:
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            _swap(temporary, path)
        finally:
            _remove(temporary)  # nothing, or what stood at `path` before


def _prefix(path: Path) -> str:
    return f".{path.name}.part-"


@contextlib.contextmanager
def _locked_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, locked while its writer lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
        with _lock(folder) as locked:
            if locked is not False and folder.is_dir():  # else another took it for left over
                yield folder
                return


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool | None]:
    """Whether the folder is now ours alone, None where the file system cannot say.

    The lock ends with the block, or the process.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    locked: bool | None = True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        locked = False
    except OSError:  # NFS locks no folders
        locked = None
    try:
        yield locked
    finally:
        os.close(handle)


def clear_up(path: Path) -> None:
    """Finish what a killed writer of `path` began, and remove what it left."""
    for folder in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        with _lock(folder) as unused:
            if not unused:
                continue
            if folder.name.endswith(_ASIDE) and not path.exists():
                folder.rename(path)
            else:
                _remove(folder)


def _swap(new: Path, path: Path) -> None:
    """Put `new` at `path` at one stroke; what stood there is then at `new`, or gone."""
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        # Two renames: killed between them, the old one lies aside until the next writer returns it.
        aside = new.with_name(new.name + _ASIDE)
        path.rename(aside)
        new.rename(path)
        _remove(aside)


_ASIDE = ".old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fs.h


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux's; some file systems lack it
    names = os.fsencode(one), os.fsencode(other)
    return rename is not None and not rename(
        _AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN), whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read JSON; raises UserError that names the file, the line and the column.

    Args:
        pairs_hook: makes each object from its keys and values, as in `json.loads`.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    try:
        return json.loads(text, object_pairs_hook=pairs_hook)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}. "
            "Export the file again; it may have been cut short."
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of 4,300 digits
        raise UserError(f"{path}: JSON that no dataset holds ({error})") from None


def unzip(archive: Path, folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Unpack a zip that may come from anyone into `folder`, whole or not at all.

    Links, devices and permissions are never made, and what a member's header claims is checked
    against what comes out.

    Args:
        max_bytes: of all members, unpacked.

    Raises:
        UserError: no sound zip, every member that is refused, or more than the disk holds.
    """
    with _open_zip(archive) as file, atomic_folder(folder) as temporary:
        members = file.infolist()
        free = shutil.disk_usage(temporary).free
        if problems := _zip_problems(members, max_bytes, free):
            if (rest := len(problems) - SHOWN_PER_ZIP) > 0:
                problems[SHOWN_PER_ZIP:] = [f"and {rest} more problems"]
            raise UserError([f"{archive}: {problem}" for problem in problems])
        for member in members:
            _extract(file, member, temporary)


def _open_zip(archive: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(archive)
    except OSError as error:
        raise UserError(f"{archive}: cannot be read ({error.strerror})") from None
    except Exception as error:  # zipfile raises nearly anything on a damaged directory
        raise UserError(
            f"{archive}: is no zip, or is cut short ({error}); download or export it again"
        ) from None


def _zip_problems(members: list[zipfile.ZipInfo], max_bytes: int, free: int) -> list[str]:
    """All that speaks against unpacking, told from the directory alone.

    Args:
        free: bytes on the disk.
    """
    problems = [] if members else ["is empty"]
    if len(members) > MAX_MEMBERS:
        problems.append(f"has {len(members)} members: must have at most {MAX_MEMBERS}")
    total = sum(member.file_size for member in members)
    if total > max_bytes:
        problems.append(f"unpacks to {total} bytes: must be at most {max_bytes}")
    elif total > free:
        problems.append(f"unpacks to {total} bytes and the disk has {free} left; free some")
    for member in members:
        # Python 3.13's filename may come from an extra field; that of others ends at a NUL
        faults = (_name_fault(member.orig_filename), _name_fault(member.filename))
        if fault := faults[0] or faults[1] or _member_fault(member):
            problems.append(f"member {member.orig_filename!r} {fault}")
    return problems + _collisions(members) + _overlaps(members)


def _name_fault(name: str) -> str | None:
    """What is wrong with a member's name; None where it stays inside the folder, on any system."""
    if "\0" in name:
        return "has NUL in its name"
    if "\\" in name:
        return "has a backslash in its name; pack it anew with a tool that writes slashes"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "has an absolute path: must be relative"
    if ".." in name.split("/"):
        return "leads out of the folder by '..'"
    return None


def _member_fault(member: zipfile.ZipInfo) -> str | None:
    """What is wrong with a member beside its name; None where it is a plain file or a folder."""
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind == stat.S_IFLNK:
        return "is a link: pack the file itself"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return f"is a special file (mode {kind:o}): remove it"
    if member.flag_bits & 0x41:  # encrypted, strongly encrypted
        return "is encrypted: unpack it yourself and give the folder"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"has compression method {member.compress_type}: pack it anew, with deflate"
    if member.file_size > max(HARMLESS_BYTES, MAX_RATIO * member.compress_size):
        return (
            f"grows from {member.compress_size} to {member.file_size} bytes: a bomb, or blank "
            "data; unpack it yourself and give the folder"
        )
    return None


def _collisions(members: list[zipfile.ZipInfo]) -> list[str]:
    """Members that would be written over each other, or into a file."""
    files = Counter(PurePosixPath(m.filename) for m in members if not m.is_dir())
    folders = {PurePosixPath(m.filename) for m in members if m.is_dir()}
    folders |= {parent for path in files for parent in path.parents}
    twice = [
        f"member '{path}' is there {count} times" for path, count in files.items() if count > 1
    ]
    return twice + [f"member '{path}' is both file and folder" for path in files.keys() & folders]


def _overlaps(members: list[zipfile.ZipInfo]) -> list[str]:
    """Members that share bytes of the zip: how a small one unpacks to petabytes.

    Python 3.11.8, 3.12.2 and later look at this as well.
    """
    ordered = sorted(members, key=lambda member: member.header_offset)
    return [
        f"members {first.filename!r} and {second.filename!r} overlap: a bomb; do not use this zip"
        for first, second in pairwise(ordered)
        if first.header_offset + LOCAL_HEADER_BYTES + first.compress_size > second.header_offset
    ]


def _extract(file: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    path = folder / PurePosixPath(member.filename)
    place = f"{file.filename}: member {member.filename!r}"
    try:
        if member.is_dir():
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_member(file, member, path)
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror})") from None
    except DAMAGED as error:
        raise UserError(f"{place} is damaged ({error}); download or export the zip again") from None


def _write_member(file: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    written = 0
    # "x": where the disk takes A and a for one name, the second is an error
    with file.open(member) as source, path.open("xb") as target:
        while (chunk := source.read(CHUNK_BYTES)) and written <= member.file_size:
            written += target.write(chunk)
    if written != member.file_size:
        raise zipfile.BadZipFile(f"it does not unpack to the {member.file_size} bytes it claims")


def hash_file(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits: some 3 s for SAM 3's weights."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())
