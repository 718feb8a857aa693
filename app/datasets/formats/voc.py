"""Pascal VOC: an XML of boxes for each image, and masks where SegmentationObject/ has them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading
from app.datasets.folders import by_way, image_folders
from app.datasets.formats.draft import Draft, Read
from app.datasets.formats.masks import read_numbers
from app.datasets.formats.outlines import encode, polygon_mask
from app.datasets.formats.telling import few, files, leads_out, root_element
from app.datasets.geometry import to_number, to_side
from app.datasets.names import Names, fold

PATTERNS = ("*.xml", "*/*.xml", "*/*/*.xml")  # beside the images, or in a folder of any name
SETS = {"train": ("train", "trainval", "default"), "valid": ("val", "valid"), "test": ("test",)}
Box = tuple[float, float, float, float]  # x, y, width, height in pixels
VOID = 255  # the border around objects in VOC's masks, which belongs to none


def is_voc(folder: Path) -> bool:
    """Return whether there are XML files of VOC's kind in the folder, or in one of its folders."""
    return any(root_element(path) == "annotation" for path in few(folder, *PATTERNS))


def splits(folder: Path, _: ReadingConfig) -> dict[str, Read]:
    """Return the splits: those that ImageSets/ lists, else by the folders of the XMLs."""
    folder = folder.resolve()
    # what has no root is broken, which reading it says, as it says of a link that leads out
    xmls = [
        path
        for path in files(folder, *PATTERNS)
        if leads_out(path, folder) or root_element(path) in ("annotation", "")
    ]
    listed = _image_sets(folder)
    if not listed:
        return {
            split: partial(_read, folder, image_folders(folder, told), found)
            for split, (told, found) in by_way(xmls, folder).items()
        }
    sets = {split: [path for path in xmls if path.stem in listed[split]] for split in listed}
    rest = [path for path in xmls if not any(path.stem in names for names in listed.values())]
    missing = set().union(*listed.values()) - {path.stem for path in xmls}
    found = {split: partial(_read, folder, (), paths) for split, paths in sets.items()}
    first = next(iter(sets))  # which says what no set has
    return {**found, first: partial(_read, folder, (), sets[first], rest, missing)}


def _image_sets(folder: Path) -> dict[str, set[str]]:
    """Return the names that ImageSets/ lists for each split; trainval only where no train is."""
    for kind in ("Main", "Segmentation", "Layout"):
        listed: dict[str, set[str]] = {}
        for split, names in SETS.items():
            paths = [folder / "ImageSets" / kind / f"{name}.txt" for name in names]
            if path := next((path for path in paths if path.is_file()), None):
                lines = path.read_bytes().decode("utf-8-sig", "replace").splitlines()
                # a second column, of class sets, says whether the class is there
                listed[split] = {Path(line.split()[0]).name for line in lines if line.strip()}
        if listed:
            return listed
    return {}


def _read(
    folder: Path,
    own: Sequence[Path],
    xmls: Sequence[Path],
    rest: Sequence[Path] = (),
    missing: Collection[str] = (),
) -> Reading:
    """Read these XMLs, their images, and their masks where there are any.

    Boxes are of whole pixels counted from 1, as VOC has them: xmin 1 and xmax W span the image.
    Where an XML has a 0 or a decimal point, as CVAT's have, its boxes are counted from 0.
    Object k of the XML has number k in the PNG of its name in SegmentationObject/. Images without
    an XML are not part of the dataset.

    Args:
        own: the folders of the split's images.
        rest: XMLs that no set lists.
        missing: listed names that have no XML.

    Returns:
        What is sound, and every fault of every file.
    """
    roots = [*own, folder / "JPEGImages", folder]
    draft = Draft(folder, names=Names(roots, folder, own[0] if own else folder))
    for path in xmls:
        if draft.contains(path, draft.place(path)):
            try:
                _read_xml(draft, folder, path)
            except ValueError as fault:
                draft.drop_file("label file", draft.place(path), path.name, str(fault))
    _report_unlisted(draft, rest, missing)
    return draft.finish()


def _report_unlisted(draft: Draft, rest: Sequence[Path], missing: Collection[str]) -> None:
    if rest:
        for path in rest:
            draft.pass_over(path.stem)
        remedy = f"{len(rest)} XMLs are in none of its lists, such as {rest[0].name}: not used"
        draft.findings.add("unlisted", "ImageSets", f"{len(rest)} files", remedy)
    if missing:
        remedy = f"{len(missing)} names have no XML, such as {min(missing)}: not used"
        draft.findings.add("unlisted", "ImageSets", f"{len(missing)} names", remedy)


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
    name = (annotation.findtext("filename") or "").strip() or path.stem
    image = draft.add_named(_meant(draft, name, path), f"{place}: filename", path.parent)
    if image is None:
        return
    size = [
        annotation.findtext(f"size/{side}") or annotation.findtext(f"imagesize/{count}")
        for side, count in (("width", "ncols"), ("height", "nrows"))  # the latter as LabelMe's
    ]
    draft.check_size(image, (to_side(size[0]), to_side(size[1])), f"{place}: size")
    _read_objects(draft, image, annotation.findall("object"), _instances(draft, folder, image))


