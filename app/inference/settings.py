"""The settings that a prediction depends on, checked as a whole."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import UserError, nearest
from app.inference.concepts import read_all
from app.inference.inputs import BOX_IN_TILE, Box, check_prompts, parse_box, read_prompts
from app.inference.journal import file_state
from app.inference.outputs import PER_IMAGE
from app.inference.postprocess import THRESHOLD
from app.inference.tables import TABLES
from app.model.vocabulary import unknown_words

if TYPE_CHECKING:
    from app.datasets.coco import Dataset

log = logging.getLogger("app")
SAVES = tuple(dict.fromkeys([*PER_IMAGE, *TABLES]))  # what --save takes
RANDOM = "none"  # the checkpoint of random weights
ALIKE = 0.8  # 0..1, a prompt and the class that may be meant


@dataclass(frozen=True)
class Settings:
    """Hold prompts, weights, limits and outputs of a prediction.

    Attributes:
        checkpoint: weights file or folder, or none for random ones.
        size, resolution: of the model; None takes the weights'.
        prompts: noun phrases.
        boxes, negative_boxes: xywh, pixels; examples of what is meant, and of what is not.
        concepts: files of concepts, whose names are prompts.
        examples: folder of a dataset whose classes are found by its boxes; None: none.
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
    concepts: tuple[str, ...] = ()
    examples: str | None = None
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

    def limits(self) -> dict[str, Any]:
        """Return the arguments of `Finder.predict` that limit what it returns."""
        names = ("threshold", "max_detections", "nms", "tile", "overlap")
        return {name: getattr(self, name) for name in names}

    def identity(self) -> dict[str, Any]:
        """Return the settings that must be equal for results to share an output folder."""
        settings = asdict(self)
        del settings["device"]
        settings["concepts"] = [file_state(Path(file)) for file in self.concepts]
        if self.examples is not None:
            settings["examples"] = self._examples().content_hash()
        if self.checkpoint != RANDOM:
            from app.model.weight_files import find_file  # here: an exported folder needs none

            settings["weights"] = file_state(find_file(Path(self.checkpoint)))
        return settings

    def concept_names(self) -> tuple[str, ...]:
        """Return the prompts that are asked by examples.

        Raises:
            UserError: a file or folder of them cannot be read, or two have one name.
        """
        named = [concept.name for concept in read_all(self.concepts)]
        if self.examples is not None:
            from app.inference.encoding import class_names

            named += class_names(self._examples())
        if problems := [
            f"concept '{name}': is in several of --concept and --examples; leave out all but one"
            for name, times in Counter(named).items()
            if times > 1
        ]:
            raise UserError(problems)
        return tuple(named)

    def _examples(self) -> Dataset:
        from app.inference.encoding import (
            read_examples,  # torch: an exported folder has no examples
        )

        assert self.examples is not None
        return read_examples(Path(self.examples))


@dataclass(frozen=True)
class Defaults:
    """Hold the settings that a model brings with it.

    Attributes:
        prompts: its classes, asked for where a user names none; empty where that takes long.
        vocabulary: the only prompts that it takes; None: any.
        threshold: 0..1, which it was calibrated to; None: it was not calibrated.
    """

    prompts: Sequence[str] = ()
    vocabulary: Collection[str] | None = None
    threshold: float | None = None


