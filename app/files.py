"""Files that are whole or absent, locks, hashes, JSON, and what to say of a path that is taken.

What is read may come from anyone: it is opened where it is a regular file, and parsed within
bounds. What is written never goes through a link.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from app.errors import UserError

MAX_JSON_BYTES = 4 << 30  # of a dataset; COCO's own largest has 0.5 GB
SETTINGS_BYTES = 16 << 20  # of a JSON that holds settings, not data
MAX_DEPTH = 64  # lists and objects within each other, in a JSON
MAX_DIGITS = 24  # of a whole number in a JSON; 64 bits have 20


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


def remove_unfinished(path: Path) -> None:
    """Remove what killed writers of the file `path` left beside it.

    It is for who has claimed the folder: another writer's would go as well.
    """
    patterns = [f"{glob.escape(f'.{path.name}.')}*"]
    if path.suffix == ".safetensors":
        patterns.append(".tmp??????")  # what the library has not finished is called so
    for part in (part for pattern in patterns for part in path.parent.glob(pattern)):
        if part.is_file():
            part.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; swap it into place only when the block succeeds.

    A failure or a kill at any moment leaves whatever stood at `path` before, whole. The next writer
    removes the temporary folders that killed writers left.

    Args:
        replace: whether what stands at `path` may go, also what came there during the block.

    Raises:
        UserError: without `replace`, where another process writes `path` too, or has written it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if clear_up(path) and not replace:
        raise UserError(f"{path}: another process is writing it; wait, or name another folder")
    with _temporary_folder(path) as temporary:
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            if replace:
                _swap(temporary, path)
            else:
                _put(temporary, path)
        finally:
            _remove(temporary)  # nothing, or what stood at `path` before


def clear_up(path: Path) -> bool:
    """Finish what a killed writer of the folder `path` began, and remove its temporary folders.

    Returns:
        Whether another process is writing the folder.
    """
    written = False
    for folder in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        with contextlib.suppress(FileNotFoundError), locked(folder, wait=False) as is_ours:
            if not is_ours:
                written = True
            elif folder.name.endswith(_ASIDE) and not path.exists():
                folder.rename(path)
            else:
                _remove(folder)
    return written


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, locked while its writer lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
        # Before it is locked, another writer may take it for a killed one's and remove it.
        with contextlib.ExitStack() as stack:
            try:
                is_ours = stack.enter_context(locked(folder, wait=False))
            except FileNotFoundError:
                continue
            if is_ours is not False and folder.is_dir():
                yield folder
                return


def _prefix(path: Path) -> str:
    return f".{path.name}.part-"


def _swap(new: Path, path: Path) -> None:
    """Put `new` at `path` in one step; what stood there is then at `new`, or removed."""
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        # Two renames: killed between them, the old one lies aside until the next writer returns it.
        aside = new.with_name(new.name + _ASIDE)
        path.rename(aside)
        new.rename(path)
        _remove(aside)


def _put(new: Path, path: Path) -> None:
    """Put `new` at `path`, where nothing stands, or an empty folder."""
    try:
        new.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(
            f"{path}: another process wrote it meanwhile; name another folder"
        ) from None


_ASIDE = ".old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fs.h


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; return False where the system cannot."""
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


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool | None]:
    """Hold the lock of a file or folder while the block runs; yield what `lock` returns.

    Args:
        path: there already.
        wait: as of `lock`.
    """
    # NFS locks a file for a writer alone, and no folder can be opened for writing.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        yield lock(handle, wait=wait)
    finally:
        os.close(handle)


def lock(handle: int, *, wait: bool = True) -> bool | None:
    """Lock an open file or folder, so that no other open one of the same path holds its lock.

    The lock ends when the file is closed, or with the process, however that ends.

    Args:
        handle: file descriptor.
        wait: until the other holder is done.

    Returns:
        True: the lock is held. False: another holds it. None: the file system has no locks (some
        network disks), so that nothing can be said.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def claim(folder: Path) -> None:
    """Keep other processes from writing to an output folder until this process ends; make it.

    Raises:
        UserError: another process has claimed it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open_own(folder / LOCK)
    try:
        # Of the process, as `flock` is not: a killed run's workers would hold that one for a while.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"{folder}: another process is at work here; wait, or name another folder"
        ) from None
    except OSError:  # the file system has no locks
        pass
    _CLAIMS.append((folder.resolve(), file))


