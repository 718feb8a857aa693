"""A start for a SAM 3 without pretrained weights: pixels and words are told apart first.

From random weights the detector has nothing to attend to and learns for thousands of steps that
everything looks alike; after some minutes of classifying pixels its trunk has features, its text
encoder puts each class where the pixels of that class are, and the encoder that joins both marks
the cells which a prompt means.
"""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from sam3.model.sam3_image import Sam3Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LinearLR

from app.config.schema import ModelConfig, WarmStartConfig
from app.console import progress
from app.datasets.coco import Dataset, Image
from app.datasets.images import open_image
from app.model.device import autocast

log = logging.getLogger("app")
ENCODED = 2  # the level of the neck that the detector's encoder reads: one cell a patch
ANCHOR_SIDE = 0.25  # of the image: width and height of the first boxes
LEAST_CELLS = 0.5  # of a class in an image, for the mean of its cells to be named
MEANT_WEIGHT = 5.0  # of what the encoder tells, beside the other losses
_SAYS = "pixels right {:.1%}, classes named right {:.1%}, prompted cells IoU {:.2f}"
Floats = NDArray[np.float32]


class Accuracy(NamedTuple):
    """Hold the shares of the last batch that were right, each 0..1."""

    pixels: float  # share of the pixels, classified as covered or not
    names: float  # share of the present classes nearer to their names than to absent ones
    prompts: float  # IoU of the cells that a prompt means


