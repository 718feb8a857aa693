"""Every fault that would break training or evaluation, found before anything trusts the file.

pycocotools segfaults or reads foreign memory on malformed masks (NaN or huge coordinates, runs
that do not fill the mask), so this module proves each mask safe without calling it.
"""

from __future__ import annotations

import re
import reprlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags
from PIL import Image as PILImage

MAX_SIDE = 32768  # pixels; pycocotools' 32-bit run lengths overflow at 65,536 squared
MAX_OUTLINE = 2_000_000  # pixels; pycocotools allocates about 80 bytes a pixel, unchecked
SHOWN_PER_KIND = 20
LARGEST_NUMBER = 1e12  # anything beyond is a fault in the export, not a measurement

Entry = tuple[str, dict[str, Any]]  # place in the file, JSON object
Sizes = dict[int, tuple[int, int]]  # image id -> width, height


class Findings:
    """Problems grouped by kind, so that a thousand of one kind do not bury another."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.by_kind: dict[str, list[str]] = {}

    def add(self, kind: str, place: str, value: object, remedy: str) -> None:
        text = f"{self.where}: {place} is {_show(value)}: {remedy}"
        self.by_kind.setdefault(kind, []).append(text)

    def lines(self) -> list[str]:
        """At most SHOWN_PER_KIND lines a kind, then a count of the rest."""
        lines = []
        for kind, problems in self.by_kind.items():
            lines += problems[:SHOWN_PER_KIND]
            if (rest := len(problems) - SHOWN_PER_KIND) > 0:
                lines.append(f"{self.where}: and {rest} more problems of this kind ({kind})")
        return lines


def check(document: object, where: str) -> list[str]:
    """The problems of a parsed COCO JSON, as text; empty where it is sound.

    Looks at the JSON only: `check_files` looks at the images that it names.

    Args:
        document: what `json.loads` gave.
        where: the file's name, put before each problem.
    """
    found = Findings(where)
    if not isinstance(document, dict):
        found.add("root", "the file", document, "must be a COCO JSON object; export it again")
        return found.lines()
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            found.add("root", f"'{key}'", document.get(key), "must be a list, as COCO has it")
    sizes = _check_images(document, found)
    categories = _check_categories(document, found)
    for place, annotation in _entries(document, "annotations", found):
        _check_annotation(place, annotation, sizes, categories, found)
    return found.lines()


def _entries(document: dict[str, Any], key: str, found: Findings) -> Iterator[Entry]:
    """Yield each object of a list, reporting what is no object and ids that are no unique int."""
    seen: dict[int, str] = {}
    for place, entry in _places(document, key):
        if not isinstance(entry, dict):
            found.add("entry", place, entry, "must be a JSON object")
            continue
        identity = entry.get("id")
        if not is_id(identity):
            found.add("id", f"{place}.id", identity, "must be a whole number")
        elif identity in seen:
            found.add("id", f"{place}.id", identity, f"is taken by {seen[identity]}; renumber one")
        else:
            seen[identity] = place
        yield place, entry


def _places(document: dict[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    values = document.get(key)
    for index, value in enumerate(values if isinstance(values, list) else []):
        yield f"{key}[{index}]", value


def _check_images(document: dict[str, Any], found: Findings) -> Sizes:
    sizes = {}
    for place, image in _entries(document, "images", found):
        for key in ("width", "height"):
            if not is_side(image.get(key)):
                remedy = f"must be a whole number of pixels, 1 to {MAX_SIDE}"
                found.add("image size", f"{place}.{key}", image.get(key), remedy)
        if fault := name_fault(image.get("file_name")):
            found.add("file name", f"{place}.file_name", image.get("file_name"), fault)
        if is_id(image.get("id")) and is_side(image.get("width")) and is_side(image.get("height")):
            sizes[image["id"]] = (image["width"], image["height"])
    return sizes


def _check_categories(document: dict[str, Any], found: Findings) -> set[int]:
    """The ids that annotations may use; placeholders may share a name with a real class."""
    dropped, ids = placeholder_ids(document), set[int]()
    seen: dict[str, str] = {}
    for place, category in _entries(document, "categories", found):
        identity, name = category.get("id"), category.get("name")
        if is_id(identity):
            ids.add(identity)
        if not isinstance(name, str) or not name.strip() or not _is_unicode(name):
            found.add("category", f"{place}.name", name, "must be the class's name, as text")
        elif name.strip() in seen and not (is_id(identity) and identity in dropped):
            remedy = f"is also the name of {seen[name.strip()]}; merge or rename one"
            found.add("category", f"{place}.name", name, remedy)
        elif not (is_id(identity) and identity in dropped):
            seen[name.strip()] = place
    return ids


def placeholder_ids(document: dict[str, Any]) -> set[int]:
    """Ids of categories that name no class: unused, and id 0 or the supercategory of others.

    Roboflow writes one such category into its exports; it must not become a prompt.
    """
    objects = {
        key: [value for _, value in _places(document, key) if isinstance(value, dict)]
        for key in ("annotations", "categories")
    }
    used = {a["category_id"] for a in objects["annotations"] if is_id(a.get("category_id"))}
    categories = [c for c in objects["categories"] if is_id(c.get("id"))]
    parents: dict[str, set[int]] = {}
    for category in categories:
        if isinstance(parent := category.get("supercategory"), str):
            parents.setdefault(parent, set()).add(category["id"])
    return {
        c["id"]
        for c in categories
        if c["id"] not in used
        and len(categories) > 1
        and (c["id"] == 0 or parents.get(str(c.get("name")), set()) - {c["id"]})
    }


def _check_annotation(
    place: str, annotation: dict[str, Any], sizes: Sizes, categories: set[int], found: Findings
) -> None:
    image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
    size = sizes.get(image_id) if is_id(image_id) else None
    if size is None:
        remedy = "is the id of no sound image in 'images'"
        found.add("image reference", f"{place}.image_id", image_id, remedy)
    if not is_id(category_id) or category_id not in categories:
        remedy = "is the id of no category in 'categories'"
        found.add("category reference", f"{place}.category_id", category_id, remedy)
    if annotation.get("iscrowd") not in (None, 0, 1):
        found.add("iscrowd", f"{place}.iscrowd", annotation["iscrowd"], "must be 0 or 1")
    area = annotation.get("area")
    if area is not None and not (_is_number(area) and area >= 0):
        found.add("area", f"{place}.area", area, "must be square pixels, 0 or more, or left out")
    if size is not None:
        _check_geometry(place, annotation, *size, found)


def _check_geometry(
    place: str, annotation: dict[str, Any], width: int, height: int, found: Findings
) -> None:
    box, segmentation = annotation.get("bbox"), annotation.get("segmentation")
    if is_absent(box) and is_absent(segmentation):
        found.add("bbox", f"{place}.bbox", box, "must be given where there is no segmentation")
    if not is_absent(box) and (fault := box_fault(box, width, height)):
        found.add("bbox", f"{place}.bbox", box, fault)
    if not is_absent(segmentation) and (fault := _mask_fault(segmentation, width, height)):
        found.add("segmentation", f"{place}.segmentation", segmentation, fault)


def box_fault(box: object, width: int, height: int) -> str | None:
    """What is wrong with an xywh box (pixels); None where it is sound."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "must be four finite numbers [x, y, width, height] in pixels"
    if box[2] <= 0 or box[3] <= 0:
        return "must have a width and a height above 0; delete this annotation or redraw it"
    *_, visible_width, visible_height = clip_box(box, width, height)
    if visible_width <= 0 or visible_height <= 0:
        return f"lies outside its image of {width} x {height} pixels; delete or redraw it"
    return None


