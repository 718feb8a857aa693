"""The feature cache: outputs of frozen encoders, computed once and kept on disk.

Where neither the trunk nor the text encoder learns, an image that comes again gives the same
features: reading them takes milliseconds where computing them takes the most of a step.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from sam3.model.sam3_image import Sam3Image
from torch import Tensor, nn

from app.config.schema import Config, Resume
from app.datasets import sources
from app.datasets.build import Splits
from app.errors import UserError
from app.files import nearest_existing
from app.model.device import choose_device, choose_precision
from app.training import checkpoints
from app.training.store import Store, as_bytes, found_for, image_bytes
from app.training.teacher import teacher_size

log = logging.getLogger("app")
FOLDER = sources.DATA / "features"
ENCODERS = {"vision": "backbone.vision_backbone.trunk", "text": "backbone.language_backbone"}
PROMPTS = 512  # whose features stay in memory: 84 MB for sam3
VIEWS = 4  # augmented views of each image, where features are cached and no number was given


def decide_feature_cache(
    config: Config, splits: Splits, resume: Resume | None, model: Sam3Image
) -> Config:
    """Return the configuration with `training.cache_features` and `dataset.views` decided.

    A resumed run keeps the choice in its checkpoint, because it changes the training data.

    Args:
        model: on the meta device, as `method.on_meta` makes it.

    Raises:
        UserError: features do not fit on the disk, and were asked for.
    """
    training, folder = config.training, Path(config.output_dir)
    cache, views = training.cache_features, config.dataset.views
    newest = None
    if resume in ("all", "auto"):
        newest = checkpoints.find_newest(folder / "checkpoints")
    if newest is not None and cache == "auto":
        then = checkpoints.read(newest)[1]
        cache, views = then["training.cache_features"], then["dataset.views"]
    elif newest is None and cache:
        cache = _has_room(config, splits, model)
    if cache and views is None:
        views = VIEWS
    return config.model_copy(
        update={
            "training": training.model_copy(update={"cache_features": cache}),
            "dataset": config.dataset.model_copy(update={"views": views}),
        }
    )


DECIDED = ("training.cache_features", "dataset.views")  # by `decide_feature_cache`


def _has_room(config: Config, splits: Splits, model: Sam3Image) -> bool:
    """Return whether a frozen trunk's features fit on their disk, beside the run's own files."""
    precision = choose_precision(
        config.training.precision, choose_device(config.training.device), config.model
    )
    needed = cache_bytes(config, splits, model, precision)
    FOLDER.mkdir(parents=True, exist_ok=True)
    output = nearest_existing(Path(config.output_dir))
    same_disk = output.stat().st_dev == FOLDER.stat().st_dev
    own = sum(checkpoints.run_bytes(config, model)) if same_disk else 0
    try:
        check_space(FOLDER, needed, beside=own)
    except UserError as error:
        if config.training.cache_features is True:
            raise
        log.info("note: features are not cached: %s", error)
        return False
    return needed > 0


def cached_encoders(config: Config, model: Sam3Image) -> list[str]:
    """Return the frozen encoders whose features are cached: none unless the trunk is frozen."""
    frozen = frozen_encoders(model)
    return frozen if config.training.cache_features and "vision" in frozen else []


def cache_bytes(config: Config, splits: Splits, model: Sam3Image, precision: torch.dtype) -> int:
    """Return the bytes that the cache needs: views x images x bytes an image.

    It is 0 where no trunk is frozen and there is no teacher.
    """
    if not config.training.cache_features:
        return 0
    views = min(config.dataset.views or VIEWS, config.training.epochs)
    training_views = len(splits.train.images) * views
    total = 0
    if cached_encoders(config, model):
        images = training_views + len(splits.valid.images)
        total += images * image_bytes(config.model, precision)
    if (teacher := teacher_size(config)) is not None:
        total += training_views * image_bytes(teacher, precision)
    return total


def frozen_encoders(model: Sam3Image) -> list[str]:
    """Return those of `ENCODERS` that are frozen."""
    return [
        name
        for name in ENCODERS
        if not any(p.requires_grad for p in _part(model, name).parameters())
    ]


def _part(model: Sam3Image, name: str) -> nn.Module:
    return model.get_submodule(ENCODERS[name])


def check_space(folder: Path, needed: int, *, beside: int = 0) -> None:
    """Refuse features that the disk cannot hold.

    Args:
        needed: bytes, of training images times their views, and of validation images.
        beside: bytes that other files of the run will take of the same disk.

    Raises:
        UserError: says what is needed, what is free, and what to change.
    """
    free = max(0, shutil.disk_usage(folder).free - beside)
    if needed > free:
        raise UserError(
            f"training.cache_features: images' features take {needed / 1e9:.1f} GB in {folder}, "
            f"where {free / 1e9:.1f} GB are free. Fewer dataset.views, --limit, or "
            "training.cache_features=false"
        )


def cache_encoders(
    model: Sam3Image, encoders: Collection[str], folder: Path, dtype: torch.dtype
) -> list[Store]:
    """Let encoders of `model` return features from disk where the same input came before.

    A key is the hash of an encoder's weights and of its whole input, in a folder of the precision,
    so that other weights, images, augmentations, sizes or precisions never meet. The first call
    returns the stored (rounded) value too, so every epoch sees identical features.

    The encoders' `forward` is replaced, because a wrapping module would rename their parameters.

    Args:
        encoders: frozen ones of `ENCODERS`.

    Returns:
        The stores of images' features, for `Batches` to read.
    """
    images = []
    ways: dict[str, Callable[[nn.Module, Store], None]]
    ways = {"vision": _cache_trunk, "text": _cache_text}
    for name in encoders:
        part = _part(model, name)
        precision = str(dtype).removeprefix("torch.")
        store = Store(folder / f"{_digest(part)}-{precision}", dtype)
        ways[name](part, store)
        images += [store] * (name == "vision")
    return images


def cache_prompts(model: Sam3Image, encoders: Collection[str]) -> None:
    """Keep what a frozen text encoder makes of each prompt, as it is, in the device's memory.

    Every step asks the same prompts or many of them, and each new one costs 600 operations at full
    size. Where features are cached on disk, `cache_encoders` has done so already.

    Args:
        encoders: frozen ones of `ENCODERS`.
    """
    text = _part(model, "text")
    if "text" in encoders and "forward" not in vars(text):
        _cache_text(text)


def _cache_trunk(trunk: nn.Module, store: Store) -> None:
    compute = trunk.forward

    def forward(pixels: Tensor) -> list[Tensor]:
        """Map (B, 3, R, R) to [(B, d, g, g)], the last block's output: all that the neck reads."""
        found = found_for(pixels)
        stored = [
            each.features[store.name] if store.name in each.features else store.load(each.key)
            for each in found
        ]
        missing = [index for index, features in enumerate(stored) if features is None]
        if missing:
            with torch.no_grad():
                computed = compute(pixels[missing])[-1]
            for index, features in zip(missing, computed, strict=True):
                stored[index] = store.write(found[index].key, {"features": features})
        maps = [features["features"] for features in stored if features is not None]  # (d, g, g)
        return [torch.stack([each.to(pixels.device).float() for each in maps])]

    trunk.forward = forward


