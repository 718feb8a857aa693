"""Make several ranks equal one process: scale losses by global counts, raise errors on all."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from app.errors import UserError


def scale_to_global_counts(
    losses: Mapping[str, Tensor], criterion: Any, targets: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return losses whose mean over the ranks is the loss of one process with all prompts.

    Upstream's losses of boxes and masks need nothing: they are divided by the mean number of
    objects (sam3_loss.py:75). The others are means over a rank's own prompts, or over its prompts
    that show something; and the sum is scaled by the root of its prompts (sam3_loss.py:193).

    Args:
        losses: of `criterion`, upstream's Sam3LossWrapper, for the targets.
        targets: as the model's `back_convert` makes them.
    """
    device = losses["core_loss"].device
    prompts = targets["num_boxes"].numel()
    masks = targets["semantic_masks"]
    positive = 0 if masks is None else int(masks.flatten(1).any(-1).sum())
    own = torch.tensor([prompts, positive], dtype=torch.float64, device=device)
    total = own.clone()
    torch.distributed.all_reduce(total)
    shares = own / total.clamp(min=1) * torch.distributed.get_world_size()
    prompt_share, positive_share = shares.float().unbind()
    factors = {"loss_ce": prompt_share, "presence_loss": prompt_share}
    factors |= {"loss_semantic_seg": positive_share, "loss_semantic_dice": positive_share}
    weights: dict[str, float] = {}
    for part in (*criterion.loss_fns_find, criterion.loss_fn_semantic_seg):
        weights |= part.weight_dict if part is not None else {}

    scaled = dict(losses)
    root = prompts**0.5 if criterion.scale_by_find_batch_size else 1.0
    core = losses["core_loss"] / root
    for key, value in losses.items():
        name = _LAYER_SUFFIX.sub("", key)
        if name in factors and name in weights:
            scaled[key] = value * factors[name]
            core = core + weights[name] * (scaled[key] - value)
    scale = total[0].float().sqrt() if criterion.scale_by_find_batch_size else 1.0
    return scaled | {"core_loss": core * scale}


@contextlib.contextmanager
def raise_on_all_ranks(device: torch.device) -> Iterator[None]:
    """Raise an error of one rank on all of them: the others would wait for it for ever.

    Raises:
        FloatingPointError: this rank had one, or another had.
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


_LAYER_SUFFIX = re.compile(r"(_aux_\d+|_fs)?(_o2m)?$")  # an earlier layer, or one object to many