def make_settings(
    settings: Settings,
    *,
    prompts_file: Path | None,
    boxes: Sequence[str],
    negative_boxes: Sequence[str],
    save: Sequence[str],
    kinds: Sequence[str] = SAVES,
    vocabulary: Collection[str] | None = None,
) -> Settings:
    """Complete the settings by flags that are text; no weights are read for it.

    Args:
        save: kinds of output, several in one where commas part them.
        kinds: those that there are.
        vocabulary: the only prompts that there are, where that is known already.

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
    chosen = [kind.strip() for text in save for kind in text.split(",")] or list(settings.save)
    problems += [
        f"--save {kind}: there is {', '.join(kinds)}.{nearest(kind, kinds)}"
        for kind in chosen
        if kind not in kinds
    ]
    if settings.tile is not None and (boxes or negative_boxes):
        problems.append(BOX_IN_TILE)
    asked = prompts or prompts_file or settings.checkpoint == RANDOM  # else the weights' classes
    if asked and not (settings.concepts or settings.examples):
        try:
            check_prompts(prompts, [()] * len(boxes))  # also those that could not be read
        except UserError as error:
            problems += error.problems
    if not settings.concepts:  # else it is known later which prompts are no words
        problems += [f"--prompt {line}" for line in unknown_words(vocabulary, prompts)]
    if problems:
        raise UserError(problems)
    for prompt in settings.prompts:
        if "," in prompt:
            parts = " ".join(f"--prompt '{part.strip()}'" for part in prompt.split(","))
            log.info("--prompt '%s' is one prompt; for several: %s", prompt, parts)
    return replace(
        settings,
        prompts=tuple(dict.fromkeys(" ".join(prompt.split()) for prompt in prompts)),
        boxes=tuple(parsed["--box"]),
        negative_boxes=tuple(parsed["--negative-box"]),
        save=tuple(kind for kind in kinds if kind in chosen),
    )


def with_defaults(settings: Settings, defaults: Defaults | None = None) -> Settings:
    """Complete the settings by what a model brings with it: its classes and its threshold.

    Args:
        defaults: of the model; None: those in the checkpoint.

    Raises:
        UserError: no prompts at all, or some that the model cannot be asked for.
    """
    concepts = settings.concept_names()
    prompts = settings.prompts
    if concepts and not (prompts or settings.boxes):
        prompts = concepts
        log.info("prompts: %s (by their examples)", ", ".join(prompts))
    classes = not (prompts or settings.boxes) and settings.checkpoint != RANDOM
    defaults = defaults or _read_defaults(settings, classes=classes)
    if classes:
        prompts = tuple(dict.fromkeys(defaults.prompts))
        log.info("prompts: %s (the classes of these weights)", ", ".join(prompts) or "none")
        check_prompts(prompts)
    words = [prompt for prompt in prompts if prompt not in concepts]
    if problems := unknown_words(defaults.vocabulary, words):
        raise UserError([f"--prompt {line}" for line in problems])
    tell_mistyped(words, [*defaults.prompts, *concepts])
    if len(prompts) > settings.max_detections:
        log.info(
            "%d prompts share --max-detections %d an image; raise it to find what each names",
            *(len(prompts), settings.max_detections),
        )
    return replace(settings, prompts=prompts, threshold=_threshold(settings, defaults))


def tell_mistyped(prompts: Sequence[str], classes: Sequence[str]) -> None:
    """Log which class of the weights may be meant by a prompt that is none: a model takes any."""
    for prompt in prompts:
        if prompt not in classes and (meant := nearest(prompt, classes, ALIKE)):
            log.info(
                "note: '%s' is no class of these weights, which find any words.%s", prompt, meant
            )


def _read_defaults(settings: Settings, *, classes: bool) -> Defaults:
    """Read the defaults of a checkpoint from its header.

    Args:
        classes: whether prompts are needed; a checkpoint without a header is read whole for them.
    """
    if settings.checkpoint == RANDOM:
        return Defaults()
    from app.model import weights  # here, because an exported folder needs no torch

    path = Path(settings.checkpoint)
    prompts = weights.describe(path, settings.size).prompts if classes else ()
    header = weights.read_header(path)
    if header is None:
        return Defaults(prompts)
    return Defaults(header.prompts, header.model.vocabulary, header.threshold)


def _threshold(settings: Settings, defaults: Defaults) -> float:
    """Return the threshold that was given, else the calibrated one, else 0.5; log which."""
    if settings.threshold is not None:
        return settings.threshold
    if defaults.threshold is None:
        log.info("threshold: %g (--threshold decides by hand)", THRESHOLD)
        return THRESHOLD
    log.info(
        "threshold: %.3f, the best on the validation images (--threshold decides by hand)",
        defaults.threshold,
    )
    return defaults.threshold
