"""Image + prompts → detections: the one path that validation, prediction and serving share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from sam3.model.box_ops import box_cxcywh_to_xyxy
from sam3.model.data_misc import FindStage
from sam3.model.geometry_encoders import Prompt
from sam3.model.sam3_image import Sam3Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from app.config import ModelConfig
from app.datasets.square import to_square
from app.errors import UserError
from app.model import weights
from app.model.device import choose_device, choose_precision

PROMPTS_A_PASS = 16  # prompts that go through DETR and mask head together: bounds the memory
VISUAL_PROMPT = "visual"  # what upstream says in place of words when there are boxes only


@dataclass(frozen=True)
class Detections:
    """What was found in one image, highest score first.

    Attributes:
        boxes_xyxy: (N, 4) float32, pixels of the image, within it.
        scores: (N,) float32, 0..1.
        prompt_ids: (N,) int64, index into `prompts`.
        prompts: what was asked for.
        masks: N compressed COCO RLEs of the image's size; None from a model without a mask head.
        width, height: of the image, pixels.
    """

    boxes_xyxy: np.ndarray
    scores: np.ndarray
    prompt_ids: np.ndarray
    prompts: tuple[str, ...]
    masks: list[dict[str, Any]] | None
    width: int
    height: int

    def __len__(self) -> int:
        return len(self.scores)


class Predictor:
    """A SAM 3 that answers prompts; the model is put in evaluation mode.

    Text features are kept, so a predictor is good for as long as the weights do not change.

    Args:
        model: upstream's module, already on its device.
        config: its size.
        precision: float32, or bfloat16 for autocast.
    """

    def __init__(
        self, model: Sam3Image, config: ModelConfig, precision: torch.dtype = torch.float32
    ) -> None:
        self.model = model.eval()
        self.config = config
        self.precision = precision
        self.device = next(model.parameters()).device
        self._text_features: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._encoded: tuple[Image.Image, dict[str, Any]] | None = None
        self._fill_caches()

    @classmethod
    def load(
        cls, path: Path | str, *, device: str = "auto", precision: str = "auto", **options: Any
    ) -> Predictor:
        """Load a weights folder or file; `options` as in `app.model.weights.load`."""
        target = choose_device(device)
        model, header = weights.load(Path(path), **options)
        dtype = choose_precision(precision, target, header.model)
        return cls(model.to(target), header.model, dtype)

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

    @torch.inference_mode()
    def predict(
        self,
        image: Image.Image,
        prompts: Sequence[str] = (),
        *,
        boxes_xywh: Sequence[Sequence[float]] = (),
        threshold: float = 0.5,
        max_detections: int = 100,
    ) -> Detections:
        """Find what the prompts name in one image.

        Args:
            image: RGB, upright.
            prompts: noun phrases; the image is encoded once for all of them.
            boxes_xywh: example boxes, pixels, that join every prompt; they need no words.
            threshold: 0..1, least score.
            max_detections: most detections over all prompts, the highest scores.

        Raises:
            UserError: neither words nor boxes, an empty prompt, a box outside the image.
        """
        prompts = check_prompts(prompts, boxes_xywh)
        boxes = normalised_boxes(boxes_xywh, image)
        with self._autocast():
            features = self._image(image)
            outputs = [
                self._ground(features, prompts[start : start + PROMPTS_A_PASS], boxes)
                for start in range(0, len(prompts), PROMPTS_A_PASS)
            ]
        joined: dict[str, Tensor] = {
            key: torch.cat([output[key] for output in outputs]).float()
            for key in ("pred_logits", "presence_logit_dec", "pred_boxes", "pred_masks")
            if key in outputs[0]
        }
        return _postprocess(joined, prompts, image, threshold, max_detections)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16
        )

    def _image(self, image: Image.Image) -> dict[str, Any]:
        """Features of the image; the last one's are kept, for a second question about it."""
        if self._encoded is None or self._encoded[0] is not image:
            pixels = normalise(to_square(image, self.config.resolution)).to(self.device)
            self._encoded = image, self.model.backbone.forward_image(pixels)
        return self._encoded[1]

    def _text(self, prompts: tuple[str, ...]) -> dict[str, Tensor]:
        if prompts not in self._text_features:
            encoded = self.model.backbone.forward_text(list(prompts), device=self.device)
            self._text_features[prompts] = encoded
        return self._text_features[prompts]

    def _ground(
        self, features: dict[str, Any], prompts: Sequence[str], boxes: Tensor
    ) -> dict[str, Tensor]:
        """Upstream's `forward_grounding` for P prompts on the one image that `features` hold."""
        count, device = len(prompts), self.device
        text = self._text(tuple(prompts))
        ids = torch.arange(count, device=device)
        stage = FindStage(
            img_ids=torch.zeros_like(ids),
            text_ids=ids,
            input_boxes=None,
            input_boxes_mask=None,
            input_boxes_label=None,
            input_points=None,
            input_points_mask=None,
        )
        box_prompt = boxes.to(device)[:, None].repeat(1, count, 1)  # (N, P, 4) cxcywh, 0..1
        geometry = Prompt(
            box_embeddings=box_prompt,
            box_mask=torch.zeros(count, len(boxes), dtype=torch.bool, device=device),
            box_labels=torch.ones(len(boxes), count, dtype=torch.long, device=device),
        )
        return self.model.forward_grounding(
            backbone_out={**features, **text},
            find_input=stage,
            find_target=None,
            geometric_prompt=geometry,
        )


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


def _postprocess(
    outputs: dict[str, Tensor],
    prompts: tuple[str, ...],
    image: Image.Image,
    threshold: float,
    max_detections: int,
) -> Detections:
    """Raw outputs of P prompts x Q queries → detections in pixels of the image."""
    presence = outputs["presence_logit_dec"].reshape(-1, 1).sigmoid()  # (P, 1)
    scores = outputs["pred_logits"].squeeze(-1).sigmoid() * presence  # (P, Q)
    flat = scores.flatten()
    order = flat.argsort(descending=True, stable=True)[:max_detections]
    order = order[flat[order] > threshold]
    prompt_ids, query_ids = order // scores.shape[1], order % scores.shape[1]
    size = flat.new_tensor([image.width, image.height] * 2)
    boxes = box_cxcywh_to_xyxy(outputs["pred_boxes"][prompt_ids, query_ids]) * size
    boxes = torch.minimum(boxes.clamp(min=0), size)  # (N, 4)
    masks = None
    if "pred_masks" in outputs:
        logits = outputs["pred_masks"][prompt_ids, query_ids]  # (N, h, w)
        masks = encode_masks(logits, image.height, image.width)
    return Detections(
        boxes_xyxy=boxes.cpu().numpy(),
        scores=flat[order].cpu().numpy(),
        prompt_ids=prompt_ids.cpu().numpy(),
        prompts=prompts,
        masks=masks,
        width=image.width,
        height=image.height,
    )


def encode_masks(logits: Tensor, height: int, width: int) -> list[dict[str, Any]]:
    """Mask logits (N, h, w) → N compressed RLEs of the image's size.

    Upstream's order: the logits are resized, then thresholded at a probability of one half.
    """
    masks = []
    for chunk in logits.split(16):  # bounds the memory at full image size
        resized = F.interpolate(
            chunk[:, None], (height, width), mode="bilinear", align_corners=False
        )
        binary = (resized[:, 0] > 0).permute(1, 2, 0).to(torch.uint8).cpu().numpy()  # (H, W, n)
        for rle in mask_utils.encode(np.asfortranarray(binary)):
            masks.append({"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")})
    return masks
