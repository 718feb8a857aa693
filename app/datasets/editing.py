"""The labels of a folder of images, edited an image at a time: a COCO JSON beside them.

What is on disk holds: the file is read again where another process has written it, and an edit is
there, whole, before its caller goes on.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from app.config.reading import AS_WRITTEN
from app.datasets.build import JSON_NAMES
from app.datasets.check import MAX_NAME, as_read, keep_doubled, listed
from app.datasets.coco import (
    UNFINISHED,
    Annotation,
    annotation_to_json,
    compress,
    examine_document,
)
from app.datasets.faults import Action, Findings, lines
from app.datasets.geometry import box_fault, clip_box, is_absent, mask_fault
from app.datasets.image_files import is_unicode, usable_header
from app.datasets.images import EXTENSIONS
from app.datasets.names import Names, walk_images
from app.errors import UserError
from app.files import locked, read_json, write_text

Object = tuple[dict[str, Any], Annotation]  # an entry of the file, and what it says
INFO = {"description": "labelled in the page of ./serve.sh --label"}
EMPTY: dict[str, Any] = {"info": INFO, "images": [], "annotations": [], "categories": []}


@dataclass(frozen=True)
class Shape:
    """An object as an editor has it.

    Attributes:
        id: of the annotation that it is; None: a new one.
        box_xywh: pixels; passed over where there is a mask.
        mask: COCO RLE or polygons, unchecked; None: a box alone.
        score: 0..1, of a proposal that nobody has accepted; None of labels.
    """

    id: int | None
    name: str
    box_xywh: Sequence[float]
    mask: Any
    score: float | None


@dataclass(frozen=True)
class Labels:
    """The labels of an image.

    Attributes:
        version: another one after every change.
        finished: whether a person is done with it.
        objects: each with its class.
    """

    name: str
    width: int
    height: int
    version: str
    finished: bool
    objects: tuple[tuple[str, Annotation], ...]


class StaleError(Exception):
    """An edit of labels that somebody else has changed meanwhile.

    Attributes:
        labels: what they are now.
    """

    def __init__(self, labels: Labels) -> None:
        super().__init__(f"{labels.name}: was changed by somebody else")
        self.labels = labels


class LabelFile:
    """The labels of a folder's images, in its `_annotations.coco.json`.

    Several threads may call it, and several processes may have one of the same folder.

    Args:
        folder: of images, at any depth.

    Raises:
        UserError: no folder, or labels with faults that an edit could make worse.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give one of images")
        self.folder = folder.resolve()
        self.file = self.folder / JSON_NAMES[0]
        self._lock = threading.RLock()
        self._state: tuple[int, ...] | None = ()
        self._sizes: dict[str, tuple[int, int]] = {}
        self._document: dict[str, Any] = EMPTY
        self._images: dict[str, dict[str, Any]] = {}  # by name
        self._objects: dict[int, list[Object]] = defaultdict(list)  # by image id
        self._names: dict[int, str] = {}  # of the classes
        self._refresh()

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes, in the order of the file."""
        with self._lock:
            self._refresh()
            return list(self._names.values())

    def names(self) -> list[str]:
        """Return the images' paths within the folder, sorted."""
        images = [path for path in walk_images(self.folder) if not path.is_symlink()]
        found = (path.relative_to(self.folder).as_posix() for path in images)
        return sorted(name for name in found if is_unicode(name))

    def counts(self) -> dict[str, tuple[bool, int, int]]:
        """Return of each image with labels whether it is finished, its objects, its proposals."""
        with self._lock:
            self._refresh()
            return {
                name: (
                    self._is_finished(name),
                    len(objects := self._objects_of(name)),
                    sum(each.score is not None for _, each in objects),
                )
                for name in self._images
            }

    def path(self, name: str) -> Path:
        """Return the file of an image.

        Raises:
            KeyError: there is no such image in the folder.
        """
        path, parts = self.folder / name, name.split("/")
        if (
            not is_unicode(name)
            or "\0" in name
            or any(part.startswith(".") or not part for part in parts)
            or not name.lower().endswith(EXTENSIONS)
            or not path.is_file()
            or path.resolve() != path
        ):
            raise KeyError(name)
        return path

    def read(self, name: str) -> Labels:
        """Return the labels of an image.

        Raises:
            KeyError: there is no such image in the folder.
            ImageError: its file is none.
        """
        size = self._size(name)
        with self._lock:
            self._refresh()
            return self._labels(name, size)

    def write(self, name: str, version: str, shapes: Sequence[Shape], finished: bool) -> Labels:
        """Make these the labels of an image, on disk; return them as they are there.

        Args:
            version: of the labels that were changed.

        Raises:
            KeyError, ImageError: as of `read`.
            StaleError: it has other labels now; nothing is written.
            UserError: each shape that is none; nothing is written.
        """
        size = self._size(name)
        with self._lock, locked(self.folder):
            self._refresh()
            now = self._labels(name, size)
            if version != now.version:
                raise StaleError(now)
            known = {raw["id"]: (raw, each) for raw, each in self._objects_of(name)}
            if faults := self._faults(shapes, size, known, finished):
                raise UserError(faults)
            images, annotations = (listed(self._document, k) for k in ("images", "annotations"))
            entry = self._images.get(name) or {
                "id": _free(images),
                "file_name": name,
                "width": size[0],
                "height": size[1],
            }
            id = entry["id"]
            entry = {key: value for key, value in entry.items() if key != UNFINISHED}
            entry |= {} if finished else {UNFINISHED: True}
            categories, names = list(listed(self._document, "categories")), dict(self._names)
            objects, free = [], _free(annotations)
            for shape in shapes:
                category = _category(shape.name, names, categories)
                raw, before = known.get(shape.id or 0, ({"id": free, "image_id": id}, None))
                free += before is None
                objects.append(_changed(shape, category, raw, before, size))
            images = [each for each in images if each["id"] != id]
            is_listed = bool(objects) or finished  # else nothing is left to say of it
            if is_listed:
                images = sorted([*images, entry], key=lambda each: str(each["file_name"]))
            others = [each for each in annotations if each["image_id"] != id]
            document = {
                **self._document,
                "images": images,
                "annotations": [*others, *(raw for raw, _ in objects)],
                "categories": categories,
            }
            write_text(self.file, _to_text(document))
            self._document, self._names, self._state = document, names, self._stat()
            self._objects[id] = objects
            if is_listed:
                self._images[name] = entry
            else:
                self._images.pop(name, None)
            return self._labels(name, size)

    def _objects_of(self, name: str) -> list[Object]:
        entry = self._images.get(name)
        return self._objects[entry["id"]] if entry else []

    def _is_finished(self, name: str) -> bool:
        """Return whether a person is done with an image: it is listed, and nothing is proposed."""
        entry = self._images.get(name)
        proposed = any(each.score is not None for _, each in self._objects_of(name))
        return entry is not None and not entry.get(UNFINISHED, False) and not proposed

    def _size(self, name: str) -> tuple[int, int]:
        """Return width and height of an image in pixels, upright."""
        path = self.path(name)
        if name not in self._sizes:
            findings = Findings("")
            header = usable_header(path, "image", name, findings)
            if header is None:
                raise UserError(findings.lines())
            self._sizes[name] = header.size
        return self._sizes[name]

    def _labels(self, name: str, size: tuple[int, int]) -> Labels:
        objects, finished = self._objects_of(name), self._is_finished(name)
        content = json.dumps([finished, [raw for raw, _ in objects]], sort_keys=True)
        version = hashlib.sha256(content.encode()).hexdigest()[:16]
        shapes = tuple((self._names[each.category_id], each) for _, each in objects)
        return Labels(name, *size, version, finished, shapes)

    def _faults(
        self,
        shapes: Sequence[Shape],
        size: tuple[int, int],
        known: dict[int, Any],
        finished: bool,
    ) -> list[str]:
        """Return what is wrong with shapes, each by its place."""
        faults, seen = list[str](), set[int]()
        for number, shape in enumerate(shapes):
            place, name = f"objects.{number}", shape.name.strip()
            if not name or len(name) > MAX_NAME or not is_unicode(name):
                faults.append(f"{place}: class: must be a name of 1 to {MAX_NAME} characters")
            if shape.id is not None and (shape.id not in known or shape.id in seen):
                faults.append(f"{place}: id: {shape.id} is no object of this image; leave it out")
            seen.add(shape.id or 0)
            if finished and shape.score is not None:
                faults.append(f"{place}: is a proposal; accept or reject it before the image ends")
            if is_absent(shape.mask):
                fault = box_fault(list(shape.box_xywh), *size)
            else:
                fault = mask_fault(shape.mask, *size)
                if fault is None and not coco_mask.area(compress(shape.mask, *size)):
                    fault = ("mask", "covers no pixel; leave the object out")
            if fault:
                faults.append(f"{place}: {fault[0]}: {fault[1]}")
        return faults

    def _stat(self) -> tuple[int, ...] | None:
        """Return what another content of the file would change; None where there is no file."""
        try:
            stat = self.file.stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _refresh(self) -> None:
        """Read the file where it is not the one that was read or written last."""
        state = self._stat()
        if state != self._state:
            self._read(EMPTY if state is None else read_json(self.file, keep_doubled))
            self._state = state

    def _read(self, document: Any) -> None:
        findings = Findings(str(self.file))
        names = Names([self.folder])
        reading = examine_document(document, findings, names, AS_WRITTEN, unfinished=True)
        dataset = reading.dataset
        images, annotations = (listed(document, key) for key in ("images", "annotations"))
        sound = (len(dataset.images), len(dataset.annotations))
        if not isinstance(document, dict) or sound != (len(images), len(annotations)):
            left_out = (Action.REFUSED, Action.DROPPED)
            faults = lines([fault for fault in reading.faults if fault.action in left_out])
            remedy = f"python -m app data fix {self.folder}"
            raise UserError([*faults, f"{self.file}: cannot be edited as it is; try {remedy}"])
        objects: dict[int, list[Object]] = defaultdict(list)
        for entry, annotation in zip(annotations, dataset.annotations, strict=True):
            entry["id"] = annotation.id  # another one where it was below 1, or taken
            objects[annotation.image_id].append((entry, annotation))
        self._images = {
            image.path.relative_to(self.folder).as_posix(): entry
            for image, entry in zip(dataset.images, images, strict=True)
        }
        self._objects = objects
        self._names = {category.id: category.name for category in dataset.categories}
        self._document = document


