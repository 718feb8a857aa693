"""Cutting: what is left computes what the whole did with the same units masked."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from sam3.model.sam3_image import Sam3Image
from torch import Tensor

from app.compression.cut import (
    DART,
    Cut,
    check_cut,
    cut_config,
    cut_model,
    project_hidden,
    protected_blocks,
)
from app.config.compose import load_model_config
from app.config.schema import ModelConfig
from app.errors import UserError
from app.inference.predictor import Predictor
from app.model import weights
from app.model.build import build_model, count_parameters
from app.model.bundled import NANO

# 192 units and less are summed in one go by the math library, in whatever order they stand; beyond
# that it sums in blocks, whose edges a cut moves, and the last bits differ.
SMALL = load_model_config("nano", ["model.resolution=64", "model.vision.mlp_ratio=1.5"])


def _model(size: ModelConfig = SMALL) -> Sam3Image:
    torch.manual_seed(0)
    return build_model(size).eval()


def _some(count: int, of: int, blocks: int = 4) -> tuple[Tensor, ...]:
    return tuple(torch.randperm(of)[:count].sort().values for _ in range(blocks))


def _mask(model: Sam3Image, cut: Cut) -> None:
    """Silence in the whole model what the cut removes, by hooks."""
    trunk: Any = model.backbone.vision_backbone.trunk
    for block, units, heads in zip(trunk.blocks, cut.hidden or (), cut.heads or (), strict=True):
        said = torch.zeros(block.mlp.fc1.out_features).index_fill(0, units, 1)
        seen = torch.zeros(block.attn.num_heads).index_fill(0, heads, 1)
        seen = seen.repeat_interleave(block.attn.head_dim)
        block.mlp.act.register_forward_hook(lambda _m, _i, out, said=said: out * said)
        block.attn.proj.register_forward_pre_hook(lambda _m, args, seen=seen: (args[0] * seen,))


def _answers(model: Sam3Image, size: ModelConfig) -> dict[str, Tensor]:
    predictor = Predictor(model, size)
    pixels = torch.rand(2, 3, size.resolution, size.resolution, generator=torch.manual_seed(1))
    with torch.inference_mode():
        features = model.backbone.forward_image(pixels.to(next(model.parameters()).dtype))
        boxes, labels = torch.zeros(0, 2, 4), torch.zeros(0, dtype=torch.bool)
        outputs = predictor._ground(features, ["circle", "dog"], boxes, labels)
    return {k: outputs[k] for k in ("pred_logits", "pred_boxes", "pred_masks", "semantic_seg")}


def test_a_narrower_model_equals_the_whole_with_the_same_units_masked_to_the_bit() -> None:
    model = _model()
    cut = Cut(hidden=_some(96, 192), heads=_some(2, 4))
    smaller, size = cut_model(model, SMALL, cut)
    assert (size.vision.mlp_units, size.vision.heads, size.vision.depth) == (96, 2, 4)
    _mask(model, cut)
    whole, left = _answers(model, SMALL), _answers(smaller.eval(), size)
    for key, value in whole.items():
        assert torch.equal(value, left[key]), key
    assert not torch.equal(_answers(_model(), SMALL)["pred_logits"], left["pred_logits"])


def test_trained_weights_cut_in_half_equal_the_masked_whole() -> None:
    """512 units are more than the library sums in one go: equal but for rounding."""
    model, header = weights.load(NANO)
    cut = Cut(hidden=_some(256, 512), heads=_some(2, 4))
    smaller, size = cut_model(model, header.model, cut)
    _mask(model.eval(), cut)
    whole, left = _answers(model, header.model), _answers(smaller.eval(), size)
    for key, value in whole.items():
        assert torch.allclose(value, left[key], rtol=1e-4, atol=1e-4), key


def test_a_shallower_model_equals_the_whole_with_the_same_layers_skipped() -> None:
    model, size = _model(), SMALL
    cut = Cut(blocks=(0, 1, 3), text_layers=(1,), encoder_layers=(0,), queries=(0, 3, 7))
    smaller, left = cut_model(model, size, cut)
    assert left.vision.global_blocks == [1, 2]
    assert (left.text.depth, left.encoder_layers, left.num_queries) == (1, 1, 3)
    model.backbone.vision_backbone.trunk.blocks[2].forward = lambda x: x
    text: Any = model.backbone.language_backbone.encoder.transformer.resblocks[0]
    text.forward = lambda x, *_, **__: x
    encoder: Any = model.transformer.encoder.layers[1]
    encoder.forward = lambda tgt, *_, **__: tgt
    whole, cut_down = _answers(model, size), _answers(smaller.eval(), left)
    assert torch.equal(whole["semantic_seg"], cut_down["semantic_seg"])
    # Queries look at one another: those that are left do not answer as among all of them.
    assert cut_down["pred_boxes"].shape[1] == 3


def test_decoder_layers_go() -> None:
    smaller, size = cut_model(_model(), SMALL, Cut(decoder_layers=(0, 2)))
    theirs = _model().transformer.decoder.layers[2].state_dict()
    for key, value in smaller.transformer.decoder.layers[1].state_dict().items():
        assert torch.equal(value, theirs[key])
    assert size.decoder_layers == 2
    _answers(smaller.eval(), size)


@pytest.mark.parametrize("resolution", [64, 96, 200])
def test_tables_of_positions_are_made_for_any_resolution(resolution: int) -> None:
    smaller, size = cut_model(_model(), SMALL, Cut(blocks=(1, 3), heads=_some(2, 4, 2)))
    state = {k: v for k, v in smaller.state_dict().items() if not k.endswith("freqs_cis")}
    other = size.model_copy(update={"resolution": resolution})
    model = build_model(other)
    model.load_state_dict(state, strict=False)
    side = resolution // size.vision.patch_size
    tables = [block.attn.freqs_cis for block in model.backbone.vision_backbone.trunk.blocks]
    assert [table.shape for table in tables] == [(side * side, 16)] * 2
    fresh = build_model(other).backbone.vision_backbone.trunk.blocks[1].attn.freqs_cis
    assert torch.equal(tables[1], fresh)
    assert _answers(model.eval(), other)["pred_boxes"].isfinite().all()


def test_sam3_cut_by_dart_is_small() -> None:
    source, small = load_model_config("sam3"), load_model_config("small")
    assert len(DART) == 16
    assert not {*DART} & protected_blocks(source)
    kept = tuple(index for index in range(32) if index not in DART)
    units = tuple(torch.arange(small.vision.mlp_units) for _ in kept)
    cut = Cut(kept, decoder_layers=(0, 1, 2, 5), queries=tuple(range(100)), hidden=units)
    left = cut_config(source, cut)
    assert left.model_copy(update={"name": "small", "resolution": 672}) == small


def test_parameters_of_small_by_component() -> None:
    """The table of what is deployed, on the meta device: 190 to 210 M without words."""
    small = load_model_config("small")
    stored = small.model_copy(update={"vocabulary": ["fish", "shark"]})
    counts = {
        "vision": 164_376_832,
        "text": 0,
        "detector": 17_336_741,
        "geometry": 8_215_808,
        "masks": 2_298_881,
        "scoring": 1_182_976,
        "total": 193_411_238,
    }
    assert count_parameters(build_model(stored, device="meta")) == counts
    with_words = count_parameters(build_model(small, device="meta"))
    assert with_words == counts | {"text": 353_724_672, "total": 547_135_910}
    thin = count_parameters(build_model(load_model_config("small-text"), device="meta"))
    assert thin == counts | {"text": 63_536_384, "total": 256_947_622}


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (Cut(blocks=(0, 1, 2)), "blocks 3: have global attention"),
        (Cut(blocks=(0, 2)), "blocks 1, 3: have global attention"),
        (Cut(blocks=(3, 1)), "must be some of 0 to 3, ascending; it is 3, 1"),
        (Cut(blocks=()), "it is nothing"),
        (Cut(decoder_layers=(0, 5)), "decoder_layers: what stays must be some of 0 to 2"),
        (Cut(queries=(16,)), "queries: what stays must be some of 0 to 15"),
    ],
)
def test_a_cut_that_cannot_work_is_refused(cut: Cut, said: str) -> None:
    with pytest.raises(UserError, match=said):
        cut_model(_model(), SMALL, cut)


def test_the_first_blocks_of_a_deep_trunk_stay() -> None:
    size = load_model_config("sam3")
    check_cut(size, Cut(blocks=tuple(i for i in range(32) if i != 4)))
    with pytest.raises(UserError, match="blocks 3: are of the first eighth"):
        check_cut(size, Cut(blocks=tuple(i for i in range(32) if i != 3)))


def test_projected_units_say_what_the_first_layer_says_most() -> None:
    """Before the activation, no K directions of an MLP's units lose less of them."""
    layer = torch.nn.Linear(8, 24)
    rows = project_hidden(layer, 5)
    assert torch.allclose(rows @ rows.T, torch.eye(5), atol=1e-5)
    joined = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()
    lost = (joined - rows.T @ rows @ joined).square().sum()
    values = torch.linalg.svdvals(joined.double())
    assert float(lost) == pytest.approx(float(values[5:].square().sum()), rel=1e-4)
    assert project_hidden(layer, 20).shape == (20, 24)  # more than it has directions: equal in size


@functools.cache
def _halved() -> tuple[Sam3Image, ModelConfig]:
    return cut_model(_model(), SMALL, Cut(blocks=(1, 3), hidden=_some(96, 192, 2)))


def test_what_was_cut_is_saved_and_loaded_as_any_weights(tmp_path) -> None:
    smaller, size = _halved()
    weights.save(smaller, tmp_path, weights.Header(model=size))
    again, header = weights.load(tmp_path)
    assert header.model == size
    for key, value in _answers(smaller.eval(), size).items():
        assert torch.equal(value, _answers(again.eval(), size)[key])
