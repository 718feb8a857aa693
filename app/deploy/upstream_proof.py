"""Load what was exported by upstream's own builders, and compare it: tensors, answers, features."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sam3 import model_builder
from sam3.model.data_misc import interpolate
from sam3.model.sam3_image import Sam3Image
from sam3.model.sam3_image_processor import Sam3Processor
from torch import Tensor, nn
from torch.nn import functional as F

from app.datasets.square import to_square
from app.deploy.base_file import Base
from app.errors import UserError
from app.inference.predictor import Predictor, normalise, query_scores
from app.model import published, weights
from app.model.upstream import fixes, pin

# Largest differences between upstream's answers and the predictor's: boxes as shares of the image's
# side, masks as probabilities.
TOLERANCES = {"scores": 1e-5, "boxes": 1e-5, "masks": 1e-4}
SHOWN = 6  # problems
PART = 1 << 20  # numbers compared at once
Answers = list[dict[str, Tensor]]  # of each image


def check_tensors(file: Path, content: Mapping[str, Tensor]) -> None:
    """Raise UserError unless a file holds these tensors to the bit, and no others."""
    written = weights.read_tensors(file)
    wrong = sorted(written.keys() ^ content.keys())
    wrong += [
        key for key in content.keys() & written.keys() if not _same(content[key], written[key])
    ]
    if wrong:
        raise UserError(
            f"{file.name}: is not written: {wrong[0]}, of {len(wrong)} tensors, is not in the file "
            "as it was in memory. Look whether the disk is sound, and run the same command again."
        )


def is_built(content: Mapping[str, Tensor]) -> bool:
    """Return whether upstream's image builder makes a model of these tensors' names and shapes."""
    with fixes.using_builders(on_meta=True):
        model = model_builder.build_sam3_image_model(
            bpe_path=str(pin.bpe_path()), device="cpu", load_from_HF=False
        )
    part = published.image_part(content)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    return {key: value.shape for key, value in part.items()} == {
        key: shape for key, shape in expected.items() if not key.endswith(published.COMPUTED)
    }


def load_image_model(file: Path, content: Mapping[str, Tensor]) -> Sam3Image:
    """Return what upstream's `build_sam3_image_model` makes of a file, on a CPU.

    Raises:
        UserError: a tensor of that model is not the file's; its loader says so in a print alone.
    """
    with fixes.using_builders(), fixes.loading_mapped():
        model = model_builder.build_sam3_image_model(
            bpe_path=str(pin.bpe_path()),
            device="cpu",
            checkpoint_path=str(file),
            load_from_HF=False,
        )
    unread = [
        key
        for key, value in model.state_dict().items()
        if not _is_left_out(key, content) and not _is_read(content[published.PREFIX + key], value)
    ]
    if unread:
        raise UserError(
            f"{file.name}: is not written: upstream's build_sam3_image_model leaves {len(unread)} "
            f"tensors as they were made, first {unread[0]}"
        )
    return model


def load_video_model(file: Path) -> None:
    """Load a file by upstream's `build_sam3_video_model`, which is strict, without its memory.

    Raises:
        UserError: names or shapes that do not fit; names the first.
    """
    with fixes.using_builders(on_meta=True), fixes.loading_mapped():
        try:
            model_builder.build_sam3_video_model(
                str(file), bpe_path=str(pin.bpe_path()), load_from_HF=False, device="meta"
            )
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:]]
            problem = f"{file.name}: is not written: upstream's build_sam3_video_model refuses it:"
            raise UserError([problem, *(line[:500] for line in lines[:SHOWN])]) from None


def our_answers(predictor: Predictor, images: Sequence[Image.Image], prompt: str) -> Answers:
    """Return what each query answers on each image, before any threshold.

    Returns:
        Of each image `scores` (Q,), `boxes` (Q, 4) xyxy, 0..1, and, where there is a mask head,
        `masks` (Q, height, width), 0..1.
    """
    found = []
    for image in images:
        _, outputs = predictor.answers(image, [prompt])
        answers = {"scores": query_scores(outputs)[0], "boxes": outputs["pred_boxes_xyxy"][0]}
        if outputs.get("pred_masks") is not None:
            size = (image.height, image.width)
            logits = outputs["pred_masks"][0][:, None]  # (Q, 1, h, w)
            scaled = interpolate(logits, size, mode="bilinear", align_corners=False)
            answers["masks"] = scaled[:, 0].sigmoid()
        found.append(answers)
    return found


def their_answers(
    model: Sam3Image, resolution: int, images: Sequence[Image.Image], prompt: str
) -> Answers:
    """Return what upstream's own `Sam3Processor` answers, as `our_answers` does."""
    processor = Sam3Processor(model, resolution, device="cpu", confidence_threshold=-1)
    found = []
    for image in images:
        state = processor.set_text_prompt(prompt, processor.set_image(image))
        sides = torch.tensor([image.width, image.height] * 2)
        boxes = state["boxes"] / sides
        found.append(
            {"scores": state["scores"], "boxes": boxes, "masks": state["masks_logits"][:, 0]}
        )
    return found


