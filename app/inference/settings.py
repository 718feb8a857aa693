"""What a prediction depends on beside its images, checked whole."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from app.errors import UserError, nearest
from app.inference.inputs import Box, parse_box, read_prompts
from app.inference.journal import file_state
from app.inference.outputs import PER_IMAGE
from app.inference.predictor import BOX_IN_TILE, THRESHOLD, check_prompts
from app.inference.tables import TABLES
from app.model import weights
from app.model.vocabulary import unknown_words

log = logging.getLogger("app")
SAVES = tuple(dict.fromkeys([*PER_IMAGE, *TABLES]))  # what --save takes
RANDOM = "none"  # the checkpoint of random weights


@dataclass(frozen=True)
class Settings:
    """What is looked for, with which weights, and what is kept of it.

    Attributes:
        checkpoint: weights file or folder, or none for random ones.
        size, resolution: of the model; None takes the weights'.
        prompts: noun phrases.
        boxes, negative_boxes: xywh, pixels; examples of what is meant, and of what is not.
        threshold: 0..1, least score; None takes the weights' own, else THRESHOLD.
        max_detections: most an image, or a tile.
        nms: IoU above which the lower of two detections goes, whatever their prompts; None: none.
        tile: side in pixels of the tiles that an image is cut into; None: it is seen whole.
        overlap: share of a tile's side that the next one sees as well.
        save: the kinds of output.
    """

    checkpoint: str
    prompts: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    negative_boxes: tuple[Box, ...] = ()
    threshold: float | None = None
    max_detections: int = 100
    nms: float | None = None
    tile: int | None = None
    overlap: float = 0.2
    save: tuple[str, ...] = ("overlay", "coco")
    size: str | None = None
    resolution: int | None = None
    device: str = "auto"
    precision: str = "auto"

    def identity(self) -> dict[str, Any]:
        """What must be the same for results to stand side by side."""
        settings = asdict(self)
        del settings["device"]
        if self.checkpoint != RANDOM:
            settings["weights"] = file_state(weights.find_file(Path(self.checkpoint)))
        return settings


def make_settings(
    settings: Settings,
    *,
    prompts_file: Path | None,
    boxes: Sequence[str],
    negative_boxes: Sequence[str],
    save: Sequence[str],
) -> Settings:
    """The settings with what the command line gave as text; without prompts, the weights' own.

    Args:
        save: kinds of output, several in one where commas part them.

    Raises:
        UserError: every problem at once.
    """
    problems: list[str] = []
    prompts = list(settings.prompts)
    if prompts_file is not None:
        try:
            prompts += read_prompts(prompts_file)
        except UserError as error:
            problems += error.problems
    parsed: dict[str, list[Box]] = {"--box": [], "--negative-box": []}
    for flag, texts in (("--box", boxes), ("--negative-box", negative_boxes)):
        for text in texts:
            try:
                parsed[flag].append(parse_box(text, flag))
            except UserError as error:
                problems += error.problems
    kinds = [kind.strip() for text in save for kind in text.split(",")] or list(settings.save)
    problems += [
        f"--save {kind}: there is {', '.join(SAVES)}.{nearest(kind, SAVES)}"
        for kind in kinds
        if kind not in SAVES
    ]
    if settings.tile is not None and (boxes or negative_boxes):
        problems.append(BOX_IN_TILE)
    if not (prompts or boxes or prompts_file) and settings.checkpoint != RANDOM:
        prompts = weights.describe(Path(settings.checkpoint), settings.size).prompts
        log.info("prompts: %s (the classes of these weights)", ", ".join(prompts) or "none")
    try:
        check_prompts(prompts, [()] * len(boxes))  # those that could not be read are boxes as well
    except UserError as error:
        problems += error.problems
    random = settings.checkpoint == RANDOM
    header = None if random else weights.read_header(Path(settings.checkpoint))
    if header is not None:
        vocabulary = header.model.vocabulary
        problems += [f"--prompt {line}" for line in unknown_words(vocabulary, prompts)]
    if problems:
        raise UserError(problems)
    return replace(
        settings,
        threshold=_threshold(settings, header),
        prompts=tuple(dict.fromkeys(" ".join(prompt.split()) for prompt in prompts)),
        boxes=tuple(parsed["--box"]),
        negative_boxes=tuple(parsed["--negative-box"]),
        save=tuple(kind for kind in SAVES if kind in kinds),
    )


def _threshold(settings: Settings, header: weights.Header | None) -> float:
    """The one given, or the one that the weights were calibrated to, or the usual; says which."""
    if settings.threshold is not None:
        return settings.threshold
    if header is None or header.threshold is None:
        log.info("threshold: %g (--threshold decides by hand)", THRESHOLD)
        return THRESHOLD
    log.info(
        "threshold: %.3f, the best on the validation images (--threshold decides by hand)",
        header.threshold,
    )
    return header.threshold
