"""Files that are whole or absent: atomic writes, JSON in and out."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
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

    A failure or a kill at any moment leaves whatever stood at `path` before, whole. What killed
    writers left beside it is removed by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_up(path)
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


def _clear_up(path: Path) -> None:
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
