"""What is done so far, image by image, on disk: a run that was stopped goes on from there."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from app.errors import UserError

FILE = ".predictions.jsonl"
Entry = dict[str, Any]  # of one image; see `folder.predict_images`


class Journal:
    """A line for the settings, then one for each image that is done; a context manager.

    Only where each image's line begins is kept in memory. A line that a kill cut short is dropped.

    Args:
        folder: where the results go; made where it is not there.
        settings: what the results depend on, as JSON takes it.
        overwrite: begin anew whatever is there.

    Raises:
        UserError: other settings have been used here, or another run is at work.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        self._lines: dict[str, int] = {}  # image → where its line begins
        folder.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = (folder / FILE).open("a+b")
        try:
            self._lock(folder)
            earlier = None if overwrite else self._index()
            if earlier is not None and self._lines and (changed := _changed(earlier, settings)):
                raise UserError(
                    f"--output-dir {folder}: holds results of other settings ({changed}). Replace "
                    "them with --overwrite, or name another folder."
                )
            if not self._lines:
                self._file.truncate(0)
                self._write(dict(settings))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, entry: Entry) -> None:
        """Note that an image is done; its files are written."""
        self._lines[entry["image"]] = self._write(entry)

    def read(self, image: Path) -> Entry | None:
        """What was found in an image; None where it is not done, or has changed since."""
        start = self._lines.get(str(image))
        if start is None:
            return None
        self._file.seek(start)
        entry: Entry = json.loads(self._file.readline())
        return entry if entry["state"] == file_state(image) else None

    def _lock(self, folder: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output-dir {folder}: another run is at work here; wait, or name another folder"
            ) from None
        except OSError:  # NFS without locks
            pass

    def _write(self, value: Mapping[str, Any]) -> int:
        start = self._file.seek(0, 2)
        self._file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
        self._file.flush()
        return start

    def _index(self) -> dict[str, Any] | None:
        """The settings of the first line; notes where the others begin."""
        self._file.seek(0)
        settings, start = None, 0
        for line in self._file:
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if value is None or not line.endswith(b"\n"):
                self._file.truncate(start)
                break
            if settings is None:
                settings = value
            else:
                self._lines[value["image"]] = start
            start += len(line)
        return settings


def has_results(folder: Path) -> bool:
    """Whether the folder is one that a run has written to."""
    return (folder / FILE).is_file()


def file_state(path: Path) -> list[int]:
    """Changes when the file does: its bytes, and when it was written."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`threshold was 0.5, now 0.3`; an empty string where nothing differs."""
    after = json.loads(json.dumps(dict(now)))  # tuples become lists, as in the file
    return "; ".join(
        f"{key} was {before.get(key)}, now {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    )
