"""Label images by the detections of weights: a dataset to correct and train on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pycocotools import mask as coco_mask

from app.config.schema import ProposalForm
from app.console import command, counted, progress
from app.datasets.coco import Annotation, Category, Dataset, Image
from app.datasets.images import ImageError, open_image
from app.datasets.writing import write_split
from app.errors import UserError
from app.files import atomic_folder, check_writable
from app.inference.detections import Detections
from app.inference.inputs import check_prompts, find_images
from app.inference.postprocess import threshold_below
from app.inference.proposals import OPENED, rewrite
from app.inference.settings import tell_mistyped
from app.model.weight_files import find_file

if TYPE_CHECKING:
    from app.inference.predictor import Predictor

log = logging.getLogger("app")
LABELLER = "labelled by python -m app label"


class NothingFoundError(UserError):
    """No weights, words or threshold gave a single proposal."""


def label(
    source: str,
    checkpoint: Path,
    folder: Path,
    prompts: Sequence[str] = (),
    *,
    threshold: float | None = None,
    max_detections: int = 100,
    device: str = "auto",
    form: ProposalForm = "coco",
) -> list[str]:
    """Write proposals and their images; return the problems of images left out.

    As COCO they are `folder/train`, a dataset; in other forms a folder to open in a labelling tool.

    Args:
        source: file, folder, glob or list of images.
        checkpoint: weights file or folder.
        prompts: the classes; without any, those of the weights.
        threshold: 0..1, least score of a label; None takes the weights' own.
        form: coco, labelme (also of X-AnyLabeling) or label-studio.

    Raises:
        UserError: no images, no classes, nothing found, or a folder that is there already, or that
            another process writes.
    """
    if folder.exists() or folder.is_symlink():
        raise UserError(f"--output-dir {folder}: is there already; name another folder")
    check_writable(folder)
    paths = find_images(source)
    find_file(checkpoint)
    from app.inference.predictor import Predictor  # torch: only where there is something to do

    predictor = Predictor.load(checkpoint, device=device)
    names = check_prompts(prompts or predictor.prompts)
    tell_mistyped(names, predictor.prompts)
    dataset, bad = propose(
        predictor, paths, names, threshold=threshold, max_detections=max_detections
    )
    with atomic_folder(folder, replace=False) as temporary:
        write_proposals(dataset, temporary, form, str(checkpoint))
    counts = Counter(annotation.category_id for annotation in dataset.annotations)
    log.info(
        "%s in %s (%s): %s",
        counted(len(dataset.annotations), "object"),
        counted(len(dataset.images), "image"),
        ", ".join(f"{category.name} {counts[category.id]}" for category in dataset.categories),
        folder,
    )
    if form == "coco":
        log.info("train on it: %s", command("./train.sh", "--dataset-dir", folder))
        log.info("correct it: %s", command("./serve.sh", "--label", folder / "train"))
    else:
        log.info("open it: %s", OPENED[form].format(folder=folder.resolve()))
    return bad


def propose(
    predictor: Predictor,
    paths: Sequence[Path],
    names: Sequence[str],
    *,
    threshold: float | None = None,
    max_detections: int = 100,
) -> tuple[Dataset, list[str]]:
    """Return what weights find in images as proposals, and the problems of images left out.

    Args:
        names: the classes.
        threshold: 0..1, least score; None takes the weights' own.

    Raises:
        NothingFoundError: in no image at all.
    """
    images: list[Image] = []
    annotations: list[Annotation] = []
    bad: list[str] = []
    best = 0.0  # score
    with progress("labelling: image", len(paths)) as advance:
        for done, path in enumerate(paths, start=1):
            try:
                pixels = open_image(path, predictor.levels)
            except ImageError as error:
                bad += error.problems
                continue
            image = Image(len(images) + 1, path.resolve(), pixels.width, pixels.height)
            images.append(image)
            detections = predictor.predict(
                pixels, names, threshold=threshold, max_detections=max_detections
            )
            annotations += to_annotations(detections, image.id, len(annotations) + 1)
            best = max(best, detections.best_score or 0.0)
            advance(done, counted(len(annotations), "object"))
    if not annotations:
        lower = f", of which the highest is {best:.3g}: --threshold {threshold_below(best)}"
        raise NothingFoundError(
            f"Nothing was found in {counted(len(images), 'image')}: lower --threshold below "
            f"the scores{lower if best else ''}, or ask for other words than {', '.join(names)}"
        )
    categories = tuple(Category(id, name) for id, name in enumerate(names, start=1))
    return Dataset(tuple(images), tuple(annotations), categories), bad


def write_proposals(dataset: Dataset, folder: Path, form: ProposalForm, weights: str) -> None:
    """Write proposals and copies of their images into a folder, in a form that a tool opens.

    Args:
        weights: that made them, for whoever looks at them.
    """
    info = {"description": LABELLER, "weights": weights}
    with progress("writing: image", len(dataset.images)) as advance:
        target = folder / "train" if form == "coco" else folder
        write_split(dataset, target, info, lambda done: advance(done, ""))
        if form != "coco":
            rewrite(target, form, weights)


def to_annotations(detections: Detections, image_id: int, first: int) -> list[Annotation]:
    """Return detections that cover something as proposals, whose ids count from `first`.

    Where there is a mask, the box is the mask's: one that is far from it would be taken for wrong.

    Their categories are the detections' prompts, counted from 1.
    """
    annotations: list[Annotation] = []
    for index in range(len(detections)):
        left, top, right, bottom = (float(side) for side in detections.boxes_xyxy[index])
        width, height = right - left, bottom - top
        area = width * height
        mask = None if detections.masks is None else detections.masks[index]
        if mask is not None:
            left, top, width, height = coco_mask.toBbox(mask).tolist()
            area = float(coco_mask.area(mask))
        if not (width > 0 and height > 0 and area > 0):
            continue
        annotations.append(
            Annotation(
                id=first + len(annotations),
                image_id=image_id,
                category_id=int(detections.prompt_ids[index]) + 1,
                bbox_xywh=(left, top, width, height),
                segmentation=mask,
                area=area,
                iscrowd=False,
                score=float(detections.scores[index]),
            )
        )
    return annotations
