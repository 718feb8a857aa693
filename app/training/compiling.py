"""The trunk compiled to one graph: fewer launches and less memory traffic, for a slow first step.

At full size the trunk is a third of a GPU's work in an update. Everything else stays as written.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from sam3.model.sam3_image import Sam3Image
from torch import Tensor

from app.config.schema import Config
from app.console import duration
from app.model.device import autocast
from app.training.random_state import random_state, restore_random_state

log = logging.getLogger("app")
LEAST_UPDATES = 3000  # that are left of a run where `auto` compiles: some 40 ms each for 2 minutes


def is_wanted(config: Config, device: torch.device, updates: int, *, cached: bool) -> bool:
    """Return whether the trunk is to be compiled.

    Args:
        updates: that are left of the run.
        cached: the trunk's outputs are, so that it sees an image once.
    """
    asked = config.training.compile
    if cached or updates < 1 or config.training.check_finite:  # which looks into it at each step
        return False
    return asked is True or (asked == "auto" and device.type == "cuda" and updates >= LEAST_UPDATES)


def compile_trunk(model: Sam3Image, images: int, resolution: int, precision: torch.dtype) -> None:
    """Let batches of training go through a compiled trunk; leave it as it is where that fails.

    It is compiled here, forward and backward, by a batch of black images. Other batches than such,
    those of validations, and those whose modules are watched go through the trunk as written.

    Args:
        model: as it is trained: on its device, frozen matrices in their half.
        images: of a batch.
        resolution: of the images, in pixels.
        precision: float32, or the half to multiply in.

    Raises:
        torch.OutOfMemoryError: the GPU's memory is used up.
    """
    trunk: Any = model.backbone.vision_backbone.trunk
    device = next(trunk.parameters()).device
    shape = (images, 3, resolution, resolution)
    as_written = trunk.forward
    compiled = torch.compile(as_written, fullgraph=True, dynamic=False)
    begun, before = time.monotonic(), random_state()
    try:
        with autocast(device, precision, cache_weights=False):
            maps = compiled(torch.zeros(shape, device=device))[-1]
        trained = [parameter for parameter in trunk.parameters() if parameter.requires_grad]
        if trained:  # not by `backward`, at which DDP would wait for the other parameters
            torch.autograd.grad(maps.sum(), trained, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of dynamo, inductor, Triton, a C compiler that is not there
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        log.info("note: the trunk is not compiled (%s)", reason)
        return
    finally:
        restore_random_state(before)

    def forward(pixels: Tensor) -> list[Tensor]:
        """Map (B, 3, R, R) to feature maps, of which the neck reads the last, (B, d, g, g)."""
        is_watched = bool(trunk.blocks[0]._forward_hooks)
        as_compiled = pixels.shape == shape and torch.is_grad_enabled() and not is_watched
        maps: list[Tensor] = (compiled if as_compiled else as_written)(pixels)
        return maps

    trunk.forward = forward
    log.info("the trunk is compiled (%s)", duration(time.monotonic() - begun))