def clip_box(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    """The part of an xywh box (pixels) inside the image; width or height <= 0 where none is."""
    x, w = _clip_span(box[0], box[2], width)
    y, h = _clip_span(box[1], box[3], height)
    return x, y, w, h


def _clip_span(start: float, length: float, limit: int) -> tuple[float, float]:
    if start >= 0 and start + length <= limit:
        return float(start), float(length)  # untouched: subtracting again would lose digits
    low, high = max(start, 0.0), min(start + length, limit)
    return float(low), float(high - low)


def _mask_fault(segmentation: object, width: int, height: int) -> str | None:
    if isinstance(segmentation, dict):
        return _rle_fault(segmentation, width, height)
    if not isinstance(segmentation, list):
        return "must be a list of polygons or an RLE object"
    faults = (polygon_fault(polygon, width, height) for polygon in segmentation)
    return next((fault for fault in faults if fault), None)


def polygon_fault(polygon: object, width: int, height: int) -> str | None:
    """What is wrong with a flat polygon [x1, y1, x2, …] (pixels); None where it is sound."""
    if not isinstance(polygon, list) or not all(map(_is_number, polygon)):
        return "must be a list of polygons, each a flat list of finite numbers [x1, y1, x2, …]"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"has a polygon of {len(polygon)} numbers: must be pairs of x and y, three or more"
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)  # (points, xy), pixels
    size = np.array([width, height])
    if (points < -size).any() or (points > 2 * size).any():
        return f"leaves its image of {width} x {height} pixels by more than the image's own size"
    outline = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()
    if outline > MAX_OUTLINE:
        return f"has an outline of {outline:.0f} pixels: no shape is so long; redraw it"
    return None


def _rle_fault(rle: dict[str, Any], width: int, height: int) -> str | None:
    size = rle.get("size")
    if not isinstance(size, list) or not all(map(is_side, size)) or size != [height, width]:
        return f"must have the image's size [height, width] = [{height}, {width}]"
    try:
        decode_counts(rle.get("counts"), width * height)
    except ValueError as error:
        return str(error)
    return None