def _cache_text(text: nn.Module, store: Store | None = None) -> None:
    """Let a text encoder return the features of then where a prompt comes again.

    Each prompt is encoded by itself: among others it may be rounded otherwise, and a run that is
    resumed meets other ones beside it.
    """
    compute, cached = text.forward, dict[str, dict[str, Tensor]]()
    names = ("mask", "memory", "embeds")
    batch_axis = (0, 1, 1)

    def encode(caption: str, device: Any) -> dict[str, Tensor]:
        key = hashlib.sha256(caption.encode()).hexdigest()
        outputs = None if store is None else store.read(key)
        if outputs is None:
            with torch.no_grad():
                computed = compute([caption], device=device)
            outputs = dict(zip(names, computed, strict=True))
            if store is not None:
                outputs = store.write(key, outputs)
        return {name: value.to(device) for name, value in outputs.items()}

    def forward(
        captions: Sequence[str],
        input_boxes: Any = None,  # noqa: ARG001
        device: Any = None,
    ) -> tuple[Tensor, ...]:
        """Map N captions to padding (N, L), features (L, N, d) and embeddings (L, N, w)."""
        unseen = [caption for caption in dict.fromkeys(captions) if caption not in cached]
        if len(cached) + len(unseen) > PROMPTS:
            cached.clear()
        for caption in captions:
            if caption not in cached:
                cached[caption] = encode(caption, device)
        return tuple(
            torch.cat([cached[caption][name] for caption in captions], dim=axis)
            for name, axis in zip(names, batch_axis, strict=True)
        )

    text.forward = forward


def _digest(part: nn.Module) -> str:
    """Return the hash of the names, shapes and values of weights and buffers."""
    total = hashlib.sha256(str(part).encode())
    for name, value in part.state_dict().items():
        total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        total.update(as_bytes(value))
    return total.hexdigest()[:32]
