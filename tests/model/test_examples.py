"""A prompt whose boxes lie in another image is asked as if its tokens had been carried over."""

from __future__ import annotations

import pytest
import torch
from sam3.model.data_misc import FindStage
from sam3.model.geometry_encoders import Prompt
from sam3.model.sam3_image import Sam3Image

from app.config.compose import load_config
from app.datasets.examples import ExampleStage
from app.model.build import build_model
from app.model.upstream.examples import encode_boxes
from tests.helpers import MICRO


@pytest.fixture(scope="module")
def model() -> Sam3Image:
    torch.manual_seed(0)
    return build_model(load_config(MICRO).model).eval()


@pytest.fixture(scope="module")
def features(model: Sam3Image) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 64, 64, generator=random) * 2 - 1
    with torch.no_grad():
        return {
            **model.backbone.forward_image(pixels),
            **model.backbone.forward_text(["circle"], device="cpu"),
        }


def _stage(images: list[int], examples: list[int] | None = None) -> FindStage:
    words = {
        "img_ids": torch.tensor(images),
        "text_ids": torch.zeros(len(images), dtype=torch.long),
        **dict.fromkeys(("input_boxes", "input_boxes_mask", "input_boxes_label")),
        **dict.fromkeys(("input_points", "input_points_mask")),
    }
    if examples is None:
        return FindStage(**words)
    return ExampleStage(**words, example_ids=torch.tensor(examples))


def _boxes(counts: list[int]) -> Prompt:
    """As many boxes of each prompt, padded to the longest."""
    most = max(counts)
    corner = torch.linspace(0.3, 0.6, most)[:, None, None]
    boxes = torch.cat([corner, corner, corner / 2, corner / 3], dim=-1).repeat(1, len(counts), 1)
    mask = torch.arange(most)[None] >= torch.tensor(counts)[:, None]
    return Prompt(box_embeddings=boxes, box_mask=mask)


def _ask(model: Sam3Image, features: dict, stage: FindStage, boxes: Prompt) -> dict:
    with torch.no_grad():
        return model.forward_grounding(
            backbone_out=dict(features),
            find_input=stage,
            find_target=None,
            geometric_prompt=boxes,
        )


def test_boxes_in_the_own_image_are_upstreams(model, features) -> None:
    plain = _ask(model, features, _stage([0, 1]), _boxes([2, 1]))
    ours = _ask(model, features, _stage([0, 1], [0, 1]), _boxes([2, 1]))
    for name in ("pred_logits", "pred_boxes", "pred_masks"):
        assert torch.allclose(plain[name], ours[name], atol=1e-5)


def test_boxes_of_another_image_are_its_tokens_beside_the_words(model, features) -> None:
    """The oracle: tokens of the boxes and of the image that is asked, joined by hand."""
    ours = _ask(model, features, _stage([0, 0], [1, 0]), _boxes([2, 1]))
    with torch.no_grad():
        one = Prompt(box_embeddings=_boxes([2]).box_embeddings)
        shown, _ = encode_boxes(model, features, torch.tensor([1]), one)
        asked, _ = encode_boxes(model, features, torch.tensor([0]), None)
        words = features["language_features"]
        mask = features["language_mask"]
        joined = torch.cat([words, shown[:2], asked])
        known = torch.cat([mask, torch.zeros(1, 3, dtype=torch.bool)], dim=1)
        model_encode = model._encode_prompt
        model._encode_prompt = lambda out, *_, **__: (joined, known, out)
        try:
            by_hand = _ask(model, features, _stage([0]), one)
        finally:
            model._encode_prompt = model_encode
    for name in ("pred_logits", "pred_boxes", "pred_masks"):
        assert torch.allclose(ours[name][:1], by_hand[name], atol=1e-5)
    alone = _ask(model, features, _stage([0]), _boxes([1]))
    assert torch.allclose(ours["pred_logits"][1:], alone["pred_logits"], atol=1e-5)


def test_boxes_of_another_image_are_learnt_from(model, features) -> None:
    """Gradients reach what encodes boxes."""
    out = model.forward_grounding(
        backbone_out=dict(features),
        find_input=_stage([0], [1]),
        find_target=None,
        geometric_prompt=_boxes([1]),
    )
    out["pred_logits"].sum().backward()
    gradient = model.geometry_encoder.boxes_direct_project.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    model.zero_grad(set_to_none=True)
