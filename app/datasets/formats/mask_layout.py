"""Where images and their masks lie, by the usual names of folders and files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.datasets.folders import WORDS
from app.datasets.formats.mask_files import ENDINGS
from app.datasets.names import fold, walk_images
from app.errors import UserError

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages")
MASK_FOLDERS = (
    *("masks", "mask", "labels", "label", "annotations", "annotation", "annots", "annot"),
    *("gt", "gts", "groundtruth", "ground_truth", "segmentations", "segmentation"),
    *("instances", "semantic"),  # of `infer --save`
)
DEFECT_FREE = "train/good"  # of MVTec AD: ground_truth/crack/, test/crack/, test/good/
# train, train_images and train_masks, trainannot (SegNet's CamVid) …
SPLIT_FOLDER = re.compile(
    rf"({'|'.join(sorted(WORDS, key=len, reverse=True))})"
    rf"(?:[_-]?({'|'.join(IMAGE_FOLDERS)})|[_-]?({'|'.join(MASK_FOLDERS)}))?"
)
# of a mask's name: x_mask.png, x_L.png (CamVid), x_mask_1.png (BUSI); and of an image's: x_sat.jpg
MASK_SUFFIX = re.compile(
    r"[ _.-](?:masks?|gt|labels?|seg|segmentation|annotation|groundtruth|matte|l)(?:[_-]\d+)?$"
)
IMAGE_SUFFIX = re.compile(r"[ _.-](?:images?|img|sat|rgb)$")
MASK_PREFIX = re.compile(r"^masks?[ _.-]")
NUMBERED = re.compile(r"[_-]\d+$")
IMAGE_ENDING = re.compile(r"\.(?:jpe?g|png|bmp|tiff?|webp|gif)$")


@dataclass(frozen=True)
class Part:
    """The folders of a split's images and masks; one folder where they lie side by side.

    Attributes:
        defects: whether they are those of MVTec AD, where images and masks alike lie in folders of
            their class, and images without a defect in good/.
    """

    images: Path
    masks: Path
    defects: bool = False

    @property
    def beside(self) -> bool:
        return self.images == self.masks


@dataclass
class Pairs:
    """The images of a split, each with its masks.

    Attributes:
        masks: of each image, in order; empty for an image without one.
        alike: images that have the name of another, which masks then may mean.
        orphans: masks that no image has the name of.
    """

    masks: dict[Path, list[Path]] = field(default_factory=dict)
    alike: list[tuple[Path, Path]] = field(default_factory=list)
    orphans: list[Path] = field(default_factory=list)


def find_parts(folder: Path) -> dict[str, Part]:
    """Return the folders of each split (train, valid, test); empty where there are no masks.

    Raises:
        UserError: one split has two folders.
    """
    if pair := _pair(folder):
        return _split_pair(pair)
    if (folder / DEFECT_FREE).is_dir() and has_masks(folder / "ground_truth"):
        return {"train": Part(folder, folder / "ground_truth", defects=True)}
    parts: dict[str, Part] = {}
    images, masks = dict[str, Path](), dict[str, Path]()
    for path in _folders(folder):
        if match := SPLIT_FOLDER.fullmatch(fold(path.name)):
            split, _, mask_name = match.groups()
            held = masks if mask_name else images
            _once(held, WORDS[split], path)
    for split, path in images.items():
        if pair := _pair(path):
            parts[split] = pair
        elif split in masks and has_masks(masks[split]):
            parts[split] = Part(path, masks[split])
        elif _beside(path):
            parts[split] = Part(path, path)
    if not parts and not images and _beside(folder):
        return {"train": Part(folder, folder)}
    return parts


def _pair(folder: Path) -> Part | None:
    """Return the folders of images and of masks in a folder; None where it lacks one."""
    named = {fold(path.name): path for path in _folders(folder)}
    images = next((named[name] for name in IMAGE_FOLDERS if name in named), None)
    masks = [named[name] for name in MASK_FOLDERS if name in named]
    found = next((path for path in masks if has_masks(path)), None)
    if images is None or found is None or next(walk_images(images), None) is None:
        return None
    return Part(images, found)


def _split_pair(pair: Part) -> dict[str, Part]:
    """Return images/train + masks/train, …; one training set where neither folder has splits."""
    images, masks = _split_folders(pair.images), _split_folders(pair.masks)
    splits = images if images else masks
    if not splits:
        return {"train": pair}
    return {
        split: Part(images.get(split, pair.images), masks.get(split, pair.masks))
        for split in ("train", "valid", "test")
        if split in splits and (not masks or split in masks or not images)
    }


def _split_folders(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in _folders(folder):
        if split := WORDS.get(fold(path.name)):
            _once(found, split, path)
    return found


def _once(found: dict[str, Path], split: str, path: Path) -> None:
    if split in found:
        names = f"{found[split].name} and {path.name}"
        raise UserError(f"{path.parent}: has both {names} folders; keep one")
    found[split] = path


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []


def has_masks(folder: Path) -> bool:
    return next(walk_images(folder, ENDINGS), None) is not None


def _beside(folder: Path) -> bool:
    """Return whether most images of a folder have a mask by its suffix beside them."""
    masks = sum(1 for _ in _masks_beside(list(walk_images(folder, ENDINGS))))
    return masks > 0 and 2 * masks >= sum(1 for _ in walk_images(folder)) - masks


def _masks_beside(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the files that are named as another beside them and a suffix of masks."""
    stems = {(path.parent, key) for path in paths for key in _image_keys(path)}
    for path in paths:
        stem = fold(path.stem)
        if (plain := MASK_SUFFIX.sub("", stem)) != stem and (path.parent, plain) in stems:
            yield path