def decode_counts(counts: object, pixels: int) -> NDArray[np.int64]:
    """Run lengths, background first, of an uncompressed (list) or compressed (string) COCO RLE.

    Args:
        counts: the RLE's `counts`, from any source.
        pixels: height x width, which the runs must sum to.

    Raises:
        ValueError: they are no such runs; says why.
    """
    if isinstance(counts, str):
        runs = _decode_string(counts)
    elif isinstance(counts, list) and all(_is_int(c) and 0 <= c <= pixels for c in counts):
        runs = np.array(counts, dtype=np.int64)
    else:
        raise ValueError("must have 'counts' that are a list of run lengths, or COCO's string")
    if (runs < 0).any() or (runs > pixels).any() or runs.sum() != pixels:
        raise ValueError(f"must have 'counts' whose runs sum to height x width = {pixels}")
    return runs


def _decode_string(counts: str) -> NDArray[np.int64]:
    """COCO's string: 5 bits a character, low first, bit 5 for 'more'; from the fourth number on,
    each is the difference to the one two before (`rleFrString`, cocoapi common/maskApi.c)."""
    codes = np.frombuffer(counts.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("must have 'counts' in COCO's string form; these are damaged or cut short")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        raise ValueError("must have 'counts' of at most 7 characters a number")
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)  # the sign
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def check_files(
    document: dict[str, Any], where: str, roots: Sequence[Path]
) -> tuple[dict[int, Path], list[str]]:
    """Find and open the image file of each sound entry of `images`.

    Entries that `check` reports are passed over. Only headers are read, not pixels.

    Returns:
        Absolute path by image id, and the problems as text.
    """
    found, files, owners = Findings(where), dict[int, Path](), dict[Path, str]()
    sound = _check_images(document, Findings(where))
    for place, image in _places(document, "images"):
        if not isinstance(image, dict) or not is_id(image.get("id")) or image["id"] not in sound:
            continue
        name = image.get("file_name")
        if not isinstance(name, str) or name_fault(name):
            continue
        path = find_image(name, roots)
        if fault := _file_fault(path, sound[image["id"]], roots):
            found.add("image file", f"{place}.file_name", name, fault)
        elif path in owners:
            remedy = f"is the same file as {owners[path]}; list each image once"
            found.add("image file", f"{place}.file_name", name, remedy)
        elif path is not None:
            files[image["id"]], owners[path] = path, place
    return files, found.lines()


def find_image(name: str, roots: Sequence[Path]) -> Path | None:
    """The first file under the roots: as written, under images/, or there by its last name."""
    for root in roots:
        for candidate in (root / name, root / "images" / name, root / "images" / Path(name).name):
            try:
                if candidate.is_file():
                    return candidate.resolve()
            except OSError:  # a name too long, or a folder that may not be read: not to be had
                continue
    return None


def _file_fault(path: Path | None, size: tuple[int, int], roots: Sequence[Path]) -> str | None:
    if path is None:
        folders = ", ".join(f"{root} and {root / 'images'}" for root in roots)
        return f"no such file in {folders}"
    if not any(path.is_relative_to(root.resolve()) for root in roots):
        return f"is a link that leads out of the dataset, to {path}; copy the file there"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            with PILImage.open(path) as image:
                stored, turned = image.size, image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # Pillow raises nearly anything on a damaged header
        return f"cannot be opened as an image ({error}); replace {path}"
    actual = stored[::-1] if turned in (5, 6, 7, 8) else stored
    if actual != size:
        note = " once turned as its EXIF orientation says" if actual != stored else ""
        return (
            f"the file has {actual[0]} x {actual[1]} pixels{note}, and the JSON says "
            f"{size[0]} x {size[1]}; export the dataset again"
        )
    return None


def name_fault(name: object) -> str | None:
    """What is wrong with a file's name in a dataset; None where it is a path inside it."""
    if not isinstance(name, str) or not name.strip() or not _is_unicode(name):
        return "must be the image's path, as text"
    if "\0" in name or name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name):
        return "must be a path relative to the dataset's folder"
    if ".." in re.split(r"[\\/]", name):
        return "must not lead out of the dataset's folder by '..'"
    return None


def is_absent(value: object) -> bool:
    """Whether a bbox or a segmentation is left out, in either way that exports do it."""
    return value is None or value == []


def is_id(value: object) -> TypeGuard[int]:
    """Whether an id fits the 64 bits that tensors hold; JSON's true and false are no ids."""
    return _is_int(value) and abs(value) < 2**63


def is_side(value: object) -> TypeGuard[int]:
    return _is_int(value) and 1 <= value <= MAX_SIDE


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    """Finite and of a sane size: NaN fails every comparison."""
    return (isinstance(value, float) or _is_int(value)) and abs(value) < LARGEST_NUMBER


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can hold and no file or tokenizer can."""
    return not re.search("[\ud800-\udfff]", text)


def _show(value: object) -> str:
    """The value on one line, cut short; control characters escaped."""
    return "missing" if value is None else _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = 80
