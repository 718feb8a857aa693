"""`python -m app export`: the flags → what is wanted."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from app.config.compose import load_config
from app.errors import UserError, nearest
from app.inference.inputs import read_prompts

log = logging.getLogger("app")
FORMATS = ("onnx", "hf")


def export(
    checkpoint: Path,
    folder: Path,
    to_format: str,
    overrides: Sequence[str],
    flags: Mapping[str, Any],
    *,
    measure_on: int,
    overwrite: bool,
) -> None:
    """Write weights in another format and say where they are.

    Args:
        overrides: of the configuration: where labelled images come from.
        flags: those of ONNX by their names; None where they were not given.

    Raises:
        UserError: no such format, flags that it has no use for, what cannot be exported.
    """
    if to_format not in FORMATS:
        raise UserError(
            f"--format {to_format}: there is {', '.join(FORMATS)}.{nearest(to_format, FORMATS)}"
        )
    if to_format == "hf":
        given = [name for name, value in flags.items() if value] + list(overrides)
        if given:
            raise UserError(f"{', '.join(given)}: nothing reads it beside --format hf")
        from app.deploy import transformers_folder

        log.info("weights: %s", transformers_folder.export(checkpoint, folder, overwrite=overwrite))
        return

    from app.datasets.read_splits import read_splits
    from app.deploy import export as onnx

    prompts = list(flags["--prompt"] or ())
    if flags["--prompts"] is not None:
        prompts += read_prompts(flags["--prompts"])
    if flags["--open-vocabulary"] and prompts:
        raise UserError("--open-vocabulary answers any words: leave out --prompt and --prompts")
    words = [word.strip() for text in flags["--precision"] or () for word in text.split(",")]
    wanted = onnx.Wanted(
        tuple(words) or ("fp32",),
        None if flags["--open-vocabulary"] else tuple(prompts),
        flags["--prompts-a-pass"],
        flags["--top"],
        flags["--resolution"],
        {key: flags[f"--{key}"] for key in ("tensorrt", "target") if flags[f"--{key}"]},
    )
    has_data = any(text.startswith("dataset.") for text in overrides)
    config = load_config(["transforms=none", *overrides], None, None) if has_data else None
    manifest = onnx.export(
        checkpoint,
        folder,
        wanted,
        images=flags["--images"],
        valid=None if config is None else read_splits(config).valid,
        max_detections=100 if config is None else config.evaluation.max_detections,
        measure_on=measure_on,
        overwrite=overwrite,
    )
    size = sum(file["bytes"] for file in manifest.files.values())
    log.info("exported: %s, %.1f MB in %d files", folder, size / 1e6, len(manifest.files) + 1)
    log.info("use it: python -m app.deploy.runtime %s --input IMAGES --output DIR", folder)
