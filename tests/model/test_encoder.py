"""A layer of DETR's encoder is upstream's."""

from __future__ import annotations

from typing import Any

import torch

from app.config.compose import load_model_config
from app.model.build import build_model
from app.model.upstream.encoder import encode_layer

CELLS, WORDS, PROMPTS = 9, 5, 3


def _layer(part: str) -> Any:
    torch.manual_seed(0)
    return build_model(load_model_config("nano")).get_submodule(part)[0].eval()


@torch.no_grad()
def test_prompts_of_images() -> None:
    """To the bit; to rounding where prompts of an image share what comes before their words."""
    layer = _layer("transformer.encoder.layers")
    tokens, places = torch.randn(2, PROMPTS, CELLS, layer.d_model).unbind()
    memory = torch.randn(PROMPTS, WORDS, layer.d_model)
    inputs: dict[str, Any] = {"query_pos": places, "pos": None, "memory_mask": None}
    inputs["memory_key_padding_mask"] = torch.arange(WORDS).expand(PROMPTS, WORDS) > 2
    expected = layer.forward_pre(tokens, memory, **inputs)
    assert torch.equal(encode_layer(layer, tokens, memory, **inputs), expected)
    image_ids = torch.tensor([0, 1, 1])
    inputs["query_pos"] = places[image_ids]
    expected = layer.forward_pre(tokens[image_ids], memory, **inputs)
    of_images = tokens[:2], places[:2], image_ids
    found = encode_layer(layer, tokens[image_ids], memory, of_images, **inputs)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_class_token_of_the_geometry_encoder() -> None:
    layer = _layer("geometry_encoder.encode")
    token, cells = (torch.randn(n, PROMPTS, layer.d_model) for n in (1, CELLS))
    inputs: dict[str, Any] = {"query_pos": None, "pos": torch.randn_like(cells)}
    inputs |= {"memory_mask": None, "memory_key_padding_mask": None}
    expected = layer.forward_pre(token, cells, **inputs)
    assert torch.equal(encode_layer(layer, token, cells, **inputs), expected)
