"""The interface of all that finds things in images, with its checks, tiles and suppression.

Needs no torch and runs on Python 3.10, as the runtime of an exported folder does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from app.datasets.levels import Levels
from app.errors import UserError
from app.inference.detections import Detections
from app.inference.inputs import BOX_IN_TILE, check_prompts
from app.inference.merging import merge_tiles, suppress
from app.inference.tiles import make_tiles


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


class Finder(ABC):
    """Finds in images what prompts name: `Predictor` in torch, `Runtime` from an exported folder.

    Attributes:
        prompts: asked for where a call names none: the classes of the weights.
        threshold: 0..1, the least score where a call names none.
        levels: the values that become 0 and 255 in images of more than 8 bits, as in training;
            None: each image's own. `open_image` takes them.
    """

    prompts: tuple[str, ...]
    threshold: float
    levels: Levels | None = None

    def predict(
        self,
        image: Image.Image,
        prompts: Sequence[str] = (),
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
            image: RGB, upright.
            prompts: noun phrases; the image is encoded once for all of them. Without any, nor
                boxes, the classes of the weights.
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
                box outside the image, boxes and tiles.
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
        images: Sequence[Image.Image],
        prompts: Sequence[str] = (),
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
        query = Query(
            prompts=check_prompts(prompts or (() if boxes_xywh else self.prompts), boxes_xywh),
            boxes_xywh=boxes_xywh,
            negative_boxes_xywh=negative_boxes_xywh,
            threshold=self.threshold if threshold is None else threshold,
            max_detections=max_detections,
        )
        if tile is None:
            results = self._find(images, query)
        else:
            results = [self._find_in_tiles(image, query, tile, overlap) for image in images]
        return results if nms is None else [suppress(each, nms) for each in results]

    @abstractmethod
    def _find(self, images: Sequence[Image.Image], query: Query) -> list[Detections]:
        """Return what is in each image, seen as a whole."""

    def _find_in_tiles(
        self, image: Image.Image, query: Query, side: int, overlap: float
    ) -> Detections:
        tiles = make_tiles(image.width, image.height, side, overlap)
        parts = [self._find([image.crop(tile.box_xyxy)], query)[0] for tile in tiles]
        return merge_tiles(tiles, parts, image.width, image.height)
