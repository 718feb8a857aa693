"""Meta's published files, `sam3.pt` and `sam3.1_multiplex.pt`: what of them the image model has.

Both hold a detector, which is the image model, beside the tracker of videos. SAM 3.1's neck has
three sets of convolutions, one for the detector and two for its tracker, and leaves out the level
that the detector drops.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from app.model.upstream import fixes, pin

PREFIX = "detector."
TRACKER = "tracker."
_NECK = "backbone.vision_backbone."
# Convolutions of the neck that the tracker sees the trunk through, by release.
TRACKER_NECKS = {"3.0": ("sam2_convs",), "3.1": ("interactive_convs", "propagation_convs")}
_BESIDE = tuple(f"{_NECK}{name}." for names in TRACKER_NECKS.values() for name in names)
# RoPE tables are persistent buffers upstream (vitdet.py:457); they follow from the resolution and
# are computed when the model is built, so they are neither saved nor loaded.
COMPUTED = (".freqs_cis", ".freqs_cis_real", ".freqs_cis_imag")
# The level of the neck that upstream computes and drops (model_builder.py, scalp=1).
DROPPED = f"{_NECK}convs.3."
_LAST = f"{_NECK}convs.2."  # of the same shapes

Release = Literal["3.0", "3.1"]


def is_layout(keys: Iterable[str]) -> bool:
    """Return whether keys are of a published file, or of one written in its layout."""
    return any(key.startswith(PREFIX) for key in keys)


def release(keys: Iterable[str]) -> Release | None:
    """Return which SAM 3 a published file holds; None where it has no tracker, so that none says.

    SAM 3.1 is told by the second neck of its tracker.
    """
    names = list(keys)
    if any(key.startswith(tracker_neck("3.1")) for key in names):
        return "3.1"
    if any(key.startswith((TRACKER, *tracker_neck("3.0"))) for key in names):
        return "3.0"
    return None


def tracker_neck(version: Release) -> tuple[str, ...]:
    """Return how the keys of the tracker's neck begin in a published file."""
    return tuple(f"{PREFIX}{_NECK}{name}." for name in TRACKER_NECKS[version])


def video_part() -> dict[str, Tensor]:
    """Return what upstream's strict video builder asks of a file beside the image model.

    Returns:
        Names → tensors on the meta device: the tracker, its neck, and RoPE tables.
    """
    from sam3 import model_builder  # takes a second to import

    with fixes.using_builders(on_meta=True):
        model = model_builder.build_sam3_video_model(
            bpe_path=str(pin.bpe_path()), load_from_HF=False, device="meta"
        )
    return {key: value for key, value in model.state_dict().items() if image_name(key) is None}


def image_name(key: str) -> str | None:
    """Return the image model's name of a published file's tensor; None of what it has not."""
    name = key.removeprefix(PREFIX)
    if name == key or name.startswith(_BESIDE) or name.endswith(COMPUTED):
        return None
    return name


def image_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the image model's tensors of a published file, by its names.

    What SAM 3.1 leaves out comes as zeros: nothing reads it. A key of no known part keeps its name,
    so that whoever compares keys with the model's names it.
    """
    part = {}
    for key, value in state.items():
        if (name := image_name(key)) is not None:
            part[name] = value
        elif not key.startswith((PREFIX, TRACKER)):
            part[key] = value
    if not any(name.startswith(DROPPED) for name in part):
        for name in [name for name in part if name.startswith(_LAST)]:
            part[name.replace(_LAST, DROPPED)] = torch.zeros_like(part[name])
    return part
