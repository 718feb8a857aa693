"""A round of the ring: labels → data → a run from the champion → a verdict → proposals.

Each step leaves a folder or a file that is whole or not there, so that the same command goes on
wherever it was killed.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.console import counted
from app.datasets.build import survey
from app.datasets.coco import Dataset
from app.datasets.duplicates import same_files
from app.datasets.editing import LabelFile, Shape, StaleError
from app.datasets.writing import write_split
from app.errors import UserError
from app.evaluation.compare import Line, compare
from app.evaluation.diagnosis import extremes
from app.evaluation.matching import overlaps
from app.evaluation.run_files import read_figures
from app.evaluation.validate import validate
from app.files import atomic_folder, hash_file, read_json, write_json, write_text
from app.inference import ranking
from app.inference.inputs import find_images
from app.inference.labelling import NothingFoundError, propose, write_proposals
from app.inference.predictor import Predictor
from app.ring import label_studio
from app.ring.review import Review, review
from app.ring.settings import RingConfig
from app.training.prepare import Request

log = logging.getLogger("app")
STATE, ROUND = "ring.json", "round.json"
DATA, RUN, BEFORE, PROPOSALS, NEXT = "data", "run", "champion", "proposals", "next"
CHOSEN = "chosen.txt"  # the images to label next, whether anything is proposed in them or not
SECOND_LOOK = 10  # labels that person and model disagree on most
Train = Callable[[Request], None]
Register = Callable[[Path], None]


@dataclass(frozen=True)
class Round:
    """Hold what a round came to.

    Attributes:
        images, objects: that it trained on.
        figure: the name of the figure that decided.
        before, after: of the champion and of the run's weights, on the validation set.
        low, high: paired 95 % interval of their difference.
        is_better: whether the run's weights are the champion from here on.
        review: of the proposals of the round before.
        second_look: images whose labels the weights disagree with most, and how.
    """

    number: int
    images: int
    objects: int
    figure: str
    before: float
    after: float
    low: float
    high: float
    is_better: bool
    minutes: float
    review: Review
    second_look: tuple[tuple[str, str], ...]


def step(config: RingConfig, train: Train, evaluate: Train, register: Register | None) -> bool:
    """Do the round that is due, or what is left of it; return whether there was one.

    Args:
        train, evaluate: make an ordinary run, and score weights.
        register: gives a run's weights to the registry, where they are better.

    Raises:
        UserError: labels with faults, or that are of validation images; whatever a run refuses.
    """
    state = _read_state(config)
    number = len(rounds(config.folder)) + 1
    folder = round_folder(config.folder, number)
    if not (folder / DATA).is_dir():
        labels = read_labels(config)
        fresh = len(labels.images) - state["images"]
        if fresh < config.every:
            log.info(
                "%s labelled since the last round; %d begin the next",
                *(counted(max(fresh, 0), "image"), config.every),
            )
            if number == 1 and not (folder.parent / "000" / PROPOSALS).is_dir():
                _propose(config, folder.parent / "000", Path(state["champion"]), labels)
                return True
            return False
        log.info("round %d: %s", number, counted(len(labels.images), "labelled image"))
        _write_data(config, labels, folder)
    begun = time.monotonic()
    champion = Path(state["champion"])
    data = survey(folder / DATA).splits
    classes = data["train"].class_names
    if "epochs" not in read_figures(folder / RUN):
        train(_request(config, folder, champion))
    if not read_figures(folder / BEFORE):
        # In the precision of the run, and with its other settings: figures are of like with like.
        words = [*config.train, f"checkpoint={champion}", f"dataset.dir={folder / DATA}"]
        words += ["evaluation.split=valid", f"output_dir={folder / BEFORE}"]
        evaluate(Request(words, eval_only=True, overwrite=True))
    done = _judge(config, folder, number, data["train"], begun)
    if done.is_better and register is not None:
        register(folder / RUN)
    winner = folder / RUN / "weights" / "best" if done.is_better else champion
    if not (folder / PROPOSALS).is_dir():
        _propose(config, folder, winner, data["train"], classes)
    write_json(folder / ROUND, asdict(done))
    write_json(
        config.folder / STATE, {"champion": str(winner), "images": done.images, "round": number}
    )
    return True


def read_labels(config: RingConfig) -> Dataset:
    """Return the labelled images, as Label Studio has them now where it is the one that labels.

    Raises:
        UserError: faults that must be mended, or images of the validation set.
    """
    if config.label_studio is not None:
        label_studio.export(config.label_studio, config.labels)
    if not _has_labels(config):
        return Dataset((), (), ())
    surveyed = survey(config.labels)
    surveyed.require_sound(0.0)
    labels = surveyed.splits["train"]
    if any(annotation.score is not None for annotation in labels.annotations):
        count = sum(annotation.score is not None for annotation in labels.annotations)
        raise UserError(
            f"{config.labels}: {count} objects are proposals that nobody has looked at; correct "
            "them in a labelling tool, and export them from there"
        )
    validation = survey(config.validation).splits["train"]
    shared = same_files(
        [image.path for image in labels.images], [image.path for image in validation.images]
    )
    if shared:
        raise UserError(
            f"{config.labels}: {counted(len(shared), 'image')} of the validation set, such as "
            f"{shared[0].name}: take them out, or the verdict means nothing"
        )
    return labels


def _has_labels(config: RingConfig) -> bool:
    """Return whether anything is labelled yet; a folder of photos alone would be refused."""
    if config.to == "page":
        return any(finished for finished, _, _ in LabelFile(config.labels).counts().values())
    return config.label_studio is None or (config.labels / label_studio.FILE).is_file()


def rounds(folder: Path) -> list[Round]:
    """Return the rounds that are done."""
    found = []
    for file in sorted(folder.glob(f"rounds/*/{ROUND}")):
        content = read_json(file)
        content["review"] = Review(**content["review"])
        content["second_look"] = tuple(map(tuple, content["second_look"]))
        found.append(Round(**content))
    return found


def round_folder(folder: Path, number: int) -> Path:
    return folder / "rounds" / f"{number:03d}"


def _read_state(config: RingConfig) -> dict[str, Any]:
    file = config.folder / STATE
    if file.is_file():
        found: dict[str, Any] = read_json(file)
        return found
    return {"champion": str(config.champion), "images": 0, "round": 0}


def _request(config: RingConfig, folder: Path, champion: Path) -> Request:
    """Return the words of the round's run: on from the champion, on its data."""
    words = [
        *config.train,
        f"dataset.dir={folder / DATA}",
        f"checkpoint={champion}",
        f"output_dir={folder / RUN}",
    ]
    return Request(words, recipe="auto", resume="auto")


