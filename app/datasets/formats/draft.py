"""Collect and check what a reader finds → a `Reading`: the sound labels, and every fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from app.datasets.coco import Annotation, Category, Dataset, Image, Reading, group_of
from app.datasets.faults import Findings, Tally
from app.datasets.formats.outlines import Rle
from app.datasets.geometry import box_fault, clip_box
from app.datasets.image_files import name_fault, usable_header
from app.datasets.names import Named, Names
from app.errors import UserError
from app.files import read_json

Read = Callable[[], Reading]  # reads a split


class Draft:
    """A dataset in the making.

    Faulty parts are left out and counted, those of an object alone or the image with all of it:
    an image of which labels are missing would teach that their objects are not there.

    Args:
        root: the dataset's folder: nothing outside it is read.
        class_names: in their order, where the format says it; else by name.
        names: finds the images that labels name; in the dataset's folder, unless given.
    """

    def __init__(
        self, root: Path, class_names: Sequence[str] = (), names: Names | None = None
    ) -> None:
        self.root = root.resolve()
        self.findings = Findings(str(root))
        self.names = names or Names([self.root], self.root)
        self._class_names = list(class_names)
        self._images: dict[Path, Image] = {}
        self._objects: list[tuple[str, Annotation]] = []
        self._listed = 0
        self._files = set[Path]()
        self._dropped_objects = 0
        self._dropped_images = set[int]()

    def place(self, path: Path) -> str:
        """Return the file as problems name it: relative to the dataset's folder."""
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)

    # --- images

    def add_named(self, name: object, place: str, near: Path | None = None) -> Image | None:
        """Add the image that a label names; return None, and report it, where it cannot be used.

        Args:
            near: folder of the label, from which the name may lead.
        """
        if fault := name_fault(name):
            self.drop_file("file name", place, name, fault)
            return None
        path = self.names.locate(str(name), place, self.findings, near)
        if path is None:
            self._listed += 1
            return None
        return self.add_image(path, place)

    def find(self, name: object, near: Path | None = None) -> Path | None:
        """Return the one image file that a name means; None, and report nothing, for none."""
        found = None if name_fault(name) else self.names.find(str(name), near)
        return found.path if isinstance(found, Named) else None

    def pass_over(self, name: object, near: Path | None = None) -> None:
        """Note an image that is named by labels and knowingly not used."""
        if path := self.find(name, near):
            self._files.add(path.resolve())

    def add_image(self, path: Path, place: str) -> Image | None:
        """Add an image, its header read; return None, and report it, where it cannot be used.

        Args:
            place: what names the image, for the problem.
        """
        if not self.contains(path, place):
            self._listed += 1
            return None
        path = path.resolve()
        self._listed += 1
        self._files.add(path)
        if path in self._images:
            remedy = "is named twice; list each image once"
            self.findings.add("listed twice", place, path.name, remedy)
            return None
        header = usable_header(path, place, path.name, self.findings)
        if header is None:
            return None
        image = self._images[path] = Image(len(self._images) + 1, path, *header.size)
        return image

    def put_in_group(self, image: Image, entry: Mapping[str, object], column: str | None) -> None:
        """Say what an image belongs with, as `group_of` reads it; an empty value says nothing."""
        if (said := group_of(entry, column)) is not None:
            self._images[image.path] = replace(self._images[image.path], group=said)

    def drop_image(self, image: Image, kind: str, place: str, value: object, remedy: str) -> None:
        """Report a fault for which an image is left out with all its objects."""
        self.findings.add(kind, place, value, remedy)
        self._dropped_images.add(image.id)

    def drop_file(self, kind: str, place: str, value: object, remedy: str) -> None:
        """Report a fault for which an image is left out that is not known by its file."""
        self.findings.add(kind, place, value, remedy)
        self._listed += 1

    def check_size(self, image: Image, size: tuple[object, object], place: str) -> None:
        """Leave out an image whose labels are made for another width and height (pixels).

        A side that is missing or 0, as some tools write it, is passed over.
        """
        actual = (image.width, image.height)
        if any(said and said != side for said, side in zip(size, actual, strict=True)):
            remedy = f"must be the image's {actual[0]} x {actual[1]} pixels; label it anew"
            self.drop_image(image, "other size", place, size, remedy)

    # --- files of labels

    def contains(self, path: Path, place: str) -> bool:
        """Return whether the file is there and in the dataset's folder; report it where not."""
        try:
            target = path.resolve()
            there = target.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, NUL, a loop of links
            there = False
        if not there:
            remedy = "no such file; add it, or mend its name"
            self.findings.add("image missing", place, self.place(path), remedy)
        elif not target.is_relative_to(self.root):
            remedy = "leads out of the dataset's folder; copy the file into it"
            self.findings.add("link", place, self.place(path), remedy)
            return False
        return there

    def read_text(self, path: Path, image: Image | None = None) -> str | None:
        """Read a UTF-8 text file of labels; return None, and report it, where it cannot be read.

        Args:
            image: the one that is left out then; None where it is not known.
        """
        if not self.contains(path, self.place(path)):
            self._lose(image)
            return None
        try:
            return path.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            self.findings.add("label file", self.place(path), str(error), "must be UTF-8 text")
            self._lose(image)
            return None

    def read_object(self, path: Path, kind: str = "label file") -> dict[str, Any] | None:
        """Read a JSON object; return None, and report it, where it cannot be read.

        Args:
            kind: of the fault: `JSON` where the file has the labels of the whole dataset.
        """
        document = None
        if self.contains(path, self.place(path)):
            try:
                document = read_json(path)
            except UserError as error:
                self.findings.add_error(kind, error)
                self._lose(None)
                return None
            if not isinstance(document, dict):
                self.findings.add(kind, self.place(path), document, "must be a JSON object")
        if not isinstance(document, dict):
            self._lose(None)
            return None
        return document

    def _lose(self, image: Image | None) -> None:
        if image is not None:
            self._dropped_images.add(image.id)
        else:
            self._listed += 1

    # --- objects

    def drop_object(self, kind: str, place: str, value: object, remedy: str) -> None:
        """Report a fault for which an object is left out."""
        self.findings.add(kind, place, value, remedy)
        self._dropped_objects += 1

    def add_box(self, image: Image, name: object, box_xywh: list[Any], place: str) -> None:
        """Add an object with a box alone: x, y, width, height in pixels, cut off at the image."""
        if fault := box_fault(box_xywh, image.width, image.height):
            self.drop_object(fault[0], place, box_xywh, fault[1])
            return
        x, y, w, h = clip_box(box_xywh, image.width, image.height)
        self._add(image, name, (x, y, w, h), None, w * h, place)

    def add_mask(
        self, image: Image, name: object, mask: Rle, place: str, *, iscrowd: bool = False
    ) -> None:
        """Add an object with a mask, whose box is the mask's."""
        x, y, w, h = coco_mask.toBbox(mask).tolist()
        self._add(image, name, (x, y, w, h), mask, float(coco_mask.area(mask)), place, iscrowd)

    def _add(
        self,
        image: Image,
        name: object,
        bbox_xywh: tuple[float, float, float, float],
        mask: Rle | None,
        area: float,
        place: str,
        iscrowd: bool = False,
    ) -> None:
        if not isinstance(name, str) or not name.strip():
            self.drop_object("label", place, name, "must have the class's name, as text")
            return
        id = len(self._objects) + 1
        annotation = Annotation(id, image.id, 0, bbox_xywh, mask, area, iscrowd)
        self._objects.append((name.strip(), annotation))

    def _drop_specks(self) -> None:
        """Leave out boxes that all lie in the first pixel: they are shares of the image."""
        boxes = [(*one.bbox_xywh, one.segmentation) for _, one in self._objects]
        if boxes and all(mask is None and max(x + w, y + h) <= 1 for x, y, w, h, mask in boxes):
            remedy = (
                f"all {len(boxes)} boxes lie within the first pixel, as shares of an image do: "
                "export them in pixels"
            )
            self.findings.add("box convention", "the boxes", list(boxes[0][:4]), remedy)
            self._dropped_objects += len(boxes)
            self._objects = []

    def finish(self) -> Reading:
        """Return all that was read, and all that was reported."""
        self._drop_specks()
        names = self._class_names or sorted({name for name, _ in self._objects})
        ids = {name: id for id, name in enumerate(names, start=1)}
        annotations = tuple(
            replace(annotation, category_id=ids[name])
            for name, annotation in self._objects
            if annotation.image_id not in self._dropped_images
        )
        images = tuple(i for i in self._images.values() if i.id not in self._dropped_images)
        categories = tuple(Category(id, name) for name, id in ids.items())
        dataset = Dataset(images, annotations, categories)
        objects = len(annotations) + self._dropped_objects
        tally = Tally(self._listed, objects, len(images), len(annotations))
        return Reading(dataset, tuple(self.findings.faults), tally, frozenset(self._files))