def give_up(folder: Path) -> None:
    """Let another process claim a folder that this one has claimed."""
    for claimed in [each for each in _CLAIMS if each[0] == folder.resolve()]:
        _CLAIMS.remove(claimed)
        claimed[1].close()


LOCK = ".lock"  # in an output folder that a process has claimed
_CLAIMS: list[tuple[Path, BinaryIO]] = []  # open, as a lock ends with its file


def open_file(path: Path) -> BinaryIO:
    """Open a regular file to read its bytes.

    A pipe would be waited for without an end, and a device may act when it is opened.

    Raises:
        OSError: the file cannot be opened, or is no regular file.
    """
    check_regular(path)
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe since the check
    return os.fdopen(handle, "rb")


def check_regular(path: Path) -> None:
    """Raise OSError where `path` leads to no regular file: a folder, a pipe, a device, nothing."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is no regular file: a pipe, socket or device", str(path))


def open_own(path: Path) -> BinaryIO:
    """Open a file of ours to read and append, or make it.

    Raises:
        UserError: the path is a link, has a second name, or is no regular file, so that another
            file would be written.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise UserError(f"{path}: is a link or no regular file; remove it") from None
    state = os.fstat(handle)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
        os.close(handle)
        raise UserError(f"{path}: is no regular file, or another name of one; remove it")
    return os.fdopen(handle, "a+b")


def check_no_links(folder: Path, names: Sequence[str]) -> None:
    """Raise UserError where a file or folder of the output `folder` is a link.

    The output folder itself may be one: the user named it.

    Args:
        names: relative paths that will be written; each folder on their way is looked at.
    """
    if not folder.exists():
        return
    inner = sorted({parent for name in names for parent in Path(name).parents} - {Path()})
    places = [*(folder / parent for parent in inner), *(folder / name for name in names)]
    problems = [
        f"{place}: is a link, and what is written there would land in {place.readlink()}; remove "
        "the link, or name that folder as the output"
        for place in places
        if place.is_symlink()
    ]
    if problems:
        raise UserError(problems)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all; what UTF-8 cannot encode becomes `\\udcff`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN), whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a header and a line a row, whole or not at all; a missing value is an empty cell."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def csv_text(words: str) -> str:
    """Return a foreign name as a cell that no spreadsheet takes for a formula.

    As OWASP has it ("CSV injection"): an apostrophe goes before a cell that begins as one.
    """
    return f"'{words}" if words.startswith(("=", "+", "-", "@", "\t", "\r")) else words


def read_text(path: Path, most: int = SETTINGS_BYTES) -> str:
    """Read UTF-8 text; raise UserError that names the file and what is wrong.

    Args:
        most: bytes.
    """
    try:
        with open_file(path) as file:
            if os.fstat(file.fileno()).st_size > most:
                raise UserError(f"{path}: has more than the {most} bytes that such a file may have")
            return file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None


def read_json(
    path: Path,
    pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
    *,
    most: int = MAX_JSON_BYTES,
) -> Any:
    """Read JSON; raise UserError that names the file, the line and the column.

    Args:
        pairs_hook: makes each object from its keys and values, as in `json.loads`.
        most: bytes.
    """
    text = read_text(path, most)
    try:
        return parse_json(text, pairs_hook)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}. "
            "Export the file again; it may have been cut short."
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: JSON that no dataset holds ({error})") from None


