"""Frozen matrices in a half: the same products, the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from sam3.model.sam3_image import Sam3Image
from torch import Tensor

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.datasets.queries import collate
from app.model.build import build_model
from app.model.halves import convert_by_layer, hold_frozen, originals
from app.model.weights import to_state
from app.training import checkpoints, method
from app.training.batches import query_dataset
from app.training.losses import LabelLosses
from app.training.step import build_accelerator
from tests.helpers import MICRO, same_tensors

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
