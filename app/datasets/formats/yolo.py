"""YOLO segmentation and detection, in Ultralytics' layout: data.yaml, images/, labels/."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from app.config.yaml_data import parse_yaml
from app.datasets.coco import Image, Reading
from app.datasets.faults import Findings
from app.datasets.formats.draft import Draft, images_in
from app.datasets.formats.outlines import polygon_mask
from app.errors import UserError

CONFIG_NAMES = ("data.yaml", "data.yml", "dataset.yaml")
SPLIT_KEYS = {"train": ("train",), "valid": ("val", "valid"), "test": ("test",)}
SLACK = 0.01  # Ultralytics' too: an export's rounding may leave 0..1 by so much


@dataclass(frozen=True)
class Config:
    """A data.yaml; each split is folders or lists (.txt) of images, all inside the dataset."""

    path: Path
    class_names: tuple[str, ...]
    splits: dict[str, tuple[Path, ...]]


def is_yolo(folder: Path) -> bool:
    return _config_path(folder) is not None


def read_config(folder: Path) -> Config:
    """Read the data.yaml in `folder`.

    Raises:
        UserError: with all that is wrong with its names and paths.
    """
    path = _config_path(folder)
    assert path is not None, "called for a folder that is_yolo"
    findings = Findings(str(path))
    document = _as_roboflow_means(_load_yaml(path), folder)
    names = _class_names(document.get("names"), findings)
    splits = {}
    for split, keys in SPLIT_KEYS.items():
        key = next((key for key in keys if document.get(key)), None)
        if key is not None:
            splits[split] = _locate_all(document, key, folder.resolve(), findings)
    if "train" not in splits:
        findings.add("split", "'train'", None, "must be the folder of the training images")
    if problems := findings.lines():
        raise UserError(problems)
    return Config(path, names, splits)


def read(config: Config, split: str) -> Reading:
    """Read the images of a split and their labels; class 0 becomes category 1, and so on.

    A line of five numbers is a box, a longer one a polygon, whose holes and parts may be joined by
    bridges of no width.

    Returns:
        What is sound, and every fault of every line.
    """
    draft = Draft(config.path.parent, config.class_names)
    for source in config.splits[split]:
        for path in _images_of(source, draft):
            image = draft.add_image(path, draft.place(path))
            labels = _label_path(path, draft.root)
            # exists() is False for a broken link, which must not pass for an image without objects
            if image is not None and (labels.exists() or labels.is_symlink()):
                _read_labels(draft, image, labels, config.class_names)
    return draft.finish()


def _config_path(folder: Path) -> Path | None:
    for name in CONFIG_NAMES:
        if (folder / name).is_file():
            return folder / name
    others = [path for path in sorted(folder.glob("*.y*ml")) if _has_names(path)]
    return others[0] if len(others) == 1 else None


def _has_names(path: Path) -> bool:
    try:
        return bool(re.search(r"(?m)^names\s*:", path.read_text("utf-8-sig")))
    except (OSError, UnicodeDecodeError):
        return False


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        document = parse_yaml(path.read_bytes().decode("utf-8-sig"), str(path))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as YAML ({reason}); export it again") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: must have the keys names, train and val; export it again")
    return document


def _class_names(names: object, findings: Findings) -> tuple[str, ...]:
    """Return the names by class number, from a list or a dict of numbers 0, 1, …"""
    if isinstance(names, dict):
        if list(names) and sorted(names, key=str) == sorted(range(len(names)), key=str):
            names = [names[number] for number in range(len(names))]
        else:
            findings.add("names", "'names'", names, "must number the classes 0, 1, … without a gap")
            return ()
    if not isinstance(names, list) or not names:
        findings.add("names", "'names'", names, "must list the classes' names, in their order")
        return ()
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            remedy = "must be the class's name, as text; put it in quotes"
            findings.add("names", f"names[{number}]", name, remedy)
        elif name in names[:number]:
            findings.add(
                "names", f"names[{number}]", name, "is another class's name too; rename one"
            )
    return tuple(str(name).strip() for name in names)


def _as_roboflow_means(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the config with the splits of Roboflow's export where they are, without missing ones.

    They lie in train/, valid/ and test/ beside data.yaml, which names all three, there or not;
    Roboflow's Python package writes paths of its machine into it (roboflow-python#125).
    """
    if "roboflow" not in document and not (folder / "README.roboflow.txt").is_file():
        return document
    meant, base = dict(document), str(document.get("path") or ".")
    for key in (key for keys in SPLIT_KEYS.values() for key in keys):
        entry = str(document.get(key))
        match = re.search(r"(?:^|/)((train|valid|test)/images)$", entry)
        if match and _locate(entry, base, folder.resolve()) is None:
            there = (folder / match[1]).is_dir()
            meant[key] = match[1] if there or key == "train" else None
    return meant


