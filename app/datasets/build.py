"""A folder of labelled images → the splits to train, validate and test on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from app.config.reading import AS_WRITTEN, ReadingConfig
from app.config.schema import Config, Folds
from app.config.shapes import ShapesConfig
from app.console import command, counted, progress
from app.datasets.coco import Category, Dataset, Image, Reading
from app.datasets.decoding import find_unusable
from app.datasets.depth import share_levels
from app.datasets.duplicates import group, same_files
from app.datasets.faults import (
    MAX_DROP,
    Action,
    Fault,
    Findings,
    Tally,
    messages,
    notes,
    problems,
)
from app.datasets.formats import COCO, Source, choose
from app.datasets.formats.coco import JSON_NAMES, coco_files
from app.datasets.formats.panoptic import passed_over
from app.datasets.settling import alike_names, settle, unread_files
from app.datasets.splitting import folds as parted
from app.datasets.splitting import names_alike, pairs_alike, stratify
from app.datasets.synthetic.shapes import check_shapes, info, is_shapes, make_shapes
from app.errors import UserError
from app.files import read_json

FEW = 20  # images, below which folds score better than a part that is set aside
AUTO_FOLDS = 5
TITLES = {"valid": ("validation", "validation"), "test": ("test", "testing")}


@dataclass(frozen=True)
class Splits:
    """Splits that share their categories; `notes` are things to tell the user.

    Where there are `folds`, all images are trained on and validated on: each in one fold, whose
    weights have not seen it. A fold is the ids of the images that it sets aside.
    """

    train: Dataset
    valid: Dataset
    test: Dataset | None
    notes: tuple[str, ...]
    folds: tuple[frozenset[int], ...] = ()

    def map(self, change: Callable[[Dataset], Dataset]) -> Splits:
        """Return the splits with each dataset changed alike."""
        test = None if self.test is None else change(self.test)
        train = change(self.train)
        there = {image.id for image in train.images}
        folds = tuple(fold & there for fold in self.folds if fold & there)
        return replace(self, train=train, valid=change(self.valid), test=test, folds=folds)

    def whole(self) -> Splits:
        """Return all images to train on, without folds, whose notes have been told."""
        return replace(self, folds=(), notes=())

    def fold(self, number: int) -> Splits:
        """Return the images to train on and to validate on in a fold, counted from 0."""
        aside = self.folds[number]
        rest = (image.id for image in self.train.images if image.id not in aside)
        return Splits(self.train.subset(rest), self.train.subset(aside), None, ())


@dataclass(frozen=True)
class Survey:
    """A dataset as it lies there: what is sound in each split that is given, and every fault."""

    splits: dict[str, Dataset]  # train, valid, test; each with its own categories
    faults: tuple[Fault, ...]
    tally: Tally
    notes: tuple[str, ...] = ()

    def require_sound(self, max_drop: float) -> None:
        """Raise UserError, with every problem, where mending would be guessing or drop too much."""
        if faults := problems(self.faults, self.tally, max_drop):
            raise UserError(faults)


def load_splits(
    folder: Path,
    *,
    format: str = "auto",
    valid_fraction: float = 0.15,
    test_fraction: float = 0.15,
    pattern: str | None = None,
    folds: Folds = "none",
    seed: int = 0,
    limit: int | None = None,
    max_drop: float = MAX_DROP,
    reading: ReadingConfig = AS_WRITTEN,
) -> Splits:
    """Read the dataset in `folder`: its train, valid (or val) and test folders, or itself.

    What can be mended without guessing is mended; `faults.KINDS` says how. Of images the headers
    are read alone.

    Args:
        folder: holds the split folders, or one COCO JSON, which then is the training set; or the
            files of another format.
        format: a key of `formats`, or auto: COCO JSON is looked for first, then the others.
        valid_fraction: of the training images, 0 to 1, set aside where there is no validation set.
        test_fraction: likewise for testing, where there is neither validation nor test set.
        pattern: a regular expression; images whose file names match it alike stay on one side.
        folds: of all images, in place of a validation set that is set aside; auto: where there is
            none and images are few; loo: one for each image.
        seed: of that choice, and of `limit`'s.
        limit: train on that many images, chosen at random; None for all.
        max_drop: most of the images and of the annotations that may be left out, 0 to 1.
        reading: what the user decided about labels that leave it open.

    Raises:
        UserError: with every problem of every split, or with what was looked for and not found.
    """
    _check_arguments(valid_fraction, test_fraction, limit)
    surveyed = survey(folder, format, reading)
    surveyed.require_sound(max_drop)
    splits = None
    if folds != "none":
        splits = _make_folds(surveyed, folds, pattern, seed, limit)
    splits = splits or make_splits(
        surveyed,
        valid_fraction=valid_fraction,
        test_fraction=test_fraction,
        pattern=pattern,
        seed=seed,
    )
    if limit is not None and limit < len(splits.train.images):
        train, note = _limited(splits.train, limit, seed)
        splits = replace(splits, train=train, notes=(*splits.notes, note))
    if not splits.train.annotations:
        raise UserError(
            f"{folder}: the {len(splits.train.images)} images left to train on have no "
            "annotations; raise limit, lower valid_fraction, or take another seed"
        )
    splits = replace(splits, train=_askable(splits.train))
    advice = [fault.remedy for fault in advise(splits, folder, surveyed.faults)]
    told = (*splits.notes, *notes(surveyed.faults), *advice, *_leaks(splits, folder))
    return replace(splits, notes=told)


def _limited(train: Dataset, limit: int, seed: int) -> tuple[Dataset, str]:
    """Return some of the training images, and a note that says so."""
    note = f"training on {limit} of {len(train.images)} images (limit, seed {seed})"
    return train.subset(_choose(train, limit, seed)), note


def _make_folds(
    surveyed: Survey, wanted: Folds, pattern: str | None, seed: int, limit: int | None
) -> Splits | None:
    """Return all images in folds; None where a validation set is to be set aside.

    Raises:
        UserError: folds are asked for, and the images cannot be parted, or have a split already.
    """
    if "valid" in surveyed.splits:
        if wanted == "auto":
            return None
        raise UserError(
            f"--folds {wanted}: the dataset has a validation split of its own, which scores each "
            "epoch; leave out --folds, or take the split away"
        )
    splits = _share_categories(surveyed.splits)
    train, notes = splits["train"], list(surveyed.notes)
    if limit is not None and limit < len(train.images):
        train, note = _limited(train, limit, seed)
        notes.append(note)
    train = _askable(train)
    if wanted == "auto" and len(train.images) >= FEW:
        return None
    number = None if wanted == "loo" else AUTO_FOLDS if wanted == "auto" else int(wanted)
    images, classes, groups, told = _grouped(train, pattern)
    places = parted(classes, groups, number, seed)
    count = max(places) + 1
    if count < 2:
        if wanted == "auto":
            return None
        raise UserError(
            f"--folds {wanted}: takes two images with objects that are not alike, one to learn "
            "from and one to score; label more, or leave out --folds"
        )
    ids: list[set[int]] = [set() for _ in range(count)]
    for image, place in zip(images, places, strict=True):
        ids[place].add(image.id)
    why = "no validation split" if wanted == "auto" else f"--folds {wanted}"
    notes.append(
        f"{why}: {counted(count, 'fold')} of {len(images)} images; each is scored by weights that "
        "have not seen it, and those that are kept are trained on all"
        + (" (--folds none: one run, that sets some aside)" if wanted == "auto" else "")
    )
    return Splits(train, train, splits.get("test"), (*notes, *told), tuple(map(frozenset, ids)))


def _leaks(splits: Splits, folder: Path) -> list[str]:
    """Return warnings for splits that share files or groups, as the figures are then too good."""
    valid = None if splits.folds else splits.valid  # folds validate on what others train on
    parts = [("train", splits.train), ("valid", valid), ("test", splits.test)]
    files = {name: [image.path for image in part.images] for name, part in parts if part}
    groups = {
        name: {image.group for image in part.images if image.group is not None}
        for name, part in parts
        if part
    }
    found = []
    for name, other in (("valid", "train"), ("test", "train"), ("test", "valid")):
        if name not in files or other not in files:
            continue
        if alike := sorted(groups[name] & groups[other]):
            found.append(
                f"{name}: {len(alike)} of {counted(len(groups[name]), 'group')} by --group-column "
                f"are in {other} as well, such as {alike[0]}: its figures are better than is true"
            )
        if shared := same_files(files[name], files[other]):
            check = command("python", "-m", "app", "data", "check", folder)
            found.append(
                f"{name}: {len(shared)} of {len(files[name])} images are in {other} as well, such "
                f"as {shared[0].name}: its figures are better than is true. {check} lists them"
            )
    return found


def _askable(train: Dataset) -> Dataset:
    """Leave out the images that have crowds of every class: there is nothing to ask of them."""
    classes = {category.id for category in train.categories}
    crowded: dict[int, set[int]] = {}
    for annotation in train.annotations:
        if annotation.iscrowd:
            crowded.setdefault(annotation.image_id, set()).add(annotation.category_id)
    full = {image_id for image_id, ids in crowded.items() if ids == classes}
    return train.subset(image.id for image in train.images if image.id not in full)


def survey(folder: Path, format: str = "auto", reading: ReadingConfig = AS_WRITTEN) -> Survey:
    """Read every split of the dataset in `folder`, with every fault of its labels and headers.

    Raises:
        UserError: there is no dataset, or no saying where its splits are.
    """
    sources, notes = _find_sources(folder, format, reading)
    written = {split: _read(source) for split, source in sources.items()}
    if reading.crowd == "instances" and not any(map(_has_crowds, written.values())):
        notes = [*notes, "--crowd instances: changes nothing, because no object is a crowd"]
    if reading.boxes == "masks" and not any(map(_has_masks, written.values())):
        notes = [*notes, "--boxes masks: changes nothing, because no object has a mask"]
    if reading.group_column is not None:
        notes = [*notes, *_ungrouped(written.values(), reading.group_column, folder)]
    readings = {split: settle(read, reading) for split, read in written.items()}
    faults = [fault for read in readings.values() for fault in read.faults]
    for split, read in readings.items():
        refused = any(fault.action is Action.REFUSED for fault in read.faults)
        faults += [] if refused else _emptiness(split, read, sources[split].where)
    splits = {split: read.dataset for split, read in readings.items()}
    faults += alike_names(folder, splits)
    files = {path for read in readings.values() for path in read.files}
    faults += unread_files(folder, splits, files)
    if repeated := _repeated_valid(splits, sources):
        faults += repeated
        notes = [
            *notes,
            *(f"valid lists only images of train: {fault.remedy}" for fault in repeated),
        ]
        del splits["valid"], readings["valid"]
    tally = sum((read.tally for read in readings.values()), Tally())
    splits, faults, depth = share_levels(splits, faults, folder)
    said = dict.fromkeys(
        [*notes, *(note for read in readings.values() for note in read.notes), *depth]
    )
    return Survey(splits, tuple(faults), tally, tuple(said))


def _repeated_valid(
    splits: Mapping[str, Dataset], sources: Mapping[str, Source]
) -> Sequence[Fault]:
    """Report a validation split that names files of training and no others."""
    if not (valid := splits.get("valid")) or not valid.images:
        return ()
    paths = {image.path.resolve() for image in valid.images}
    if not paths <= {image.path.resolve() for image in splits["train"].images}:
        return ()
    findings = Findings(str(sources["valid"].where))
    remedy = "some of train's are set aside in its place; give it other images, or leave it out"
    findings.add("same splits", "valid", f"{len(paths)} images, all of train", remedy)
    return findings.faults


def decode(surveyed: Survey, folder: Path, on_image: Callable[[int], None]) -> Survey:
    """Return the survey without the images that only a full decode shows to be unusable.

    Args:
        folder: the dataset's.
        on_image: is told how many are decoded.
    """
    unusable, findings = find_unusable(surveyed.splits, folder, on_image)
    splits, tally = {}, surveyed.tally
    for split, dataset in surveyed.splits.items():
        if split not in unusable:
            images, objects = len(dataset.images), len(dataset.annotations)
            tally += Tally(-images, -objects, -images, -objects)  # neither listed nor left out
            continue
        usable = {image.id for image in dataset.images} - unusable[split]
        splits[split] = part = dataset.subset(usable)
        images = len(part.images) - len(dataset.images)
        tally += Tally(0, 0, images, len(part.annotations) - len(dataset.annotations))
        if dataset.images and not usable:
            findings.add("empty", split, [], "has no image left to use; replace them")
    return replace(
        surveyed, splits=splits, tally=tally, faults=(*surveyed.faults, *findings.faults)
    )


def _read(source: Source) -> Reading:
    try:
        return source.read()
    except UserError as error:
        faults = messages("root", str(source.where), error)
        return Reading(Dataset((), (), ()), tuple(faults), Tally())


def _has_crowds(reading: Reading) -> bool:
    return any(annotation.iscrowd for annotation in reading.dataset.annotations)


def _has_masks(reading: Reading) -> bool:
    return any(annotation.segmentation for annotation in reading.dataset.annotations)


def _ungrouped(readings: Iterable[Reading], column: str, folder: Path) -> list[str]:
    """Return a note where images lack the column that says what they belong with.

    Raises:
        UserError: all lack it.
    """
    images = [image for read in readings for image in read.dataset.images]
    lacking = [image for image in images if image.group is None]
    if not lacking:
        return []
    says = f"--group-column {column}: {len(lacking)} of {len(images)} images lack it"
    if len(lacking) == len(images):
        raise UserError(f"{folder}: {says}; mend the name, or leave it out")
    return [f"{says}, such as {lacking[0].path.name}; each of these images stands alone"]


def _emptiness(split: str, reading: Reading, where: Path) -> list[Fault]:
    """Report a split that there is nothing to train on, or nothing to score."""
    findings, dataset, tally = Findings(str(where)), reading.dataset, reading.tally
    objects = [annotation for annotation in dataset.annotations if not annotation.iscrowd]
    if not dataset.images:
        if not tally.images:  # else it is said of each why it is left out
            findings.add("empty", "'images'", [], "lists no images; add some, or remove this split")
    elif dataset.annotations and not objects:
        remedy = (
            f"all {len(dataset.annotations)} objects are crowds (iscrowd 1), which name no single "
            "object: --crowd instances reads each as one object"
        )
        findings.add("empty", f"{split}: 'annotations'", "only crowds", remedy)
    elif not objects and not tally.annotations:
        purpose = "to train on" if split == "train" else "to score; or remove this split"
        remedy = f"has no annotations; label the images first: there is nothing {purpose}"
        findings.add("empty", f"{split}: 'annotations'", [], remedy)
    return findings.faults


def make_splits(
    surveyed: Survey,
    *,
    valid_fraction: float = 0.15,
    test_fraction: float = 0.15,
    pattern: str | None = None,
    seed: int = 0,
) -> Splits:
    """Return the given splits, and make the missing ones from the training images.

    Args:
        valid_fraction, test_fraction, pattern, seed: as `load_splits` has them.

    Raises:
        UserError: no file name matches the pattern.
    """
    splits = _share_categories(surveyed.splits)
    train, valid, test = (splits.get(name) for name in ("train", "valid", "test"))
    assert train is not None, "every source has a training split"
    if valid is not None:
        return Splits(train, valid, test, surveyed.notes)
    fractions = {"valid": valid_fraction} | ({} if test else {"test": test_fraction})
    parts, made = _set_aside(train, fractions, pattern, seed)
    return Splits(
        parts["train"], parts["valid"], test or parts.get("test"), (*surveyed.notes, *made)
    )


def advise(splits: Splits, folder: Path, faults: Sequence[Fault] = ()) -> list[Fault]:
    """Return warnings of what makes a sound dataset train to something else than its user wants.

    Args:
        faults: what is told already.
    """
    findings = Findings(str(folder))
    for title, dataset in (("validation", splits.valid), ("test", splits.test)):
        if dataset is not None and (
            missing := sorted(_labelled(dataset) - _labelled(splits.train))
        ):
            classes = ", ".join(f"'{name}'" for name in missing)
            remedy = f"{title} has objects of {classes}, which no training image has"
            findings.add("untrained class", title, missing, remedy)
    train = splits.train
    findings.faults += _proposals(splits, folder)
    findings.faults += _crowds(splits, folder)
    told = any(fault.kind == "numbers" for fault in faults)
    numbers = [name for name in train.class_names if name.strip().isdecimal()]
    if numbers and not told:
        remedy = (
            f"{len(numbers)} classes are called by numbers, such as '{numbers[0]}': a prompt is a "
            "noun phrase, and numbers mean nothing to the model; --prompts FILE gives each words"
        )
        findings.add("numbers", "categories", numbers, remedy)
    if len(train.categories) == 1 and all(train.annotations_by_image.values()):
        name = train.class_names[0]
        remedy = (
            f"every training image has a '{name}', the only class: the tuned model would answer "
            "any prompt with it. dataset.negatives asks for other things in training; name what "
            f"looks like a '{name}' in dataset.near_misses, or add images without one (listed, "
            "with no annotations)"
        )
        findings.add("no negatives", "categories", name, remedy)
    return findings.faults


def _crowds(splits: Splits, folder: Path) -> list[Fault]:
    """Report how many objects are crowds, and the classes that have nothing else in training."""
    findings = Findings(str(folder))
    parts = [part for part in (splits.train, splits.valid, splits.test) if part is not None]
    objects = [annotation for part in parts for annotation in part.annotations]
    crowds = sum(each.iscrowd and each.score is None for each in objects)
    if crowds:
        remedy = (
            f"{crowds} of {len(objects)} objects are crowds (iscrowd 1): an image that has one is "
            "not asked for its class; --crowd instances reads each as one object"
        )
        plain = {a.category_id for a in splits.train.annotations if not a.iscrowd}
        marked = {a.category_id for a in splits.train.annotations} - plain
        names = [f"'{c.name}'" for c in splits.train.categories if c.id in marked]
        if names:
            remedy += f". {', '.join(names)}: crowds alone, so it is not trained at all"
        findings.add("crowd", "annotations", crowds, remedy)
    return findings.faults


def _proposals(splits: Splits, folder: Path) -> list[Fault]:
    """Report what weights have proposed and nobody has looked at, where it counts as labels."""
    findings = Findings(str(folder))
    for split, dataset in (("train", splits.train), ("valid", splits.valid), ("test", splits.test)):
        if dataset is None or (split == "valid" and dataset is splits.train):
            continue
        objects = [each for each in dataset.annotations if not each.iscrowd]
        proposed = [each.score for each in objects if each.score is not None]
        if not proposed:
            continue
        effect = "it learns what weights have found, right or wrong"
        if split != "train":
            effect = "its figures say how well that is found again, not how well what is there is"
        remedy = (
            f"{split}: {len(proposed)} of {len(objects)} objects are proposals that nobody has "
            f"looked at, with scores from {min(proposed):.2f}: {effect}. Correct them first, or "
            "take the surest alone, as by --accept-above 0.8"
        )
        findings.add("proposals", split, len(proposed), remedy)
    return findings.faults


def many_classes(train: Dataset, most: int) -> list[Fault]:
    """Warn where there are more classes than the `most` prompts an image and step."""
    findings, classes = Findings("dataset"), len(train.categories)
    if classes > most:
        remedy = (
            f"an image trains {most} prompts a step, its own classes first, then absent ones by "
            "chance, so that memory does not grow with the classes; where memory allows, raise "
            f"dataset.max_prompts={most} towards {classes}"
        )
        findings.add("many classes", "the number of classes", classes, remedy)
    return findings.faults


def settings_advice(splits: Splits, config: Config) -> list[Fault]:
    """Return warnings of what the model and the settings are too small for."""
    queries, detections = config.model.num_queries, config.evaluation.max_detections
    faults = many_classes(splits.train, config.dataset.max_prompts)
    for split, dataset in (("train", splits.train), ("valid", splits.valid), ("test", splits.test)):
        if dataset is None:
            continue
        of_class = Counter((a.image_id, a.category_id) for a in dataset.annotations)
        of_image = Counter((a.image_id, None) for a in dataset.annotations)
        faults += _many_objects(split, dataset, of_class, f"{queries} that a prompt finds", queries)
        if split != "train":
            most = f"{detections} that are scored (evaluation.max_detections)"
            faults += _many_objects(split, dataset, of_image, most, detections)
    return faults


def _many_objects(
    split: str, dataset: Dataset, counts: Mapping[tuple[int, Any], int], limit: str, most: int
) -> list[Fault]:
    findings = Findings("dataset")
    beyond = {key[0]: count for key, count in counts.items() if count > most}
    if beyond:
        worst = max(beyond, key=lambda image_id: beyond[image_id])
        name = next(image.path.name for image in dataset.images if image.id == worst)
        remedy = (
            f"{split}: {len(beyond)} images have more objects than the {limit}, such as "
            f"{name} with {beyond[worst]}: the rest cannot be found; cut such images into "
            "tiles, as ./infer.sh --tile does"
        )
        findings.add("many objects", split, beyond[worst], remedy)
    return findings.faults


def shapes_dataset(cache: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Make the synthetic set with these settings of `make_shapes` at `cache`, if it is not there.

    Returns:
        `cache`, to be given to `load_splits`.

    Raises:
        UserError: `cache` holds something other than a set of shapes, or a setting is out of range.
    """
    config = check_shapes(settings, seed)
    if not (is_shapes(cache) and _is_complete(cache, config, seed)):
        make_shapes(cache, seed=seed, **settings)
    return cache


