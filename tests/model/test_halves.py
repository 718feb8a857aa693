"""Matrices in a half, against autocast that converts them at each use: the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from sam3.model.sam3_image import Sam3Image
from torch import Tensor

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.datasets.queries import collate
from app.inference.predictor import Predictor
from app.model import adapters
from app.model.build import build_model
from app.model.halves import convert_by_layer, hold_all, hold_frozen, originals
from app.model.weights import to_state
from app.training import checkpoints, method
from app.training.batches import query_dataset
from app.training.losses import LabelLosses
from app.training.step import build_accelerator
from tests.helpers import MICRO, TINY, same_tensors

BOX = {"boxes_xywh": [(20, 10, 40, 40)]}  # so that the layers of boxes take part
# All of it stays in float32: what is trained, is no matrix, or is read outside of autocast.
IN_FLOAT32 = (
    *("pos_embed", "token_embedding", "positional_embedding", "text_projection", "lora_"),
    *(
        "norm",
        "ln_",
        "query_embed",
        "presence_token.",
        "label_embed",
        "cls_embed",
        "reference_points",
    ),
)


def _model(words: list[str]) -> tuple[Any, Sam3Image]:
    config = load_config([*MICRO, "transforms=none", *words])
    build_accelerator(torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    method.prepare(model, config.method, pretrained=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # would be 0, and the adapter say nothing
            torch.nn.init.normal_(parameter, std=0.05)
    return config, model


@pytest.mark.parametrize(
    "words",
    [
        ["method=full"],
        ["method=full", "method.freeze=[]", "model.activation_checkpointing=true"],
        ["method=head"],
        ["method=lora-full", "method.lora.parts.text=true"],
    ],
    ids=["full", "recomputed", "head", "lora"],
)
def test_a_step_is_the_same_to_the_bit(shapes: Path, words: list[str]) -> None:
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for held in (False, True):
        config, model = _model(words)
        if held:
            hold_frozen(model, torch.bfloat16)
            convert_by_layer(model, torch.bfloat16)
            frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
            halves = {n for n, p in frozen.items() if p.dtype == torch.bfloat16}
            assert bool(halves) == ("method.freeze=[]" not in words)
            patches = "backbone.vision_backbone.trunk.patch_embed.proj.weight"
            assert (patches in halves) == ("method=full" not in words)
            assert not {n for n in halves if any(part in n for part in IN_FLOAT32)}
            matrices = {n for n, p in frozen.items() if p.ndim > 1} - halves
            assert all("decoder.layers" in n or _is_no_factor(n) for n in matrices), matrices
        data = query_dataset(config, load_splits(shapes).train)
        method.set_training(model)
        torch.manual_seed(1)
        losses = LabelLosses(instantiate(config.loss.criterion, _convert_="all"), torch.bfloat16)
        loss = losses(model, collate([data[0], data[1]]))["loss"]
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    (loss, gradients), (other, others) = found
    assert torch.equal(loss, other)
    assert len(gradients) > 10
    assert same_tensors(gradients, others)


def _is_no_factor(name: str) -> bool:
    """Whether no product reads it, or an adapter is added to it before one does."""
    return any(part in name for part in IN_FLOAT32) or name.endswith("base_layer.in_proj_weight")


def test_what_is_saved_is_float32_as_it_was() -> None:
    config, model = _model(["method=head"])
    before = {name: value.clone() for name, value in to_state(model).items()}
    size = checkpoints.checkpoint_bytes(config, model)
    hold_frozen(model, torch.float16)
    assert len(originals(model)) > 20
    assert same_tensors(to_state(model), before)
    assert checkpoints.checkpoint_bytes(config, model) == size


def test_under_an_adapter_no_originals_are_kept() -> None:
    """Its file holds the adapter alone."""
    _, model = _model(["method=lora"])
    hold_frozen(model, torch.bfloat16)
    assert not originals(model)


# --- of a model that predicts


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_what_is_found_is_the_same_to_the_bit(precision: torch.dtype) -> None:
    config = load_config(TINY).model
    torch.manual_seed(1)
    model = build_model(config)
    image = Image.effect_noise((90, 60), 80).convert("RGB")
    expected = Predictor(model, config, precision).predict(image, ["a"], threshold=0.0, **BOX)
    hold_all(model, precision)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    matrices = [name for name, kind in kinds.items() if kind == precision]
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    del sizes["backbone.language_backbone.encoder.token_embedding.weight"]  # most of so small a one
    assert sum(sizes[name] for name in matrices) > 0.8 * sum(sizes.values())
    assert not any("norm" in name or "embed.weight" in name for name in matrices)
    for layer in range(config.decoder_layers):  # outside of autocast (decoder.py:74)
        for side in ("linear1", "linear2"):
            assert kinds[f"transformer.decoder.layers.{layer}.{side}.weight"] == torch.float32
    found = Predictor(model, config, precision).predict(image, ["a"], threshold=0.0, **BOX)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.boxes_xyxy, expected.boxes_xyxy)
    assert found.masks == expected.masks


def test_float32_and_a_lora_stay_as_they_are() -> None:
    config = load_config([*TINY, "method=lora"])
    model = build_model(config.model)
    hold_all(model, torch.float32)
    adapters.apply_lora(model, config.method.lora)
    hold_all(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
