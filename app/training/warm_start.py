"""A start for a SAM 3 without pretrained weights: pixels and words are told apart first.

From random weights the detector has nothing to attend to and learns for thousands of steps that
everything looks alike; after some minutes of classifying pixels its trunk has features, and its
text encoder puts each class where the pixels of that class are.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from sam3.model.sam3_image import Sam3Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR

from app.config import ModelConfig, WarmStartConfig
from app.datasets.coco import Dataset, Image
from app.datasets.images import open_image
from app.progress import progress

log = logging.getLogger("app")
ENCODED = 2  # the level of the neck that the detector's encoder reads: one cell a patch
ANCHOR_SIDE = 0.25  # of the image: width and height of the first boxes
Floats = NDArray[np.float32]


def warm_start(
    model: Sam3Image, size: ModelConfig, dataset: Dataset, config: WarmStartConfig, seed: int
) -> float:
    """Train trunk and text encoder to classify pixels, with heads that are then dropped.

    A cell (patch) has two targets: the share of it that each class covers, and which of its pixels
    are covered at all. A linear head tells both from the trunk; and the share is told a second time
    by how near a class's words are to the cell, as SigLIP has it (arXiv 2303.15343, equation 1).
    The decoder's anchors are laid on a grid.

    Args:
        model: trained in place, on its own device.
        size: of the model.
        dataset: to train on; objects without a mask count as ground.

    Returns:
        Share of the pixels of the last batch of which it is told right whether they are covered.
    """
    lay_anchors(model.transformer.decoder.reference_points.weight)
    vision, names = model.backbone.train().vision_backbone, dataset.class_names
    classes, cell = len(names), size.vision.patch_size**2
    device = next(model.parameters()).device
    head = nn.Conv2d(size.vision.embed_dim, classes + cell, 1).to(device)
    scale, bias = (nn.Parameter(torch.tensor(x, device=device)) for x in (math.log(10), -5.0))
    trained = [vision.trunk, vision.convs[ENCODED], model.backbone.language_backbone, head]
    parameters = [scale, bias, *(p for part in trained for p in part.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, fused=True)
    scheduler = LinearLR(optimizer, 1.0, 0.05, total_iters=config.steps)
    right = named = 0.0
    with progress("warm start: step", config.steps) as advance:
        for step, batch in enumerate(batches(dataset, size, config, seed), 1):
            pixels, shares, covered = (tensor.to(device) for tensor in batch)
            features = vision.trunk(pixels)[-1]
            scores = head(features.float())  # (B, classes + cell, g, g)
            nearness = _nearness(model, vision.convs[ENCODED](features), names)
            loss = F.binary_cross_entropy_with_logits(scores[:, classes:], covered)
            for told in (scores[:, :classes], nearness * scale.exp() + bias):
                # Few of many classes are in a cell: summed, they weigh as much as its pixels do.
                loss = loss + classes * F.binary_cross_entropy_with_logits(told, shares)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            right = float(((scores[:, classes:] > 0) == (covered > 0.5)).float().mean())
            named = _named_right(nearness, shares)
            advance(step, f"loss {loss.item():.3g}, pixels right {right:.1%}, names {named:.1%}")
    log.info(
        "warm start: %d steps; ground told from objects at %.1f %% of pixels, objects named right "
        "in %.1f %% of cells",
        *(step, 100 * right, 100 * named),
    )
    return right


def _named_right(nearness: Tensor, shares: Tensor) -> float:
    """Of the cells that lie in an object, how many are nearest to a name of its."""
    top = shares.gather(1, nearness.argmax(dim=1, keepdim=True))[:, 0]  # (B, g, g)
    inside = shares.amax(dim=1) > 0.8
    return float((top > 0.8)[inside].float().mean()) if inside.any() else 0.0


def _nearness(model: Sam3Image, cells: Tensor, names: list[str]) -> Tensor:
    """(B, classes, g, g): cosines of cells (B, d, g, g) and names, each the mean of its tokens."""
    text = model.backbone.forward_text(names, device=cells.device)
    tokens = text["language_features"]  # (L, classes, d)
    inside = (~text["language_mask"]).T[..., None]  # (L, classes, 1)
    pooled = (tokens * inside).sum(dim=0) / inside.sum(dim=0)
    return torch.einsum("bdhw,kd->bkhw", F.normalize(cells, dim=1), F.normalize(pooled, dim=1))


@torch.no_grad()
def lay_anchors(reference_points: Tensor) -> None:
    """Set the decoder's anchors, (Q, 4) cxcywh before the sigmoid, to a grid over the image."""
    queries = len(reference_points)
    columns = math.ceil(math.sqrt(queries))
    rows = math.ceil(queries / columns)
    index = torch.arange(queries)
    x, y = (index % columns + 0.5) / columns, (index // columns + 0.5) / rows
    side = torch.full((queries,), ANCHOR_SIDE)
    reference_points.copy_(torch.stack([x, y, side, side], dim=1).logit())


def batches(
    dataset: Dataset, size: ModelConfig, config: WarmStartConfig, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """`config.steps` batches of images, each mirrored at random, in an order that the seed decides.

    Yields:
        Pixels (B, 3, R, R) float32 in -1..1; shares (B, classes, g, g) float32 in 0..1, of each
        cell, and covered (B, patch², g, g) float32, 0 or 1, of each of its pixels.
    """
    order = random.Random(f"warm start/{seed}")
    for _ in range(config.steps):
        images = order.choices(dataset.images, k=config.batch_size)
        arrays = [_load(dataset, image, size, order) for image in images]
        pixels, shares, covered = (
            torch.from_numpy(np.stack(parts)) for parts in zip(*arrays, strict=True)
        )
        yield pixels, shares, F.pixel_unshuffle(covered[:, None], size.vision.patch_size)


def _load(dataset: Dataset, image: Image, size: ModelConfig, order: random.Random) -> list[Floats]:
    """Pixels (3, R, R), shares (classes, g, g) and covered (R, R) of one image."""
    side, cells = size.resolution, size.resolution // size.vision.patch_size
    rgb = np.asarray(open_image(image.path).resize((side, side)), np.float32)
    shares = np.zeros((len(dataset.categories), cells, cells), np.float32)
    covered = np.zeros((image.height, image.width), np.uint8)
    rows = {category.id: row for row, category in enumerate(dataset.categories)}
    for annotation in dataset.annotations_by_image[image.id]:
        if annotation.segmentation is not None:
            mask = coco_mask.decode(annotation.segmentation)
            covered |= mask
            share = cv2.resize(
                mask.astype(np.float32), (cells, cells), interpolation=cv2.INTER_AREA
            )
            row = shares[rows[annotation.category_id]]
            np.minimum(row + share, 1, out=row)
    whole = cv2.resize(covered, (side, side), interpolation=cv2.INTER_NEAREST).astype(np.float32)
    arrays = [(rgb / 127.5 - 1).transpose(2, 0, 1), shares, whole]
    for axis in (-1, -2):
        if order.random() < 0.5:
            arrays = [np.flip(array, axis) for array in arrays]
    return [np.ascontiguousarray(array) for array in arrays]
