"""Every kind of fault of a dataset with its consequence, and whether a dataset may be used.

`python -m app.datasets.faults > docs/faults.md` renews the page of that table.
"""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from app.errors import UserError

SHOWN_PER_KIND = 20
MAX_DROP = 0.01  # of the images, and of the annotations
PAGE = """\
# What can be wrong with a dataset

`python -m app data check DIR` reports every fault below, all at once, with its place and remedy, on
the terminal and in `dataset_report.html`. `python -m app data build` and `./train.sh` go by the
same table:

- **refused**: mending it would be guessing. Nothing is written or trained.
- **dropped**: the image or the annotation is left out and counted. More than {max_drop:.0f} % of
  either is refused, unless `--max-drop 0.05` (in training `dataset.max_drop=0.05`) allows it.
- **mended**: nothing is guessed; the number of them is reported.
- **warning**: the dataset is used as it is.

`data check` ends with 0 where the dataset can be trained on as it is, and with 2 where not.
Training reads only the headers of images, and warns where two splits have the same file: what takes
a full decode to find is found by `check` and `build`.

| kind | what becomes of it | how |
|---|---|---|
{rows}
"""


class Action(StrEnum):
    """The consequence of a fault, in training and in `data build` alike."""

    REFUSED = "refused"  # mending it would be guessing
    DROPPED = "dropped"  # its image or annotation is left out, and counted against the cap
    MENDED = "mended"
    WARNED = "warning"


@dataclass(frozen=True)
class Kind:
    """A kind of fault: its name, its consequence, and how that comes about."""

    name: str
    action: Action
    outcome: str


def _kinds(action: Action, **outcomes: str) -> list[Kind]:
    return [Kind(name.replace("_", " "), action, text) for name, text in outcomes.items()]


KINDS = {
    kind.name: kind
    for kind in (
        *_kinds(
            Action.REFUSED,
            JSON="broken, cut short, not UTF-8: export it again",
            root="no COCO object with images, annotations and categories: export it again",
            duplicate_key="a key twice in one object: which of them holds is not known",
            empty="no images or categories, or nothing to train on or to score: add some",
            image_id="missing, no whole number, or taken: annotations point to it",
            listed_twice="two entries for one file: list each image once",
            category_id="missing, no whole number, or taken: annotations point to it",
            category_name="empty, no text, or too long: a short name, as you would say it",
            alike_names="the same but for case or space: merge or rename",
            names="the classes' names are missing, doubled or no text: mend the list",
            split="a split that cannot be found: mend the path",
            attribute="more than one attribute could be the class: --attribute names it",
        ),
        *_kinds(
            Action.DROPPED,
            image_missing="no such file",
            ambiguous_name="several files could be meant: the folder is missing in the name",
            image_empty="a file of 0 bytes",
            no_image="a web page, SVG or anything else that is no image: convert it",
            image_damaged="cut short or broken: a full decode fails",
            image_enormous="more pixels than an image has: a decompression bomb",
            image_tiny="under 10 pixels a side",
            image_size="width or height no number of pixels, or enormous",
            other_size="the file has other pixels than its labels say: export it again",
            file_name="no text: a path inside the dataset",
            link="leads out of the dataset: copy the file there",
            in_two_splits="the same pixels in two splits: left out of train, else of test",
            label_file="labels of one image that cannot be read: the image is left out",
            orphan="labels that belong to no image: add it, or mend their name",
            entry="no JSON object where one must be",
            image_reference="annotation of an image that is not listed",
            category_reference="annotation of a category that is not listed",
            iscrowd="neither 0 nor 1",
            label="a line or an entry that is no object of a class that there is",
            shape="a shape that is none, or of a kind that is not read",
            no_geometry="neither box nor mask",
            bbox="not four finite numbers",
            bbox_empty="no width or no height",
            bbox_outside="wholly outside its image",
            box_convention="not x y width height in pixels, or far from its mask: see --boxes",
            segmentation="neither polygons nor RLE",
            polygon="not finite, odd, fewer than six numbers, or far outside its image",
            RLE="too short, too long, damaged, or of another size than its image",
            zero_area="a mask that covers no pixel",
        ),
        *_kinds(
            Action.MENDED,
            BOM="byte order mark: passed over",
            other_name="the one file that can be meant: see docs/data.md, Names",
            annotation_id="missing or taken: numbered",
            no_categories="one file lists no classes: those of the file of another split",
            several_labels="an image that was labelled more than once: the last labels",
            no_iscrowd="0, as COCO's default is",
            no_area="missing or no number of pixels: the mask's, else the box's",
            no_bbox="the mask's",
            bbox_clipped="cut off at the image's edge",
            space_in_name="space around a class's name: cut off",
            placeholder="a name for what is no class, such as __ignore__: left out",
            void="pixels of no object in a mask: left out",
            lossy_mask="a mask of two values as JPEG: cut at half",
            same_object="the same object twice: once",
            same_splits="valid lists only images of train, or test only those of valid: left out",
            EXIF="turned upright once; labels are those of the upright image",
            CMYK="converted to RGB",
            palette="converted to RGB",
            alpha="transparency left out",
            bits="more than 8 bits a pixel: the dataset's range is scaled to 8",
        ),
        *_kinds(
            Action.WARNED,
            unfinished="a person is not done with it in the page of serve.sh: left out",
            proposals="weights have found them and nobody has looked: correct, or --accept-above",
            crowd="not asked for in training, passed over in figures: --crowd instances reads it",
            image_twice="the same pixels twice in one split",
            unlabelled="images without labels or a mask: they are taken to show no object",
            unlisted="images beside others that no label names: not used",
            tag="what marks no place in an image, such as a tag or a choice: passed over",
            not_read="files that are not read, in a folder of images",
            dark="nearly black once scaled to 8 bits",
            numbers="classes that are called by numbers: a prompt is a noun phrase",
            many_objects="more objects in an image than the model finds",
            no_negatives="a model tuned on one class that every image has answers any prompt",
            many_classes="more classes than prompts an image and step",
            untrained_class="evaluated and never trained on",
        ),
    )
}


