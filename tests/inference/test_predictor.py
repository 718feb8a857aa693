"""The one path of prediction, against upstream's own processor and a plain version."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as mask_utils
from sam3.model.sam3_image_processor import Sam3Processor
from torch.nn import functional as F

from app.config import load_config
from app.errors import UserError
from app.inference import predictor as predictor_module
from app.inference.predictor import Predictor, encode_masks
from app.model.build import build_model
from tests.conftest import TINY

CONFIG = load_config(TINY).model


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(1)
    return Predictor(build_model(CONFIG), CONFIG)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    ImageDraw.Draw(image).ellipse((20, 10, 60, 50), fill=(200, 30, 30))
    return image


def _upstream(predictor: Predictor, image: Image.Image, threshold: float) -> Sam3Processor:
    return Sam3Processor(
        predictor.model, CONFIG.resolution, device="cpu", confidence_threshold=threshold
    )


def _same(ours, theirs) -> None:
    order = theirs["scores"].argsort(descending=True, stable=True)
    assert len(ours) == len(order) > 0
    size = torch.tensor([ours.width, ours.height] * 2)
    boxes = torch.minimum(theirs["boxes"][order].clamp(min=0), size)
    assert np.allclose(ours.scores, theirs["scores"][order], atol=1e-6)
    assert np.allclose(ours.boxes_xyxy, boxes, atol=1e-4)
    for rle, mask in zip(ours.masks, theirs["masks"][order, 0].numpy(), strict=True):
        assert np.array_equal(mask_utils.decode(rle).astype(bool), mask)


def test_words_find_what_upstreams_processor_finds(predictor, image) -> None:
    ours = predictor.predict(image, ["red circle"], threshold=0.0)
    processor = _upstream(predictor, image, 0.0)
    theirs = processor.set_text_prompt("red circle", processor.set_image(image))
    _same(ours, theirs)


@pytest.mark.parametrize("words", [[], ["red circle"]])
def test_boxes_find_what_upstreams_processor_finds(predictor, image, words) -> None:
    ours = predictor.predict(image, words, boxes_xywh=[(20, 10, 40, 40)], threshold=0.0)
    processor = _upstream(predictor, image, 0.0)
    state = processor.set_image(image)
    if words:
        state = processor.set_text_prompt(words[0], state)
    box = [40 / 90, 30 / 60, 40 / 90, 40 / 60]  # cxcywh, 0..1
    theirs = processor.add_geometric_prompt(box, True, state)
    _same(ours, theirs)
    plain = predictor.predict(image, words or ["visual"], threshold=0.0)
    assert not np.allclose(plain.scores, ours.scores, atol=1e-4)


def test_many_prompts_find_what_each_finds_alone(predictor, image, monkeypatch) -> None:
    prompts = ["red circle", "dog", "a very long prompt of many words", "cat"]
    monkeypatch.setattr(predictor_module, "PROMPTS_A_PASS", 3)
    together = predictor.predict(image, prompts, threshold=0.0, max_detections=1000)
    assert together.prompts == tuple(prompts)
    for index, prompt in enumerate(prompts):
        alone = predictor.predict(image, [prompt], threshold=0.0)
        chosen = together.prompt_ids == index
        assert np.allclose(together.scores[chosen], alone.scores, atol=1e-5)
        assert np.allclose(together.boxes_xyxy[chosen], alone.boxes_xyxy, atol=1e-3)


def test_threshold_and_limit(predictor, image) -> None:
    everything = predictor.predict(image, ["a", "b"], threshold=0.0)
    middle = float(np.median(everything.scores))
    some = predictor.predict(image, ["a", "b"], threshold=middle)
    assert len(some) == int((everything.scores > middle).sum())
    few = predictor.predict(image, ["a", "b"], threshold=0.0, max_detections=3)
    assert np.array_equal(few.scores, np.sort(everything.scores)[::-1][:3])
    none = predictor.predict(image, ["a"], threshold=1.0)
    assert (len(none), none.masks, none.boxes_xyxy.shape) == (0, [], (0, 4))


def test_boxes_stay_in_the_image(predictor, image) -> None:
    found = predictor.predict(image, ["a"], threshold=0.0)
    assert found.boxes_xyxy.dtype == np.float32
    assert (found.boxes_xyxy >= 0).all()
    assert (found.boxes_xyxy[:, 2] <= 90).all()
    assert (found.boxes_xyxy[:, 3] <= 60).all()


def test_masks_are_resized_and_then_thresholded() -> None:
    logits = torch.randn(20, 16, 16)
    for rle, plain in zip(encode_masks(logits, 45, 70), logits, strict=True):
        big = F.interpolate(plain[None, None], (45, 70), mode="bilinear", align_corners=False)
        expected = big[0, 0].sigmoid().numpy() > 0.5
        assert np.array_equal(mask_utils.decode(rle).astype(bool), expected)
        assert rle["size"] == [45, 70]
        assert isinstance(rle["counts"], str)


def test_bfloat16_is_near_float32(predictor, image) -> None:
    half = Predictor(predictor.model, CONFIG, torch.bfloat16)
    ours = half.predict(image, ["red circle"], threshold=0.0)
    exact = predictor.predict(image, ["red circle"], threshold=0.0)
    assert np.allclose(np.sort(ours.scores), np.sort(exact.scores), atol=0.03)


@pytest.mark.parametrize("prompts", [[""], ["  "], ["circle", "\t"], ["?!"]])
def test_a_prompt_of_no_words_is_refused(predictor, image, prompts) -> None:
    with pytest.raises(UserError, match="no words"):
        predictor.predict(image, prompts)


def test_nothing_to_find_is_refused(predictor, image) -> None:
    with pytest.raises(UserError, match="Nothing to find"):
        predictor.predict(image)


@pytest.mark.parametrize("box", [(95, 5, 10, 10), (5, 70, 10, 10), (-20, 0, 10, 10)])
def test_a_box_outside_the_image_is_refused(predictor, image, box) -> None:
    with pytest.raises(UserError, match="covers nothing"):
        predictor.predict(image, boxes_xywh=[box])
