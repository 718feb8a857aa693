"""The one path of prediction, against upstream's own processor and a plain version."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as mask_utils
from sam3.model.sam3_image_processor import Sam3Processor

from app.config import load_config
from app.errors import UserError
from app.inference import Predictor
from app.inference import predictor as predictor_module
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


def test_negative_boxes_find_what_upstreams_processor_finds(predictor, image) -> None:
    boxes = {"boxes_xywh": [(20, 10, 40, 40)], "negative_boxes_xywh": [(0, 0, 9, 6)]}
    ours = predictor.predict(image, ["red circle"], threshold=0.0, **boxes)
    processor = _upstream(predictor, image, 0.0)
    state = processor.set_text_prompt("red circle", processor.set_image(image))
    processor.add_geometric_prompt([40 / 90, 30 / 60, 40 / 90, 40 / 60], True, state)
    theirs = processor.add_geometric_prompt([0.05, 0.05, 0.1, 0.1], False, state)
    _same(ours, theirs)
    boxes["boxes_xywh"] += boxes.pop("negative_boxes_xywh")
    positive = predictor.predict(image, ["red circle"], threshold=0.0, **boxes)
    assert not np.allclose(positive.scores, ours.scores, atol=1e-5)


def test_a_batch_finds_what_each_image_alone_does(predictor, image, monkeypatch) -> None:
    monkeypatch.setattr(predictor_module, "PROMPTS_A_PASS", 5)  # two prompts of two images
    images = [image, image.resize((50, 70)).rotate(90)]
    words = {"prompts": ["red circle", "dog", "cat"], "boxes_xywh": [(5, 6, 30, 20)]}
    together = predictor.predict_batch(images, **words, threshold=0.0, max_detections=40)
    for found, single in zip(together, images, strict=True):
        alone = predictor.predict(single, **words, threshold=0.0, max_detections=40)
        assert (found.width, found.height) == single.size
        assert len(found) == 40
        assert np.allclose(found.scores, alone.scores, atol=1e-5)
        assert np.allclose(found.boxes_xyxy, alone.boxes_xyxy, atol=1e-2)
        assert np.array_equal(found.prompt_ids, alone.prompt_ids)
    assert not np.allclose(together[0].scores, together[1].scores, atol=1e-4)


def test_text_features_do_not_pile_up(predictor, image, monkeypatch) -> None:
    monkeypatch.setattr(predictor_module, "TEXTS_KEPT", 2)
    for prompt in ("a", "b", "c", "d"):
        predictor.predict(image, [prompt])
    assert len(predictor._text_features) <= 2


def test_the_python_interface(tiny_run, image) -> None:
    found = Predictor.load(tiny_run / "weights/best", device="cpu").predict(
        image, prompts=["circle"], threshold=0.0, max_detections=3
    )
    assert (found.boxes_xyxy.shape, found.boxes_xyxy.dtype) == ((3, 4), np.float32)
    masks = found.bool_masks()
    assert (masks.shape, masks.dtype) == ((3, 60, 90), bool)
    assert np.array_equal(masks[1], mask_utils.decode(found.masks[1]).astype(bool))
    assert found.select([2, 0]).scores.tolist() == found.scores[[2, 0]].tolist()


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