def _locate_all(
    document: dict[str, Any], key: str, root: Path, findings: Findings
) -> tuple[Path, ...]:
    entries = document[key] if isinstance(document[key], list) else [document[key]]
    base, paths = document.get("path"), []
    for entry in entries:
        path = _locate(str(entry), str(base or "."), root)
        if path is None:
            remedy = f"must be a folder or a .txt list of images in the dataset's folder {root}"
            findings.add("split", f"'{key}'", entry, remedy)
        else:
            paths.append(path)
    return tuple(paths)


def _locate(entry: str, base: str, root: Path) -> Path | None:
    """Return the path inside the dataset that an entry means; None where there is none.

    `path` is often a folder of the machine that exported it, and Roboflow writes '../train/images'
    for what lies beside data.yaml: Ultralytics forgives the latter too.
    """
    for candidate in (root / base / entry, root / entry, root / entry.removeprefix("../")):
        try:
            path = candidate.resolve()
            if path.is_relative_to(root) and path.exists():
                return path
        except (OSError, ValueError, RuntimeError):  # too long, NUL, a loop of links
            continue
    return None


def _images_of(source: Path, draft: Draft) -> list[Path]:
    if source.is_dir():
        return images_in(source)
    lines = (draft.read_text(source) or "").splitlines()
    paths = []
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if not name:
            continue
        path = _locate(name, str(source.parent), draft.root)
        if path is None:
            remedy = "must be an image in the dataset's folder"
            draft.findings.add("list", f"{draft.place(source)} line {number}", name, remedy)
        else:
            paths.append(path)
    return paths


def _label_path(image: Path, root: Path) -> Path:
    """Return the twin under labels/ of an image under (the last) images/, else its neighbor."""
    parts = list(image.relative_to(root).parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return root.joinpath(*parts).with_suffix(".txt")


def _read_labels(draft: Draft, image: Image, path: Path, names: tuple[str, ...]) -> None:
    for number, line in enumerate((draft.read_text(path) or "").splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{draft.place(path)} line {number}"
        try:
            class_number, numbers = _parse(line, len(names))
            if len(numbers) == 4:
                box = _box_xywh(numbers, image.width, image.height)
                draft.add_box(image, names[class_number], box, place)
            else:
                sides = (image.width, image.height)
                polygon = [number * sides[i % 2] for i, number in enumerate(numbers)]
                mask = polygon_mask(polygon, image.width, image.height)
                draft.add_mask(image, names[class_number], mask, place)
        except ValueError as fault:
            draft.findings.add("label", place, line.strip(), str(fault))


def _parse(line: str, classes: int) -> tuple[int, list[float]]:
    """Parse a line's class number and coordinates (0..1); raise ValueError with the fault."""
    try:
        first, *numbers = (float(word) for word in line.split())
    except ValueError:
        raise ValueError("must be a class number and coordinates, parted by spaces") from None
    if not (first.is_integer() and 0 <= first < classes):
        raise ValueError(f"must begin with a class number, 0 to {classes - 1}, of data.yaml")
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise ValueError(
            f"has {len(numbers)} numbers after the class: must be a box (cx cy w h) or the x and y "
            "of three or more points"
        )
    if not all(math.isfinite(n) and -SLACK <= n <= 1 + SLACK for n in numbers):
        raise ValueError("must have coordinates from 0 to 1: parts of the image's sides")
    return int(first), numbers


def _box_xywh(cxcywh: list[float], width: int, height: int) -> list[float]:
    """Convert a box of center and size (0..1) to corner and size in pixels."""
    cx, cy, w, h = cxcywh
    return [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
