"""What is done alike to the labels of every format once they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from app.config.reading import ReadingConfig
from app.datasets.check import as_read
from app.datasets.coco import Annotation, Dataset, Reading
from app.datasets.faults import Fault, Findings, Tally
from app.datasets.images import EXTENSIONS, FILMS

NO_CLASS = ("__ignore__", "_background_")  # LabelMe's names for what is no class
# pictures and films of kinds that are not read: told by their endings alone
NOT_READ = (
    *(".svg", ".eps", ".pdf", ".psd", ".ai", ".xcf", ".exr", ".hdr", ".dcm", ".nii", ".czi"),
    *(".nd2", ".lif", ".svs", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raw"),
    *(".npy", ".jxl", *FILMS),
)


def settle(reading: Reading, decisions: ReadingConfig) -> Reading:
    """Return the reading without what is no object: names of no class, and objects that are double.

    Crowds become objects where the user decided so. Images that are all missing are one fault.
    """
    reading = replace(reading, faults=_missing_once(reading.faults, reading.tally))
    findings = Findings("")
    dataset = _without_no_class(reading.dataset, findings)
    if decisions.crowd == "instances":
        plain = tuple(replace(annotation, iscrowd=False) for annotation in dataset.annotations)
        dataset = replace(dataset, annotations=plain)
    if decisions.accept_above is not None:
        dataset = _accepted(dataset, decisions.accept_above)
    dataset = _each_once(dataset, findings)
    gone = len(reading.dataset.annotations) - len(dataset.annotations)
    tally = reading.tally + Tally(0, -gone, 0, -gone)  # mended, so neither listed nor left out
    return replace(
        reading, dataset=dataset, faults=(*reading.faults, *findings.faults), tally=tally
    )


def _accepted(dataset: Dataset, least: float) -> Dataset:
    """Make crowds of the proposals below a score: there may be something, and nobody knows what.

    A class with a crowd is not asked for in its image, so that what is doubtful teaches neither
    that it is there nor that it is not.
    """
    judged = (
        replace(a, iscrowd=a.iscrowd or (a.score is not None and a.score < least))
        for a in dataset.annotations
    )
    return replace(dataset, annotations=tuple(judged))


def _missing_once(faults: Sequence[Fault], tally: Tally) -> tuple[Fault, ...]:
    """Make one fault of those of images that are missing, where none is there."""
    missing = [fault for fault in faults if fault.kind == "image missing"]
    if len(missing) < 2 or len(missing) != tally.images:
        return tuple(faults)
    place = f"{len(missing)} of {tally.images} images are missing: {missing[0].place}"
    remedy = missing[0].remedy.replace(
        "add it, or mend its name", "put the images there, or name the folder that holds them too"
    )
    rest = [fault for fault in faults if fault.kind != "image missing"]
    return (replace(missing[0], place=place, remedy=remedy), *rest)


def _without_no_class(dataset: Dataset, findings: Findings) -> Dataset:
    none = {
        category.id: category.name for category in dataset.categories if category.name in NO_CLASS
    }
    for id, name in none.items():
        count = sum(annotation.category_id == id for annotation in dataset.annotations)
        remedy = f"names no class: {count} shapes of it are left out"
        findings.add("placeholder", "categories", name, remedy)
    return replace(
        dataset,
        annotations=tuple(a for a in dataset.annotations if a.category_id not in none),
        categories=tuple(c for c in dataset.categories if c.id not in none),
    )


def _each_once(dataset: Dataset, findings: Findings) -> Dataset:
    """Leave out objects of one class that have the box and the mask of another to the bit."""
    seen: dict[object, Annotation] = {}
    paths = {image.id: image.path.name for image in dataset.images}
    for annotation in dataset.annotations:
        mask = (annotation.segmentation or {}).get("counts")
        key = (annotation.image_id, annotation.category_id, annotation.bbox_xywh, mask)
        if seen.setdefault(key, annotation) is not annotation:
            place = f"{paths[annotation.image_id]}: annotation {annotation.id}"
            remedy = f"is annotation {seen[key].id} once more"
            findings.add("same object", place, list(annotation.bbox_xywh), remedy)
    return replace(dataset, annotations=tuple(seen.values()))


def alike_names(folder: Path, splits: Mapping[str, Dataset]) -> list[Fault]:
    """Report names of classes, over all splits, that the model reads as one prompt."""
    findings = Findings(str(folder))
    spellings: dict[str, dict[str, str]] = {}  # what the model reads -> each name, its split
    for split, dataset in splits.items():
        for name in dataset.class_names:
            spellings.setdefault(as_read(name), {}).setdefault(name, split)
    for names in spellings.values():
        if len(names) > 1:
            (first, split), *others = names.items()
            for name, other in others:
                remedy = f"is '{first}' of {split} but for case or space; merge or rename one"
                findings.add("alike names", f"{other}: categories", name, remedy)
    return findings.faults


def unread_files(
    folder: Path, splits: Mapping[str, Dataset], named: Collection[Path]
) -> list[Fault]:
    """Report what lies beside the images and is not used: images in no labels, and other kinds.

    Args:
        named: the files that labels name, used or not.
    """
    findings = Findings(str(folder))
    used = {image.path for dataset in splits.values() for image in dataset.images}
    for parent in sorted({path.parent for path in used}):
        unlisted, other = [], Counter[str]()
        example = ""
        for path in sorted(parent.iterdir()):
            ending = path.suffix.lower()
            if path.name.startswith(".") or path.is_symlink() or not path.is_file():
                continue
            if ending in EXTENSIONS and path.resolve() not in named:
                unlisted.append(path.name)
            elif ending in NOT_READ:
                other[ending] += 1
                example = example or path.name
        place = str(parent.relative_to(folder.resolve())) if parent != folder.resolve() else "."
        if unlisted:
            remedy = f"{len(unlisted)} images are in no labels, such as {unlisted[0]}: not used"
            findings.add("unlisted", place, f"{len(unlisted)} files", remedy)
        if other:
            kinds = ", ".join(f"{count} {ending}" for ending, count in other.items())
            remedy = f"{kinds}: not read, such as {example}; convert them to PNG or JPEG"
            findings.add("not read", place, f"{other.total()} files", remedy)
    return findings.faults