def parse_json(text: str, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse JSON within bounds, so that whatever walks through the values comes to an end.

    A whole number of more than `MAX_DIGITS` digits is read as a float, as JavaScript does.

    Raises:
        ValueError: broken JSON (`json.JSONDecodeError`), or nested more than `MAX_DEPTH` deep.
    """
    data = text.encode("utf-8", "surrogatepass")  # bytes are looked through ten times as fast
    # A hook for each number would double the time of large files; few have numbers that need one.
    has_long = b"0" * (MAX_DIGITS + 1) in data.translate(_DIGITS)
    try:
        value = json.loads(
            text, object_pairs_hook=pairs_hook, parse_int=_short_int if has_long else None
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _is_deep(data):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return value


_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_PLAIN = bytes(set(range(256)) - set(b'[]{}"'))  # what tells nothing of depth
_STEPS = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
_BRACKET = re.compile(rb'"[^"]*"|[][{}]')  # or a string, whose brackets are none


def _short_int(digits: str) -> float:
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _is_deep(data: bytes) -> bool:
    """Return whether the brackets of sound JSON are nested more than `MAX_DEPTH` deep."""
    unescaped = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Two quotes side by side end one string and begin the next, or are a string of no brackets.
    depth, bare = 0, unescaped.translate(None, _PLAIN).replace(b'""', b"")
    for found in _BRACKET.finditer(bare):
        depth += _STEPS.get(found[0], 0)
        if depth > MAX_DEPTH:
            return True
    return False


def flatten(node: Any, *, lists: bool = False, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key; empty mappings have none.

    Args:
        lists: go into lists that hold mappings too, with each item's index as its key; else a list
            is a leaf.
        prefix: dotted key of `node` itself.
    """
    if isinstance(node, Mapping):
        items = [(str(key), value) for key, value in node.items()]
    elif lists and isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
        items = [(str(index), item) for index, item in enumerate(node)]
    else:
        return {prefix: node}
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= flatten(value, lists=lists, prefix=f"{prefix}.{key}" if prefix else key)
    return leaves


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal: some 3 s for SAM 3's weights."""
    digest = hashlib.sha256()
    with open_file(file) as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def short_hash(text: str, digits: int) -> str:
    """Return the first hexadecimal digits of a text's SHA-256, for the name of a file or folder.

    Args:
        text: may hold the surrogates by which Python names paths that are not UTF-8.
        digits: 8 tell apart what one folder holds; 16, what is never listed side by side.
    """
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:digits]


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def check_writable(folder: Path) -> None:
    """Refuse an output folder that cannot be made or written, before any work is done.

    Raises:
        UserError: what is in the way.
    """
    there = nearest_existing(folder)
    if not there.is_dir():
        raise UserError(f"--output-dir {folder}: cannot be written ({there} is no folder)")
    if not os.access(there, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(there).f_flag & os.ST_RDONLY
        reason = os.strerror(errno.EROFS if is_read_only else errno.EACCES)
        raise UserError(f"--output-dir {folder}: cannot be written ({reason})")


def free_folder(folder: Path) -> Path:
    """Return `folder`, or the first of folder-2, folder-3, … that is missing or empty.

    For outputs that the user has not named: they are never in the way.
    """
    return next(name for name in _numbered(folder) if not _holds_something(name))


def last_folder(folder: Path) -> Path | None:
    """Return what `free_folder` returned last: the highest of folder, folder-2, … that is there."""
    free = free_folder(folder)
    before = list(itertools.takewhile(lambda name: name != free, _numbered(folder)))
    return before[-1] if before else None


def _holds_something(path: Path) -> bool:
    return path.exists() and any(inside.name != LOCK for inside in path.iterdir())


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    for number in itertools.count(2):
        yield Path(f"{folder}-{number}")


def exists_problem(
    path: Path, state: str, *, option: str = "--output-dir", instead: str = ""
) -> str:
    """Return the problem of an output that exists, for a UserError: replace it, or write elsewhere.

    Args:
        path: the output that was asked for, by `option`.
        state: what is there, such as "holds weights already".
        instead: another way out, to name first, such as "Go on with --resume".
    """
    remedy = f"{instead}, replace it" if instead else "Replace it"
    return f"{option} {path}: {state}. {remedy} with --overwrite, or name another folder."
