"""Files that are whole or absent, locks, hashes, JSON, and what to say of a path that is taken."""

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
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.errors import UserError


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

    A failure or a kill at any moment leaves whatever stood at `path` before, whole. The next writer
    removes the temporary folders that killed writers left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_up(path)
    with _temporary_folder(path) as temporary:
        try:
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            _swap(temporary, path)
        finally:
            _remove(temporary)  # nothing, or what stood at `path` before


def clear_up(path: Path) -> None:
    """Finish what a killed writer of the folder `path` began, and remove its temporary folders."""
    for folder in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        with contextlib.suppress(FileNotFoundError), locked(folder, wait=False) as is_ours:
            if not is_ours:
                continue
            if folder.name.endswith(_ASIDE) and not path.exists():
                folder.rename(path)
            else:
                _remove(folder)


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


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN), whole or not at all."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a header and a line a row, whole or not at all; a missing value is an empty cell."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def read_json(path: Path, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Read JSON; raise UserError that names the file, the line and the column.

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
    with file.open("rb") as content:
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
    return next(name for name in _numbered(folder) if not (name.exists() and any(name.iterdir())))


def last_folder(folder: Path) -> Path | None:
    """Return what `free_folder` returned last: the highest of folder, folder-2, … that is there."""
    free = free_folder(folder)
    before = list(itertools.takewhile(lambda name: name != free, _numbered(folder)))
    return before[-1] if before else None


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