def differences(ours: Answers, theirs: Answers) -> dict[str, float]:
    """Return the largest absolute difference of each kind of answer, NaN where one has it."""
    return {
        name: max(
            float((one[name] - other[name]).abs().max())
            for one, other in zip(ours, theirs, strict=True)
        )
        for name in ours[0]
    }


def check_answers(measured: Mapping[str, float]) -> None:
    """Raise UserError for each difference that is beyond its tolerance, or NaN."""
    if misses := [
        f"sam3.pt is not written: upstream's model answers otherwise than these weights do: {name} "
        f"differ by {value:.2g} (at most {TOLERANCES[name]:g}). Please report it with the weights' "
        "size."
        for name, value in measured.items()
        if not value <= TOLERANCES[name]
    ]:
        raise UserError(misses)


@torch.inference_mode()
def tracker_sees(
    model: Sam3Image, base: Base, resolution: int, images: Sequence[Image.Image]
) -> float | None:
    """Return how like the features that the tracker gets are to those that it was trained with.

    Detector and tracker share the trunk: the tracker gets what its neck makes of the trunk's output
    (necks.py:98-121).

    Args:
        model: of the exported image part; left with the base's trunk.
        base: the published file, and the neck that was taught for this trunk, if one was.

    Returns:
        The least cosine of a level's features on an image; None where the trunk is the base's.
    """
    vision: Any = model.backbone.vision_backbone
    own = vision.trunk.state_dict()
    old = {key: value.to(own[key].dtype) for key, value in trunk_state(base).items()}
    if all(_same(own[key], value) for key, value in old.items()):
        return None
    pixels = [normalise(to_square(image, resolution)) for image in images]
    tuned = [vision.trunk(each)[-1] for each in pixels]  # (1, width, tokens, tokens)
    vision.trunk.load_state_dict(old, strict=False, assign=True)
    before = [vision.trunk(each)[-1] for each in pixels]
    cosines = []
    for neck in published.tracker_neck(base.release):
        for level in range(len(vision.convs) - 1):  # the last is dropped
            ours, theirs = (
                neck_level(vision.convs[level], tensors, f"{neck}{level}.")
                for tensors in (base.written, base.tensors)
            )
            cosines += [
                float(F.cosine_similarity(ours(a).flatten(), theirs(b).flatten(), dim=0))
                for a, b in zip(tuned, before, strict=True)
            ]
    return min(cosines)


def trunk_state(base: Base) -> dict[str, Tensor]:
    """Return the trunk of a published file, by the names of `vision_backbone.trunk`."""
    start = f"{published.PREFIX}backbone.vision_backbone.trunk."
    return {
        key.removeprefix(start): value
        for key, value in base.tensors.items()
        if key.startswith(start) and not key.endswith(published.COMPUTED)
    }


def neck_level(like: nn.Module, tensors: Mapping[str, Tensor], first: str) -> nn.Module:
    """Return a level of a neck, by the tensors whose keys begin so."""
    convs = copy.deepcopy(like)
    convs.load_state_dict(
        {key.removeprefix(first): value for key, value in tensors.items() if key.startswith(first)}
    )
    return convs


def _is_left_out(key: str, content: Mapping[str, Tensor]) -> bool:
    """Return whether a model has a tensor of its own where SAM 3.1's file has none."""
    is_free = key.startswith(published.DROPPED) or key.endswith(published.COMPUTED)
    return is_free and published.PREFIX + key not in content


def _is_read(written: Tensor, value: Tensor) -> bool:
    """Return whether a model has a file's tensor, compared in parts, as a whole would be a copy."""
    parts = (written.flatten().split(PART), value.flatten().split(PART))
    return written.shape == value.shape and all(
        _same(one.to(value.dtype), other) for one, other in zip(*parts, strict=True)
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
