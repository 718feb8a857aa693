"""The method of training: all of a model, some of its components, or an adapter."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from sam3.model.sam3_image import Sam3Image

from app.config.schema import Config, MethodConfig
from app.console import command
from app.errors import UserError
from app.model import adapters
from app.model.build import build_model, components, count_parameters

log = logging.getLogger("app")


def prepare(
    model: Sam3Image, config: MethodConfig, *, pretrained: bool, base: adapters.Base | None = None
) -> None:
    """Freeze what is not to be trained, or put an adapter beside it.

    Args:
        config: one that `check` lets pass.
        pretrained: whether the weights are. Of random ones nothing is frozen by default: a text
            encoder that has learnt nothing would tell no prompt from another.
        base: of an adapter that is to be saved.
    """
    if config.lora is not None:
        adapters.apply_lora(model, config.lora, base)
    elif config.freeze is not None:
        freeze(model, config.freeze)
    elif pretrained:
        freeze(model, ["text"])


def on_meta(config: Config, *, pretrained: bool) -> Sam3Image:
    """Return the model as `prepare` leaves it, on the meta device: to count its parameters."""
    model = build_model(config.model, device="meta")
    prepare(model, config.method, pretrained=pretrained)
    return model


def check(config: Config, pretrained_path: Path | None) -> Sam3Image:
    """Refuse what cannot be trained, before anything is made or written.

    Returns:
        The model as it will be trained, on the meta device.

    Raises:
        UserError: an adapter on weights that cannot be its base, patterns that match nothing, or
            nothing left to train.
    """
    name, adapts = config.method.name, config.method.lora is not None
    if adapts and pretrained_path is None:
        raise UserError(
            f"--method {name}: adapts trained weights, and these are random. Give them by "
            "--checkpoint, or --method full"
        )
    if adapts and pretrained_path is not None and pretrained_path.name == adapters.FILE:
        raise UserError(
            f"--checkpoint {pretrained_path.parent}: is an adapter, and --method {name} adapts "
            "plain weights. Merge it first: "
            f"{command('python', '-m', 'app', 'merge', pretrained_path.parent)} --output-dir FOLDER"
        )
    return on_meta(config, pretrained=pretrained_path is not None)


def leaves_unused(config: MethodConfig) -> bool:
    """Return whether some trainable parameters may take no part in a step.

    Some of all weights never do: upstream computes the smallest feature map and one layer of its
    pixel decoder, and reads neither. Adapters are all used, but for patterns of one's own.
    """
    return config.lora is None or bool(config.lora.targets)


def freeze(model: Sam3Image, names: Collection[str]) -> None:
    """Freeze these components."""
    for name, part in components(model).items():
        if name in names:
            part.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze {','.join(names)}: leaves nothing to train")


def set_training(model: Sam3Image) -> None:
    """Set training mode, but not in frozen components: no dropout or stochastic depth there."""
    model.train()
    for part in components(model).values():
        if not any(parameter.requires_grad for parameter in part.parameters()):
            part.eval()


def describe(model: Sam3Image, name: str) -> None:
    """Log what is trained and what is frozen, component by component."""
    every, trained = count_parameters(model), count_parameters(model, trainable=True)
    log.info(
        "method %s: %s of %s parameters trained (%.2f %%)",
        name,
        _millions(trained["total"]),
        _millions(every["total"]),
        100 * trained["total"] / every["total"],
    )
    for part in components(model):
        share = f"{_millions(trained[part])} of {_millions(every[part])} trained"
        log.info("  %s: %s", part, share if trained[part] else f"{_millions(every[part])} frozen")


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
