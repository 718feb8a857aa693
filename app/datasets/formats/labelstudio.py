"""Label Studio's JSON: a list of tasks, or a task a file, with the annotations of each."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from app.config.reading import ReadingConfig
from app.datasets.coco import Image, Reading
from app.datasets.folders import split_on_way, splits_of
from app.datasets.formats.draft import Draft, Read
from app.datasets.formats.embedded import brush_mask
from app.datasets.formats.outlines import Rle, ellipse_mask, encode, polygon_mask, turned_box
from app.datasets.formats.parts import Box, Part, add_objects
from app.datasets.formats.telling import entries, files, holding, leads_out, mentions
from app.datasets.geometry import is_number
from app.datasets.images import EXTENSIONS
from app.datasets.names import Names
from app.errors import UserError
from app.files import read_json

PATTERNS = ("*.json", "*/*.json")
UPLOAD = re.compile(r"(.*[/\\])?[0-9a-f]{8}-(?=[^/\\]+$)")  # that Label Studio puts before a name
TEXTS = ("text", "rating", "number", "taxonomy", "datetime")  # of a region, beside its labels
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
UNDERSTOOD = "rectangles, polygons, ellipses and brush strokes"


def is_label_studio(folder: Path) -> bool:
    """Return whether one of the first JSONs holds tasks, in the folder or in one of its own."""
    return any(
        document is None or any(map(_is_task, _listed(document)))
        for pattern in PATTERNS
        # completions: as annotations were called before version 1
        for key in ("annotations", "completions", "task")
        for _, document in holding(folder, pattern, "data", "result", key)
    )


def _listed(document: object) -> list[dict[str, Any]]:
    """Return the tasks of a file: a list, one, or an annotation that holds its task.

    The last is what Label Studio writes to a storage, a file an annotation.
    """
    task = document.get("task") if isinstance(document, dict) else None
    if isinstance(document, dict) and isinstance(task, dict):
        return [{**task, "annotations": [document]}]
    return entries(document if isinstance(document, list) else [document])


def _is_task(entry: dict[str, Any]) -> bool:
    return isinstance(entry.get("data"), dict) and isinstance(_annotations(entry), list)


def _annotations(task: dict[str, Any]) -> object:
    return task.get("annotations", task.get("completions"))


def splits(folder: Path, _: ReadingConfig) -> dict[str, Read]:
    """Return the splits by the folders of the JSONs, else by their names.

    Raises:
        UserError: some names tell a split and others do not.
    """
    folder = folder.resolve()
    tasks: dict[str, list[tuple[str, object]]] = {}
    for path in files(folder, *PATTERNS):
        if leads_out(path, folder) or not mentions(path, "data", "result"):
            continue
        try:
            document = read_json(path)
        except UserError as error:
            document = error
        if isinstance(document, UserError) or any(map(_is_task, _listed(document))):
            # the files of single tasks are many, and their names tell nothing
            own = path.stem if isinstance(document, list) else ""
            one = [document] if isinstance(document, UserError) else _listed(document)
            listed = document if isinstance(document, list) else one
            place = str(path.relative_to(folder))
            tasks.setdefault(split_on_way(path, folder) or own, []).extend(
                (f"{place}: [{index}]", task) for index, task in enumerate(listed)
            )
    by_split: dict[str, list[tuple[str, object]]] = {}
    for name, split in splits_of(tasks, f"{folder}: the files").items():
        by_split.setdefault(split, []).extend(tasks[name])
    return {split: partial(_read, folder, found) for split, found in by_split.items()}


def _read(folder: Path, tasks: Sequence[tuple[str, object]]) -> Reading:
    """Read these tasks' annotations; predictions are passed over.

    Returns:
        What is sound, and every fault of every region.
    """
    draft, notes = Draft(folder, names=Names([folder], folder)), _Notes()
    for place, task in tasks:
        if isinstance(task, UserError):
            draft.findings.add_error("JSON", task)
        elif not isinstance(task, dict) or not _is_task(task):
            draft.drop_file("entry", place, task, "must be a task with data and annotations")
        else:
            _read_task(draft, place, task, notes)
    notes.report(draft)
    return draft.finish()


class _Notes:
    """What is passed over, to be said once."""

    def __init__(self) -> None:
        self.tags = 0
        self.unlabelled = list[str]()

    def report(self, draft: Draft) -> None:
        if self.tags:
            remedy = "mark no place, as choices and texts: passed over"
            draft.findings.add("tag", "results", f"{self.tags} results", remedy)
        if count := len(self.unlabelled):
            remedy = f"{count} tasks have no annotation, such as {self.unlabelled[0]}: not used"
            draft.findings.add("unlisted", "tasks", f"{count} tasks", remedy)


def _read_task(draft: Draft, place: str, task: dict[str, Any], notes: _Notes) -> None:
    found = [one for one in entries(_annotations(task)) if not one.get("was_cancelled")]
    # of those of one time, the last that is listed
    last = max(found[::-1], key=lambda one: str(one.get("updated_at") or ""), default=None)
    results = entries(last.get("result")) if last else []
    name = _image_name(task["data"], results)
    meant = _meant(draft, name, place)
    if last is None:
        notes.unlabelled.append(place)
        draft.pass_over(meant)
        return
    if str(meant).lower().split("?")[0].endswith(VIDEOS):
        draft.drop_file(
            "no image", f"{place}: data", meant, "is a video: label images of its frames"
        )
        return
    image = draft.add_named(meant, f"{place}: data")
    if image is None:
        return
    if len(found) > 1:
        remedy = f"are annotations of one image: the last, updated {last.get('updated_at')}, counts"
        draft.findings.add("several labels", place, len(found), remedy)
    parts = []
    regions, tags = _regions(results)
    notes.tags += tags
    for index, labels in regions:
        spot, result = f"{place}: result[{index}]", results[index]
        value = result["value"]
        sides = (result.get("original_width"), result.get("original_height"))
        draft.check_size(image, sides, spot)
        for label in labels:
            make = partial(_shape, value, result.get("image_rotation"), image)
            parts.append(Part(label, None, spot, value, make))
    add_objects(draft, image, parts)


def _regions(results: Sequence[dict[str, Any]]) -> tuple[list[tuple[int, list[object]]], int]:
    """Return the results that are regions, each with its labels, and how many mark no place.

    A region that has a choice or a text of its own, as of what is written there, is a result for
    each, with its id and place in all of them. Its labels count; where there are none, the choice.
    """
    shapes: dict[str, list[int]] = {}
    for index, result in enumerate(results):
        value = result.get("value")
        if isinstance(value, dict) and _is_shape(value):
            place = {key: value[key] for key in value if not _is_said(key)}
            shapes.setdefault(repr((result.get("id"), place)), []).append(index)
    regions: list[tuple[int, list[object]]] = []
    tags = len(results) - sum(map(len, shapes.values()))
    for same in shapes.values():
        said = {index: _labels(results[index]["value"]) for index in same}
        labelled = [index for index in same if said[index]]
        chosen = [c for i in same for c in _list(results[i]["value"].get("choices"))]
        regions += [(index, said[index]) for index in labelled]
        if not labelled:
            regions.append((same[0], chosen if len(chosen) == 1 else [None]))
        kinds = ("choices", *TEXTS) if labelled or len(chosen) != 1 else TEXTS
        tags += sum(any(key in results[index]["value"] for key in kinds) for index in same)
    return sorted(regions, key=lambda region: region[0]), tags


def _is_said(key: str) -> bool:
    """Return whether a key of a region's value says what is there, and not where."""
    return key.endswith("labels") or key in ("choices", *TEXTS)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _image_name(data: dict[str, Any], results: list[dict[str, Any]]) -> object:
    """Return the value of the task's data that names its image."""
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    named = [str(result.get("to_name")) for result in results]
    ending = [key for key, text in texts.items() if text.lower().split("?")[0].endswith(EXTENSIONS)]
    keys = [key for key in [*named, "image", "img", *ending, *texts] if key in texts]
    return texts[keys[0]] if keys else next(iter(data.values()), None)


