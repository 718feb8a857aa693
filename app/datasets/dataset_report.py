"""A checked dataset → one HTML page: faults, counts, sizes, and samples with their labels."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image as PILImage
from pycocotools import mask as coco_mask

from app.console import counted
from app.datasets.build import Splits
from app.datasets.coco import Annotation, Dataset, Image
from app.datasets.faults import KINDS, SHOWN_PER_KIND, Action, Fault
from app.datasets.images import open_small
from app.datasets.overlay import color_of, draw_objects
from app.errors import UserError
from app.files import write_text
from app.page import page, picture, readable, table, text

REPORT = "dataset_report.html"
SAMPLES = {"train": 8, "valid": 4, "test": 4}
THUMBNAIL = 480  # pixels of the longer side
SHOWN_CLASSES = 200
SIZES = (16, 32, 64, 96, 128, 256, 512)  # pixels, lower ends
OBJECTS = (1, 2, 3, 4, 5, 6, 11, 21, 51)  # an image, lower ends


def write_page(folder: Path, splits: Splits) -> None:
    """Write the page of a run's dataset to the run's folder: a second, as few images are read."""
    parts = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    present = {name: part for name, part in parts.items() if part is not None}
    title = f"Dataset of {folder.resolve().name}"
    write_text(folder / REPORT, render(title, present, None, splits.notes))


def render(
    title: str,
    splits: Mapping[str, Dataset],
    faults: Sequence[Fault] | None,
    notes: Sequence[str] = (),
) -> str:
    """Return the page, whole in itself, with all text of the dataset escaped.

    Args:
        title: the dataset's name or folder.
        splits: what is sound of each split.
        faults: all that were found; None where the notes say what was.
        notes: for the user, such as how splits were made.
    """
    parts = [
        "".join(f"<p>{text(note)}</p>" for note in notes),
        _summary(splits),
        *([] if faults is None else ["<h2>Faults</h2>", _faults(faults)]),
        "<h2>Objects by class and split</h2>",
        _classes(splits),
        '<h2>Sizes</h2><div class="row">',
        _bars("objects, by side √(width × height), pixels", _object_sizes(splits)),
        _bars("images, by objects in them", _objects_an_image(splits)),
        _bars("images, by width × height, pixels", _image_sizes(splits)),
        "</div><h2>Samples</h2>",
        *(_samples(split, dataset) for split, dataset in splits.items()),
    ]
    return page(title, parts)


def _summary(splits: Mapping[str, Dataset]) -> str:
    rows = []
    for split, dataset in splits.items():
        empty = sum(not objects for objects in dataset.annotations_by_image.values())
        masks = sum(annotation.segmentation is not None for annotation in dataset.annotations)
        crowds = sum(annotation.iscrowd for annotation in dataset.annotations)
        counts = (len(dataset.images), empty, len(dataset.annotations), masks, crowds)
        rows.append([split, *map(str, counts)])
    return table(["split", "images", "without objects", "objects", "with mask", "crowds"], rows)


def _faults(faults: Sequence[Fault]) -> str:
    if not faults:
        return "<p>None were found.</p>"
    rows = []
    for kind, group in by_kind(faults):
        action, outcome = group[0].action, KINDS[kind].outcome if kind in KINDS else ""
        listed = "".join(f"<li>{text(str(f))}</li>" for f in group[:SHOWN_PER_KIND])
        rest = len(group) - SHOWN_PER_KIND
        more = f"<li>and {rest} more</li>" if rest > 0 else ""
        shown = f"{text(outcome)}<details><summary>where</summary><ul>{listed}{more}</ul></details>"
        rows.append([text(kind), f'<span class="{action}">{action}</span>', shown, str(len(group))])
    return table(["kind", "what becomes of it", "how", "faults"], rows, numbers=3)


def by_kind(faults: Iterable[Fault]) -> list[tuple[str, list[Fault]]]:
    """Group faults by kind: refused ones first, then dropped, mended, and warnings."""
    grouped: dict[str, list[Fault]] = {}
    for fault in faults:
        grouped.setdefault(fault.kind, []).append(fault)
    order = list(Action)
    return sorted(grouped.items(), key=lambda item: order.index(item[1][0].action))


def _classes(splits: Mapping[str, Dataset]) -> str:
    counts = {split: _class_counts(dataset) for split, dataset in splits.items()}
    total = Counter[str]()
    for dataset in splits.values():
        total.update(dict.fromkeys(dataset.class_names, 0))
    for count in counts.values():
        total.update(count)
    most = max(total.values(), default=0) or 1
    rows = [
        [
            text(name) + f'<br><svg width="{1 + 240 * number / most:.0f}" height="6">'
            f'<rect width="100%" height="6" fill="{_css(index)}"/></svg>',
            *(str(counts[split][name]) for split in splits),
            str(number),
        ]
        for index, (name, number) in enumerate(total.items())
    ]
    cut = (
        f"<p>and {len(rows) - SHOWN_CLASSES} more classes</p>" if len(rows) > SHOWN_CLASSES else ""
    )
    return table(["class", *splits, "all"], rows[:SHOWN_CLASSES]) + cut


def _class_counts(dataset: Dataset) -> Counter[str]:
    names = {category.id: category.name for category in dataset.categories}
    return Counter(names[annotation.category_id] for annotation in dataset.annotations)


def _css(index: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color_of(index))


def _object_sizes(splits: Mapping[str, Dataset]) -> dict[str, int]:
    sides = (
        (annotation.bbox_xywh[2] * annotation.bbox_xywh[3]) ** 0.5
        for dataset in splits.values()
        for annotation in dataset.annotations
    )
    return _binned(sides, SIZES, "{} to {}")


def _objects_an_image(splits: Mapping[str, Dataset]) -> dict[str, int]:
    numbers = (
        len(objects)
        for dataset in splits.values()
        for objects in dataset.annotations_by_image.values()
    )
    return _binned(numbers, OBJECTS, "{} to {}", whole=True)


def _binned(
    values: Iterable[float], ends: Sequence[int], between: str, whole: bool = False
) -> dict[str, int]:
    """Count the values from each of `ends` to below the next, and those before and after them."""
    counts = Counter(bisect_right(ends, value) for value in values)
    lows, last = (0, *ends), len(ends)
    names = {}
    for index, low in enumerate(lows):
        high = lows[index + 1] - (1 if whole else 0) if index < last else None
        name = str(low) if high == low else between.format(low, high)
        names[f"{low} and more" if high is None else name] = counts[index]
    return names


def _image_sizes(splits: Mapping[str, Dataset]) -> dict[str, int]:
    counts = Counter((i.width, i.height) for dataset in splits.values() for i in dataset.images)
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    shown = {f"{width} × {height}": number for (width, height), number in common[:10]}
    rest = sum(number for _, number in common[10:])
    return shown | ({f"{len(common) - 10} other sizes": rest} if rest else {})


def _bars(title: str, counts: Mapping[str, int]) -> str:
    """Return bars as an inline SVG, one a row."""
    most, rows = max(counts.values(), default=0) or 1, ""
    for row, (name, number) in enumerate(counts.items()):
        y, length = 20 * row, 170 * number / most
        rows += (
            f'<text x="105" y="{y + 14}" text-anchor="end">{text(name)}</text>'
            f'<rect x="112" y="{y + 3}" width="{length:.1f}" height="14" fill="#4a7ebb"/>'
            f'<text x="{116 + length:.1f}" y="{y + 14}">{number}</text>'
        )
    size = f'width="340" height="{20 * len(counts) + 4}"'
    return f"<figure><figcaption>{text(title)}</figcaption><svg {size}>{rows}</svg></figure>"


def _samples(split: str, dataset: Dataset) -> str:
    """Choose images spread over the split, those with objects first."""
    labelled = [i for i in dataset.images if dataset.annotations_by_image[i.id]]
    images = labelled or list(dataset.images)
    count = min(SAMPLES.get(split, 4), len(images))
    chosen = [images[index * len(images) // count] for index in range(count)]
    figures = "".join(_figure(image, dataset) for image in chosen)
    return f'<h3>{text(split)}</h3><div class="row">{figures}</div>'


def _figure(image: Image, dataset: Dataset) -> str:
    annotations = dataset.annotations_by_image[image.id]
    caption = f"{image.path.name}: {image.width} × {image.height}, "
    caption += counted(len(annotations), "object")
    try:
        drawn = draw_sample(image, annotations, dataset)
    except UserError:
        return f"<figure><figcaption>{text(caption)}: unreadable</figcaption></figure>"
    return picture(drawn, caption)


def draw_sample(
    image: Image,
    annotations: Sequence[Annotation],
    dataset: Dataset,
    scores: Mapping[int, float] | None = None,
) -> PILImage.Image:
    """Draw a thumbnail with masks, boxes and class names, the smaller objects on top.

    Args:
        scores: by annotation id, said after the name, where the annotations are predictions.

    Raises:
        UserError: the image cannot be decoded.
    """
    scale = min(1.0, THUMBNAIL / max(image.width, image.height))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    pixels = open_small(image.path, THUMBNAIL, image.levels).resize(size)
    order = {category.id: index for index, category in enumerate(dataset.categories)}
    ordered = sorted(annotations, key=lambda a: a.bbox_xywh[2] * a.bbox_xywh[3])
    boxes = np.array([a.bbox_xywh for a in ordered], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    indices = [order[a.category_id] for a in ordered]
    names = [readable(dataset.class_names[index])[:40] for index in indices]
    if scores is not None:
        names = [f"{name} {scores[a.id]:.2f}" for name, a in zip(names, ordered, strict=True)]
    masks = [_shrink(a.segmentation, size) if a.segmentation else None for a in ordered]
    return draw_objects(pixels, boxes * scale, masks, names, [color_of(i) for i in indices])


def _shrink(mask: dict[str, object], size: tuple[int, int]) -> dict[str, object]:
    # Turned, as pycocotools stores masks by columns: a third of the time for large images.
    turned = coco_mask.decode(mask).T
    small = cv2.resize(turned, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT).T
    encoded: dict[str, object] = coco_mask.encode(np.asfortranarray(small))
    return encoded
