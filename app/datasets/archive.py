"""Zips that may come from anyone, unpacked whole or not at all."""

from __future__ import annotations

import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path, PurePosixPath

from app.errors import UserError
from app.files import atomic_folder, check_regular

MAX_MEMBERS = 2_000_000  # of a zip
MAX_DEPTH = 64  # folders that a member may lie in
MAX_BYTES = 2 * 10**12  # unpacked, of a zip; what is free on the disk limits it as well
MAX_RATIO = 200  # unpacked to packed, of a member; JSON and blank images stay below 100
HARMLESS_BYTES = 10_000_000  # a member this small may have any ratio
LOCAL_HEADER_BYTES = 30  # before a member's data in a zip, at least
CHUNK_BYTES = 1 << 20
SHOWN_PER_ZIP = 20
# what zipfile raises on a member that its directory describes wrongly
DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, NotImplementedError)


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
        check_regular(archive)
        return zipfile.ZipFile(archive)
    except OSError as error:
        raise UserError(f"{archive}: cannot be read ({error.strerror})") from None
    except Exception as error:  # zipfile raises nearly anything on a damaged directory
        raise UserError(
            f"{archive}: is no zip, or is cut short ({error}); download or export it again"
        ) from None


def _zip_problems(members: list[zipfile.ZipInfo], max_bytes: int, free: int) -> list[str]:
    """Return all that speaks against unpacking, as the zip's directory tells it.

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
    """Return what is wrong with a member's name; None where it stays inside on any system."""
    if "\0" in name:
        return "has NUL in its name"
    if "\\" in name:
        return "has a backslash in its name; pack it anew with a tool that writes slashes"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "has an absolute path: must be relative"
    if name.count("/") > MAX_DEPTH:
        return f"lies more than {MAX_DEPTH} folders deep"
    if ".." in name.split("/"):
        return "leads out of the folder by '..'"
    return None


def _member_fault(member: zipfile.ZipInfo) -> str | None:
    """Return what else is wrong with a member; None where it is a plain file or a folder."""
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
    """Report members that would be written over each other, or into a file."""
    files = Counter(PurePosixPath(m.filename) for m in members if not m.is_dir())
    folders = {PurePosixPath(m.filename) for m in members if m.is_dir()}
    folders |= {parent for path in files for parent in path.parents}
    twice = [
        f"member '{path}' is there {count} times" for path, count in files.items() if count > 1
    ]
    return twice + [f"member '{path}' is both file and folder" for path in files.keys() & folders]


def _overlaps(members: list[zipfile.ZipInfo]) -> list[str]:
    """Report members that share bytes of the zip, by which a small one unpacks to petabytes.

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
