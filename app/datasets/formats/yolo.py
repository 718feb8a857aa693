"""YOLO boxes, polygons and poses: Ultralytics' data.yaml, Darknet's obj.names, or classes.txt."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from app.config.yaml_data import parse_yaml
from app.datasets.coco import Image, Reading
from app.datasets.faults import Findings
from app.datasets.folders import FOLDERS, split_folders
from app.datasets.formats.draft import Draft
from app.datasets.formats.outlines import polygon_mask
from app.datasets.images import EXTENSIONS
from app.datasets.names import Names, walk_images
from app.errors import UserError

CONFIG_NAMES = ("data.yaml", "data.yml", "dataset.yaml")
DARKNET = "obj.data"  # as CVAT's YOLO 1.1 has it, beside obj.names and train.txt
# a name a line, as Darknet, LabelImg, Label Studio and Make Sense write them
NAME_LISTS = ("obj.names", "classes.txt", "labels/classes.txt", "predefined_classes.txt")
SPLIT_KEYS = {"train": ("train",), "valid": ("val", "valid"), "test": ("test",)}
SLACK = 0.01  # Ultralytics' too: an export's rounding may leave 0..1 by so much
NO_LABELS = ("classes.txt", "train.txt", "val.txt", "valid.txt", "test.txt", "requirements.txt")
LABEL_LINE = re.compile(r"\s*\d+(\.0+)?(\s+[-+.\deE]+){4,}\s*?(\n|\r|$|\s)")


@dataclass(frozen=True)
class Config:
    """What a dataset says of itself.

    Attributes:
        path: the file that says it.
        splits: folders or lists (.txt) of images, all inside the dataset.
        keypoints: numbers after the box in a line of a pose; 0 where there are no poses.
    """

    path: Path
    class_names: tuple[str, ...]
    splits: dict[str, tuple[Path, ...]]
    keypoints: int = 0

    @property
    def root(self) -> Path:
        folder = self.path.parent.resolve()
        return folder.parent if self.path.parent.name == "labels" else folder

    @cached_property
    def owned(self) -> frozenset[Path]:
        """Return the label files that the dataset's images may have, of whatever split."""
        return frozenset(_label_path(path, self.root) for path in walk_images(self.root))


def is_yolo(folder: Path) -> bool:
    if _config_path(folder) is not None:
        return True
    return _name_list(folder) is not None and any(_label_files(folder))


def read_config(folder: Path) -> Config:
    """Read the data.yaml in `folder`, or obj.data, or the list of classes.

    Raises:
        UserError: with all that is wrong with its names and paths.
    """
    path = _config_path(folder)
    if path is None or path.name == DARKNET:
        return _read_plain(folder, path)
    findings = Findings(str(path))
    document = _as_roboflow_means(_load_yaml(path), folder)
    names = _class_names(document.get("names"), findings)
    splits = {}
    for split, keys in SPLIT_KEYS.items():
        key = next((key for key in keys if document.get(key)), None)
        if key is not None:
            splits[split] = _locate_all(document, key, folder.resolve(), findings)
    if not any(document.get(key) for keys in SPLIT_KEYS.values() for key in keys):
        splits = _folders(folder.resolve())  # as `infer --save yolo` writes it, beside images/
    if "train" not in splits:
        findings.add("split", "'train'", None, "must be the folder of the training images")
    keypoints = _keypoints(document.get("kpt_shape"), findings)
    if problems := findings.lines():
        raise UserError(problems)
    return Config(path, names, splits, keypoints)


def _keypoints(shape: object, findings: Findings) -> int:
    """Return the numbers of a pose from data.yaml's `kpt_shape`: points, and 2 or 3 for each."""
    if shape is None:
        return 0
    if isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape):
        return int(shape[0] * shape[1])
    findings.add("names", "'kpt_shape'", shape, "must be [points, 2 or 3]")
    return 0


def _read_plain(folder: Path, darknet: Path | None) -> Config:
    """Read a dataset without a data.yaml: a list of names, and folders or lists of images."""
    root, name_list = folder.resolve(), _name_list(folder)
    path = darknet or name_list
    assert path is not None, "called for a folder that is_yolo"
    findings = Findings(str(path))
    names: list[str] = []
    if name_list is None:
        findings.add("names", "obj.names", None, "must list the classes' names, one a line")
    else:
        text = name_list.read_bytes().decode("utf-8-sig", "replace")
        names = [line.strip() for line in text.splitlines() if line.strip()]
    _class_names(names, findings)
    splits: dict[str, tuple[Path, ...]] = {}
    if darknet is not None:
        for line in darknet.read_text("utf-8-sig", "replace").splitlines():
            key, _, entry = (part.strip() for part in line.partition("="))
            split = next((split for split, keys in SPLIT_KEYS.items() if key in keys), None)
            # CVAT writes data/train.txt for what lies beside obj.data, and `valid = train.txt`
            at = _locate(entry, ".", root) or _locate(Path(entry).name, ".", root)
            if split is not None and at is not None and (at,) not in splits.values():
                splits[split] = (at,)
    splits = splits or _folders(root)
    if "train" not in splits:
        findings.add("split", "'train'", None, "must be the folder or the list of training images")
    if problems := findings.lines():
        raise UserError(problems)
    return Config(path, tuple(names), splits)


def _folders(root: Path) -> dict[str, tuple[Path, ...]]:
    """Return the splits' folders: images/train, train/, or one for all."""
    images = root / "images" if (root / "images").is_dir() else root
    parts = split_folders(images) or split_folders(root)
    return {split: (part,) for split, part in parts.items()} or {"train": (images,)}


