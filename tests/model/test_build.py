"""Sizes: what upstream's own builder makes, and what can be trained from nothing."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate
from sam3 import model_builder
from sam3.model import vitdet

from app.config.compose import load_config, load_model_config, model_names
from app.datasets.queries import collate
from app.errors import UserError
from app.model.build import build_model, components, count_parameters, padding_note
from app.model.upstream import fixes, pin
from benchmarks.init import first_step_is_finite, query_dataset
from tests.helpers import TINY


def test_size_sam3_has_the_keys_and_shapes_of_upstreams_builder(monkeypatch) -> None:
    fixes.apply_fixes()
    linspace = torch.linspace  # vitdet.py:746 reads the rates back, which meta tensors cannot
    monkeypatch.setattr(
        vitdet.torch, "linspace", lambda *a, **k: linspace(*a, **{**k, "device": "cpu"})
    )
    with torch.device("meta"):
        theirs = model_builder.build_sam3_image_model(
            bpe_path=str(pin.bpe_path()), device="meta", load_from_HF=False
        )
    ours = build_model(load_model_config("sam3"), device="meta")
    expected = {k: (v.shape, v.dtype) for k, v in theirs.state_dict().items()}
    assert {k: (v.shape, v.dtype) for k, v in ours.state_dict().items()} == expected
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in _trunk(ours).blocks]
    assert rates == [getattr(block.drop_path, "drop_prob", 0.0) for block in _trunk(theirs).blocks]


def _trunk(model: torch.nn.Module) -> torch.nn.Module:
    return model.backbone.vision_backbone.trunk


@pytest.mark.parametrize(
    ("name", "total", "text"),
    [("sam3", 840_509_750, 353_724_672), ("small", None, 353_724_672), ("nano", None, None)],
)
def test_parameters(name: str, total: int | None, text: int | None) -> None:
    counts = count_parameters(build_model(load_model_config(name), device="meta"))
    if total is not None:
        assert counts["total"] == total
    if text is not None:
        assert counts["text"] == text
    if name == "small":
        assert 190e6 <= counts["total"] - counts["text"] <= 210e6
    if name == "nano":
        assert counts["total"] <= 6e6


@pytest.mark.parametrize("name", model_names())
def test_sizes_stay_expressible_in_transformers(name: str) -> None:
    """The constraints of `Sam3Config`, as far as our own sizes could break them."""
    config = load_model_config(name)
    vision = config.vision
    assert vision.global_blocks[-1] == vision.depth - 1
    assert vision.embed_dim % 4 == 0
    assert vision.embed_dim // vision.num_heads % 4 == 0
    assert config.d_model % 8 == 0
    assert config.d_model % config.num_heads == 0
    assert config.text.context_length == 32


@pytest.mark.parametrize(
    ("resolution", "said"), [(336, None), (672, None), (1008, None), (252, "78% more")]
)
def test_what_padding_costs_is_said(resolution: int, said: str | None) -> None:
    """252 px are 18 patches: windows of 24 compute 24 * 24 cells for 18 * 18."""
    note = padding_note(load_model_config("small", [f"model.resolution={resolution}"]))
    assert (note is None) == (said is None)
    if said is not None and note is not None:
        assert said in note
        assert "Multiples of 336 need no padding" in note


@pytest.mark.parametrize("name", model_names())
def test_prompts_have_32_tokens(name: str) -> None:
    text = build_model(load_model_config(name), device="meta").backbone.language_backbone
    for prompt, used in (("pothole", 4), ("word " * 60, 32)):
        tokens = text.tokenizer([prompt], context_length=text.context_length)
        assert tokens.shape == (1, 32)
        assert int((tokens != 0).sum()) == used


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 50), marks=pytest.mark.slow)])
def test_a_first_step_from_nothing_is_finite(shapes, seeds: range) -> None:
    config = load_config(TINY)
    data = query_dataset(config, shapes)
    assert all(first_step_is_finite(config, data, seed) for seed in seeds)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "sam3"])
def test_a_first_step_of_the_large_sizes_is_finite(shapes, name: str) -> None:
    """One seed here; `benchmarks/init.py` runs as many as it is told."""
    config = load_config([f"model={name}", "model.resolution=112", "model.mask_points=64"])
    assert first_step_is_finite(config, query_dataset(config, shapes), seed=0)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.resolution=100", "96 or 104"),
        ("model.resolution=16", "below 32"),
        ("model.d_model=60", "multiple of 8"),
        ("model.num_heads=3", "multiple of model.num_heads"),
        ("model.vision.num_heads=24", "rotary"),
        ("model.vision.global_blocks=[0]", "hold the last block, 3"),
        ("model.vision.depth=5", "hold the last block, 4"),
        ("model.text.num_heads=5", "multiple of text.num_heads"),
    ],
)
def test_a_size_that_cannot_be_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config([override])


@pytest.mark.parametrize("resolution", [64, 96, 128, 160])
def test_rope_is_that_of_the_resolution(resolution: int) -> None:
    """Another resolution than the one of the size runs, padded windows included."""
    model = build_model(load_config([f"model.resolution={resolution}"]).model).eval()
    tokens = resolution // 8
    blocks = _trunk(model).blocks
    assert [b.attn.freqs_cis.shape[0] for b in blocks] == [64, tokens**2, 64, tokens**2]
    with torch.no_grad():
        features = model.backbone.forward_image(torch.zeros(1, 3, resolution, resolution))
    assert [f.shape[-1] for f in features["backbone_fpn"]] == [tokens * 4, tokens * 2, tokens]


def test_activation_checkpointing_leaves_gradients_as_they_are(shapes) -> None:
    grads = []
    for checkpointing in ("true", "false", "[vision,masks]"):
        words = ["transforms=none", f"model.activation_checkpointing={checkpointing}"]
        config = load_config([*TINY, *words])
        torch.manual_seed(0)
        model = build_model(config.model, matcher=instantiate(config.loss.matcher))
        batch = collate([query_dataset(config, shapes)[0]])
        targets = [model.back_convert(target) for target in batch.find_targets]
        torch.manual_seed(1)
        criterion = instantiate(config.loss.criterion, _convert_="all")
        criterion(model(batch), targets)["core_loss"].backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for others in grads[1:]:
        assert grads[0].keys() == others.keys()
        for name, gradient in grads[0].items():  # summed in another order
            # What attention cannot feel, as a bias that all keys share, has none but rounding.
            tolerance = max(1e-4 * float(gradient.abs().max()), 1e-6)
            assert torch.allclose(gradient, others[name], rtol=1e-3, atol=tolerance), name


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("true", {True}), ("false", {False}), ("[vision,masks]", {True, False})],
)
def test_what_is_recomputed(asked: str, expected: set[bool]) -> None:
    model = build_model(load_config([*TINY, f"model.activation_checkpointing={asked}"]).model)
    found = {
        name: {module.checkpoint_activations for module in part.modules()}
        for name, part in components(model).items()
    }
    assert set().union(*found.values()) == expected
    if asked.startswith("["):
        assert [name for name, values in found.items() if True in values] == ["vision", "masks"]
    assert _trunk(model).use_act_checkpoint == (asked != "false")
