"""Settings by the size of the dataset: `--recipe auto`, which nano takes unless told otherwise."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.console import counted

log = logging.getLogger("app")


@dataclass(frozen=True)
class Tier:
    """Hold the settings for up to `images` training images; None for any number."""

    images: int | None
    epochs: int
    lr_scale: float  # from pretrained weights; 1 is upstream's full training
    batch_size: int
    grad_accum: int
    rank: int  # of a LoRA; its alpha is twice that
    boxes_only: bool = False


# The first is SAM 3's own few-shot recipe (arXiv 2511.16719, fine-tuning on ODinW and RF-100VL):
# 40 epochs, a tenth of the rate, batches of 2, no mask losses. The more images, the fewer epochs
# and the larger rank and batch: the number of updates grows slower than the data.
TIERS = (
    Tier(10, epochs=40, lr_scale=0.1, batch_size=2, grad_accum=1, rank=4, boxes_only=True),
    Tier(499, epochs=40, lr_scale=0.1, batch_size=2, grad_accum=2, rank=8),
    Tier(2000, epochs=20, lr_scale=0.1, batch_size=2, grad_accum=4, rank=16),
    Tier(None, epochs=10, lr_scale=0.2, batch_size=2, grad_accum=8, rank=32),
)


# Example boxes (`dataset.examples`) are left out: after 3 and 10 images of new shapes words lose
# 0.01 of box AP by them, and where other images' boxes are given 0.01 is gained after 3 images
# (benchmarks.few shots, 5 seeds), for a third more time.
#
# nano from its own weights, measured on shapes and on photographs of potholes: all of it moves, and
# fast. Its trunk knows drawn shapes alone, so that it has as much to learn as DETR has. The rate
# and the numbers below are what a sweep says: docs/recipes.md.
NANO = {
    "training.batch_size": 4,
    "training.grad_accum": 1,
    "optim.lr_scale": 0.8,
    "optim.layer_decay": 1.0,
    "optim.max_grad_norm": 1.0,
    "optim.schedule.name": "linear",
}
NANO_SEEN = 2400  # images that training sees in all, where it has enough: 600 updates
NANO_EPOCHS = (10, 45)  # least and most
NANO_FEW = 10  # images at most that are seen more often
# Most epochs of those, and of any with example boxes, which take half of the words' prompts: of 20
# images of new shapes, 45 epochs bring words 0.25 of box AP, 90 bring 0.39 (0.33, 0.38 without).
NANO_LONG = 90
NANO_VALIDATIONS = 10  # about as many in a run


def auto(images: int, size: str, given: Sequence[str], *, pretrained: bool) -> list[str]:
    """Return overrides for `images` training images, of keys that are not set; log the choice.

    Args:
        size: of the model; the full one is adapted by LoRA unless a method is given.
        given: the user's overrides, and keys that other flags decide.
        pretrained: whether training starts from pretrained weights.
    """
    chosen_by_user = {text.partition("=")[0]: text.partition("=")[2] for text in given}
    if size == "nano" and pretrained:
        return _choose(_for_nano(images, chosen_by_user), chosen_by_user, images)
    tier = next(tier for tier in TIERS if tier.images is None or images <= tier.images)
    settings: dict[str, object] = {
        "training.epochs": tier.epochs,
        "training.batch_size": tier.batch_size,
        "training.grad_accum": tier.grad_accum,
    }
    if pretrained:
        settings["optim.lr_scale"] = tier.lr_scale
    if tier.boxes_only:
        settings["loss"] = "boxes"
    method = chosen_by_user.get("method")
    if (
        size == "sam3"
        and pretrained
        and not any(key.startswith("method") for key in chosen_by_user)
    ):
        settings["method"] = method = "lora"
    if str(method).startswith("lora"):
        settings |= {"method.lora.rank": tier.rank, "method.lora.alpha": 2 * tier.rank}
    return _choose(settings, chosen_by_user, images)


def _for_nano(images: int, chosen_by_user: Mapping[str, str]) -> dict[str, object]:
    """Return nano's settings: as many updates for any number of images, within limits."""
    least, most = NANO_EPOCHS
    if images <= NANO_FEW or _is_positive(chosen_by_user.get("dataset.examples", "0")):
        most = NANO_LONG
    epochs = min(max(NANO_SEEN // images, least), most)
    settings: dict[str, object] = {"training.epochs": epochs, **NANO}
    if str(chosen_by_user.get("method")).startswith("lora"):
        del settings["optim.lr_scale"]  # adapters begin at zero: they take the whole rate
    if "training.epochs" not in chosen_by_user:
        every = -(-epochs // NANO_VALIDATIONS)
        settings |= {"evaluation.every": every, "training.save_every": every}
    return settings


def _is_positive(text: str) -> bool:
    """Return whether a value is a number above zero; what is none is refused with the others."""
    try:
        return float(text) > 0
    except ValueError:
        return False


def _choose(
    settings: Mapping[str, object], chosen_by_user: Mapping[str, str], images: int
) -> list[str]:
    """Return the settings that the user has not chosen, as overrides; log them."""
    chosen = [f"{key}={value}" for key, value in settings.items() if key not in chosen_by_user]
    log.info("recipe auto for %s: %s", counted(images, "training image"), ", ".join(chosen))
    return chosen
