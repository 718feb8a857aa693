"""The parts of all shards → one file: complete or not at all, each image once."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from app.console import counted
from app.datasets import rle
from app.datasets.coco import PROPOSAL
from app.errors import UserError
from app.files import atomic_folder, atomic_path, exists_problem, short_hash
from app.launch.shards import Shard
from app.scale.parts import SCHEMA, Row, find, read_mark, rows_of, shards
from app.scale.sources import items, read

log = logging.getLogger("app")
FORMS = {"coco": "coco.json", "parquet": "all.parquet", "dataset": "dataset"}
BAD = "bad_images.txt"
ANNOTATIONS = "_annotations.coco.json"
ROWS = 10_000  # of a group in the merged Parquet
SHOWN = 10  # problems


@dataclass
class Collected:
    """Hold what was merged.

    Attributes:
        bad: name and problem of images that could not be read.
        labels: classes, in the order in which they were found.
    """

    file: Path
    images: int = 0
    objects: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


def collect(
    folder: Path,
    form: str,
    file: Path | None,
    *,
    images: str | None = None,
    overwrite: bool = False,
) -> Collected:
    """Merge a folder's shards, and list the images that could not be read.

    Args:
        folder: output of `./infer.sh --shards`.
        form: of FORMS.
        file: None for its own name in the folder.
        images: the source that the shards were of; of a dataset, which holds them.

    Raises:
        UserError: a shard lacks or is not done, a part is damaged, an image is there twice or is
            not in the source; names all of them.
    """
    if (form == "dataset") != (images is not None):
        raise UserError("--images: is of --to dataset, which needs it: what --input was")
    if form not in FORMS:
        raise UserError(f"--to {form}: there is {', '.join(FORMS)}")
    target = file or folder / FORMS[form]
    if target.exists() and not overwrite:
        raise UserError(exists_problem(target.parent, f"holds {target.name} already"))
    found = shards(folder)
    _check_complete(found)
    collected = Collected(target)
    rows = _checked_rows(found, collected)
    if images is not None:
        with atomic_folder(target, replace=overwrite) as temporary:
            _write_dataset(temporary / "train", rows, collected, images)
    else:
        with atomic_path(target) as temporary:
            if form == "coco":
                with temporary.open("w", encoding="utf-8") as out:
                    _write_coco(out, rows, collected)
            else:
                _write_parquet(temporary, rows)
    with atomic_path(target.parent / BAD) as temporary:
        lines = [f"{name}\t{problem}\n" for name, problem in collected.bad]
        temporary.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    log.info(
        "%s, %s, of %s: %s",
        counted(collected.images, "image"),
        counted(collected.objects, "object"),
        counted(len(found), "shard"),
        target,
    )
    return collected


def _check_complete(found: dict[Shard, Path]) -> None:
    """Raise UserError where shards lack, or are not done."""
    count = next(iter(found)).count
    lacking = [n for n in range(count) if Shard(n, count) not in found]
    undone = [shard.number for shard, path in found.items() if read_mark(path) is None]
    if left := sorted({*lacking, *undone}):
        shown = ", ".join(map(str, left[:SHOWN])) + (", …" if len(left) > SHOWN else "")
        raise UserError(
            f"{counted(len(left), 'shard')} of {count} are not done: {shown}. Run them: the same "
            "command with --shard N does what is left"
        )


def _checked_rows(found: dict[Shard, Path], collected: Collected) -> Iterator[Row]:
    """Yield each image's row; raise UserError at the end where the parts do not hold each once."""
    problems: list[str] = []
    for path in (found[shard] for shard in sorted(found, key=lambda each: each.number)):
        seen: set[str] = set()
        mark = read_mark(path)
        for part in find(path):
            for row in rows_of(part):
                name = row["name"]
                if name in seen:
                    problems.append(f"{part}: {name} is there twice")
                    continue
                seen.add(name)
                collected.images += 1
                collected.objects += len(row["score"])
                if row["problem"] is not None:
                    collected.bad.append((name, row["problem"]))
                yield row
        if mark is not None and mark.images != len(seen):
            problems.append(f"{path}: has {len(seen)} images, and its mark says {mark.images}")
        if len(problems) > SHOWN:
            break
    if problems:
        raise UserError(problems[:SHOWN])


