"""Which unlabelled images to label next: those that weights are unsure of, each unlike the others.

An image's doubt joins three signs of it: a score near the weights' threshold, a presence near one
half, and other answers about the mirrored image. Classes with few labels weigh more. The images are
chosen one by one, each for its doubt and for its distance from all chosen and labelled ones: the
greedy k-centre (Sener and Savarese, "Active Learning for Convolutional Neural Networks", 2018).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from app.console import progress
from app.datasets.coco import Dataset
from app.datasets.duplicates import group
from app.datasets.images import ImageError, open_image
from app.inference.predictor import Predictor, query_scores

log = logging.getLogger("app")
NOTED = 0.05  # score, above which two views of an image are compared
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """Hold what weights make of an image.

    Attributes:
        margin, presence, mirror: 0..1, the three signs of doubt, of each class.
        feature: (D,) of length 1, the mean of the trunk's map.
    """

    image: Path
    margin: Array
    presence: Array
    mirror: Array
    feature: Array

    @property
    def doubts(self) -> Array:
        """Return the doubt of each class, 0..1."""
        found: Array = (self.margin + self.presence + self.mirror) / 3
        return found


@dataclass(frozen=True)
class Ranked:
    """Hold an image's place, and why it has it.

    Attributes:
        doubt: 0..1, of the class that it is of.
        distance: 0..2, from the nearest image that was labelled or chosen before.
    """

    image: Path
    doubt: float
    distance: float
    reason: str


def look(
    predictor: Predictor, paths: Sequence[Path], prompts: Sequence[str]
) -> tuple[list[Seen], list[str]]:
    """Return what the weights make of each image, and the problems of those that cannot be read."""
    seen: list[Seen] = []
    bad: list[str] = []
    with progress("ranking: image", len(paths)) as advance:
        for done, path in enumerate(paths, start=1):
            try:
                image = open_image(path, predictor.levels)
            except ImageError as error:
                bad += error.problems
            else:
                seen.append(look_at(predictor, path, image, prompts))
            advance(done, "")
    return seen, bad


def look_at(predictor: Predictor, path: Path, image: Image.Image, prompts: Sequence[str]) -> Seen:
    """Return what the weights make of an image, and of its mirror image."""
    features, outputs = predictor.answers(image, prompts)
    _, mirrored = predictor.answers(ImageOps.mirror(image), prompts)
    scores, presence = query_scores(outputs), outputs["presence_logit_dec"].float().reshape(-1)
    best = scores.amax(dim=1).double().cpu().numpy()  # (P,)
    threshold = predictor.threshold
    margin = 1 - np.abs(best - threshold) / max(threshold, 1 - threshold)
    half = 1 - (2 * presence.sigmoid() - 1).abs().double().cpu().numpy()
    return Seen(
        path,
        margin=margin,
        presence=half,
        mirror=_disagreement(outputs, mirrored),
        feature=_feature(features["vision_features"]),
    )


def _disagreement(outputs: Mapping[str, Tensor], mirrored: Mapping[str, Tensor]) -> Array:
    """Return how far two views of an image differ in what each prompt finds, 0..1: (P,).

    The boxes of each view look for their like in the other one; what scores higher weighs more.
    """
    views = []
    for found, turned in ((outputs, False), (mirrored, True)):
        boxes = found["pred_boxes"].float().cpu().clone()  # (P, Q, 4) cxcywh, 0..1
        if turned:
            boxes[..., 0] = 1 - boxes[..., 0]
        views.append((query_scores(dict(found)).cpu(), box_convert(boxes, "cxcywh", "xyxy")))
    differences = []
    for prompt in range(len(views[0][0])):
        total = weight = 0.0
        for own, other in (views, views[::-1]):
            kept = own[0][prompt] > NOTED
            there = other[0][prompt] > NOTED
            scores = own[0][prompt][kept].double()
            weight += float(scores.sum())
            if not bool(there.any()):
                total += float(scores.sum())
            elif bool(kept.any()):
                nearest = box_iou(own[1][prompt][kept], other[1][prompt][there]).amax(dim=1)
                total += float((scores * (1 - nearest.double())).sum())
        differences.append(total / weight if weight else 0.0)
    return np.array(differences)


def weights_of(prompts: Sequence[str], labelled: Dataset | None) -> Array:
    """Return how much each class weighs, 0..1: the fewer labels it has beside others, the more."""
    if labelled is None:
        return np.ones(len(prompts))
    names = {category.id: category.name for category in labelled.categories}
    counts = Counter(names[a.category_id] for a in labelled.annotations if not a.iscrowd)
    found = np.array([1 / np.sqrt(1 + counts[prompt]) for prompt in prompts])
    return np.asarray(found / found.max())


def rank(
    seen: Sequence[Seen],
    prompts: Sequence[str],
    top: int,
    *,
    weights: Array,
    labelled: Sequence[Array] = (),
) -> list[Ranked]:
    """Return the images to label next, the most telling first; of near-duplicates one alone.

    Args:
        top: how many, at most.
        weights: of each class, 0..1.
        labelled: features of images that are labelled already.
    """
    if not seen:
        return []
    groups = group([(each.image, None) for each in seen])
    doubts = np.array([each.doubts * weights for each in seen])  # (N, P)
    doubt = doubts.max(axis=1)
    features = np.array([each.feature for each in seen])
    distance = np.full(len(seen), 2.0)
    for feature in labelled:
        distance = np.minimum(distance, 1 - features @ feature)
    open_ones = np.ones(len(seen), dtype=bool)
    ranked: list[Ranked] = []
    while len(ranked) < top and open_ones.any():
        worth = np.where(open_ones, doubt * (distance + 1e-6), -1.0)
        chosen = int(worth.argmax())
        ranked.append(
            Ranked(
                seen[chosen].image,
                float(doubt[chosen]),
                float(distance[chosen]),
                _reason(seen[chosen], prompts, int(doubts[chosen].argmax())),
            )
        )
        open_ones &= np.array(groups) != groups[chosen]
        distance = np.minimum(distance, 1 - features @ features[chosen])
    return ranked


def _reason(seen: Seen, prompts: Sequence[str], place: int) -> str:
    """Return in words which sign of doubt is the strongest, and of which class."""
    signs = {
        "a score near the threshold": seen.margin[place],
        "not sure whether there is one": seen.presence[place],
        "found otherwise in the mirror image": seen.mirror[place],
    }
    return f"{prompts[place]}: {max(signs, key=lambda sign: signs[sign])}"


def features_of(predictor: Predictor, dataset: Dataset) -> list[Array]:
    """Return the features of labelled images; those that cannot be read are left out."""
    found = []
    for image in dataset.images:
        try:
            opened = open_image(image.path, predictor.levels or image.levels)
        except ImageError:
            continue
        with torch.inference_mode():
            (encoded,) = predictor.encode([predictor.prepare(opened)])
            found.append(_feature(encoded.features[-1]))
    return found


def _feature(level: Tensor) -> Array:
    """Return the mean of a map (1, D, h, w) over its places, of length 1: (D,)."""
    mean = level[0].float().mean(dim=(1, 2)).double().cpu().numpy()
    return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12))