def _is_complete(cache: Path, config: ShapesConfig, seed: int) -> bool:
    document = read_json(cache / "train" / JSON_NAMES[0])
    images = {split: len([*cache.glob(f"{split}/images/*.png")]) for split in ("train", "valid")}
    wanted = {"train": config.train, "valid": config.valid}
    return document.get("info") == info(config, seed) and images == wanted


def _check_arguments(valid_fraction: float, test_fraction: float, limit: int | None) -> None:
    wrong = []
    if not 0 < valid_fraction < 1:
        wrong.append(f"valid_fraction is {valid_fraction}: must be between 0 and 1")
    if not 0 <= test_fraction < 1:
        wrong.append(f"test_fraction is {test_fraction}: must be from 0 to below 1")
    if limit is not None and limit < 1:
        wrong.append(f"limit is {limit}: must be 1 or more images")
    if wrong:
        raise UserError(wrong)


def _find_sources(
    folder: Path, key: str, reading: ReadingConfig
) -> tuple[dict[str, Source], list[str]]:
    """Return each split that is there, `train` always, and a note where the format is not COCO."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the one that holds the dataset")
    format = choose(folder, key)
    format.check_decisions(reading)
    sources = format.sources(folder, reading)
    if "train" not in sources:
        there = ", ".join(f"'{source.where.name}'" for source in sources.values())
        raise UserError(f"{folder}: no 'train' folder to train on; there is {there}")
    if key != "auto":
        return sources, [f"read as {format.name}, as dataset.format says"]
    if format is COCO:
        return sources, passed_over(folder)
    if others := coco_files(folder):  # beside panoptic segments
        names = ", ".join(path.name for path in others)
        return sources, [f"read as {format.name}; not read beside it: {names} (COCO)"]
    return sources, [f"no COCO JSON: read as {format.name}"]


def _share_categories(splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Give all splits the union of their categories, matched by name.

    An id stays as in the first split that has the name, unless another name has taken it.
    """
    ids: dict[str, int] = {}
    for dataset in splits.values():
        for category in dataset.categories:
            taken = set(ids.values())
            if category.name not in ids:
                free = next(id for id in count(max(taken, default=0) + 1) if id not in taken)
                ids[category.name] = free if category.id in taken else category.id
    categories = tuple(Category(id, name) for name, id in ids.items())
    return {split: _renumber(dataset, ids, categories) for split, dataset in splits.items()}