def _changed(
    shape: Shape,
    category: int,
    raw: dict[str, Any],
    before: Annotation | None,
    size: tuple[int, int],
) -> Object:
    """Return the annotation of a shape; as it was where nothing of it has changed.

    Args:
        raw: the entry that it changes; of a new one its ids alone.
        before: what that entry says; None: it is new.
    """
    mask = None if is_absent(shape.mask) else compress(shape.mask, *size)
    box = clip_box(shape.box_xywh, *size) if mask is None else tuple(coco_mask.toBbox(mask))
    if before is not None and mask is not None and mask == before.segmentation:
        box = before.bbox_xywh
    same = before is not None and (before.category_id, before.score) == (category, shape.score)
    if before is not None and same and (mask, box) == (before.segmentation, before.bbox_xywh):
        return raw, before
    x, y, width, height = map(float, box)
    annotation = Annotation(
        id=raw["id"],
        image_id=raw["image_id"],
        category_id=category,
        bbox_xywh=(x, y, width, height),
        segmentation=mask,
        area=width * height if mask is None else float(coco_mask.area(mask)),
        iscrowd=before is not None and before.iscrowd,
        score=shape.score,
    )
    kept = {key: value for key, value in raw.items() if key not in ("source", "score")}
    return {**kept, **annotation_to_json(annotation)}, annotation


def _category(name: str, names: dict[int, str], categories: list[dict[str, Any]]) -> int:
    """Return the id of a class, which is added to both where there is none of that name."""
    for id, known in names.items():
        if as_read(known) == as_read(name):
            return id
    id = _free(categories)
    names[id] = " ".join(name.split())
    categories.append({"id": id, "name": names[id]})
    return id


def _free(entries: Sequence[dict[str, Any]]) -> int:
    """Return an id, 1 or more, that no entry has."""
    return max((0, *(each["id"] for each in entries))) + 1


def _to_text(document: dict[str, Any]) -> str:
    """Return JSON with an entry a line: quick to write, and its differences can be read."""
    parts = []
    for key, value in document.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value:
            lines = (json.dumps(each, allow_nan=False) for each in value)
            text = "[\n" + ",\n".join(lines) + "\n]"
        parts.append(f"{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
