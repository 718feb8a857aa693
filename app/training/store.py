"""What the feature cache keeps on disk: tensors by key, and how images are known by theirs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.config.schema import ModelConfig
from app.datasets.augment import Changes
from app.files import atomic_path

log = logging.getLogger("app")


class Store:
    """Keep tensors by key, each in a file of its own, written whole or not at all.

    Args:
        folder: made where it is missing.
        dtype: that features are kept in; bfloat16 halves them.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self._is_full = False

    def load(self, key: str) -> dict[str, Tensor] | None:
        """Return what was written under the key, as it is on disk; None without."""
        try:
            return load_file(self._file(key))
        except (OSError, SafetensorError):
            return None

    def read(self, key: str) -> dict[str, Tensor] | None:
        """Return what was written under the key, floating values in float32; None without."""
        tensors = self.load(key)
        return None if tensors is None else _in_float32(tensors)

    def write(self, key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep tensors under a key; return them as `read` will.

        On a full disk they are not kept, and are computed again when they are asked for.
        """
        stored = {
            name: (value.to(self.dtype) if value.is_floating_point() else value).cpu().contiguous()
            for name, value in tensors.items()
        }
        file = self._file(key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(file) as temporary:
                save_file(stored, temporary)
        except (OSError, SafetensorError) as error:
            if not self._is_full:
                log.warning("note: features are no longer cached in %s (%s)", self.folder, error)
            self._is_full = True
        return _in_float32(stored)

    @property
    def name(self) -> str:
        """Return the folder's name, which tells whose features these are, and in which dtype."""
        return self.folder.name

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _in_float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v.float() if v.is_floating_point() else v for n, v in tensors.items()}


@dataclass
class Found:
    """What is on disk of an image's features.

    The processes that load images look for it, and it travels with the pixels.

    Attributes:
        key: of the image.
        features: by the name of a store that was looked into, its tensors; None without.
    """

    key: str
    features: dict[str, dict[str, Tensor] | None]


def find(pixels: Tensor, changes: Changes, stores: Sequence[Store]) -> Found:
    """Look for the features of an image (3, R, R) uint8, of which colors are to be changed."""
    key = _key(pixels, str(changes))
    return Found(key, {store.name: store.load(key) for store in stores})


def found_for(pixels: Any) -> list[Found]:
    """Return what was noted at images (B, 3, R, R); others are known by their numbers alone."""
    noted: list[Found] = getattr(pixels, "found", [])
    return noted or [Found(_key(image), {}) for image in pixels]


def note_found(pixels: Any, found: Sequence[Found | None]) -> None:
    """Note at images (B, 3, R, R), or at others made of them, what was found."""
    if all(found):
        pixels.found = found


def _key(pixels: Tensor, more: str = "") -> str:
    return hashlib.sha256(as_bytes(pixels) + more.encode()).hexdigest()


def as_bytes(tensor: Tensor) -> bytes:
    """Return a tensor's values as they are in memory."""
    return tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes()


def image_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes on disk of one image's features: 10.6 MB for sam3 in bfloat16."""
    side = config.resolution // config.vision.patch_size
    return int(side * side * config.vision.embed_dim * dtype.itemsize)