def _renumber(dataset: Dataset, ids: dict[str, int], categories: tuple[Category, ...]) -> Dataset:
    new_ids = {category.id: ids[category.name] for category in dataset.categories}
    annotations = tuple(
        replace(annotation, category_id=new_ids[annotation.category_id])
        for annotation in dataset.annotations
    )
    return Dataset(dataset.images, annotations, categories)


def _set_aside(
    train: Dataset, fractions: Mapping[str, float], pattern: str | None, seed: int
) -> tuple[dict[str, Dataset], list[str]]:
    """Return the training set, the sets made from it, and notes for the user."""
    total = len(train.images)
    if total == 1:
        note = "no validation split, and one training image: it is validated on as well"
        only = {"train": train, "valid": train}
        return only, [f"{note}, so the figures say nothing about new images"]
    chosen, parted = _assign(train, _sizes(total, fractions), pattern, seed)
    labelled = {a.image_id for a in train.annotations if not a.iscrowd}
    lacking = _give_objects(chosen, labelled)
    datasets = {split: train.subset(ids) for split, ids in chosen.items() if ids}
    notes = []
    for split, fraction in fractions.items():
        title, purpose = TITLES[split]
        if split in datasets:
            count = f"{len(chosen[split])} of {total} training images"
            share = f"({fraction * 100:g} %, seed {seed}) set aside for {purpose}"
            notes.append(f"no {title} split: {count} {share}")
        elif fraction:
            notes.append(f"no {title} split: {total} images are too few to set any aside")
    if lacking:
        note = "one training image has objects: it is validated on as well"
        notes.append(f"{note}, so the figures say nothing about new images")
    return datasets, [*notes, *parted]


