"""The interface of all that finds things in images, with its checks, tiles and suppression.

Needs no torch and runs on Python 3.10, as the runtime of an exported folder does.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.datasets.images import open_image, to_rgb
from app.datasets.levels import Levels
from app.errors import UserError
from app.inference.concepts import Concept
from app.inference.detections import Detections
from app.inference.inputs import BOX_IN_TILE, Sized, check_length, check_prompts
from app.inference.merging import merge_tiles, suppress
from app.inference.postprocess import Candidates
from app.inference.tiles import make_tiles
from app.model.score_counts import ScoreCounts

log = logging.getLogger("app")
LEAST_TILE = 32  # pixels
MOST_OVERLAP = 0.9  # of a tile's side


@dataclass(frozen=True)
class Query:
    """Hold the checked request for images that are seen as a whole.

    Attributes:
        prompts: P noun phrases, at least one.
        boxes_xywh: example boxes, pixels, that join every prompt.
        negative_boxes_xywh: boxes of what is not meant, likewise.
        threshold: 0..1; a detection has a higher score.
        max_detections: most detections over all prompts.
    """

    prompts: tuple[str, ...]
    boxes_xywh: Sequence[Sequence[float]]
    negative_boxes_xywh: Sequence[Sequence[float]]
    threshold: float
    max_detections: int


@dataclass(frozen=True)
class Prepared:
    """Hold an image as its model takes it.

    Attributes:
        pixels: of the model's square, in the form of the finder that made them.
        width, height: of the image, pixels.
    """

    pixels: Any
    width: int
    height: int


@dataclass(frozen=True)
class Encoded:
    """Hold what a model has seen in an image, which it can be asked about again and again.

    Attributes:
        features: in the form of the finder that made them, where it computes.
        width, height: of the image, pixels.
        nbytes: memory of the features.
    """

    features: Any
    width: int
    height: int
    nbytes: int


# What `predict` takes; see there.
Picture = Image.Image | Path | str | NDArray[np.uint8] | Prepared


class MemoryShort(UserError):
    """A GPU's memory does not hold what was asked for at once."""


class Finder(ABC):
    """Finds in images what prompts name: `Predictor` in torch, `Runtime` from an exported folder.

    Attributes:
        prompts: asked for where a call names none: the classes of the weights.
        threshold: 0..1, the least score where a call names none.
        levels: the values that become 0 and 255 in images of more than 8 bits, as in training;
            None: each image's own. `open_image` takes them.
        scores: those of the validation images above the threshold; None where the weights do not
            tell them.
        concepts: by name; a prompt of that name is asked by its examples in place of its words.
    """

    prompts: tuple[str, ...]
    threshold: float
    levels: Levels | None = None
    scores: ScoreCounts | None = None
    concepts: Mapping[str, Concept] = MappingProxyType({})
    _context_length = 32  # tokens of a prompt, with those of start and end
    _told = ""  # the last note of `check_length`

    def predict(
        self,
        image: Picture,
        prompts: str | Sequence[str] = (),
        *,
        boxes_xywh: Sequence[Sequence[float]] = (),
        negative_boxes_xywh: Sequence[Sequence[float]] = (),
        threshold: float | None = None,
        max_detections: int = 100,
        nms: float | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
    ) -> Detections:
        """Find what the prompts name in one image, as `infer.sh` does.

        Args:
            image: RGB, upright; or the path of an image file, an array (H, W, 3) uint8, RGB, or
                what `StagedFinder.prepare` made of one, where it is not cut into tiles.
            prompts: noun phrases, or one as a text; the image is encoded once for all of them.
                Without any, nor boxes, the classes of the weights.
            boxes_xywh: example boxes, pixels, that join every prompt; they need no words. An
                exported folder takes none.
            negative_boxes_xywh: boxes of what is not meant, likewise.
            threshold: 0..1, least score; None takes the weights' own, else THRESHOLD.
            max_detections: most detections over all prompts, the highest scores; with tiles, in
                each of them.
            nms: 0..1, IoU above which the lower of two goes, whatever their prompts; None: none.
            tile: side in pixels of the tiles that the image is cut into; None: it is seen whole.
            overlap: share of a tile's side that the next one sees as well, 0 to below 1.

        Raises:
            UserError: neither words nor boxes, a prompt that is empty or not in the vocabulary, a
                box outside the image, boxes and tiles, a number out of its range, a file or an
                array that is no image.
        """
        return self.predict_batch(
            [image],
            prompts,
            boxes_xywh=boxes_xywh,
            negative_boxes_xywh=negative_boxes_xywh,
            threshold=threshold,
            max_detections=max_detections,
            nms=nms,
            tile=tile,
            overlap=overlap,
        )[0]

    def predict_batch(
        self,
        images: Sequence[Picture],
        prompts: str | Sequence[str] = (),
        *,
        boxes_xywh: Sequence[Sequence[float]] = (),
        negative_boxes_xywh: Sequence[Sequence[float]] = (),
        threshold: float | None = None,
        max_detections: int = 100,
        nms: float | None = None,
        tile: int | None = None,
        overlap: float = 0.2,
    ) -> list[Detections]:
        """Find the same in several images, which may differ in size; otherwise as `predict`."""
        if tile is not None and (boxes_xywh or negative_boxes_xywh):
            raise UserError(BOX_IN_TILE)
        _check_ranges(threshold, max_detections, nms, tile, overlap)
        query = self.query(prompts, boxes_xywh, negative_boxes_xywh, threshold, max_detections)
        opened = [_open(image, self.levels) for image in images]
        if tile is None:
            results = self._find(opened, query)
        else:
            results = [self._find_in_tiles(image, query, tile, overlap) for image in opened]
        return results if nms is None else [suppress(each, nms) for each in results]

    def query(
        self,
        prompts: str | Sequence[str] = (),
        boxes_xywh: Sequence[Sequence[float]] = (),
        negative_boxes_xywh: Sequence[Sequence[float]] = (),
        threshold: float | None = None,
        max_detections: int = 100,
    ) -> Query:
        """Return what is asked for, checked and complete; the arguments are those of `predict`.

        Raises:
            UserError: neither words nor boxes, or a prompt that is empty.
        """
        prompts = (prompts,) if isinstance(prompts, str) else prompts
        prompts = check_prompts(prompts or (() if boxes_xywh else self.prompts), boxes_xywh)
        self.check_length(prompts)
        return Query(
            prompts=prompts,
            boxes_xywh=boxes_xywh,
            negative_boxes_xywh=negative_boxes_xywh,
            threshold=self.threshold if threshold is None else threshold,
            max_detections=max_detections,
        )

    def learn(self, concepts: Sequence[Concept]) -> None:
        """Take concepts in the place of those from before.

        Raises:
            UserError: the model cannot read them.
        """
        if note := self._check_concepts(concepts):
            log.warning("%s", note)
        self.concepts = {concept.name: concept for concept in concepts}

    def _check_concepts(self, concepts: Sequence[Concept]) -> str:
        """Return a note of what is doubtful; raise UserError where the model cannot read them."""
        raise UserError(f"concept '{concepts[0].name}': this finder takes words alone")

    def check_length(self, prompts: Sequence[str]) -> None:
        """Log which prompts the model does not read to their end, once.

        Raises:
            UserError: two prompts differ only in what is not read.
        """
        prompts = [prompt for prompt in prompts if prompt not in self.concepts]
        if (note := check_length(prompts, self._tokens, self._context_length)) != self._told:
            self._told = note
            if note:
                log.warning("%s", note)

    def _tokens(self, prompt: str) -> Sequence[int]:
        """Return all tokens of a prompt, also those not read; none where texts are stored."""
        del prompt
        return ()

    @abstractmethod
    def _find(self, images: Sequence[Image.Image], query: Query) -> list[Detections]:
        """Return what is in each image, seen as a whole."""

    def _find_in_tiles(
        self, image: Image.Image, query: Query, side: int, overlap: float
    ) -> Detections:
        tiles = make_tiles(image.width, image.height, side, overlap)
        parts = [self._find([image.crop(tile.box_xyxy)], query)[0] for tile in tiles]
        return merge_tiles(tiles, parts, image.width, image.height)


