"""Collect and check what a reader finds → a `Reading`: the sound labels, and every fault."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from app.datasets.coco import Annotation, Category, Dataset, Image, Reading
from app.datasets.faults import Findings, Tally
from app.datasets.formats.outlines import Rle
from app.datasets.geometry import box_fault, clip_box
from app.datasets.image_files import usable_header
from app.datasets.images import EXTENSIONS
from app.errors import UserError
from app.files import read_json


class Draft:
    """A dataset in the making.

    Args:
        root: the dataset's folder: nothing outside it is read.
        class_names: in their order, where the format says it; else by name.
    """

    def __init__(self, root: Path, class_names: Sequence[str] = ()) -> None:
        self.root = root.resolve()
        self.findings = Findings(str(root))
        self._class_names = list(class_names)
        self._images: dict[Path, Image] = {}
        self._objects: list[tuple[str, Annotation]] = []
        self._named: set[Path] = set()
        self._left_out = 0

    def place(self, path: Path) -> str:
        """Return the file as problems name it: relative to the dataset's folder."""
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)

    def contains(self, path: Path, place: str) -> bool:
        """Return whether the file is there and in the dataset's folder; report it where not."""
        try:
            target = path.resolve()
            there = target.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, NUL, a loop of links
            there = False
        if not there:
            self.findings.add("file", place, str(path), "no such file; add it, or mend its name")
        elif not target.is_relative_to(self.root):
            remedy = "leads out of the dataset's folder; copy the file into it"
            self.findings.add("file", place, str(path), remedy)
            return False
        return there

    def read_text(self, path: Path) -> str | None:
        """Read a UTF-8 text file; return None, and report it, where it cannot be read."""
        if not self.contains(path, self.place(path)):
            return None
        try:
            return path.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            self.findings.add("text", self.place(path), str(error), "must be UTF-8 text")
            return None

    def read_object(self, path: Path) -> dict[str, Any] | None:
        """Read a JSON object; return None, and report it, where it cannot be read."""
        if not self.contains(path, self.place(path)):
            return None
        try:
            document = read_json(path)
        except UserError as error:
            self.findings.add_error("JSON", error)
            return None
        if not isinstance(document, dict):
            self.findings.add("JSON", self.place(path), document, "must be a JSON object")
            return None
        return document

    def add_image(self, path: Path, place: str) -> Image | None:
        """Add an image, its header read; return None, and report it, where it cannot be used.

        Args:
            place: what names the image, for the problem.
        """
        self._named.add(path)
        if not self.contains(path, place):
            return None
        path = path.resolve()
        if path in self._images:
            remedy = "is named twice; list each image once"
            self.findings.add("listed twice", place, path.name, remedy)
            return None
        header = usable_header(path, place, path.name, self.findings)
        if header is None:
            return None
        image = self._images[path] = Image(len(self._images) + 1, path, *header.size)
        return image

    def check_size(self, image: Image, size: tuple[object, object], place: str) -> None:
        """Report a label file that was made for an image of another width and height (pixels).

        A side that is missing or 0, as some tools write it, is passed over.
        """
        actual = (image.width, image.height)
        if any(said and said != side for said, side in zip(size, actual, strict=True)):
            remedy = f"must be the image's {actual[0]} x {actual[1]} pixels; label it anew"
            self.findings.add("size", place, size, remedy)

    def add_box(self, image: Image, name: str, box_xywh: list[Any], place: str) -> None:
        """Add an object with a box alone: x, y, width, height in pixels, cut off at the image."""
        if fault := box_fault(box_xywh, image.width, image.height):
            self.findings.add(fault[0], place, box_xywh, fault[1])
            self._left_out += 1
            return
        x, y, w, h = clip_box(box_xywh, image.width, image.height)
        self._add(image, name, (x, y, w, h), None, w * h, place)

    def add_mask(self, image: Image, name: str, mask: Rle, place: str) -> None:
        """Add an object with a mask, whose box is the mask's."""
        x, y, w, h = coco_mask.toBbox(mask).tolist()
        self._add(image, name, (x, y, w, h), mask, float(coco_mask.area(mask)), place)

    def _add(
        self,
        image: Image,
        name: str,
        bbox_xywh: tuple[float, float, float, float],
        mask: Rle | None,
        area: float,
        place: str,
    ) -> None:
        if not isinstance(name, str) or not name.strip():
            self.findings.add("class", place, name, "must have the class's name, as text")
            return
        annotation = Annotation(
            len(self._objects) + 1, image.id, 0, bbox_xywh, mask, area, iscrowd=False
        )
        self._objects.append((name.strip(), annotation))

    def finish(self) -> Reading:
        """Return all that was read, and all that was reported."""
        names = self._class_names or sorted({name for name, _ in self._objects})
        ids = {name: id for id, name in enumerate(names, start=1)}
        annotations = tuple(
            Annotation(**{**vars(annotation), "category_id": ids[name]})
            for name, annotation in self._objects
        )
        categories = tuple(Category(id, name) for name, id in ids.items())
        dataset = Dataset(tuple(self._images.values()), annotations, categories)
        total = (len(self._named), len(annotations) + self._left_out)
        tally = Tally(*total, len(dataset.images), len(annotations))
        return Reading(dataset, tuple(self.findings.faults), tally)


def images_in(folder: Path) -> list[Path]:
    """List the image files under a folder, at any depth, by name, without hidden ones."""
    paths = folder.rglob("*") if folder.is_dir() else ()
    return sorted(
        path
        for path in paths
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")
    )