def _assign(
    train: Dataset, sizes: Mapping[str, int], pattern: str | None, seed: int
) -> tuple[dict[str, set[int]], list[str]]:
    """Return the ids of each split's images, and notes on what could not be kept together.

    The choice does not depend on the order of the images.
    """
    images, classes, groups, notes = _grouped(train, pattern)
    parts = stratify(classes, groups, sizes, seed)
    if len(set(parts)) < sum(size > 0 for size in sizes.values()):
        parts = stratify(classes, range(len(images)), sizes, seed)
        of = "" if pattern is None else f", or of too few groups by dataset.group={pattern},"
        notes.append(f"the images are too much alike{of} to keep near-duplicates out of validation")
    chosen: dict[str, set[int]] = {split: set() for split in sizes}
    for image, part in zip(images, parts, strict=True):
        chosen[part].add(image.id)
    return chosen, notes


def _grouped(
    train: Dataset, pattern: str | None
) -> tuple[list[Image], list[frozenset[int]], list[int], list[str]]:
    """Return the images in an order of their own, the classes and group of each, and notes.

    Images of one group, near-duplicates or alike by name or column, stay on one side.
    """
    images = sorted(train.images, key=lambda image: (image.path.name, image.id))
    classes = [
        frozenset(a.category_id for a in train.annotations_by_image[image.id] if not a.iscrowd)
        for image in images
    ]
    pairs, notes = _by_name([image.path for image in images], pattern)
    pairs += pairs_alike([image.group for image in images])
    with progress("near-duplicates: image", len(images)) as advance:
        groups = group([(i.path, i.levels) for i in images], lambda done: advance(done, ""), pairs)
    return images, classes, groups, notes


