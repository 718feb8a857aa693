"""A journal on disk of the images that are done, from which a stopped run goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from app.errors import UserError
from app.files import check_no_links, exists_problem, lock, open_file, open_own, parse_json

FILE = ".predictions.jsonl"
MAX_LINE = 1 << 30  # bytes of an entry
_START = b'{"checkpoint": '  # of a journal: the first of the settings
CONTENTS = ("weights", "manifest")  # settings that stand for the content of a file
FLAGS = {  # of settings whose flag is not their name
    **{"prompts": "--prompt", "boxes": "--box", "negative_boxes": "--negative-box"},
    **{"size": "--model", "device": "--backend"},
}
Entry = dict[str, Any]  # of one image; see `batch.predict_batches`


@dataclass
class Contents:
    """Hold the content of a journal.

    Attributes:
        settings: those that its results depend on; None where there is no journal.
        lines: image that is done → offset of its line, bytes.
        files: those that its runs set out to write, done or not; relative to the output folder.
        end: of the last whole line, bytes; a kill may cut one short.
    """

    settings: dict[str, Any] | None = None
    lines: dict[str, int] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    end: int = 0


def read_contents(folder: Path) -> Contents:
    """Read the journal of an output folder; empty where there is none.

    Raises:
        UserError: the file is a link, or no journal.
    """
    contents, path = Contents(), folder / FILE
    check_no_links(folder, [FILE])
    if not path.exists():
        return contents
    with open_file(path) as file:
        start = file.read(len(_START))
        if start != _START[: len(start)]:  # a kill may have cut the first line short
            raise UserError(f"{path}: is no journal of results; move it, or name another folder")
        file.seek(0)
        while (line := file.readline(MAX_LINE)).endswith(b"\n"):
            try:
                _read_line(parse_json(line.decode()), contents)
            except (ValueError, KeyError, TypeError):
                break
            contents.end += len(line)
    return contents


def read_entries(folder: Path) -> Iterator[Entry]:
    """Yield the entries of an output folder's journal, as they were written."""
    with open_file(folder / FILE) as file:
        for start in read_contents(folder).lines.values():
            file.seek(start)
            yield parse_json(file.readline().decode())


def _read_line(value: Any, contents: Contents) -> None:
    """Add the value of a line to the contents; raise where it is none of a journal's."""
    if contents.settings is None:
        contents.settings = dict(value)
    elif "files" in value:
        contents.files.update(map(str, value["files"]))
    else:
        contents.lines[str(value["image"])] = contents.end


def _is_entry(value: Any, prompts: int) -> bool:
    """Return whether a line holds what `batch.predict_batches` makes of an image.

    Args:
        prompts: the number of them.
    """
    size = [value.get("height"), value.get("width")]
    return isinstance(value.get("found"), list) and all(
        isinstance(result, dict)
        and result.get("category_id") in range(1, prompts + 1)
        and _are_numbers(result.get("bbox"), 4)
        and _are_numbers([result.get("score")], 1)
        and (
            (mask := result.get("segmentation")) is None
            or (
                isinstance(mask, dict)
                and mask.get("size") == size
                and isinstance(mask.get("counts"), str)
            )
        )
        for result in value["found"]
    )


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(isinstance(value, int | float) for value in values)
    )


class Journal:
    """Keep a journal, as a context manager that closes the file.

    The file has a line for the settings, one for the files that a run sets out to write, and one
    for each image that is done. Detections are not held in memory. A line that a kill cut short is
    dropped.

    Args:
        folder: of the results; made where it is missing. `earlier` is what its journal holds.
        settings: those that the results depend on, as JSON takes them.
        overwrite: drop an earlier journal.

    Raises:
        UserError: the journal is of other settings, another run has locked it, or what stands in
            its place is no journal. Nothing is lost then: it is `begin` that writes.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self._file: BinaryIO = open_own(folder / FILE)
        try:
            self._lock(folder)
            self.earlier = read_contents(folder)
            earlier = Contents() if overwrite else self.earlier
            if earlier.lines and (changed := _changed(earlier.settings or {}, settings)):
                raise UserError(
                    exists_problem(folder, f"holds results of other settings ({changed})")
                )
            self._contents = earlier if earlier.lines else Contents()
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
        return len(self._contents.lines)

    def begin(self, files: Iterable[str]) -> None:
        """Begin to write: drop what a kill cut short, and note files."""
        self._file.truncate(self._contents.end)
        if not self._contents.lines:
            self._write(self._settings)
        self.note(files)

    def note(self, files: Iterable[str]) -> None:
        """Note files before they are written, so that a later run may overwrite them."""
        new = [file for file in files if file not in self._contents.files]
        if new:
            self._write({"files": new})
            self._contents.files.update(new)

    def add(self, entry: Entry) -> None:
        """Note that an image is done: its files are written."""
        self._contents.lines[entry["image"]] = self._write(entry)

    def read(self, image: str, state: Sequence[int]) -> Entry | None:
        """Return the entry of an image; None where it is not done, or has changed since.

        Args:
            image: its path, or a frame's number.
            state: of its file, or of the film's.
        """
        start = self._contents.lines.get(image)
        if start is None:
            return None
        self._file.seek(start)
        entry: Entry = parse_json(self._file.readline().decode())
        prompts = max(1, len(self._settings["prompts"]))  # a box alone is a prompt of its own
        whole = _is_entry(entry, prompts) and entry.get("state") == list(state)
        return entry if whole else None

    def _lock(self, folder: Path) -> None:
        if lock(self._file.fileno(), wait=False) is False:
            raise UserError(
                f"--output-dir {folder}: another run is at work here; wait, or name another folder"
            )

    def _write(self, value: Mapping[str, Any]) -> int:
        start = self._file.seek(0, 2)
        self._file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
        self._file.flush()
        return start


def file_state(path: Path) -> list[int]:
    """Return size in bytes and time of the last change, which tell whether a file has changed."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return "--threshold was 0.5, now 0.3"; an empty string where nothing differs."""
    after = json.loads(json.dumps(dict(now)))  # tuples become lists, as in the file
    return "; ".join(
        "the weights have changed since"
        if key in CONTENTS
        else f"{_flag(key)} was {_typed(before.get(key))}, now {_typed(after.get(key))}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    )


def _flag(key: str) -> str:
    """Return the flag of a setting."""
    return FLAGS.get(key, f"--{key.replace('_', '-')}")


def _typed(value: Any) -> str:
    """Return a value as it is typed on a command line."""
    if isinstance(value, list):
        return ",".join(map(_typed, value)) or "not given"
    return "not given" if value is None else str(value)