def _name_list(folder: Path) -> Path | None:
    return next((folder / name for name in NAME_LISTS if (folder / name).is_file()), None)


def _label_files(folder: Path) -> Iterator[Path]:
    """Yield .txt files that begin as a label does, where labels lie."""
    places = ["labels", "", *(f"labels/{name}" for names in FOLDERS.values() for name in names)]
    places += [f"{name}/labels" for names in FOLDERS.values() for name in names]
    places += ["obj_train_data", *(name for names in FOLDERS.values() for name in names)]
    for place in places:
        for path in sorted((folder / place).glob("*.txt"))[:20]:
            if path.name not in NO_LABELS and LABEL_LINE.match(_head(path)):
                yield path


def _head(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(200).decode("utf-8-sig", "replace")
    except OSError:
        return ""


def read(config: Config, split: str) -> Reading:
    """Read the images of a split and their labels; class 0 becomes category 1, and so on.

    A line of five numbers is a box, a longer one a polygon, whose holes and parts may be joined by
    bridges of no width; of a pose the box is read. An image without a label file has no objects.

    Returns:
        What is sound, and every fault of every line.
    """
    root = config.root
    draft = Draft(root, config.class_names, Names([root, *config.splits[split]], root, root))
    seen = 0
    images = [pair for source in config.splits[split] for pair in _images_of(source, draft)]
    for path, image in images:
        labels = _label_path(path, root)
        # exists() is False for a broken link, which must not pass for an image without objects
        if image is not None and (labels.exists() or labels.is_symlink()):
            _read_labels(draft, image, labels, config)
            seen += 1
        elif image is not None:
            remedy = f"has no label file {draft.place(labels)}: it is taken to show no object"
            draft.findings.add("unlabelled", draft.place(path), path.name, remedy)
    if images and not seen:
        looked_for = draft.place(_label_path(images[0][0], root))
        remedy = f"none has a label file; looked for {looked_for} and so on"
        draft.findings.add("empty", "the images", f"{len(images)} files", remedy)
    _report_orphans(draft, config, [_label_path(path, root) for path, _ in images])
    return draft.finish()


def _report_orphans(draft: Draft, config: Config, labels: Sequence[Path]) -> None:
    """Report the label files beside these that no image of the dataset has."""
    for folder in sorted({path.parent for path in labels}):
        for path in sorted(folder.glob("*.txt")):
            if path in config.owned or path.name in NO_LABELS or not LABEL_LINE.match(_head(path)):
                continue
            others = {other.name for other in _twin(path, draft.root).parent.glob(f"{path.stem}.*")}
            beside = next(iter(sorted(others - {path.name})), None)
            remedy = (
                f"belongs to {beside}, which is not read; convert it"
                if beside
                else "belongs to no image; add the image, or mend the label's name"
            )
            draft.drop_file("orphan", draft.place(path), path.name, remedy)


def _twin(labels: Path, root: Path) -> Path:
    """Return where the image of a label file should be, without its ending."""
    parts = list(labels.relative_to(root).parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "labels":
            parts[index] = "images"
            break
    return root.joinpath(*parts)


def _config_path(folder: Path) -> Path | None:
    for name in CONFIG_NAMES:
        if (folder / name).is_file():
            return folder / name
    if (folder / DARKNET).is_file():
        return folder / DARKNET
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


def _images_of(source: Path, draft: Draft) -> list[tuple[Path, Image | None]]:
    """Add the images of a folder, a list, or one; return each file, and its image where used."""
    if source.is_dir() or source.suffix.lower() in EXTENSIONS:
        paths = list(walk_images(source)) if source.is_dir() else [source]
        return [(path, draft.add_image(path, draft.place(path))) for path in paths]
    images: list[tuple[Path, Image | None]] = []
    for number, line in enumerate((draft.read_text(source) or "").splitlines(), start=1):
        if line.strip():
            place = f"{draft.place(source)} line {number}"
            image = draft.add_named(line.strip(), place)
            if image is not None:
                images.append((image.path, image))
    return images


def _label_path(image: Path, root: Path) -> Path:
    """Return the twin under labels/ of an image under (the last) images/, else its neighbor."""
    parts = list(image.relative_to(root).parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return root.joinpath(*parts).with_suffix(".txt")


def _read_labels(draft: Draft, image: Image, path: Path, config: Config) -> None:
    names = config.class_names
    for number, line in enumerate((draft.read_text(path, image) or "").splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{draft.place(path)} line {number}"
        try:
            class_number, numbers = _parse(line, len(names), config.keypoints)
            if len(numbers) == 4:
                box = _box_xywh(numbers, image.width, image.height)
                draft.add_box(image, names[class_number], box, place)
            else:
                sides = (image.width, image.height)
                polygon = [number * sides[i % 2] for i, number in enumerate(numbers)]
                mask = polygon_mask(polygon, image.width, image.height)
                draft.add_mask(image, names[class_number], mask, place)
        except ValueError as fault:
            draft.drop_object("label", place, line.strip(), str(fault))


def _parse(line: str, classes: int, keypoints: int) -> tuple[int, list[float]]:
    """Parse a line's class number and coordinates (0..1); raise ValueError with the fault.

    Of a pose, whose line has `keypoints` numbers after the box, the box is returned.
    """
    try:
        first, *numbers = (float(word) for word in line.split())
    except ValueError:
        raise ValueError("must be a class number and coordinates, parted by spaces") from None
    if not (first.is_integer() and 0 <= first < classes):
        raise ValueError(f"must begin with a class number, 0 to {classes - 1}, of data.yaml")
    if keypoints and len(numbers) == 4 + keypoints:
        numbers = numbers[:4]
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