def _write_coco(out: TextIO, rows: Iterator[Row], collected: Collected) -> None:
    """Write COCO: annotations go to the file as they come, and images after them."""
    images: list[str] = []
    numbers: dict[str, int] = {}
    out.write('{"info": {"description": "found by SAM 3"}, "annotations": [')
    written = 0
    for image_id, row in enumerate(rows, start=1):
        size = row["height"], row["width"]
        record = {"id": image_id, "file_name": row["name"], "height": size[0], "width": size[1]}
        if row["problem"] is None:
            images.append(json.dumps(record))
        for index, label in enumerate(row["label"]):
            category = numbers.setdefault(label, len(numbers) + 1)
            written += 1
            out.write(",\n" if written > 1 else "\n")
            out.write(json.dumps(_annotation(row, index, written, image_id, category)))
    collected.labels = list(numbers)
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    out.write('],\n"images": [' + ",\n".join(images))
    out.write('],\n"categories": ' + json.dumps(categories) + "}\n")


def _write_dataset(folder: Path, rows: Iterator[Row], collected: Collected, source: str) -> None:
    """Write the images with their COCO, as the dataset builder reads them: as proposals."""
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    taken: set[str] = set()

    def placed() -> Iterator[Row]:
        for row in rows:
            if row["problem"] is None:
                path = places[row["name"]] = inner_path(row["name"], taken)
                taken.add(path)
                yield {**row, "name": path}

    with (folder / ANNOTATIONS).open("w", encoding="utf-8") as out:
        _write_coco(out, placed(), collected)
    left = set(places)
    for item in items(source, Shard(0, 1)):
        if item.name in left:
            left.remove(item.name)
            target = folder / places[item.name]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(read(item))
    if left:
        first = ", ".join(sorted(left)[:SHOWN])
        raise UserError(f"--images {source}: lacks {counted(len(left), 'image')}: {first}")


def inner_path(name: str, taken: Collection[str]) -> str:
    """Return a path within a folder for an image's name, which may be an address, or lead out."""
    parts = re.split(r"[/\\]+", re.sub("[^A-Za-z0-9._/\\\\ +-]", "-", name))
    path = "/".join(part for part in parts if part not in ("", ".", ".."))
    if path in taken:
        stem, dot, suffix = path.rpartition(".")
        path = f"{stem}-{short_hash(name, 8)}{dot}{suffix}"
    return path


def _annotation(row: Row, index: int, id: int, image_id: int, category: int) -> dict[str, Any]:
    """Return an object as COCO has it, with its score."""
    box = [float(side) for side in row["bbox"][index]]
    annotation: dict[str, Any] = {
        **{"id": id, "image_id": image_id, "category_id": category},
        **{"bbox": box, "score": row["score"][index], "area": box[2] * box[3], "iscrowd": 0},
        "source": PROPOSAL,
    }
    if row["rle"] is not None:
        mask: Any = {"size": [row["height"], row["width"]], "counts": row["rle"][index]}
        annotation |= {"segmentation": mask, "area": float(rle.area(mask))}
    return annotation


def _write_parquet(path: Path, rows: Iterator[Row]) -> None:
    with pyarrow.parquet.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        group: list[Row] = []
        for row in rows:
            group.append(row)
            if len(group) == ROWS:
                writer.write_table(pyarrow.Table.from_pylist(group, schema=SCHEMA))
                group = []
        if group:
            writer.write_table(pyarrow.Table.from_pylist(group, schema=SCHEMA))