def _by_name(paths: Sequence[Path], pattern: str | None) -> tuple[list[tuple[int, int]], list[str]]:
    """Return pairs of images that belong together by their names, and notes on names that do not.

    Raises:
        UserError: no name matches.
    """
    if pattern is None:
        return [], []
    pairs, others = names_alike(paths, pattern)
    if not others:
        return pairs, []
    names = f"{len(others)} of {len(paths)} file names do not match it, such as {others[0].name}"
    if len(others) == len(paths):
        raise UserError(
            f"dataset.group={pattern}: {names}; mend the expression, or leave it out; a column of "
            "the labels is --group-column"
        )
    return pairs, [f"dataset.group={pattern}: {names}; each of these images stands alone"]


def _give_objects(chosen: dict[str, set[int]], labelled: set[int]) -> bool:
    """Move images so that what is made to be scored has objects; change `chosen` in place.

    A split that lacks them takes an image with objects from the training images for one without.
    Where those have none to spare, a test set goes back to them, and validation shares their one.

    Returns:
        Whether an image is both trained and validated on.
    """
    train = chosen["train"]
    for split in [name for name in ("valid", "test") if name in chosen]:
        spare = sorted(train & labelled)
        if not chosen[split] or chosen[split] & labelled:
            continue
        if len(spare) > 1:
            given = min(chosen[split])
            chosen[split] ^= {given, spare[0]}
            train ^= {given, spare[0]}
        elif split == "test":
            train |= chosen.pop(split)
        else:
            chosen[split].update(spare)
            return bool(spare)
    return False


def _sizes(total: int, fractions: Mapping[str, float]) -> dict[str, int]:
    """Return the images of each split: at least one to train on and one to validate on."""
    valid = min(max(1, round(total * fractions["valid"])), total - 1)
    test = min(round(total * fractions.get("test", 0)), total - valid - 1)
    return {"train": total - valid - test, "valid": valid, "test": test}


def _choose(dataset: Dataset, size: int, seed: int) -> set[int]:
    """Choose ids of images at random, whatever their order in the JSON."""
    return set(random.Random(seed).sample(sorted(image.id for image in dataset.images), size))


def _labelled(dataset: Dataset) -> set[str]:
    """Return the names of the classes with at least one annotation."""
    used = {annotation.category_id for annotation in dataset.annotations}
    return {category.name for category in dataset.categories if category.id in used}
