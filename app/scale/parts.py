"""The files of a shard: parts, each written whole or not at all, and a mark once all are there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from app.errors import UserError
from app.files import atomic_path, exists_problem, read_json, remove_unfinished, write_json
from app.inference.detections import Detections
from app.inference.outputs import box_xywh
from app.launch.shards import Shard
from app.scale.sources import KINDS

DONE, SETTINGS = "done.json", "settings.json"
PATTERN = re.compile(r"shard-(\d{5,})-of-(\d{5,})")
Row = dict[str, Any]  # of an image; its columns are those of SCHEMA
SCHEMA = pyarrow.schema(
    [
        ("name", pyarrow.string()),
        ("width", pyarrow.int32()),  # pixels; null of an image that could not be read
        ("height", pyarrow.int32()),
        ("label", pyarrow.list_(pyarrow.string())),  # of each object: its prompt
        ("score", pyarrow.list_(pyarrow.float32())),
        ("bbox", pyarrow.list_(pyarrow.list_(pyarrow.float32(), 4))),  # x, y, width, height
        ("rle", pyarrow.list_(pyarrow.string())),  # COCO's compressed counts; null without masks
        ("best_score", pyarrow.float32()),  # of any query, also below the threshold
        ("problem", pyarrow.string()),  # why it could not be read; else null
    ]
)


@dataclass(frozen=True)
class Mark:
    """Hold what a shard that is done counts."""

    images: int
    failed: int
    objects: int


def folder_of(output: Path, shard: Shard) -> Path:
    return output / f"shard-{shard.number:05}-of-{shard.count:05}"


def row_of(name: str, found: Detections) -> Row:
    """Return the row of an image that was predicted on."""
    return {
        "name": name,
        "width": found.width,
        "height": found.height,
        "label": [found.prompts[int(prompt)] for prompt in found.prompt_ids],
        "score": [float(score) for score in found.scores],
        "bbox": [box_xywh(found, index) for index in range(len(found))],
        "rle": None if found.masks is None else [mask["counts"] for mask in found.masks],
        "best_score": found.best_score,
        "problem": None,
    }


def failed_row(name: str, problem: str) -> Row:
    """Return the row of an image that could not be read."""
    empty: Row = {"label": [], "score": [], "bbox": [], "rle": None, "best_score": None}
    return {"name": name, "width": None, "height": None, **empty, "problem": problem}


class Parts:
    """The parts of one shard.

    Args:
        folder: of the shard.
        kind: of KINDS.
        settings: that all parts share; another run with others is refused.

    Raises:
        UserError: the folder holds parts of other settings.
    """

    def __init__(self, folder: Path, kind: str, settings: Mapping[str, Any]) -> None:
        self.folder, self.kind = folder, kind
        folder.mkdir(parents=True, exist_ok=True)
        self._next = 0
        for part in find(folder):
            self._next = max(self._next, int(part.stem.rpartition("-")[2]) + 1)
        remove_unfinished(self._path(self._next))
        now = json.loads(json.dumps(dict(settings)))
        file = folder / SETTINGS
        if file.is_file():
            before = read_json(file)
            if before != now:
                keys = sorted({*before, *now})
                told = ", ".join(key for key in keys if before.get(key) != now.get(key))
                state = f"holds results of other settings ({told})"
                raise UserError(exists_problem(folder.parent, state))
        else:
            write_json(file, now)

    @property
    def mark(self) -> Mark | None:
        """Return what was counted when the shard was done; None: it is not."""
        return read_mark(self.folder)

    def names(self) -> set[str]:
        """Return the names of all images of the parts."""
        return {name for part in find(self.folder) for name in names_of(part)}

    def add(self, rows: Sequence[Row]) -> None:
        """Write a part."""
        if not rows:
            return
        with atomic_path(self._path(self._next)) as temporary:
            if self.kind == "parquet":
                table = pyarrow.Table.from_pylist(list(rows), schema=SCHEMA)
                pyarrow.parquet.write_table(table, temporary, compression="zstd")
            else:
                with temporary.open("w", encoding="utf-8") as file:
                    for row in rows:
                        file.write(json.dumps(row) + "\n")
        self._next += 1

    def finish(self) -> Mark:
        """Note that all images of the shard are in its parts."""
        images = failed = objects = 0
        for part in find(self.folder):
            for row in rows_of(part, ["name", "score", "problem"]):
                images += 1
                failed += row["problem"] is not None
                objects += len(row["score"])
        mark = Mark(images, failed, objects)
        write_json(self.folder / DONE, vars(mark))
        return mark

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05}.{self.kind}"


def find(folder: Path) -> list[Path]:
    """Return the parts of a shard, in their order."""
    found = [folder.glob(f"part-*.{kind}") for kind in KINDS]
    return sorted(path for each in found for path in each)


def read_mark(folder: Path) -> Mark | None:
    """Return the mark of a shard; None where it is not done."""
    file = folder / DONE
    if not file.is_file():
        return None
    try:
        return Mark(**{key: int(value) for key, value in read_json(file).items()})
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"{file}: is no mark of a shard; remove it, and run the shard") from None


def names_of(part: Path) -> list[str]:
    """Return the names of a part's images."""
    return [row["name"] for row in rows_of(part, ["name"])]


def rows_of(part: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a part.

    Args:
        columns: those that are wanted; None: all.

    Raises:
        UserError: it is no part, or cut short.
    """
    try:
        if part.suffix == ".parquet":
            table = pyarrow.parquet.ParquetFile(part)
            for batch in table.iter_batches(4096, columns=columns):
                yield from batch.to_pylist()
            return
        with part.open("rb") as file:
            for line in file:
                row = json.loads(line)
                yield row if columns is None else {key: row[key] for key in columns}
    except (pyarrow.ArrowException, ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{part}: is damaged ({error}); remove it, and run its shard") from None


def shards(output: Path) -> dict[Shard, Path]:
    """Return the shards' folders of an output folder.

    Raises:
        UserError: there are none, or of several counts.
    """
    found: dict[Shard, Path] = {}
    for path in sorted(output.glob("shard-*-of-*")):
        if matched := PATTERN.fullmatch(path.name):
            found[Shard(int(matched[1]), int(matched[2]))] = path
    counts = sorted({shard.count for shard in found})
    if not found:
        raise UserError(f"{output}: holds no shards of ./infer.sh --shards")
    if len(counts) > 1:
        told = " and ".join(map(str, counts))
        raise UserError(f"{output}: holds shards of {told}; each belongs in a folder of its own")
    return found
