"""Image + prompts → detections: the one path that validation, prediction and serving share.

A prediction reads top to bottom in `Predictor._find_at_once`: image → square → features → prompts,
some at a time → raw outputs → candidates → detections. `Finder.predict` comes before it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sam3.model.data_misc import FindStage
from sam3.model.geometry_encoders import Prompt
from sam3.model.sam3_image import Sam3Image
from torch import Tensor
from torch.nn import functional as F

from app.config.schema import ModelConfig
from app.datasets.levels import Levels
from app.datasets.rle import Rle, from_bounds
from app.datasets.square import to_square
from app.errors import UserError
from app.files import short_hash
from app.inference.concepts import Concept
from app.inference.concepts import check as check_concepts
from app.inference.detections import Detections
from app.inference.finder import Encoded, MemoryShort, Prepared, Query, StagedFinder
from app.inference.inputs import Sized, normalised_boxes
from app.inference.masks import encode_masks
from app.inference.postprocess import (
    THRESHOLD,
    Candidates,
    best_queries,
    join_passes,
    to_detections,
)
from app.model import weights
from app.model.device import (
    autocast,
    choose_device,
    choose_precision,
    release_memory,
    spare_memory,
    told,
)
from app.model.halves import hold_all
from app.model.score_counts import ScoreCounts
from app.model.upstream.examples import encode_boxes
from app.model.vocabulary import VISUAL_PROMPT

log = logging.getLogger("app")
PAIRS_PER_PASS = 16  # pairs of image and prompt that go through DETR together: bounds the memory
MAPS_PER_PAIR = 4  # of the finest level, in float32, that the mask head holds at once
MASK_BYTES = 16  # of a pixel of a mask that a GPU enlarges
MOST_PIXELS = 2**31 - 1  # of all masks that it enlarges at once: torch's `nonzero` takes no more
SMALL = 128  # height and width together; `_use_vectorized_kernel_cond_2d` of UpSampleKernel.cpp
TOKENS_PER_PASS = 16 * 256  # of their features on a CPU, whose caches more of them outgrow
CACHED_TEXTS = 64  # passes whose text features are cached
RAW = ("pred_logits", "presence_logit_dec", "pred_boxes", "pred_masks")  # upstream's names


class Predictor(StagedFinder):
    """Finds with a SAM 3 in torch; the model is put in evaluation mode.

    Features of texts and of the last images are cached, so a predictor is good for as long as the
    weights do not change.

    Args:
        model: upstream's module, already on its device.
        config: its size.
        precision: float32, or the half for autocast.
        prompts: asked for where a call names none.
        threshold: 0..1, least score where a call names none.
        levels, scores: as of `Finder`.
        identity: what tells the weights from others, for the concepts that they encode.
    """

    def __init__(
        self,
        model: Sam3Image,
        config: ModelConfig,
        precision: torch.dtype = torch.float32,
        *,
        prompts: Sequence[str] = (),
        threshold: float = THRESHOLD,
        levels: Levels | None = None,
        scores: ScoreCounts | None = None,
        identity: str = "",
    ) -> None:
        self.model = model.eval()
        self.config = config
        self.precision = precision
        self.prompts = tuple(prompts)
        self.threshold = threshold
        self.levels = levels
        self.scores = scores
        self.identity = identity
        self._parameters = list(model.parameters())
        self.device = self._parameters[0].device
        self._pairs = self._images = sys.maxsize  # most at once, since memory ran out
        self._text_features: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._encoded: tuple[Tensor, dict[str, Any]] | None = None  # squares, their features
        self._positions: list[Tensor] | None = None  # those of each level, which images share
        self._context_length = config.text.context_length
        self._fill_caches()

    @classmethod
    def load(
        cls, path: Path | str, *, device: str = "auto", precision: str = "auto", **options: Any
    ) -> Predictor:
        """Load a weights folder or file.

        The classes and the threshold that the weights name are used where a call gives none.

        Args:
            device: auto, cpu or cuda.
            precision: auto, fp32, bf16 or fp16.
            options: as in `app.model.weights.load`.

        Raises:
            UserError: no such device or precision, or no weights that fit a model.
        """
        target = choose_device(device)
        model, header = weights.load(Path(path), **options)
        dtype = choose_precision(precision, target, header.model)
        threshold = THRESHOLD if header.threshold is None else header.threshold
        hold_all(model, dtype)
        return cls(
            model.to(target),
            header.model,
            dtype,
            prompts=header.prompts,
            threshold=threshold,
            levels=header.levels,
            scores=header.scores,
            identity="" if header.golden is None else short_hash(repr(header.golden), 16),
        )

    def _fill_caches(self) -> None:
        """Fill the caches of upstream's modules, outside of inference mode.

        Tensors that are made inside cannot be saved for the backward pass of a later training step.
        """
        tokens = self.config.resolution // self.config.vision.patch_size
        for side in (4 * tokens, 2 * tokens, tokens, tokens // 2):  # the levels of the neck
            self.model.backbone.vision_backbone.position_encoding(
                torch.empty(1, 1, side, side, device=self.device)
            )
        decoder = self.model.transformer.decoder
        decoder.compilable_cord_cache = decoder._get_coords(tokens, tokens, self.device)
        decoder.compilable_stored_size = (tokens, tokens)

    def _tokens(self, prompt: str) -> Sequence[int]:
        """Return all tokens of a prompt; none where its features are stored."""
        tokenizer = getattr(self.model.backbone.language_backbone, "tokenizer", None)
        return () if tokenizer is None else tokenizer.encode(prompt)

    def _find(self, images: Sequence[Image.Image], query: Query) -> list[Detections]:
        """Return what is in each image, with fewer at once where the GPU's memory runs out.

        Raises:
            UserError: it does not hold one image with one prompt.
        """
        if len(images) > self._images:
            first, others = images[: self._images], images[self._images :]
            return [*self._find(first, query), *self._find(others, query)]
        try:
            return self._find_at_once(images, query)
        except torch.OutOfMemoryError as error:
            shortage = told(error)
        # Not before the error is gone, which holds what was computed.
        self._encoded = None
        release_memory()
        prompts = min(self._prompts_per_pass(len(images)), len(query.prompts))
        if prompts > 1:
            self._pairs = prompts // 2 * len(images)
        elif len(images) > 1:
            self._images = len(images) // 2
        else:
            raise UserError(
                f"{shortage} It holds not even one image at {self.config.resolution} px with one "
                "prompt. Free it (nvidia-smi names who holds it), or give --device cpu"
            )
        log.info("note: the GPU's memory is short: fewer prompts or images are seen at once")
        return self._find(images, query)

    @torch.inference_mode()
    def _find_at_once(self, images: Sequence[Image.Image], query: Query) -> list[Detections]:
        """Return what is in each of B images, seen as a whole: a prediction from end to end."""
        prepared = [each if isinstance(each, Prepared) else self.prepare(each) for each in images]
        squares = torch.stack([each.pixels for each in prepared])  # (B, 3, R, R)
        with autocast(self.device, self.precision), self._no_gradients():
            features = self._encode(squares)  # "backbone_fpn": 3 levels (B, d, h, w), and others
            best = self._choose_all(features, query, images)
        return [self.finish(each, query, image) for each, image in zip(best, images, strict=True)]

    def _choose_all(
        self, features: dict[str, Any], query: Query, images: Sequence[Sized]
    ) -> list[Candidates]:
        """Return the best queries on each of B images, of which these are the features."""
        boxes, is_positive = _example_boxes(query, images)  # (N, B, 4) cxcywh, 0..1; (N,) bool
        prompts = query.prompts  # P of them
        prompts_per_pass = self._prompts_per_pass(len(images))
        passes: list[list[Candidates]] = [[] for _ in images]  # of each image
        for first in range(0, len(prompts), prompts_per_pass):
            part = prompts[first : first + prompts_per_pass]  # K of them
            outputs = self._ground(features, part, boxes, is_positive)  # (B * K, Q, …)
            raw = {k: outputs[k].unflatten(0, (-1, len(part))) for k in RAW if k in outputs}
            for index in range(len(images)):
                answers = {name: value[index] for name, value in raw.items()}  # (K, Q, …)
                passes[index].append(_choose(answers, first, query))
        return [join_passes(each, query.max_detections) for each in passes]

    # The steps of a prediction apart, as a server takes them: see `StagedFinder`.

    @property
    def gathers(self) -> bool:
        """Whether images are seen faster together: a GPU sees several in the time of one."""
        return self.device.type != "cpu"

    def prepare(self, image: Image.Image) -> Prepared:
        """Return an image as a square (3, R, R) uint8."""
        return Prepared(to_square(image, self.config.resolution), image.width, image.height)

    @torch.inference_mode()
    def encode(self, images: Sequence[Prepared]) -> list[Encoded]:
        """Return the features of each of B images: three levels (1, d, h, w)."""
        with self._counted_memory(), autocast(self.device, self.precision), self._no_gradients():
            features = self._forward_image(torch.stack([image.pixels for image in images]))
        if self._positions is None:
            self._positions = [level[:1].clone() for level in features["vision_pos_enc"]]
        parts = [
            [level[index : index + 1] for level in features["backbone_fpn"]]
            for index in range(len(images))
        ]
        if len(images) > 1:  # or one image that is kept would keep those that it was seen with
            parts = [[level.clone() for level in levels] for levels in parts]
        return [
            Encoded(levels, image.width, image.height, sum(level.nbytes for level in levels))
            for levels, image in zip(parts, images, strict=True)
        ]

    @torch.inference_mode()
    def ground(self, images: Sequence[Encoded], query: Query) -> list[Candidates]:
        """Return the best queries on each of B images."""
        joined = [
            each[0] if len(each) == 1 else torch.cat(each)
            for each in zip(*(image.features for image in images), strict=True)
        ]
        assert self._positions is not None  # there are features
        features = {
            "vision_features": joined[-1],
            "vision_pos_enc": [level.expand(len(images), -1, -1, -1) for level in self._positions],
            "backbone_fpn": joined,
            "sam2_backbone_out": None,
        }
        with self._counted_memory(), autocast(self.device, self.precision), self._no_gradients():
            try:
                return self._choose_all(features, query, images)
            except torch.OutOfMemoryError:
                pairs = self._prompts_per_pass(len(images)) * len(images)
                self._pairs = max(1, min(pairs, len(query.prompts) * len(images)) // 2)
                raise

    @torch.inference_mode()
    def finish(self, candidates: Candidates, query: Query, image: Sized) -> Detections:
        """Return candidates as detections of an image, with their masks."""
        masks = None
        if candidates.mask_logits is not None:  # N of (h, w)
            with self._counted_memory():
                masks = encode_where_they_are(candidates.mask_logits, image.height, image.width)
        return to_detections(candidates, masks, query.prompts, image.width, image.height)

    def release_memory(self) -> None:
        """Give the GPU back what no tensor holds."""
        self._encoded = None
        if self.gathers:
            release_memory()

    @contextlib.contextmanager
    def _counted_memory(self) -> Iterator[None]:
        """Raise MemoryShort where the GPU's memory runs out within the block."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise MemoryShort(f"{told(error)} Free it, or ask for less at once") from None

    def _prompts_per_pass(self, images: int) -> int:
        pairs = min(self._pairs, pairs_per_pass(self.config, self.device))
        return max(1, pairs // images)

    @torch.inference_mode()
    def answers(
        self, image: Image.Image, prompts: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return upstream's own features of an image and outputs for P prompts, (P, …).

        Nothing is chosen from the outputs: exports are compared with them.
        """
        square = to_square(image, self.config.resolution)[None]  # (1, 3, R, R)
        no_boxes = torch.zeros(0, 1, 4), torch.zeros(0, dtype=torch.bool)
        with autocast(self.device, self.precision), self._no_gradients():
            features = self._encode(square)
            return features, self._ground(features, tuple(prompts), *no_boxes)

    @contextlib.contextmanager
    def _no_gradients(self) -> Iterator[None]:
        """Clear `requires_grad` of all weights within the block.

        torch.matmul multiplies another way, and rounds otherwise, by a weight that requires
        gradients, even where none are computed (LinearAlgebra.cpp, should_fold). Partly frozen
        weights would not find in training what they find when loaded again.
        """
        trainable = [parameter for parameter in self._parameters if parameter.requires_grad]
        for parameter in trainable:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)

    def _encode(self, squares: Tensor) -> dict[str, Any]:
        """Return upstream's features of images (B, 3, R, R) uint8.

        Those of the last call are cached, for a second question about the same images.
        """
        if self._encoded is None or not torch.equal(self._encoded[0], squares):
            self._encoded = squares, self._forward_image(squares)
        return self._encoded[1]

    def _forward_image(self, squares: Tensor) -> dict[str, Any]:
        on_device = squares.to(self.device)  # as bytes: a quarter of what the numbers take
        pixels = torch.cat([normalise(square) for square in on_device])  # (B, 3, R, R), -1..1
        features: dict[str, Any] = self.model.backbone.forward_image(pixels)
        return features

    def _text(self, prompts: tuple[str, ...]) -> dict[str, Tensor]:
        """Return upstream's features of K prompts: "language_features" (L, K, d) and others."""
        if prompts not in self._text_features:
            if len(self._text_features) >= CACHED_TEXTS:
                self._text_features.clear()
            words = [VISUAL_PROMPT if each in self.concepts else each for each in prompts]
            encoded = self.model.backbone.forward_text(words, device=self.device)
            self._text_features[prompts] = self._with_concepts(encoded, prompts)
        return self._text_features[prompts]

    def _with_concepts(
        self, encoded: dict[str, Tensor], prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        """Put the tokens of concepts in the place of their words'."""
        known = {k: self.concepts[name] for k, name in enumerate(prompts) if name in self.concepts}
        if not known:
            return encoded
        features, mask = encoded["language_features"], encoded["language_mask"]
        longer = max(0, *(len(c.tokens) - len(features) for c in known.values()))
        features = F.pad(features, (0, 0, 0, 0, 0, longer))  # (L, K, d)
        mask = F.pad(mask, (0, longer), value=True)  # (K, L)
        for place, concept in known.items():
            count = len(concept.tokens)
            features[:count, place] = torch.from_numpy(concept.tokens).to(features)
            mask[place] = torch.arange(len(features), device=mask.device) >= count
        return encoded | {"language_features": features, "language_mask": mask}

    def learn(self, concepts: Sequence[Concept]) -> None:
        """Take concepts in the place of those from before."""
        super().learn(concepts)
        self._text_features.clear()

    def _check_concepts(self, concepts: Sequence[Concept]) -> str:
        return check_concepts(concepts, self.config.d_model, self.identity)

    @torch.inference_mode()
    def concept(
        self,
        name: str,
        shots: Sequence[tuple[Image.Image, Sequence[Sequence[float]]]],
        *,
        words: str = VISUAL_PROMPT,
    ) -> Concept:
        """Encode example boxes as a concept, for images that they were not drawn in.

        Args:
            name: by which it is asked for.
            shots: images, RGB, each with its boxes as xywh in pixels.
            words: that are read beside the boxes.

        Raises:
            UserError: a box covers nothing of its image.
        """
        with autocast(self.device, self.precision), self._no_gradients():
            text = self.model.backbone.forward_text([words], device=self.device)
            tokens = [text["language_features"][~text["language_mask"][0], 0]]  # (T, d)
            for image, boxes_xywh in shots:
                boxes = torch.from_numpy(normalised_boxes(boxes_xywh, image)).to(self.device)
                prompt = Prompt(box_embeddings=boxes[:, None])  # (N, 1, 4)
                features = self._forward_image(self.prepare(image).pixels[None])
                first = torch.zeros(1, dtype=torch.long, device=self.device)
                encoded, _ = encode_boxes(self.model, features, first, prompt)  # (N + 1, 1, d)
                tokens.append(encoded[: len(boxes), 0])
        joined = torch.cat([each.float() for each in tokens]).cpu().numpy()
        return Concept(name, joined, sum(len(boxes) for _, boxes in shots), self.identity)

    def _ground(
        self, features: dict[str, Any], prompts: Sequence[str], boxes: Tensor, is_positive: Tensor
    ) -> dict[str, Any]:
        """Call upstream's `forward_grounding` for K prompts on each of B images.

        Args:
            features: of the B images.
            boxes: (N, B, 4) cxcywh, 0..1: example boxes.
            is_positive: (N,) bool: whether a box shows what is meant, or what is not.

        Returns:
            Upstream's outputs, (B * K, …): the K prompts of the first image, of the second, …
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
            box_labels=is_positive.to(device, torch.long)[:, None].repeat(1, pairs),
        )
        return self.model.forward_grounding(
            backbone_out={**features, **text},
            find_input=stage,
            find_target=None,
            geometric_prompt=geometry,
        )


def pairs_per_pass(config: ModelConfig, device: torch.device) -> int:
    """Return how many pairs of image and prompt share a pass: by a CPU's caches, a GPU's memory."""
    tokens = (config.resolution // config.vision.patch_size) ** 2
    if (spare := spare_memory(device)) is None:
        room = TOKENS_PER_PASS // tokens
    else:
        room = spare // (MAPS_PER_PAIR * 16 * tokens * config.d_model * torch.float32.itemsize)
    return max(1, min(PAIRS_PER_PASS, room))


def normalise(pixels: Tensor) -> Tensor:
    """Return (3, R, R) uint8 as (1, 3, R, R) float32 in -1..1, on its device.

    The order of the operations is that of upstream's Sam3Processor, whose transforms would send
    mean and deviation to a GPU each time.
    """
    return pixels[None].to(torch.float32).mul_(1 / 255).sub_(0.5).div_(0.5)


def query_scores(outputs: dict[str, Tensor]) -> Tensor:
    """Return (P, Q), 0..1: the score of each query as a thing that the prompt names."""
    presence = outputs["presence_logit_dec"].float().reshape(-1, 1).sigmoid()  # (P, 1)
    return outputs["pred_logits"].float().squeeze(-1).sigmoid() * presence


def _example_boxes(query: Query, images: Sequence[Sized]) -> tuple[Tensor, Tensor]:
    """Return the query's N boxes in each of B images, (N, B, 4) cxcywh, 0..1, and (N,) bool.

    The second says whether a box is an example of what is meant. Raises UserError where a box
    covers nothing of an image.
    """
    every_box = [*query.boxes_xywh, *query.negative_boxes_xywh]
    boxes = np.stack([normalised_boxes(every_box, image) for image in images], axis=1)
    return torch.from_numpy(boxes), torch.arange(len(every_box)) < len(query.boxes_xywh)


def _choose(outputs: dict[str, Tensor], first: int, query: Query) -> Candidates:
    """Return the highest scores of K prompts and Q queries on one image; masks stay where they are.

    Args:
        outputs: upstream's, (K, Q, …).
        first: index of the first of the K prompts among all.
    """
    scored = [query_scores(outputs)[..., None], outputs["pred_boxes"].float()]
    found = torch.cat(scored, dim=2).cpu().numpy()  # (K, Q, 5): what is waited for comes at once
    scores, boxes = found[..., 0], found[..., 1:]
    prompt_ids, query_ids = best_queries(scores, query.threshold, query.max_detections)  # (N,) each
    masks = outputs.get("pred_masks")  # (K, Q, h, w)
    if masks is not None:
        chosen = torch.from_numpy(prompt_ids * scores.shape[1] + query_ids)
        masks = masks.flatten(0, 1)[chosen.to(masks.device, non_blocking=True)].float()
    return Candidates(
        scores=scores[prompt_ids, query_ids],
        prompt_ids=prompt_ids + first,
        boxes_cxcywh=boxes[prompt_ids, query_ids],
        mask_logits=None if masks is None else list(masks),
        best_score=float(scores.max()),
    )


def encode_where_they_are(logits: Sequence[Tensor], height: int, width: int) -> list[Rle]:
    """Return N mask logits (h, w) as N RLEs of an image (height, width).

    A CPU looks at their outlines alone, unless the masks are so small that torch has another order
    of sums for them. A GPU makes whole masks, as many at once as its memory has room for, and only
    the bounds of their runs leave it.
    """
    if not logits:
        return []
    spare = spare_memory(logits[0].device)
    if spare is None and height + width > SMALL:
        return encode_masks([mask.numpy() for mask in logits], height, width)
    most = MOST_PIXELS if spare is None else min(spare // MASK_BYTES, MOST_PIXELS)
    at_once = max(1, most // (height * width))
    return [
        mask
        for first in range(0, len(logits), at_once)
        for mask in enlarge_and_encode(
            torch.stack([*logits[first : first + at_once]]), height, width
        )
    ]


def enlarge_and_encode(logits: Tensor, height: int, width: int) -> list[Rle]:
    """Return mask logits (N, h, w) as N RLEs of an image (height, width), by whole masks."""
    whole = F.interpolate(logits[:, None], (height, width), mode="bilinear", align_corners=False)
    inside = (whole[:, 0] > 0).transpose(1, 2).flatten(1)  # (N, width * height), as runs go
    changed = torch.cat([inside[:, :1], inside[:, 1:] ^ inside[:, :-1]], dim=1)
    places = changed.flatten().nonzero()[:, 0].cpu().numpy()
    firsts = np.searchsorted(places, np.arange(len(logits) + 1) * height * width)  # of each mask
    return [
        from_bounds(places[first:last] - index * height * width, height, width)
        for index, (first, last) in enumerate(itertools.pairwise(firsts))
    ]
