"""Features of frozen encoders, computed once and kept on disk.

Where neither the trunk nor the text encoder learns, an image that comes again gives the same
features: reading them takes milliseconds where computing them takes the most of a step.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sam3.model.sam3_image import Sam3Image
from torch import Tensor, nn

from app.config.schema import ModelConfig
from app.errors import UserError
from app.files import atomic_path

log = logging.getLogger("app")
ENCODERS = {"vision": "backbone.vision_backbone.trunk", "text": "backbone.language_backbone"}

VIEWS = 4  # of each image, where their features are kept and no number was given


class Store:
    """Tensors by key, each in a file of its own, written whole or not at all.

    Args:
        folder: made where it is missing.
        dtype: that features are kept in; bfloat16 halves them.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self._is_full = False

    def read(self, key: str) -> dict[str, Tensor] | None:
        """What was written under the key, in float32 where it is floating; None where nothing."""
        try:
            found = load_file(self._file(key))
        except (OSError, SafetensorError):
            return None
        return _in_float32(found)

    def write(self, key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep tensors under a key; returns them as `read` will.

        Where the disk takes no more they are not kept: the next one who asks computes them.
        """
        kept = {
            name: (value.to(self.dtype) if value.is_floating_point() else value).cpu().contiguous()
            for name, value in tensors.items()
        }
        file = self._file(key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(file) as temporary:
                save_file(kept, temporary)
        except (OSError, SafetensorError) as error:
            if not self._is_full:
                log.warning("note: features are no longer kept in %s (%s)", self.folder, error)
            self._is_full = True
        return _in_float32(kept)

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _in_float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.float() if v.is_floating_point() else v for n, v in tensors.items()}


def frozen_encoders(model: Sam3Image) -> list[str]:
    """Which of `ENCODERS` learn nothing."""
    return [
        name
        for name in ENCODERS
        if not any(p.requires_grad for p in _part(model, name).parameters())
    ]


def _part(model: Sam3Image, name: str) -> nn.Module:
    return model.get_submodule(ENCODERS[name])


def image_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """On disk, of one image's features: 10.6 MB for the full size in bfloat16."""
    side = config.resolution // config.vision.patch_size
    return int(side * side * config.vision.embed_dim * dtype.itemsize)


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


def keep(model: Sam3Image, encoders: Collection[str], folder: Path, dtype: torch.dtype) -> None:
    """Let encoders of `model` answer from disk what they were asked before.

    A key is the hash of an encoder's weights and of its whole input, in a folder of the precision,
    so that other weights, images, augmentations, sizes or precisions never meet. What is kept is
    what is answered, the first time as well.

    Args:
        encoders: of `ENCODERS`, those that learn nothing.
    """
    ways = {"vision": _keep_trunk, "text": _keep_text}
    for name in encoders:
        part = _part(model, name)
        precision = str(dtype).removeprefix("torch.")
        ways[name](part, Store(folder / f"{_digest(part)}-{precision}", dtype))


def _keep_trunk(trunk: nn.Module, store: Store) -> None:
    compute = trunk.forward

    def forward(pixels: Tensor) -> list[Tensor]:
        """(B, 3, R, R) → [(B, d, g, g)], the last block's output: all that the neck reads."""
        keys = [hashlib.sha256(_bytes(image)).hexdigest() for image in pixels]
        found = [store.read(key) for key in keys]
        missing = [index for index, features in enumerate(found) if features is None]
        if missing:
            with torch.no_grad():
                computed = compute(pixels[missing])[-1]
            for index, features in zip(missing, computed, strict=True):
                found[index] = store.write(keys[index], {"features": features})
        return [_stack(found, "features").to(pixels.device)]

    trunk.forward = forward


def _keep_text(text: nn.Module, store: Store) -> None:
    compute, known = text.forward, dict[str, dict[str, Tensor]]()
    names = ("mask", "memory", "embeds")
    batch_axis = (0, 1, 1)

    def forward(
        captions: Sequence[str], input_boxes: Any = None, device: Any = None
    ) -> tuple[Tensor, ...]:
        """N captions → padding (N, L), features (L, N, d), embeddings (L, N, w)."""
        for caption in dict.fromkeys(captions):
            if caption not in known:
                key = hashlib.sha256(caption.encode()).hexdigest()
                found = store.read(key)
                if found is None:
                    with torch.no_grad():
                        outputs = compute([caption], input_boxes, device=device)
                    found = store.write(key, dict(zip(names, outputs, strict=True)))
                known[caption] = {name: value.to(device) for name, value in found.items()}
        return tuple(
            torch.cat([known[caption][name] for caption in captions], dim=axis)
            for name, axis in zip(names, batch_axis, strict=True)
        )

    text.forward = forward


def _stack(found: Sequence[dict[str, Tensor] | None], name: str) -> Tensor:
    return torch.stack([features[name] for features in found if features is not None])


def _digest(part: nn.Module) -> str:
    """Of its weights' and buffers' names, shapes and values."""
    total = hashlib.sha256(str(part).encode())
    for name, value in part.state_dict().items():
        total.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        total.update(_bytes(value))
    return total.hexdigest()[:32]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes()