def _image_keys(path: Path) -> list[str]:
    stem = fold(path.stem)
    return list(dict.fromkeys([stem, IMAGE_SUFFIX.sub("", stem)]))


def _mask_keys(path: Path) -> list[str]:
    """Return the stems that the image of a mask may have, the plainest first."""
    stem = fold(path.stem)
    stem = IMAGE_ENDING.sub("", stem)  # x.jpg.png
    plain = MASK_SUFFIX.sub("", stem)
    return list(dict.fromkeys([stem, plain, MASK_PREFIX.sub("", plain), NUMBERED.sub("", plain)]))


def pair_up(part: Part) -> Pairs:
    """Find the image of each mask of a split: by its name, and by its folder where names agree."""
    every_mask = list(walk_images(part.masks, ENDINGS))
    if part.beside:
        every_mask = list(_masks_beside(every_mask))
    taken, pairs = set(every_mask), Pairs()
    by_key: dict[str, list[Path]] = {}
    first: dict[tuple[Path, str], Path] = {}
    for path in walk_images(part.images):
        if path in taken:
            continue
        owner = first.setdefault((path.parent, path.stem), path)
        if owner != path:
            pairs.alike.append((path, owner))
        pairs.masks[path] = []
        for key in _image_keys(path):
            by_key.setdefault(key, []).append(path)
    for path in every_mask:
        image = _image_of(path, part, by_key)
        if image is None:
            pairs.orphans.append(path)
        else:
            pairs.masks[image].append(path)
    return pairs


def _image_of(mask: Path, part: Part, by_key: dict[str, list[Path]]) -> Path | None:
    within = mask.relative_to(part.masks).parent
    for key in [*_mask_keys(mask), *map(fold, within.parts[::-1])]:
        if found := by_key.get(key):
            same = [image for image in found if image.relative_to(part.images).parent == within]
            if part.defects:
                same = [image for image in found if image.parent == part.images / "test" / within]
            found = same or found
            # several of one folder are reported as alike; of several folders none can be meant
            return found[0] if len({image.parent for image in found}) == 1 else None
    return None


def class_of(mask: Path, part: Part, image: Path) -> str | None:
    """Return the class that a mask's folder names, masks/<class>/; None where it names none.

    A split, a folder that images have as well, one of the image's own name, and masks/masks/, as
    some archives unpack, are no classes.
    """
    if part.beside:
        return None
    if part.defects:
        return mask.parent.name
    no_classes = {*WORDS, *MASK_FOLDERS, *_image_keys(image)}
    no_classes.update(fold(name) for name in image.relative_to(part.images).parent.parts)
    for name in reversed(mask.relative_to(part.masks).parent.parts):
        if fold(name) not in no_classes:
            return name
    return None
