"""The decoder in fewer operations is upstream's: to the bit in predictions, else to rounding."""

from __future__ import annotations

from typing import Any

import torch
from sam3.model.decoder import TransformerDecoder
from torch import Tensor

from app.config.compose import load_model_config
from app.model.build import build_model
from app.model.upstream.attention import project_at_once
from app.model.upstream.decoder import decode_layer, of_both, together

SIDE, WORDS, PROMPTS = 24, 5, 3


def _decoder() -> Any:
    """Return nano's decoder, with boxes that are not all alike."""
    torch.manual_seed(0)
    decoder = build_model(load_model_config("nano")).transformer.decoder
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return decoder


def _inputs(decoder: Any) -> dict[str, Any]:
    width, cells = decoder.d_model, SIDE * SIDE
    padding = torch.zeros(PROMPTS, WORDS, dtype=torch.bool)
    padding[1, 3:] = True
    return {
        "tgt": decoder.query_embed.weight[:, None].repeat(1, PROMPTS, 1),
        "memory": torch.randn(cells, PROMPTS, width, requires_grad=True),
        "memory_key_padding_mask": None,
        "pos": torch.randn(cells, PROMPTS, width),
        "reference_boxes": None,
        "level_start_index": torch.zeros(1, dtype=torch.long),
        "spatial_shapes": torch.tensor([[SIDE, SIDE]]),
        "valid_ratios": torch.ones(PROMPTS, 1, 2),
        "tgt_mask": None,
        "memory_text": torch.randn(WORDS, PROMPTS, width, requires_grad=True),
        "text_attention_mask": padding,
    }


def _upstreams(decoder: Any, **inputs: Any) -> tuple[Tensor, ...]:
    return TransformerDecoder.forward.__wrapped__(decoder, **inputs)


def test_predictions_are_upstreams_to_the_bit() -> None:
    decoder = _decoder().eval()
    inputs = _inputs(decoder)
    with torch.no_grad():
        queries, boxes, presence, _ = decoder(**inputs, apply_dac=False)
        expected = _upstreams(decoder, **inputs, apply_dac=False)
    assert torch.equal(queries, expected[0])
    assert torch.equal(boxes, expected[1])
    assert torch.equal(presence[-1], expected[2][-1])
    assert boxes.std() > 0.1


def test_training_is_upstreams_to_rounding() -> None:
    decoder = _decoder().train()
    inputs = _inputs(decoder)
    leaves = [inputs["memory"], inputs["memory_text"], *decoder.parameters()]

    def outputs_and_gradients(decode: Any) -> tuple[list[Tensor], list[Tensor | None]]:
        outputs = decode(**inputs, apply_dac=True)[:3]
        total = sum((output * output.detach().cos()).sum() for output in outputs)
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        return outputs, gradients

    found, gradients = outputs_and_gradients(decoder)
    expected, upstreams = outputs_and_gradients(lambda **kwargs: _upstreams(decoder, **kwargs))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert sum(gradient is not None for gradient in gradients) > 100
    for ours, theirs in zip(gradients, upstreams, strict=True):
        assert (ours is None) is (theirs is None)
        if ours is not None:
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-5


def test_what_is_not_usual_goes_upstreams_way() -> None:
    decoder = _decoder().eval()
    inputs = _inputs(decoder) | {"is_instance_prompt": True}
    with torch.no_grad():
        assert decoder(**inputs, apply_dac=False)[2] is None  # clicks have no presence


def test_two_heads_at_once_are_the_two() -> None:
    """As on a GPU."""
    decoder = _decoder()
    heads = decoder.boxRPB_embed_x, decoder.boxRPB_embed_y
    distances = torch.randn(2, PROMPTS, 7, SIDE, 2)
    found = of_both(distances, together(heads))
    for ours, head, of_head in zip(found, heads, distances, strict=True):
        torch.testing.assert_close(ours, head(of_head))


def test_keys_and_values_of_all_layers_at_once_change_nothing() -> None:
    """As on a GPU."""
    decoder = _decoder().train()
    inputs, layers = _inputs(decoder), list(decoder.layers)
    text, memory, key = inputs["memory_text"], inputs["memory"], inputs["memory"] + inputs["pos"]
    of_text = project_at_once([layer.ca_text for layer in layers], text, text)
    of_image = project_at_once([layer.cross_attn for layer in layers], key, memory)
    tokens, where = torch.randn(2, 1 + 16, PROMPTS, decoder.d_model).unbind()
    bias = torch.randn(PROMPTS * layers[0].cross_attn.num_heads, len(tokens), SIDE * SIDE)
    padding = inputs["text_attention_mask"]
    for layer, words, image in zip(layers, of_text, of_image, strict=True):
        expected = decode_layer(layer, tokens, where, text, padding, key, memory, bias, 1)
        found = decode_layer(layer, tokens, where, words, padding, image, memory, bias, 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
