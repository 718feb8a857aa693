"""State dicts of ours ↔ those of transformers' `Sam3Model`.

They hold the same tensors under other names, but for what the other side has no place for:
projections of point prompts, and the position of a class token that upstream drops as well
(vitdet.py:200). Neither is read by a prompt of words or boxes; both come back as zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from app.errors import UserError
from app.model.transformers.names import TO_OURS, TO_THEIRS, rename, rename_key
from app.model.weight_files import shards

# Of a published folder, which holds the detector beside the video's tracker (Sam3VideoModel).
DETECTOR = "detector_model."
TRACKER = ("tracker_model.", "tracker_neck.")
_POINTS = "geometry_encoder.points_"
_POSITIONS = "backbone.vision_backbone.trunk.pos_embed"  # (1, 1 + patches, width)
_PROJECTION = "backbone.language_backbone.encoder.text_projection"  # (width, 512); theirs turned


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict of ours to `Sam3Model`'s, of the same memory where that can be.

    Args:
        state: whole, without what is computed.

    Raises:
        KeyError: a key that no SAM 3 of ours has.
    """
    result = {}
    for key, value in state.items():
        if key.startswith(_POINTS):
            continue
        if key == _POSITIONS:
            value = value[:, 1:]
        elif key == _PROJECTION:
            value = value.T
        module, _, parameter = key.rpartition(".")
        packed = module.endswith(".qkv") or parameter.startswith("in_proj_")
        name = rename(module, TO_THEIRS) if packed else rename_key(key, TO_THEIRS)
        if name is None:
            raise KeyError(key)
        if packed:
            kind = parameter.removeprefix("in_proj_")
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                result[f"{name}.{letter}_proj.{kind}"] = part
        else:
            result[name] = value
    return {key: value.contiguous() for key, value in result.items()}


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert `Sam3Model`'s state dict, or a published one with a tracker, to ours.

    What has no name of ours, or parts that do not go together, keep their keys: the caller compares
    keys and shapes with the model's, and names those that do not fit.
    """
    detector = dict(_detector(state))
    result = {}
    for key in list(detector):
        match = re.fullmatch(r"(.+)\.q_proj\.(weight|bias)", key)
        module = rename(match[1], TO_OURS) if match else None
        if match and module:
            names = [f"{match[1]}.{letter}_proj.{match[2]}" for letter in "qkv"]
            parts = [detector[name] for name in names if name in detector]
            shapes = {part.shape for part in parts}
            if len(parts) == 3 and len(shapes) == 1 and parts[0].dim():
                joint = "." if module.endswith(".qkv") else ".in_proj_"
                result[f"{module}{joint}{match[2]}"] = torch.cat(parts)
                for name in names:
                    del detector[name]
    for key, value in detector.items():
        result[rename_key(key, TO_OURS) or key] = value
    return _complete(result)


def is_layout(keys: Iterable[str]) -> bool:
    """Return whether keys are of transformers' Sam3Model or Sam3VideoModel."""
    return any(key.startswith(("vision_encoder.", DETECTOR)) for key in keys)


def is_transformers(file: Path) -> bool:
    """Return whether a weights file has that layout; its folder has the size in `config.json`."""
    if file.suffix == ".json":
        return any(is_transformers(part) for part in shards(file))
    if file.suffix != ".safetensors":
        return False
    try:
        with safe_open(file, framework="pt") as content:
            return is_layout(content.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file, or cut short ({error})") from None


def _detector(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state.items():
        if not key.startswith(TRACKER):
            yield key.removeprefix(DETECTOR), value


def _complete(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add zeros for what the other side has no place for, if the shapes are as they ought to be."""
    positions, projection = state.get(_POSITIONS), state.get(_PROJECTION)
    if positions is not None and positions.dim() == 3:
        state[_POSITIONS] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    if projection is not None and projection.dim() == 2:
        state[_PROJECTION] = projection.T.contiguous()
    final = state.get("geometry_encoder.final_proj.weight")
    if final is not None and final.dim() == 2:
        width = len(final)
        for name, inputs in (("direct", 2), ("pool", width), ("pos_enc", width)):
            state[f"{_POINTS}{name}_project.weight"] = final.new_zeros(width, inputs)
            state[f"{_POINTS}{name}_project.bias"] = final.new_zeros(width)
    return state
