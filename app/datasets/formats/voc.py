"""Pascal VOC: an XML of boxes for each image, and masks where SegmentationObject/ has them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading
from app.datasets.formats.draft import Draft
from app.datasets.formats.masks import read_numbers
from app.datasets.formats.outlines import encode

VOID = 255  # the border around objects in VOC's masks, which belongs to none


def is_voc(folder: Path) -> bool:
    """Return whether there are XML files of VOC's kind in Annotations/, or beside the images."""
    first = min(_annotations(folder).glob("*.xml"), default=None)
    try:
        return first is not None and b"<annotation" in first.read_bytes()[:4096]
    except OSError:
        return False


def read(folder: Path, root: Path, _: ReadingConfig) -> Reading:
    """Read every XML, its image, and its masks where there are any.

    Boxes are of whole pixels counted from 1, as VOC has them: xmin 1 and xmax W span the image.
    Object k of the XML has number k in the PNG of its name in SegmentationObject/. Images without
    an XML are not part of the dataset.

    Returns:
        What is sound, and every fault of every file.
    """
    draft, folder = Draft(root), folder.resolve()
    for path in sorted(_annotations(folder).glob("*.xml")):
        if draft.contains(path, draft.place(path)):
            try:
                _read_xml(draft, folder, path)
            except ValueError as fault:
                draft.drop_file("label file", draft.place(path), path.name, str(fault))
    return draft.finish()


def _annotations(folder: Path) -> Path:
    return folder / "Annotations" if (folder / "Annotations").is_dir() else folder


def parse_xml(content: bytes) -> ElementTree.Element:
    """Return the root element.

    Raises:
        ValueError: broken, or with a document type: its entities can name files and fill memory.
    """

    def refuse(*_: object) -> None:
        raise ValueError("has a DOCTYPE, which VOC does not have; delete it")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
        return ElementTree.fromstring(content)
    except (expat.ExpatError, ElementTree.ParseError, LookupError) as error:
        raise ValueError(f"is broken XML ({error}); export it again") from None


def _read_xml(draft: Draft, folder: Path, path: Path) -> None:
    annotation, place = parse_xml(path.read_bytes()), draft.place(path)
    name = (annotation.findtext("filename") or "").strip()
    if not name or Path(name.replace("\\", "/")).name != name:
        draft.drop_file("file name", f"{place}: filename", name, "must be a file's name, no path")
        return
    places = [folder / "JPEGImages" / name, path.parent / name, folder / "images" / name]
    at = next((candidate for candidate in places if candidate.is_file()), places[0])
    image = draft.add_image(at, f"{place}: filename")
    if image is None:
        return
    size = (annotation.findtext("size/width"), annotation.findtext("size/height"))
    draft.check_size(image, (_whole(size[0]), _whole(size[1])), f"{place}: size")
    _read_objects(draft, image, annotation.findall("object"), _instances(draft, folder, image, at))


def _whole(text: str | None) -> int:
    """Return a side in pixels; 0, which is passed over, where it is none."""
    return int(text) if text and text.strip().isdecimal() else 0


def _instances(draft: Draft, folder: Path, image: Image, at: Path) -> NDArray[np.integer] | None:
    """Return the (height, width) object numbers of an image; None where it has no such PNG."""
    path = folder / "SegmentationObject" / f"{at.stem}.png"
    if not path.is_file() or not draft.contains(path, draft.place(path)):
        return None
    try:
        numbers = read_numbers(path, image.width, image.height)
    except ValueError as fault:
        draft.drop_image(image, "label file", draft.place(path), path.name, str(fault))
        return None
    return np.where(numbers == VOID, 0, numbers)


def _read_objects(
    draft: Draft,
    image: Image,
    objects: list[ElementTree.Element],
    numbers: NDArray[np.integer] | None,
) -> None:
    if numbers is not None and numbers.max() > len(objects):
        remedy = f"must be at most {len(objects)}, as many as its XML has objects"
        draft.drop_image(
            image, "label file", f"{image.path.stem}.png's number", int(numbers.max()), remedy
        )
        return
    for index, element in enumerate(objects):
        place = f"{image.path.stem}.xml: object[{index}]"
        name, box = (element.findtext("name") or ""), _box_xywh(element)
        mask = None if numbers is None else numbers == index + 1
        if mask is None or not mask.any():
            draft.add_box(image, name, list(box), place)
        elif not _crosses(mask, box):
            remedy = f"must be around number {index + 1} of its PNG in SegmentationObject/"
            draft.drop_object("box convention", f"{place}.bndbox", box, remedy)
        else:
            draft.add_mask(image, name, encode(mask), place)


def _box_xywh(element: ElementTree.Element) -> tuple[float, float, float, float]:
    """Return the box in pixels, with NaN, which is refused later, for what is no number."""
    left, top, right, bottom = (
        _number(element.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
    )
    return left - 1, top - 1, right - left + 1, bottom - top + 1


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _crosses(mask: NDArray[np.bool_], box_xywh: tuple[float, float, float, float]) -> bool:
    """Return whether a mask has a pixel in the box."""
    x, y, w, h = box_xywh
    rows, columns = np.nonzero(mask)
    inside = (columns + 1 > x) & (columns < x + w) & (rows + 1 > y) & (rows < y + h)
    return bool(inside.any())
