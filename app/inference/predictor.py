"""Image + prompts → detections: the one path that validation, prediction and serving share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sam3.model.box_ops import box_cxcywh_to_xyxy
from sam3.model.data_misc import FindStage
from sam3.model.geometry_encoders import Prompt
from sam3.model.sam3_image import Sam3Image
from torch import Tensor
from torchvision.transforms import v2

from app.config import ModelConfig
from app.datasets.square import to_square
from app.errors import UserError
from app.inference.detections import Detections
from app.inference.masks import encode_masks
from app.inference.merging import merge_tiles, suppress
from app.inference.tiles import make_tiles
from app.model import weights
from app.model.device import choose_device, choose_precision
from app.model.vocabulary import VISUAL_PROMPT

PROMPTS_A_PASS = 16  # pairs of image and prompt that go through DETR together: bounds the memory
TEXTS_KEPT = 64  # passes whose text features are kept
RAW = ("pred_logits", "presence_logit_dec", "pred_boxes", "pred_masks")  # what a result needs
THRESHOLD = 0.5  # where the weights say none
BOX_IN_TILE = "--tile and --box: a box lies in one tile, not in all; give one of them"


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
        if tile is None:
            found = find(images)
        else:
            found = [_find_in_tiles(find, image, tile, overlap) for image in images]
        return found if nms is None else [suppress(detections, nms) for detections in found]

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
        boxes = torch.stack([normalised_boxes(every_box, image) for image in images], dim=1)
        labels = torch.arange(len(every_box)) < len(boxes_xywh)  # (N,) whether it is an example
        step = max(1, PROMPTS_A_PASS // len(images))
        found: list[list[dict[str, Tensor]]] = [[] for _ in images]
        with self._autocast(), self._no_gradients():
            features = self._features(images)
            for start in range(0, len(prompts), step):
                part = prompts[start : start + step]
                outputs = self._ground(features, part, boxes, labels)
                needed = {k: outputs[k].unflatten(0, (-1, len(part))) for k in RAW if k in outputs}
                for index, best in enumerate(found):
                    rows = {key: value[index] for key, value in needed.items()}
                    best.append(_best(rows, start, threshold, max_detections))
        return [
            _postprocess(best, prompts, image, max_detections)
            for best, image in zip(found, images, strict=True)
        ]

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


def _find_in_tiles(
    find: Callable[[Sequence[Image.Image]], list[Detections]],
    image: Image.Image,
    side: int,
    overlap: float,
) -> Detections:
    tiles = make_tiles(image.width, image.height, side, overlap)
    parts = [find([image.crop(tile.box_xyxy)])[0] for tile in tiles]
    return merge_tiles(tiles, parts, image.width, image.height)


def normalise(pixels: Tensor) -> Tensor:
    """(3, R, R) uint8 → (1, 3, R, R) float32 in -1..1, in the order of upstream's Sam3Processor."""
    scaled = v2.functional.to_dtype(pixels, torch.float32, scale=True)
    return v2.functional.normalize(scaled, [0.5] * 3, [0.5] * 3)[None]


def check_prompts(
    prompts: Sequence[str], boxes_xywh: Sequence[Sequence[float]] = ()
) -> tuple[str, ...]:
    """Prompts without outer blanks; the visual prompt where there are boxes only."""
    stripped = tuple(" ".join(prompt.split()) for prompt in prompts)
    if any(not any(c.isalnum() for c in prompt) for prompt in stripped):
        raise UserError(
            "--prompt: a prompt of no words; name what to find, as in --prompt 'pothole'"
        )
    if not stripped and not boxes_xywh:
        raise UserError("Nothing to find: give --prompt 'a noun phrase' or --box x,y,w,h")
    return stripped or (VISUAL_PROMPT,)


def normalised_boxes(boxes_xywh: Sequence[Sequence[float]], image: Image.Image) -> Tensor:
    """(N, 4) cxcywh, 0..1, clipped to the image."""
    boxes = torch.tensor([list(box) for box in boxes_xywh], dtype=torch.float32).reshape(-1, 4)
    size = torch.tensor([image.width, image.height] * 2, dtype=torch.float32)
    corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    corners = torch.minimum(corners.clamp(min=0), size)
    for box, (left, top, right, bottom) in zip(boxes_xywh, corners.tolist(), strict=True):
        if not (right > left and bottom > top):
            raise UserError(
                f"--box {','.join(f'{side:g}' for side in box)}: covers nothing of an image of "
                f"{image.width} x {image.height} pixels; it is x,y,w,h in pixels"
            )
    corners = corners / size
    return torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)


def query_scores(outputs: dict[str, Tensor]) -> Tensor:
    """(P, Q), 0..1: of each query, that it is a thing that the prompt names."""
    presence = outputs["presence_logit_dec"].float().reshape(-1, 1).sigmoid()  # (P, 1)
    return outputs["pred_logits"].float().squeeze(-1).sigmoid() * presence


def _best(
    outputs: dict[str, Tensor], first: int, threshold: float, limit: int
) -> dict[str, Tensor]:
    """The highest scores of P prompts x Q queries on one image.

    Args:
        first: the index of the first of these prompts.

    Returns:
        `scores` (N,), `prompt_ids` (N,), `boxes` (N, 4) cxcywh, 0..1, and where the model makes
        masks `logits` (N, h, w).
    """
    scores = query_scores(outputs)
    flat = scores.flatten()
    order = flat.argsort(descending=True, stable=True)[:limit]
    order = order[flat[order] > threshold]
    prompt_ids, query_ids = order // scores.shape[1], order % scores.shape[1]
    best = {
        "scores": flat[order],
        "prompt_ids": prompt_ids + first,
        "boxes": outputs["pred_boxes"][prompt_ids, query_ids].float(),
    }
    if "pred_masks" in outputs:
        best["logits"] = outputs["pred_masks"][prompt_ids, query_ids].float()
    return best


def _postprocess(
    passes: list[dict[str, Tensor]], prompts: tuple[str, ...], image: Image.Image, limit: int
) -> Detections:
    """The best of each pass → detections in pixels of the image."""
    best = {key: torch.cat([output[key] for output in passes]) for key in passes[0]}
    order = best["scores"].argsort(descending=True, stable=True)[:limit]
    size = best["boxes"].new_tensor([image.width, image.height] * 2)
    boxes = box_cxcywh_to_xyxy(best["boxes"][order]) * size
    boxes = torch.minimum(boxes.clamp(min=0), size)  # (N, 4)
    masks = None
    if "logits" in best:
        masks = encode_masks(best["logits"][order], image.height, image.width)
    return Detections(
        boxes_xyxy=boxes.cpu().numpy(),
        scores=best["scores"][order].cpu().numpy(),
        prompt_ids=best["prompt_ids"][order].cpu().numpy(),
        prompts=prompts,
        masks=masks,
        width=image.width,
        height=image.height,
    )