@dataclass(frozen=True)
class Fault:
    """One fault: its kind, the file and the place in it, the value found, and the remedy."""

    kind: str
    where: str
    place: str
    value: str
    remedy: str

    @property
    def action(self) -> Action:
        """Return the consequence."""
        return KINDS[self.kind].action

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""  # of what is of the whole dataset
        return f"{where}{self.place} is {self.value}: {self.remedy}"


@dataclass(frozen=True)
class Message(Fault):
    """A fault that is described in full by the UserError that it comes from."""

    def __str__(self) -> str:
        return self.remedy


def messages(kind: str, where: str, error: UserError) -> list[Fault]:
    return [Message(kind, where, "", "", problem) for problem in error.problems]


class Findings:
    """A collection of the faults of one file or folder."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.faults: list[Fault] = []

    def add(self, kind: str, place: str, value: object, remedy: str) -> None:
        self.faults.append(Fault(kind, self.where, place, _show(value), remedy))

    def add_error(self, kind: str, error: UserError) -> None:
        self.faults += messages(kind, self.where, error)

    def lines(self) -> list[str]:
        return lines(self.faults)


@dataclass(frozen=True)
class Tally:
    """The number of images and annotations that a dataset lists, and of those that are used."""

    images: int = 0
    annotations: int = 0
    kept_images: int = 0
    kept_annotations: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.images + other.images,
            self.annotations + other.annotations,
            self.kept_images + other.kept_images,
            self.kept_annotations + other.kept_annotations,
        )

    def over(self, max_drop: float) -> list[str]:
        """Report images, and annotations, of which more than that share is left out."""
        pairs = {
            "images": (self.images - self.kept_images, self.images),
            "annotations": (self.annotations - self.kept_annotations, self.annotations),
        }
        return [
            f"{dropped} of {total} {what} would be left out ({dropped / total * 100:.3g} %)"
            + _advice(dropped / total, max_drop)
            for what, (dropped, total) in pairs.items()
            if dropped > max_drop * total or dropped == total > 0
        ]


def _advice(share: float, max_drop: float) -> str:
    if share == 1:
        return ": nothing would remain; mend them"
    needed = f"{math.ceil(share * 100) / 100:.2f}"
    return (
        f", and {max_drop * 100:g} % may be: mend them, or allow it with --max-drop {needed} "
        f"(./train.sh: dataset.max_drop={needed})"
    )


def problems(faults: Sequence[Fault], tally: Tally, max_drop: float) -> list[str]:
    """Return why a dataset is refused, all at once; empty where it is not."""
    refused = [fault for fault in faults if fault.action is Action.REFUSED]
    dropped = [fault for fault in faults if fault.action is Action.DROPPED]
    if refused:  # the tally lacks what is refused as well, and says nothing of the drops alone
        return lines([*refused, *dropped])
    over = tally.over(max_drop)
    return lines(dropped) + over if over else []


def lines(faults: Iterable[Fault]) -> list[str]:
    """Return a line a fault: at most SHOWN_PER_KIND a kind and file, then a count of the rest."""
    grouped: dict[tuple[str, str], list[Fault]] = {}
    for fault in faults:
        grouped.setdefault((fault.where, fault.kind), []).append(fault)
    shown = []
    for (where, kind), group in grouped.items():
        shown += [str(fault) for fault in group[:SHOWN_PER_KIND]]
        if (rest := len(group) - SHOWN_PER_KIND) > 0:
            shown.append(f"{where}: and {rest} more problems of this kind ({kind})")
    return shown


def counts_of(faults: Iterable[Fault]) -> dict[str, dict[str, int]]:
    """Count how many of each kind were mended, and how many were left out."""
    counts = Counter((fault.action, fault.kind) for fault in faults)
    return {
        str(action): {kind: n for (its, kind), n in counts.items() if its is action}
        for action in (Action.MENDED, Action.DROPPED)
    }


def notes(faults: Iterable[Fault]) -> list[str]:
    """Return a note for the user of what was mended, and of what was left out."""
    return [
        f"{action}: {', '.join(f'{n} x {kind}' for kind, n in kinds.items())} "
        "(python -m app data check says which)"
        for action, kinds in counts_of(faults).items()
        if kinds
    ]


def _show(value: object) -> str:
    """Return the value on one line, cut short, with control characters escaped."""
    return "missing" if value is None else _short.repr(value)


_short = reprlib.Repr()
_short.maxstring = 80


def page() -> str:
    """Return `docs/faults.md`: every kind of fault, its consequence, and how that comes about."""
    rows = [f"| {kind.name} | {kind.action} | {kind.outcome} |" for kind in KINDS.values()]
    return PAGE.format(max_drop=MAX_DROP * 100, rows="\n".join(rows))


if __name__ == "__main__":
    print(page(), end="")
