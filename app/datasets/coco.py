"""The dataset's types, and COCO JSON in and out."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from app.config.reading import AS_WRITTEN, ReadingConfig
from app.datasets import conventions
from app.datasets.check import UNKNOWN, Entry, check, is_area, is_id, keep_doubled, listed
from app.datasets.conventions import TO_XYWH
from app.datasets.faults import MAX_DROP, Fault, Findings, Tally, problems
from app.datasets.geometry import (
    clip_box,
    decode_counts,
    is_absent,
    is_number,
    is_side,
    mask_fault,
)
from app.datasets.image_files import find_files
from app.datasets.levels import Levels
from app.datasets.names import Names
from app.errors import UserError
from app.files import read_json, write_json

PROPOSAL = "proposal"  # the `source` of annotations that nobody has looked at
UNFINISHED = "unfinished"  # key of images that a person is not done with


@dataclass(frozen=True)
class Image:
    """An image file; width and height in pixels, after its EXIF rotation.

    Attributes:
        levels: the values that become 0 and 255 where its pixels have more than 8 bits.
        group: what the labels say that it belongs with, by `ReadingConfig.group_column`.
    """

    id: int
    path: Path
    width: int
    height: int
    levels: Levels | None = None
    group: str | None = None


def group_of(entry: Mapping[str, object], column: str | None) -> str | None:
    """Return what an entry says that its image belongs with; None where it says nothing.

    Args:
        column: the entry's key that says it; None where the user has named none.
    """
    value = None if column is None else entry.get(column)
    is_said = isinstance(value, str) or is_number(value)
    return (str(value).strip() or None) if is_said else None


@dataclass(frozen=True)
class Annotation:
    """One labelled object.

    Attributes:
        bbox_xywh: x, y, width, height in pixels, inside the image.
        segmentation: compressed COCO RLE {"size": [height, width], "counts": str}, or None where
            the source has boxes only.
        area: square pixels, as the source says it (Roboflow writes the box's), else the mask's,
            else the box's.
        score: 0..1, of a proposal that weights have made and nobody has looked at; None of labels.
    """

    id: int
    image_id: int
    category_id: int
    bbox_xywh: tuple[float, float, float, float]
    segmentation: dict[str, Any] | None
    area: float
    iscrowd: bool
    score: float | None = None


def overlap(one: Annotation, other: Annotation) -> float:
    """Return the IoU of two objects: of masks where both have one, else of boxes."""
    shapes: list[Any] = [one.segmentation, other.segmentation]
    if None in shapes:
        shapes = [list(one.bbox_xywh), list(other.bbox_xywh)]
    return float(coco_mask.iou([shapes[0]], [shapes[1]], [False])[0][0])


@dataclass(frozen=True)
class Category:
    """A class: what the model is asked for, and other words for it, drawn in training."""

    id: int
    name: str
    synonyms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    images: tuple[Image, ...]
    annotations: tuple[Annotation, ...]
    categories: tuple[Category, ...]

    @cached_property
    def annotations_by_image(self) -> dict[int, list[Annotation]]:
        """Return the annotations by image id; an image without objects has an empty list."""
        grouped: dict[int, list[Annotation]] = {image.id: [] for image in self.images}
        for annotation in self.annotations:
            grouped[annotation.image_id].append(annotation)
        return grouped

    @property
    def class_names(self) -> list[str]:
        return [category.name for category in self.categories]

    def subset(self, image_ids: Iterable[int]) -> Dataset:
        """Return the dataset of these images and their annotations, with all categories."""
        wanted = set(image_ids)
        images = tuple(image for image in self.images if image.id in wanted)
        annotations = tuple(a for a in self.annotations if a.image_id in wanted)
        return Dataset(images, annotations, self.categories)

    def content_hash(self) -> str:
        """Return the hex SHA-256 of the labels and of each image's name and number of bytes.

        The folder of the images is left out, so that a moved dataset has the same hash.

        Sizes stand for the image's contents: hashing each pixel would cost a read of the whole set.
        """
        content = self.to_json()
        for entry, image in zip(content["images"], self.images, strict=True):
            entry["file_name"] = image.path.name
            entry["bytes"] = image.path.stat().st_size
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return strict COCO: absolute file names; `segmentation` is RLE, or [] for boxes only."""
        return {
            "images": [_image_to_json(image) for image in self.images],
            "annotations": [annotation_to_json(a) for a in self.annotations],
            "categories": [{"id": c.id, "name": c.name} for c in self.categories],
        }


def _image_to_json(image: Image) -> dict[str, Any]:
    entry = {
        "id": image.id,
        "file_name": str(image.path),
        "width": image.width,
        "height": image.height,
    }
    return entry if image.levels is None else {**entry, "levels": list(image.levels)}


def annotation_to_json(annotation: Annotation) -> dict[str, Any]:
    """Return an entry of strict COCO; of proposals with their source and score."""
    proposed = {} if annotation.score is None else {"source": PROPOSAL, "score": annotation.score}
    return proposed | {
        "id": annotation.id,
        "image_id": annotation.image_id,
        "category_id": annotation.category_id,
        "bbox": list(annotation.bbox_xywh),
        "area": annotation.area,
        "iscrowd": int(annotation.iscrowd),
        "segmentation": annotation.segmentation or [],
    }


def write(dataset: Dataset, path: Path) -> None:
    """Write the dataset as COCO JSON, whole or not at all."""
    write_json(path, dataset.to_json())


@dataclass(frozen=True)
class Reading:
    """A split as it was read: what of it is sound, and every fault of the rest.

    Attributes:
        tally: how much the split lists, and how much of that is in `dataset`.
        files: the image files that the labels name, sound or not.
        notes: what was decided about how to read it, to tell the user.
    """

    dataset: Dataset
    faults: tuple[Fault, ...]
    tally: Tally
    files: frozenset[Path] = frozenset()
    notes: tuple[str, ...] = ()

    def sound(self, max_drop: float = MAX_DROP) -> Dataset:
        """Return the dataset; raise UserError with every problem where it must not be used."""
        if faults := problems(self.faults, self.tally, max_drop):
            raise UserError(faults)
        return self.dataset


def read(json_path: Path, image_roots: Sequence[Path], max_drop: float = MAX_DROP) -> Dataset:
    """Read a COCO JSON and check it whole; `faults.KINDS` says what is mended and left out.

    Args:
        json_path: the COCO JSON.
        image_roots: folders in which its images are looked for; the first at any depth, and none
            of them may be left.
        max_drop: most of the images and of the annotations that may be left out, 0 to 1.

    Raises:
        UserError: with every problem of the file and of its images.
    """
    return examine(json_path, Names(image_roots)).sound(max_drop)


def examine(
    json_path: Path,
    names: Names | None,
    reading: ReadingConfig = AS_WRITTEN,
    others: Sequence[Path] = (),
) -> Reading:
    """Read like `read`, but return the faults with what is sound instead of raising them.

    Polygons and uncompressed RLE become compressed RLE.

    Args:
        names: finds the images. With None they need not be there: their paths are as the JSON names
            them, from its own folder.
        reading: what the user decided.
        others: the files of other splits, for the classes where this one lists none.
    """
    findings = Findings(str(json_path))
    document = _parse(json_path, findings)
    if document is None:
        return Reading(Dataset((), (), ()), tuple(findings.faults), Tally())
    if isinstance(document, dict) and not document.get("categories"):
        _borrow_categories(document, others, findings)
    return examine_document(document, findings, names or json_path.parent, reading)


def examine_document(
    document: object,
    findings: Findings,
    names: Names | Path,
    reading: ReadingConfig,
    *,
    unfinished: bool = False,
) -> Reading:
    """Check a parsed COCO JSON, find its images, and return what is sound beside every fault.

    Args:
        names: finds the images, or the folder from which their paths are as the JSON names them.
        unfinished: take the images as well that a person is not done with.
    """
    if not unfinished:
        _leave_out_unfinished(document, findings)
    _convert_boxes(document, reading.boxes)
    sound = check(document, findings)
    if isinstance(names, Names):
        files, named = find_files(sound.images, names, findings)
        looked_up = {id(entry) for _, entry in sound.images}
        rest = (entry for entry in listed(document, "images") if id(entry) not in looked_up)
        named |= names.paths(entry.get("file_name") for entry in rest if isinstance(entry, dict))
    else:
        files = {entry["id"]: names / entry["file_name"] for _, entry in sound.images}
        named = set()
    images = tuple(
        Image(
            *(entry["id"], files[entry["id"]], entry["width"], entry["height"]),
            group=group_of(entry, reading.group_column),
        )
        for _, entry in sound.images
        if entry["id"] in files
    )
    categories = tuple(
        Category(entry["id"], entry["name"].strip()) for _, entry in sound.categories
    )
    usable = {category.id for category in categories}
    entries = [
        (place, entry)
        for place, entry in sound.annotations
        if entry["image_id"] in files and entry["category_id"] in usable
    ]
    annotations = _read_annotations(entries, images, findings, reading)
    dataset = Dataset(images, annotations, categories)
    total, labelled = (len(listed(document, key)) for key in ("images", "annotations"))
    tally = Tally(total, labelled, len(images), len(annotations))
    return Reading(dataset, tuple(findings.faults), tally, frozenset(named))


def _borrow_categories(
    document: dict[str, Any], others: Sequence[Path], findings: Findings
) -> None:
    for path in others:
        with contextlib.suppress(UserError):
            if categories := listed(read_json(path), "categories"):
                remedy = f"those of {path.name} are taken"
                findings.add("no categories", "'categories'", document.get("categories"), remedy)
                document["categories"] = categories
                return


def _leave_out_unfinished(document: object, findings: Findings) -> None:
    """Take images out of a document, with their annotations, that a person is not done with."""
    images = [entry for entry in listed(document, "images") if isinstance(entry, dict)]
    begun = [entry for entry in images if entry.get(UNFINISHED) is True]
    if not begun or not isinstance(document, dict):
        return
    ids = {entry["id"] for entry in begun if is_id(entry.get("id"))}
    for key, name in (("images", "id"), ("annotations", "image_id")):
        document[key] = [
            entry
            for entry in listed(document, key)
            if not (isinstance(entry, dict) and is_id(entry.get(name)) and entry[name] in ids)
        ]
    first = str(begun[0].get("file_name"))
    remedy = "is left out: finish it in the page of ./serve.sh --label"
    findings.add("unfinished", f"images ({len(begun)} of them)", first, remedy)


def _convert_boxes(document: object, convention: str) -> None:
    """Make the document's boxes x y width height, in place; `masks` leaves the masks' boxes."""
    if convention == "xywh":
        return
    images = (entry for entry in listed(document, "images") if isinstance(entry, dict))
    sizes: dict[int, tuple[Any, Any]] = {
        entry["id"]: (entry.get("width"), entry.get("height"))
        for entry in images
        if is_id(entry.get("id"))
    }
    for entry in listed(document, "annotations"):
        if not isinstance(entry, dict):
            continue
        box, image_id = entry.get("bbox"), entry.get("image_id")
        size = sizes.get(image_id) if is_id(image_id) else None
        if convention == "masks":
            if not is_absent(entry.get("segmentation")):
                entry["bbox"] = None
        elif (
            isinstance(box, list) and len(box) == 4 and size and all(map(is_number, [*box, *size]))
        ):
            entry["bbox"] = _converted(box, entry.get("segmentation"), size, convention)


def _converted(
    box: list[float], segmentation: Any, size: tuple[Any, Any], convention: str
) -> Sequence[float]:
    """Return the box as x y width height; as it stands where its mask says that it is so."""
    if is_absent(segmentation) or not all(map(is_side, size)) or mask_fault(segmentation, *size):
        return TO_XYWH[convention](box, size)
    mask_xywh = _box_of(compress(segmentation, *size) or {})
    return list(conventions.nearest(box, mask_xywh, size, convention))


def _parse(json_path: Path, findings: Findings) -> Any:
    """Return the parsed document; None, and report it, where the file is no JSON."""
    try:
        document = read_json(json_path, keep_doubled)
    except UserError as error:
        findings.add_error("JSON", error)
        return None
    if document is None:
        findings.add("root", "its top level", None, UNKNOWN)
    with json_path.open("rb") as file:
        if file.read(3) == codecs.BOM_UTF8:
            findings.add("BOM", "the file's start", "a byte order mark", "is passed over")
    return document


def _read_annotations(
    entries: Sequence[Entry],
    images: Sequence[Image],
    findings: Findings,
    reading: ReadingConfig,
) -> tuple[Annotation, ...]:
    sizes = {image.id: (image.width, image.height) for image in images}
    plain = [
        (entry["bbox"], sizes[entry["image_id"]])
        for _, entry in entries
        if is_absent(entry.get("segmentation"))
    ]
    of_all = conventions.convention(plain)
    # another flag than the one that is given would undo what that one did
    mixed = len(plain) < len(entries) and reading.boxes == "xywh"
    advised = conventions.possible(plain) if mixed else ()
    annotations = []
    for (place, entry), id in zip(entries, _free_ids(entries), strict=True):
        size = sizes[entry["image_id"]]
        annotation = _read_annotation(entry, id, *size)
        mask: Any = annotation.segmentation
        box: Any = entry.get("bbox")
        if mask is not None and not coco_mask.area(mask):
            remedy = "covers no pixel; delete it"
            findings.add("zero area", f"{place}.segmentation", entry["segmentation"], remedy)
        elif not is_absent(box) and (
            fault := of_all
            if mask is None
            else conventions.misfit(box, _box_of(mask), size, advised)
        ):
            findings.add("box convention", f"{place}.bbox", box, fault)
        else:
            if box and conventions.leaves(box, size):
                findings.add("bbox clipped", f"{place}.bbox", box, "is cut off at the image's edge")
            annotations.append(annotation)
    return tuple(annotations)


def _box_of(mask: dict[str, Any]) -> list[float]:
    box: list[float] = coco_mask.toBbox(mask).tolist()
    return box


def _free_ids(entries: Sequence[Entry]) -> list[int]:
    """Return an id for each annotation: its own, if it is a whole number that none before it has.

    pycocotools takes a match with annotation 0 for no match (cocoeval.py, `dtm`), and Roboflow
    counts from 0: a perfect detection of that object would score AP 0. So no id is below 1.
    """
    own = [entry["id"] for _, entry in entries if is_id(entry.get("id"))]
    if min(own, default=1) < 1:
        return list(range(1, len(entries) + 1))
    taken = set(own)
    free = (number for number in count(1) if number not in taken)
    ids: dict[int, None] = {}  # in order
    for _, entry in entries:
        id = entry.get("id")
        ids[id if is_id(id) and id not in ids else next(free)] = None
    return list(ids)


def _read_annotation(entry: dict[str, Any], id: int, width: int, height: int) -> Annotation:
    segmentation = compress(entry.get("segmentation"), width, height)
    box: list[float] = entry.get("bbox") or _box_of(segmentation or {})
    bbox_xywh = clip_box(box, width, height)
    area = entry.get("area")
    if not is_area(area):
        area = coco_mask.area(segmentation) if segmentation else bbox_xywh[2] * bbox_xywh[3]
    return Annotation(
        id=id,
        image_id=entry["image_id"],
        category_id=entry["category_id"],
        bbox_xywh=bbox_xywh,
        segmentation=segmentation,
        area=float(area),
        iscrowd=bool(entry.get("iscrowd")),
        score=_score(entry),
    )


def _score(entry: dict[str, Any]) -> float | None:
    """Return the score of a proposal, which is 0 where it is none; None of a label."""
    if entry.get("source") != PROPOSAL:
        return None
    score = entry.get("score")
    return float(score) if is_number(score) and 0 <= score <= 1 else 0.0


def compress(segmentation: Any, width: int, height: int) -> dict[str, Any] | None:
    """Return checked polygons or RLE as one compressed RLE; None where there is no segmentation."""
    if is_absent(segmentation):
        return None
    if isinstance(segmentation, dict):
        runs = decode_counts(segmentation["counts"], width * height)
        if isinstance(segmentation["counts"], str) and runs[1:].all():
            return {"size": [height, width], "counts": segmentation["counts"]}
        runs = _join_empty_runs(runs)
        uncompressed = {"size": [height, width], "counts": runs.tolist()}
        rle = coco_mask.frPyObjects(uncompressed, height, width)
    else:
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _join_empty_runs(runs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the same mask without empty runs, at which pycocotools' merge stops short."""
    ends = np.cumsum(runs)
    foreground = np.arange(len(runs)) % 2
    ends, foreground = ends[runs > 0], foreground[runs > 0]
    last_of_value = np.append(np.diff(foreground) != 0, True)
    joined = np.diff(ends[last_of_value], prepend=0)
    return joined if not foreground[0] else np.insert(joined, 0, 0)
