"""Image + prompts → detections: the one path that validation, prediction and serving share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sam3.model.data_misc import FindStage
from sam3.model.geometry_encoders import Prompt
from sam3.model.sam3_image import Sam3Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from app.config.schema import ModelConfig
from app.datasets.square import to_square
from app.errors import UserError
from app.inference.detections import Detections
from app.inference.inputs import BOX_IN_TILE, check_prompts, normalised_boxes
from app.inference.masks import Floats
from app.inference.postprocess import THRESHOLD, Best, best_queries, find_all, to_detections
from app.model import weights
from app.model.device import choose_device, choose_precision

PROMPTS_A_PASS = 16  # pairs of image and prompt that go through DETR together: bounds the memory
TOKENS_A_PASS = 16 * 256  # of their features on a CPU, whose caches more of them outgrow
TEXTS_KEPT = 64  # passes whose text features are kept
RAW = ("pred_logits", "presence_logit_dec", "pred_boxes", "pred_masks")  # what a result needs


class Predictor:
    """A SAM 3 that answers prompts; the model is put in evaluation mode.

    Features of texts and of the last images are kept, so a predictor is good for as long as the
    weights do not change.

    Args:
        model: upstream's module, already on its device.
        config: its size.
        precision: float32, or bfloat16 for autocast.
        prompts: asked for where a call names none.
        threshold: 0..1, least score where a call names none.
    """

    def __init__(
        self,
        model: Sam3Image,
        config: ModelConfig,
        precision: torch.dtype = torch.float32,
        *,
        prompts: Sequence[str] = (),
        threshold: float = THRESHOLD,
    ) -> None:
        self.model = model.eval()
        self.config = config
        self.precision = precision
        self.prompts = tuple(prompts)
        self.threshold = threshold
        self._parameters = list(model.parameters())
        self.device = self._parameters[0].device
        self._text_features: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._encoded: tuple[Tensor, dict[str, Any]] | None = None  # squares, their features
        self._fill_caches()

    @classmethod
    def load(
        cls, path: Path | str, *, device: str = "auto", precision: str = "auto", **options: Any
    ) -> Predictor:
        """Load a weights folder or file; `options` as in `app.model.weights.load`.

        The classes and the threshold that the weights name are used where a call gives none.
        """
        target = choose_device(device)
        model, header = weights.load(Path(path), **options)
        dtype = choose_precision(precision, target, header.model)
        threshold = THRESHOLD if header.threshold is None else header.threshold
        return cls(
            model.to(target), header.model, dtype, prompts=header.prompts, threshold=threshold
        )

    def _fill_caches(self) -> None:
        """Make what upstream's modules keep between calls, outside of inference mode.

        Made inside, a later training step could not save it for its backward pass.
        """
        tokens = self.config.resolution // self.config.vision.patch_size
        for side in (4 * tokens, 2 * tokens, tokens, tokens // 2):  # the levels of the neck
            self.model.backbone.vision_backbone.position_encoding(
                torch.empty(1, 1, side, side, device=self.device)
            )
        decoder = self.model.transformer.decoder
        decoder.compilable_cord_cache = decoder._get_coords(tokens, tokens, self.device)
        decoder.compilable_stored_size = (tokens, tokens)

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
            boxes_xywh: example boxes, pixels, that join every prompt; they need no words.
            negative_boxes_xywh: boxes of what is not meant, likewise.
            threshold: 0..1, least score; None takes the weights' own, else THRESHOLD.
            max_detections: most detections over all prompts, the highest scores; with tiles, in
                each of them.
            nms: 0..1, IoU above which the lower of two goes, whatever their prompts; None: none.
            tile: side in pixels of the tiles that the image is cut into; None: it is seen whole.
            overlap: share of a tile's side that the next one sees as well, 0 to below 1.

        Raises:
            UserError: neither words nor boxes, an empty prompt, a box outside the image, boxes
                and tiles.
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
        """Like `predict`, for several images at once, which may differ in size."""
        if tile is not None and (boxes_xywh or negative_boxes_xywh):
            raise UserError(BOX_IN_TILE)
        find = functools.partial(
            self._find,
            prompts=check_prompts(prompts or (() if boxes_xywh else self.prompts), boxes_xywh),
            boxes_xywh=boxes_xywh,
            negative_boxes_xywh=negative_boxes_xywh,
            threshold=self.threshold if threshold is None else threshold,
            max_detections=max_detections,
        )
        return find_all(find, images, nms=nms, tile=tile, overlap=overlap)

    @torch.inference_mode()
    def _find(
        self,
        images: Sequence[Image.Image],
        *,
        prompts: tuple[str, ...],
        boxes_xywh: Sequence[Sequence[float]],
        negative_boxes_xywh: Sequence[Sequence[float]],
        threshold: float,
        max_detections: int,
    ) -> list[Detections]:
        """What is in each image as a whole."""
        every_box = [*boxes_xywh, *negative_boxes_xywh]
        boxes = np.stack([normalised_boxes(every_box, image) for image in images], axis=1)
        labels = torch.arange(len(every_box)) < len(boxes_xywh)  # (N,) whether it is an example
        pairs = PROMPTS_A_PASS if self.device.type != "cpu" else pairs_a_pass(self.config)
        step = max(1, pairs // len(images))
        found: list[list[Best]] = [[] for _ in images]
        with self._autocast(), self._no_gradients():
            features = self._features(images)
            for start in range(0, len(prompts), step):
                part = prompts[start : start + step]
                outputs = self._ground(features, part, torch.from_numpy(boxes), labels)
                needed = {k: outputs[k].unflatten(0, (-1, len(part))) for k in RAW if k in outputs}
                for index, best in enumerate(found):
                    rows = {key: value[index] for key, value in needed.items()}
                    best.append(_best(rows, start, threshold, max_detections))
        return [
            to_detections(best, prompts, *image.size, max_detections, plain_mask)
            for best, image in zip(found, images, strict=True)
        ]

    @torch.inference_mode()
    def answers(
        self, image: Image.Image, prompts: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Upstream's own features of an image and outputs for P prompts, (P, …), nothing chosen.

        What exports are compared with.
        """
        with self._autocast(), self._no_gradients():
            features = self._features([image])
            nowhere = torch.zeros(0, 1, 4), torch.zeros(0, dtype=torch.bool)
            return features, self._ground(features, tuple(prompts), *nowhere)

    @contextlib.contextmanager
    def _no_gradients(self) -> Iterator[None]:
        """No weight asks for gradients, as in no training.

        torch.matmul multiplies another way, and rounds otherwise, by a weight that asks for them,
        even where none are computed (LinearAlgebra.cpp, should_fold): partly frozen weights would
        not find in training what they find when loaded again.
        """
        asking = [parameter for parameter in self._parameters if parameter.requires_grad]
        for parameter in asking:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16
        )

    def _features(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Features of the images; the last ones' are kept, for a second question about them."""
        squares = torch.stack([to_square(image, self.config.resolution) for image in images])
        if self._encoded is None or not torch.equal(self._encoded[0], squares):
            pixels = torch.cat([normalise(square) for square in squares]).to(self.device)
            self._encoded = squares, self.model.backbone.forward_image(pixels)
        return self._encoded[1]

    def _text(self, prompts: tuple[str, ...]) -> dict[str, Tensor]:
        if prompts not in self._text_features:
            if len(self._text_features) >= TEXTS_KEPT:
                self._text_features.clear()
            encoded = self.model.backbone.forward_text(list(prompts), device=self.device)
            self._text_features[prompts] = encoded
        return self._text_features[prompts]

    def _ground(
        self, features: dict[str, Any], prompts: Sequence[str], boxes: Tensor, labels: Tensor
    ) -> dict[str, Any]:
        """Upstream's `forward_grounding` for P prompts on each of the B images of `features`.

        Args:
            boxes: (N, B, 4) cxcywh, 0..1.
            labels: (N,) bool.

        Returns:
            Upstream's outputs, (B * P, …): the prompts of the first image, of the second, …
        """
        count, device = len(prompts), self.device
        pairs = boxes.shape[1] * count
        text = self._text(tuple(prompts))
        ids = torch.arange(pairs, device=device)
        stage = FindStage(
            img_ids=ids // count,
            text_ids=ids % count,
            input_boxes=None,
            input_boxes_mask=None,
            input_boxes_label=None,
            input_points=None,
            input_points_mask=None,
        )
        geometry = Prompt(
            box_embeddings=boxes.to(device).repeat_interleave(count, dim=1),  # (N, B * P, 4)
            box_mask=torch.zeros(pairs, len(boxes), dtype=torch.bool, device=device),
            box_labels=labels.to(device, torch.long)[:, None].repeat(1, pairs),
        )
        return self.model.forward_grounding(
            backbone_out={**features, **text},
            find_input=stage,
            find_target=None,
            geometric_prompt=geometry,
        )


def pairs_a_pass(config: ModelConfig) -> int:
    """Pairs of image and prompt that go together where memory or caches are small."""
    tokens = (config.resolution // config.vision.patch_size) ** 2
    return max(1, min(PROMPTS_A_PASS, TOKENS_A_PASS // tokens))


def normalise(pixels: Tensor) -> Tensor:
    """(3, R, R) uint8 → (1, 3, R, R) float32 in -1..1, in the order of upstream's Sam3Processor."""
    scaled = v2.functional.to_dtype(pixels, torch.float32, scale=True)
    return v2.functional.normalize(scaled, [0.5] * 3, [0.5] * 3)[None]


def query_scores(outputs: dict[str, Tensor]) -> Tensor:
    """(P, Q), 0..1: of each query, that it is a thing that the prompt names."""
    presence = outputs["presence_logit_dec"].float().reshape(-1, 1).sigmoid()  # (P, 1)
    return outputs["pred_logits"].float().squeeze(-1).sigmoid() * presence


def _best(outputs: dict[str, Tensor], first: int, threshold: float, limit: int) -> Best:
    """The highest scores of P prompts x Q queries on one image; `first`: the first's index."""
    scores = query_scores(outputs).cpu().numpy()
    prompt_ids, query_ids = best_queries(scores, threshold, limit)
    device = outputs["pred_boxes"].device
    where = torch.from_numpy(prompt_ids).to(device), torch.from_numpy(query_ids).to(device)
    kept = {
        key: _to_numpy(outputs[key][where])
        for key in ("pred_boxes", "pred_masks")
        if key in outputs
    }
    return Best(
        scores=scores[prompt_ids, query_ids],
        prompt_ids=prompt_ids + first,
        boxes=kept["pred_boxes"],
        logits=kept.get("pred_masks"),
    )


def _to_numpy(tensor: Tensor) -> Floats:
    array: Floats = tensor.float().cpu().numpy()
    return array


def plain_mask(logits: Floats, height: int, width: int) -> NDArray[np.bool_]:
    """The mask (height, width) of logits (h, w), as upstream's Sam3Processor makes it."""
    tensor = torch.from_numpy(np.ascontiguousarray(logits))[None, None]
    resized = F.interpolate(tensor, (height, width), mode="bilinear", align_corners=False)
    mask: NDArray[np.bool_] = (resized[0, 0] > 0).numpy()
    return mask
