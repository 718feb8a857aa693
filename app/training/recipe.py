"""Settings by the size of the dataset: `--recipe auto`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

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


def auto(images: int, size: str, given: Sequence[str], *, pretrained: bool) -> list[str]:
    """Return overrides for `images` training images, of keys that are not set; log the choice.

    Args:
        size: of the model; the full one is adapted by LoRA unless a method is given.
        given: the user's overrides, and keys that other flags decide.
        pretrained: whether training starts from pretrained weights.
    """
    tier = next(tier for tier in TIERS if tier.images is None or images <= tier.images)
    chosen_by_user = {text.partition("=")[0]: text.partition("=")[2] for text in given}
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
    chosen = [f"{key}={value}" for key, value in settings.items() if key not in chosen_by_user]
    most = "any number" if tier.images is None else f"up to {tier.images}"
    log.info("recipe auto for %d training images (%s): %s", images, most, ", ".join(chosen))
    return chosen