class StagedFinder(Finder):
    """A finder whose predictions can be taken by their steps, to keep features or divide the work.

    `finish(ground(encode([prepare(image)]), query)[0], query, image)` is what `predict` returns.
    """

    @property
    def gathers(self) -> bool:
        """Whether images are seen faster together than one after the other."""
        return False

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""
        return True

    @abstractmethod
    def prepare(self, image: Image.Image) -> Prepared:
        """Return an RGB image as the model takes it; needs no model, and may run in any thread."""

    @abstractmethod
    def encode(self, images: Sequence[Prepared]) -> list[Encoded]:
        """Return what the model sees in each image; one thread at a time, as `ground`.

        Raises:
            MemoryShort: not so many fit a GPU's memory.
        """

    @abstractmethod
    def ground(self, images: Sequence[Encoded], query: Query) -> list[Candidates]:
        """Return the best queries on each image, seen as a whole.

        Raises:
            UserError: words or boxes that the model cannot be asked for.
            MemoryShort: a GPU's memory ran out; the next call sees fewer prompts at once.
        """

    @abstractmethod
    def finish(self, candidates: Candidates, query: Query, image: Sized) -> Detections:
        """Return candidates as detections, with their masks; may run in any thread."""

    def release_memory(self) -> None:
        """Give back the memory that was kept for the next call."""


def _check_ranges(
    threshold: float | None,
    max_detections: int,
    nms: float | None,
    tile: int | None,
    overlap: float,
) -> None:
    """Raise UserError that lists each number out of its range."""
    ranges = (
        ("threshold", threshold, 0, 1),
        ("max_detections", max_detections, 1, float("inf")),
        ("nms", nms, 0, 1),
        ("tile", tile, LEAST_TILE, float("inf")),
        ("overlap", overlap, 0, MOST_OVERLAP),
    )
    problems = []
    for name, value, least, most in ranges:
        if value is not None and not least <= value <= most:
            bounds = f"{least} or more" if most == float("inf") else f"{least} to {most}"
            problems.append(f"{name} {value:g}: must be {bounds}")
    if problems:
        raise UserError(problems)


def _open(image: Any, levels: Levels | None) -> Any:
    """Return what `predict` was given as an RGB image; one that is prepared stays as it is.

    Raises:
        UserError: a file or an array that is no image.
    """
    if isinstance(image, Prepared):
        return image
    if isinstance(image, str | Path):
        return open_image(Path(image), levels)
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else to_rgb(image, levels)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise UserError(
            f"image: an array of shape {array.shape} and type {array.dtype}; give one of (height, "
            "width, 3) and uint8, RGB, or the path of an image file"
        )
    return Image.fromarray(array)
