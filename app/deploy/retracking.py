"""Teach the tracker's neck to give from a tuned trunk what it gave from the base's.

Detector and tracker share the trunk: the tracker reads what its own convolutions make of it
(necks.py:98-121). Where the trunk was tuned, they get other features than they were trained on.
Here they alone learn, on images without labels, and the base's trunk and neck teach them.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from app.compression.distillation import distance
from app.config.compose import load_model_config
from app.console import progress
from app.datasets.images import ImageError, open_image
from app.datasets.square import to_square
from app.deploy.base_file import NECK, Base, find_base
from app.deploy.upstream_proof import neck_level, trunk_state
from app.errors import UserError
from app.files import atomic_path, exists_problem, hash_file
from app.inference.predictor import normalise
from app.model import published, weights
from app.model.device import choose_device, choose_threads

log = logging.getLogger("app")
HELD_OUT = 5  # one image of so many is not learned from, and measured on
LEARNING_RATE = 3e-4
LOOKS = 10  # times that it is measured, of which the best is kept


@dataclass(frozen=True)
class Retracked:
    """Hold what came of it.

    Attributes:
        file: of the neck, which exports of these weights take.
        before, after: least cosine of a level's features, on an image that was not learned from,
            with those of the base's trunk.
    """

    file: Path
    before: float
    after: float


def retrack(
    path: Path,
    images: Sequence[Path],
    *,
    base_file: Path | None = None,
    updates: int = 300,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> Retracked:
    """Write the tracker's neck for tuned weights beside them.

    Args:
        path: weights whose trunk was tuned.
        images: files without labels, two or more; of films that are to be followed, at best.
        base_file: the published file that they began as, where they do not tell where it is.
        updates: of an image each.
        seed: of the order of the images.

    Raises:
        UserError: no base, a trunk that is the base's, too few images, a neck that is there.
    """
    source = weights.find_file(path)
    file = source.parent / NECK
    if file.exists() and not overwrite:
        raise UserError(exists_problem(source.parent, f"holds {NECK} already", option="WEIGHTS"))
    base = find_base(source, base_file, own_neck=False)
    if base is None or base.origin.layout == "transformers":
        raise UserError(
            f"{path}: nothing says which of Meta's files these weights began as, and the tracker's "
            "neck is in that alone. Name it: --base sam3.pt"
        )
    opened, target = _open(images), choose_device(device)
    resolution = load_model_config(weights.describe(path).model.name).resolution  # the tracker's
    model, config = weights.load(path, resolution=resolution, merge=True)
    choose_threads(target, config.model)
    vision: Any = model.backbone.vision_backbone.to(target).eval()
    pixels = [normalise(to_square(image, resolution).to(target)) for image in opened]
    pairs = _features(vision.trunk, base, pixels)
    if all(torch.equal(tuned, before) for tuned, before in pairs):
        raise UserError(f"{path}: the trunk is the base's: the tracker sees what it was trained on")
    necks = _necks(vision.convs, base)
    frozen = copy.deepcopy(necks).requires_grad_(False)
    held_out, learned = pairs[::HELD_OUT], [p for n, p in enumerate(pairs) if n % HELD_OUT]
    before = _least_cosine(necks, frozen, held_out)
    after, state = before, copy.deepcopy(necks.state_dict())
    for done in _learn(necks, frozen, learned, updates, random.Random(seed)):
        if done % max(updates // LOOKS, 1) == 0 or done == updates:
            now = _least_cosine(necks, frozen, held_out)
            if now > after:
                after, state = now, copy.deepcopy(necks.state_dict())
    log.info(
        "the tracker's features have a cosine of %.4f with those that it was trained on, %.4f "
        "before (least of %d images that were not learned from)",
        *(after, before, len(held_out)),
    )
    named = {key.replace("|", "."): v.cpu().contiguous() for key, v in state.items()}
    notes = {"weights": hash_file(source), "base": base.origin.sha256}
    with atomic_path(file) as temporary:
        save_file(named, temporary, {"format": "pt", **notes})
    log.info("neck: %s; export --format sam3 and hf --video of these weights take it", file)
    return Retracked(file, before, after)


def _open(images: Sequence[Path]) -> list[Any]:
    opened = []
    for path in images:
        try:
            opened.append(open_image(path))
        except ImageError as error:
            log.warning("left out: %s", error)
    if len(opened) < 2:
        raise UserError(
            "--images: give two images or more; 30 of what is to be followed are better"
        )
    return opened


@torch.inference_mode()
def _features(
    trunk: nn.Module, base: Base, pixels: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return what a tuned trunk, and then the base's in its place, make of each image.

    Args:
        pixels: (1, 3, R, R) each.

    Returns:
        Two maps (1, d, h, w) of each image.
    """
    tuned = [trunk(each)[-1].clone() for each in pixels]
    trunk.load_state_dict(trunk_state(base), strict=False)
    return [(one, trunk(each)[-1].clone()) for one, each in zip(tuned, pixels, strict=True)]


def _necks(convs: nn.ModuleList, base: Base) -> nn.ModuleDict:
    """Return the base's convolutions by how their keys begin, a level each, to be trained.

    Args:
        convs: of the detector's neck, which has the same levels.
    """
    starts = [
        f"{n}{level}." for n in published.tracker_neck(base.release) for level in range(len(convs))
    ]
    necks = {
        start.removesuffix(".").replace(".", "|"): neck_level(like, base.tensors, start)
        for start, like in zip(starts, [*convs] * len(starts), strict=False)
        if any(key.startswith(start) for key in base.tensors)
    }
    return nn.ModuleDict(necks).requires_grad_(True)


def _learn(
    necks: nn.ModuleDict,
    frozen: nn.ModuleDict,
    pairs: Sequence[tuple[Tensor, Tensor]],
    updates: int,
    chance: random.Random,
) -> Iterator[int]:
    """Yield how many updates are done, after each of them."""
    optimizer = torch.optim.AdamW(necks.parameters(), LEARNING_RATE, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, updates)
    with progress("updates", updates) as advance:
        for update in range(1, updates + 1):
            tuned, before = (each.clone() for each in chance.choice(pairs))
            losses = []
            for name, convs in necks.items():
                with torch.no_grad():
                    target = frozen[name](before)
                losses.append(distance(convs(tuned), target))
            loss = torch.stack(losses).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            advance(update, f"loss {loss.item():.4f}")
            yield update


@torch.no_grad()
def _least_cosine(
    necks: nn.ModuleDict,
    frozen: nn.ModuleDict,
    pairs: Sequence[tuple[Tensor, Tensor]],
) -> float:
    """Return the least cosine of a level's features of an image."""
    return min(
        float(F.cosine_similarity(convs(a).flatten(), frozen[name](b).flatten(), dim=0))
        for name, convs in necks.items()
        for a, b in pairs
    )