def _meant(draft: Draft, name: str, path: Path) -> str:
    """Return the name, or the XML's own where that, and not this one, names its image.

    Tools that rename files leave the names in the XMLs as they were; ImageSets go by the XMLs'.
    """
    written, own = draft.find(name, path.parent), draft.find(path.stem, path.parent)
    if own is None or (written is not None and fold(written.stem) == fold(path.stem)):
        return name
    remedy = f"is read as {own.name}, as the XML is called"
    draft.findings.add("other name", f"{draft.place(path)}: filename", name, remedy)
    return str(own.relative_to(draft.root)) if own.is_relative_to(draft.root) else name


def _instances(draft: Draft, folder: Path, image: Image) -> NDArray[np.integer] | None:
    """Return the (height, width) object numbers of an image; None where it has no such PNG."""
    path = folder / "SegmentationObject" / f"{image.path.stem}.png"
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
    first = _first_pixel(objects)
    for index, element in enumerate(objects):
        place = f"{image.path.stem}.xml: object[{index}]"
        name, box = (element.findtext("name") or ""), _box_xywh(element, first)
        mask = None if numbers is None else numbers == index + 1
        if mask is None or not mask.any():
            _add_shape(draft, image, name, element, place, box)
        elif not _crosses(mask, box):
            remedy = f"must be around number {index + 1} of its PNG in SegmentationObject/"
            draft.drop_object("box convention", f"{place}.bndbox", box, remedy)
        else:
            draft.add_mask(image, name, encode(mask), place)


def _add_shape(
    draft: Draft,
    image: Image,
    name: str,
    element: ElementTree.Element,
    place: str,
    box: Box,
) -> None:
    """Add the object of an XML: its box, or the outline that LabelMe's and Roboflow's XMLs have."""
    if (element.findtext("deleted") or "").strip() == "1":
        return
    if mask := (element.findtext("segm/mask") or "").strip():
        _add_drawn(draft, image, name, mask, place)
        return
    outline = element.find("polygon")
    points = [] if outline is None else [*outline.findall("pt/x"), *outline.findall("pt/y")]
    if outline is None and element.find("bndbox") is None:
        kinds = ", ".join(child.tag for child in element)
        draft.drop_object("shape", place, kinds, "must have a bndbox or a polygon")
        return
    if outline is None:
        draft.add_box(image, name, list(box), place)
        return
    half = len(points) // 2
    flat = [to_number(points[k].text) for pair in range(half) for k in (pair, half + pair)]
    flat = flat or [to_number(child.text) for child in outline]  # x1, y1, x2, …
    try:
        draft.add_mask(image, name, polygon_mask(flat, image.width, image.height), place)
    except ValueError as fault:
        draft.drop_object("shape", place, flat, str(fault))


def _add_drawn(draft: Draft, image: Image, name: str, file: str, place: str) -> None:
    """Add an object whose mask is a PNG of its own in Masks/, as LabelMe's web tool has it."""
    path = draft.find(file)
    try:
        if path is None or not draft.contains(path, place):
            raise ValueError("no such mask in the dataset; add it")
        drawn = read_numbers(path, image.width, image.height) > 0
        draft.add_mask(image, name, encode(drawn), place)
    except ValueError as fault:
        draft.drop_object("shape", f"{place}: segm", file, str(fault))


def _first_pixel(objects: Sequence[ElementTree.Element]) -> int:
    """Return what the first pixel is called in an XML's boxes: 1, or 0."""
    sides = [side for element in objects for side in _sides(element)]
    return 0 if any("." in side or to_number(side) == 0 for side in sides) else 1


def _sides(element: ElementTree.Element) -> list[str]:
    names = ("xmin", "ymin", "xmax", "ymax")
    return [element.findtext(f"bndbox/{name}") or "" for name in names]


def _box_xywh(element: ElementTree.Element, first: int) -> Box:
    """Return the box in pixels, with NaN, which is refused later, for what is no number."""
    left, top, right, bottom = map(to_number, _sides(element))
    return left - first, top - first, right - left + first, bottom - top + first


def _crosses(mask: NDArray[np.bool_], box_xywh: Box) -> bool:
    """Return whether a mask has a pixel in the box."""
    x, y, w, h = box_xywh
    rows, columns = np.nonzero(mask)
    inside = (columns + 1 > x) & (columns < x + w) & (rows + 1 > y) & (rows < y + h)
    return bool(inside.any())
