"""Label images by the detections of weights: a dataset to correct and train on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

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

log = logging.getLogger("app")
LABELLER = "labelled by python -m app label"


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
    images: list[Image] = []
    annotations: list[Annotation] = []
    bad: list[str] = []
    best = 0.0  # score
    with atomic_folder(folder, replace=False) as temporary:
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
            raise UserError(
                f"Nothing was found in {counted(len(images), 'image')}: lower --threshold below "
                f"the scores{lower if best else ''}, or ask for other words than {', '.join(names)}"
            )
        categories = tuple(Category(id, name) for id, name in enumerate(names, start=1))
        dataset = Dataset(tuple(images), tuple(annotations), categories)
        with progress("writing: image", len(images)) as advance:
            info = {"description": LABELLER, "weights": str(checkpoint)}
            target = temporary / "train" if form == "coco" else temporary
            write_split(dataset, target, info, lambda done: advance(done, ""))
            if form != "coco":
                rewrite(target, form, str(checkpoint))
    counts = Counter(annotation.category_id for annotation in annotations)
    log.info(
        "%s in %s (%s): %s",
        *(counted(len(annotations), "object"), counted(len(images), "image")),
        ", ".join(f"{category.name} {counts[category.id]}" for category in categories),
        folder,
    )
    if form == "coco":
        log.info("train on it: %s", command("./train.sh", "--dataset-dir", folder))
    else:
        log.info("open it: %s", OPENED[form].format(folder=folder.resolve()))
    return bad


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