def warm_start(
    model: Sam3Image,
    size: ModelConfig,
    dataset: Dataset,
    config: WarmStartConfig,
    seed: int,
    precision: torch.dtype = torch.float32,
) -> Accuracy:
    """Train trunk and text encoder to classify pixels, with heads that are then dropped.

    A cell (patch) has two targets: the share of it that each class covers, and which of its pixels
    are covered at all. A linear head tells both from the trunk; and the share is told a second time
    by how near a class's words are to the cell, as SigLIP has it (arXiv 2303.15343, equation 1),
    and to the mean of a class's cells, which tells shapes apart long before a cell alone does.
    The encoder tells it once more, prompted with one class that the image has and one that it
    lacks. The decoder's anchors are laid on a grid.

    Args:
        model: trained in place, on its own device.
        size: of the model.
        dataset: to train on; objects without a mask count as ground.
    """
    lay_anchors(model.transformer.decoder.reference_points.weight)
    vision, names = model.backbone.train().vision_backbone, dataset.class_names
    classes, cell = len(names), size.vision.patch_size**2
    device = next(model.parameters()).device
    head = nn.Conv2d(size.vision.embed_dim, classes + cell, 1).to(device)
    meant_head = nn.Linear(size.d_model, 1).to(device)
    scale, bias = (nn.Parameter(torch.tensor(x, device=device)) for x in (math.log(10), -5.0))
    trained = [vision.trunk, vision.convs[ENCODED], model.backbone.language_backbone, head]
    trained += [model.geometry_encoder, model.transformer.encoder, meant_head]
    parameters = [scale, bias, *(p for part in trained for p in part.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, fused=True)
    scheduler = LinearLR(optimizer, 1.0, 0.05, total_iters=config.steps)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    right = Accuracy(0.0, 0.0, 0.0)
    with progress("warm start: step", config.steps) as advance:
        for step, batch in enumerate(batches(dataset, size, config, seed), 1):
            pixels, shares, covered, prompted = (tensor.to(device) for tensor in batch)
            with autocast(device, precision):
                features = vision.trunk(pixels)[-1]
                cells = vision.convs[ENCODED](features)
                text = model.backbone.forward_text(names, device=device)
                encoded = _prompted(model, text, cells, prompted)
            features, cells, encoded = features.float(), cells.float(), encoded.float()
            words = _embeddings(text)
            means, present, truth = _class_means(cells, shares)
            scores = head(features)  # (B, classes + cell, g, g)
            nearness = torch.einsum("bdhw,kd->bkhw", F.normalize(cells, dim=1), words)
            named = F.normalize(means, dim=-1)[present] @ words.T  # (N, classes)
            marks = meant_head(encoded)[..., 0]  # (B, 2, g, g)
            meant = shares.gather(1, prompted[..., None, None].expand_as(marks))
            # Few of many classes are in a cell: summed, they weigh as much as its pixels do.
            loss = (
                _mean_loss(scores[:, classes:], covered)
                + classes * _mean_loss(scores[:, :classes], shares)
                + classes * _mean_loss(nearness * scale.exp() + bias, shares)
                + classes * _mean_loss(named * scale.exp() + bias, truth[present])
                + MEANT_WEIGHT * _mean_loss(marks, meant)
            )
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            right = Accuracy(
                float(((scores[:, classes:] > 0) == (covered > 0.5)).float().mean()),
                _named_right(named, truth, present),
                _overlap(marks > 0, meant > 0.5),
            )
            advance(step, f"loss {loss.item():.3g}, " + _SAYS.format(*right))
    log.info("warm start: %d steps; %s", step, _SAYS.format(*right))
    return right


def _class_means(cells: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return means of cells (B, d, g, g) over each class's shares (B, K, g, g).

    Returns:
        Means (B, K, d); which classes are present, (B, K) bool; and how much of a class's cells
        another class covers, (B, K, K) in 0..1: all of them for a class of the same objects.
    """
    weights = shares.sum(dim=(2, 3))
    means = torch.einsum("bkhw,bdhw->bkd", shares, cells) / weights.clamp(min=1e-6)[..., None]
    common = torch.einsum("bkhw,bjhw->bkj", shares, shares)
    own = common.diagonal(dim1=1, dim2=2).clamp(min=1e-6)[..., None]
    return means, weights > LEAST_CELLS, (common / own).clamp(max=1)


def _mean_loss(scores: Tensor, truth: Tensor) -> Tensor:
    """Return the mean binary cross-entropy; 0 of empty tensors."""
    total = F.binary_cross_entropy_with_logits(scores, truth, reduction="sum")
    return total / max(scores.numel(), 1)


def _named_right(named: Tensor, truth: Tensor, present: Tensor) -> float:
    """Return the share of the N present classes nearer to their names than to any absent one.

    Args:
        named: (N, K) nearness.
        truth, present: what `_class_means` returned.
    """
    index = present.nonzero()
    if not len(index):
        return 0.0
    own = named.gather(1, index[:, 1:])[:, 0]
    absent = (truth.diagonal(dim1=1, dim2=2) == 0)[index[:, 0]]  # (N, K): not in that image at all
    return float((own > named.masked_fill(~absent, -2).amax(dim=1)).float().mean())


def _overlap(predicted: Tensor, truth: Tensor) -> float:
    """Return the IoU of all cells of a batch together."""
    return float((predicted & truth).sum() / (predicted | truth).sum().clamp(min=1))


def _embeddings(text: dict[str, Tensor]) -> Tensor:
    """Return (classes, d) of length 1: the mean of each name's tokens."""
    tokens = text["language_features"].float()  # (L, classes, d)
    inside = (~text["language_mask"]).T[..., None]  # (L, classes, 1)
    return F.normalize((tokens * inside).sum(dim=0) / inside.sum(dim=0), dim=1)


def _prompted(model: Sam3Image, text: dict[str, Tensor], cells: Tensor, prompted: Tensor) -> Tensor:
    """Return (B, K, g, g, d): cells (B, d, g, g) encoded with each of the classes `prompted`.

    Args:
        prompted: (B, K) int64.
    """
    (batch, each), side = prompted.shape, cells.shape[-1]
    images = torch.arange(batch, device=cells.device).repeat_interleave(each)
    queries = SimpleNamespace(img_ids=images, text_ids=prompted.flatten())
    position = model.backbone.vision_backbone.position_encoding(cells).to(cells.dtype)
    features = {**text, "backbone_fpn": [cells], "vision_pos_enc": [position]}
    no_boxes = model._get_dummy_prompt(batch * each)
    prompt, mask, features = model._encode_prompt(features, queries, no_boxes)
    _, encoded, _ = model._run_encoder(features, queries, prompt, mask)
    memory = encoded["encoder_hidden_states"]  # (g * g, B * K, d)
    return memory.transpose(0, 1).reshape(batch, each, side, side, -1)


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
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield `config.steps` batches of images, mirrored at random, in the order that the seed gives.

    Yields:
        Pixels (B, 3, R, R) float32 in -1..1; shares (B, classes, g, g) float32 in 0..1, of each
        cell, and covered (B, patch², g, g) float32, 0 or 1, of each of its pixels; prompted (B, 2)
        int64, a class that the image has and one that it lacks, as often as others have it.
    """
    order = random.Random(f"warm start/{seed}")
    rows = {category.id: row for row, category in enumerate(dataset.categories)}
    present = [
        {rows[a.category_id] for a in dataset.annotations_by_image[image.id]}
        for image in dataset.images
    ]
    images_with = Counter(row for has in present for row in has)
    for _ in range(config.steps):
        drawn = order.choices(range(len(present)), k=config.batch_size)
        arrays = [_load(dataset, dataset.images[index], size, order) for index in drawn]
        prompted = [_draw_prompts(present[index], images_with, order) for index in drawn]
        pixels, shares, covered = (
            torch.from_numpy(np.stack(parts)) for parts in zip(*arrays, strict=True)
        )
        whole = F.pixel_unshuffle(covered[:, None], size.vision.patch_size)
        yield pixels, shares, whole, torch.tensor(prompted)


def _draw_prompts(
    present: set[int], images_with: Counter[int], order: random.Random
) -> tuple[int, int]:
    """Return a class that is present and one that is not; any, where there is none such."""
    everything = sorted(images_with) or [0]
    absent = [row for row in everything if row not in present] or everything
    lacking = order.choices(absent, [images_with[row] or 1 for row in absent])[0]
    return order.choice(sorted(present) or everything), lacking


def _load(dataset: Dataset, image: Image, size: ModelConfig, order: random.Random) -> list[Floats]:
    """Return pixels (3, R, R), shares (classes, g, g) and covered (R, R) of one image."""
    side, cells = size.resolution, size.resolution // size.vision.patch_size
    rgb = np.asarray(open_image(image.path, image.levels).resize((side, side)), np.float32)
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