def _meant(draft: Draft, name: object, place: str) -> object:
    """Return the name, without what Label Studio put before it where the file lacks that."""
    if not isinstance(name, str) or draft.find(name):
        return name
    own = UPLOAD.sub("", name)
    if own == name or draft.find(own) is None:
        return name
    remedy = f"is read as {own}, as the file was called that was uploaded"
    draft.findings.add("other name", f"{place}: data", name, remedy)
    return own


def _is_shape(value: dict[str, Any]) -> bool:
    places = ("x", "points", "rle", "vertices", "imageDataURL")
    return any(key in value for key in places)


def _labels(value: dict[str, Any]) -> list[object]:
    """Return the labels of a region: `rectanglelabels`, `brushlabels` or plain `labels`."""
    found = [labels for key, labels in value.items() if key.endswith("labels") and labels]
    labels = found[0] if found else []
    return labels if isinstance(labels, list) else [labels]


def _shape(value: dict[str, Any], image_turn: object, image: Image) -> Box | Rle:
    """Return the box or the mask of a region, whose numbers are percents of the image's sides."""
    width, height = image.width, image.height
    if image_turn:
        raise ValueError(f"was drawn on an image turned by {image_turn}: turn it back and export")
    if "rle" in value:
        return encode(brush_mask(value["rle"], width, height))
    if isinstance(points := value.get("points"), list):
        pairs = [pair for pair in points if isinstance(pair, list) and len(pair) == 2]
        if len(pairs) != len(points):
            raise ValueError("must have points that are pairs of x and y")
        sides = (width, height)
        return polygon_mask(
            [_share(side, sides[axis]) for pair in pairs for axis, side in enumerate(pair)],
            *sides,
        )
    turn = _share(value.get("rotation") or 0, 100)
    x, y = _share(value.get("x"), width), _share(value.get("y"), height)
    if "radiusX" in value:
        radii = (_share(value.get("radiusX"), width), _share(value.get("radiusY"), height))
        return ellipse_mask((x, y), radii, width, height, angle=math.radians(turn))
    if "height" not in value:
        raise ValueError(f"is none of {UNDERSTOOD}")
    box = [x, y, _share(value.get("width"), width), _share(value.get("height"), height)]
    # turned around its upper left corner, not its center
    return turned_box(box, turn, (x, y), width, height) if turn else box


def _share(percent: object, side: int) -> float:
    if not is_number(percent):
        raise ValueError("must have finite numbers, in percent of the image's sides")
    return percent / 100 * side
