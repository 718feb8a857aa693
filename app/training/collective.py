"""Several processes as one: the losses of all of their prompts, and one end for all."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from app.errors import UserError


def over_processes(
    losses: Mapping[str, Tensor], criterion: Any, targets: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Losses whose mean over the processes is what one process with all the prompts would have.

    Upstream's losses of boxes and masks are so already: they are divided by the mean number of
    objects (sam3_loss.py:75). The others are means over a process's own prompts, or over those
    that show something; and the sum is scaled by the root of its own prompts (sam3_loss.py:193).

    Args:
        losses: what `criterion`, upstream's Sam3LossWrapper, returned for the targets.
        targets: as the model's `back_convert` makes them.
    """
    device = losses["core_loss"].device
    prompts = targets["num_boxes"].numel()
    masks = targets["semantic_masks"]
    shown = 0 if masks is None else int(masks.flatten(1).any(-1).sum())
    own = torch.tensor([prompts, shown], dtype=torch.float64, device=device)
    every = own.clone()
    torch.distributed.all_reduce(every)
    shares = own / every.clamp(min=1) * torch.distributed.get_world_size()
    of_prompts, of_shown = shares.float().unbind()
    factors = {"loss_ce": of_prompts, "presence_loss": of_prompts}
    factors |= {"loss_semantic_seg": of_shown, "loss_semantic_dice": of_shown}
    weights: dict[str, float] = {}
    for part in (*criterion.loss_fns_find, criterion.loss_fn_semantic_seg):
        weights |= part.weight_dict if part is not None else {}

    found = dict(losses)
    root = prompts**0.5 if criterion.scale_by_find_batch_size else 1.0
    core = losses["core_loss"] / root
    for key, value in losses.items():
        name = _SUFFIX.sub("", key)  # of an earlier layer, or of one object to many queries
        if name in factors and name in weights:
            found[key] = value * factors[name]
            core = core + weights[name] * (found[key] - value)
    scale = every[0].float().sqrt() if criterion.scale_by_find_batch_size else 1.0
    return found | {"core_loss": core * scale}


@contextlib.contextmanager
def together(device: torch.device) -> Iterator[None]:
    """What ends the block in one process ends it in all: the others would wait for it in vain.

    Raises:
        FloatingPointError: its own, or another process had one.
        UserError: likewise.
    """
    error: FloatingPointError | UserError | None = None
    try:
        yield
    except (FloatingPointError, UserError) as caught:
        error = caught
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        kinds = torch.zeros(2, device=device)
        if error is not None:
            kinds[int(isinstance(error, UserError))] = 1
        torch.distributed.all_reduce(kinds)
        elsewhere = (FloatingPointError(), UserError("another process of this run cannot go on"))
        if error is None and kinds.any():
            error = elsewhere[int(kinds[1] > 0)]
    if error is not None:
        raise error


_SUFFIX = re.compile(r"(_aux_\d+|_fs)?(_o2m)?$")