def _write_data(config: RingConfig, labels: Dataset, folder: Path) -> None:
    """Write the round's dataset: the labels of now, and the validation set as it always was."""
    validation = survey(config.validation)
    validation.require_sound(0.0)
    with atomic_folder(folder / DATA, replace=False) as temporary:
        info = {"description": "a round of python -m app ring"}
        write_split(labels, temporary / "train", info, lambda _: None)
        write_split(validation.splits["train"], temporary / "valid", info, lambda _: None)


def _judge(config: RingConfig, folder: Path, number: int, train: Dataset, begun: float) -> Round:
    """Compare the run's weights with the champion, and look for labels to doubt."""
    compared = compare(folder / BEFORE, folder / RUN)
    line = _deciding(compared.lines)
    low, high = line.interval or (0.0, 0.0)
    is_better = low > 0
    log.info(
        "%s %.3f, %.3f before (%+.3f to %+.3f, 95 %%): %s",
        *(line.name, line.other, line.one, low, high),
        "the new champion" if is_better else "the champion stays",
    )
    before = round_folder(config.folder, number - 1) / PROPOSALS
    checked = Review()
    if before.is_dir():
        checked = review(survey(before).splits["train"], train)
    objects = [each for each in train.annotations if not each.iscrowd]
    return Round(
        number=number,
        images=len(train.images),
        objects=len(objects),
        figure=line.name,
        before=line.one,
        after=line.other,
        low=low,
        high=high,
        is_better=is_better,
        minutes=round((time.monotonic() - begun) / 60, 2),
        review=checked,
        second_look=_second_look(folder / RUN / "weights" / "best", train),
    )


def _deciding(lines: Sequence[Line]) -> Line:
    """Return the line of mask AP, or of box AP without masks."""
    named = {line.name: line for line in lines}
    return named.get("segm/AP") or named["bbox/AP"]


def _second_look(weights: Path, train: Dataset) -> tuple[tuple[str, str], ...]:
    """Return the training images that the weights see otherwise than they are labelled."""
    predictor = Predictor.load(weights)
    found = validate(predictor, train, max_detections=100)
    kind = "segm" if "segm/AP" in found.figures else "bbox"
    worst, _ = extremes(overlaps(train, found.results, kind), predictor.threshold, SECOND_LOOK)
    names = {image.id: image.path.name for image in train.images}
    return tuple((names[each.image_id], str(each)) for each in worst)


def _propose(
    config: RingConfig,
    folder: Path,
    weights: Path,
    labelled: Dataset,
    classes: Sequence[str] = (),
) -> None:
    """Write proposals for the images that teach the most, of those without labels."""
    known = {hash_file(image.path) for image in labelled.images}
    known |= {hash_file(image.path) for image in survey(config.validation).splits["train"].images}
    left = [path for path in find_images(str(config.images)) if hash_file(path) not in known]
    if not left:
        log.info("no image is left without labels")
        return
    predictor = Predictor.load(weights)
    prompts = list(config.classes or classes or labelled.class_names or predictor.prompts)
    seen, _ = ranking.look(predictor, left, prompts)
    chosen = ranking.rank(
        seen,
        prompts,
        config.top,
        weights=ranking.weights_of(prompts, labelled if labelled.images else None),
        labelled=ranking.features_of(predictor, labelled),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CHOSEN, "".join(f"{each.image.resolve()}\n" for each in chosen))
    try:
        proposals, _ = propose(predictor, [each.image for each in chosen], prompts)
    except NothingFoundError as error:
        log.info("nothing is proposed: %s", error)
        return
    shown = folder / PROPOSALS
    if config.to == "page":
        _show_in_page(config, proposals)
        shown = config.labels
    elif config.to != "coco":
        shown = folder / NEXT
        shutil.rmtree(shown, ignore_errors=True)
        with atomic_folder(shown, replace=False) as temporary:
            write_proposals(proposals, temporary, config.to, str(weights))
    with atomic_folder(folder / PROPOSALS, replace=False) as temporary:
        write_proposals(proposals, temporary, "coco", str(weights))
    log.info("proposals to correct: %s (%s)", shown, counted(len(chosen), "image"))


def _show_in_page(config: RingConfig, proposals: Dataset) -> None:
    """Write proposals beside the labels, for the page; what a person has begun is left alone."""
    file = LabelFile(config.labels)
    names = {category.id: category.name for category in proposals.categories}
    begun = file.counts()
    for image in proposals.images:
        name = image.path.relative_to(file.folder).as_posix()
        objects = proposals.annotations_by_image[image.id]
        if name in begun or not objects:
            continue
        shapes = [
            Shape(None, names[each.category_id], each.bbox_xywh, each.segmentation, each.score)
            for each in objects
        ]
        with contextlib.suppress(StaleError):  # a person has begun it this very moment
            file.write(name, file.read(name).version, shapes, finished=False)
