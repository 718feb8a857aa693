"""The warm start: targets that say what the images show, a trunk that learns them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch.nn import functional as F

from app.config.compose import load_model_config
from app.config.schema import WarmStartConfig
from app.datasets.build import load_splits
from app.datasets.synthetic.shapes import make_shapes
from app.model.build import build_model
from app.training.warm_start import (
    ENCODED,
    _class_means,
    _embeddings,
    batches,
    lay_anchors,
    warm_start,
)
from tests.helpers import TINY, Command

NANO = load_model_config("nano", TINY)


def _config(**changes) -> WarmStartConfig:
    return WarmStartConfig(
        **{"method": "pixels", "steps": 3, "batch_size": 4, "lr": 1e-3, **changes}
    )


def test_targets_are_the_shares_of_the_masks(tmp_path: Path) -> None:
    """Whole over the image, each class's share is its masks' area, mirrored or not."""
    make_shapes(tmp_path / "s", train=3, valid=1, fog=0, width=96, height=64, background="plain")
    dataset = load_splits(tmp_path / "s").train
    truth = set()
    for image in dataset.images:
        areas = np.zeros(len(dataset.categories))
        for annotation in dataset.annotations_by_image[image.id]:
            area = coco_mask.area(annotation.segmentation) / (image.width * image.height)
            areas[annotation.category_id - 1] += area
        truth.add(tuple(areas.round(3)))
    seen = set()
    for pixels, shares, covered, asked in batches(dataset, NANO, _config(), seed=0):
        assert pixels.shape == (4, 3, 64, 64)
        assert shares.shape == (4, 3, 8, 8)
        assert covered.shape == (4, 64, 8, 8)
        has = shares.amax(dim=(2, 3)) > 0
        for row, (present, absent) in zip(has, asked.tolist(), strict=True):
            assert row[present]
            assert not row[absent] or row.all()
        assert pixels.min() >= -1
        assert pixels.max() <= 1
        seen |= {tuple(row.numpy().round(3)) for row in shares.mean(dim=(2, 3))}
        # A cell's own pixels say the same as the classes' shares of it.
        assert (shares.sum(dim=1) - covered.mean(dim=1)).abs().max() < 0.35
        # Covered pixels differ from the ground, which is of one colour.
        flat = F.pixel_shuffle(covered, 8)[:, 0]
        for image, cover in zip(pixels, flat, strict=True):
            ground = image[:, cover == 0].median(dim=1).values
            assert (image[:, cover == 1] - ground[:, None]).abs().amax(dim=0).mean() > 0.2
    for row in seen:
        assert min(np.abs(np.array(row) - t).max() for t in truth) < 0.002


def test_anchors_lie_on_a_grid() -> None:
    points = torch.zeros(6, 4)
    lay_anchors(points)
    boxes = points.sigmoid()
    assert torch.allclose(boxes[:, 2:], torch.full((6, 2), 0.25))
    assert boxes[:, 0].reshape(2, 3).tolist() == [pytest.approx([1 / 6, 0.5, 5 / 6])] * 2
    assert boxes[:, 1].reshape(2, 3).T.tolist() == [pytest.approx([0.25, 0.75])] * 3


@pytest.mark.slow
def test_trunk_words_and_encoder_learn_and_nothing_else_moves(shapes: Path) -> None:
    """Of the class names, the nearest to an object's cells is its own; prompted, it is marked."""
    torch.manual_seed(0)
    model = build_model(NANO)
    before = {name: p.clone() for name, p in model.named_parameters()}
    dataset = load_splits(shapes).train
    config = _config(steps=150, batch_size=8, lr=2e-3)
    told = warm_start(model, NANO, dataset, config, seed=0)
    assert told.pixels > 0.93
    assert told.names > 0.9
    assert told.prompts > 0.5
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    parts = (
        "backbone.vision_backbone.trunk.",
        "backbone.vision_backbone.convs.2.",
        "backbone.language_backbone.",
        "geometry_encoder.",
        "transformer.encoder.",
        "transformer.decoder.reference_points.weight",
    )
    assert all(name.startswith(parts) for name in moved)
    assert all(any(name.startswith(part) for name in moved) for part in parts)
    vision = model.eval().backbone.vision_backbone
    right = total = 0
    with torch.no_grad():
        for pixels, shares, _, _ in batches(dataset, NANO, _config(steps=2, batch_size=8), seed=1):
            cells = vision.convs[ENCODED](vision.trunk(pixels)[-1])
            text = model.backbone.forward_text(dataset.class_names, device=cells.device)
            nearest = torch.einsum("bdhw,kd->bkhw", cells, _embeddings(text)).argmax(dim=1)
            inside = shares.amax(dim=1) > 0.8
            right += int((nearest == shares.argmax(dim=1))[inside].sum())
            total += int(inside.sum())
    assert right / total > 0.8


def test_in_float16_the_loss_is_scaled(shapes: Path) -> None:
    """Else small gradients would be 0. What a parameter sees of the scale is gone from its step."""
    largest, weights = {}, {}
    for precision in (torch.float32, torch.float16):
        torch.manual_seed(0)
        model = build_model(NANO)
        weight = model.backbone.vision_backbone.trunk.patch_embed.proj.weight
        seen: list[float] = []
        weight.register_hook(lambda gradient, seen=seen: seen.append(float(gradient.abs().max())))
        settings = _config(steps=1, batch_size=2)
        warm_start(model, NANO, load_splits(shapes).train, settings, 0, precision)
        largest[precision], weights[precision] = seen[0], weight.detach().clone()
    assert largest[torch.float16] > 1000 * largest[torch.float32]
    torch.testing.assert_close(*weights.values(), rtol=0, atol=3e-3)


def test_the_mean_of_a_class_and_what_else_covers_it() -> None:
    """A 2 x 2 image: red things left, a red circle in the upper left, the rest blue."""
    shares = torch.zeros(1, 4, 2, 2)
    shares[0, 0, :, 0] = 1.0  # red thing
    shares[0, 1, 0, 0] = 1.0  # red circle
    shares[0, 2, :, 1] = 0.5  # blue thing
    cells = torch.arange(8.0).reshape(1, 2, 2, 2)  # two features of four cells
    means, present, truth = _class_means(cells, shares)
    assert means[0, :3].tolist() == [[1.0, 5.0], [0.0, 4.0], [2.0, 6.0]]
    assert present.tolist() == [[True, True, True, False]]
    assert truth[0, :3].tolist() == [[1, 0.5, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]


def test_a_run_resumes_from_its_warm_start(shapes: Path, tmp_path: Path, command: Command) -> None:
    """A checkpoint follows the warm start; before it, --resume starts from the beginning."""
    words = [
        *("train", "--dataset-dir", shapes, "--model", "nano", "--epochs", 1, *TINY),
        *("--checkpoint", "none", "--warm-start", "pixels", "training.warm_start.steps=2"),
        *("training.warm_start.batch_size=2", "evaluation.pictures=0"),
    ]
    whole = command(*words, "--output-dir", tmp_path / "a")
    assert whole.code == 0, whole.err
    assert "warm start: 2 steps" in whole.out
    start = tmp_path / "a" / "checkpoints" / "update-00000000"
    assert (start / "state.pt").is_file()
    cut = tmp_path / "b"
    (cut / "checkpoints").mkdir(parents=True)
    (cut / "config.yaml").write_text("")
    start.rename(cut / "checkpoints" / "update-00000000")
    resumed = command(*words, "--output-dir", cut, "--resume")
    assert resumed.code == 0, resumed.err
    assert "warm start" not in resumed.out
    weights = [
        folder / "weights" / "last" / "model.safetensors" for folder in (tmp_path / "a", cut)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for path in cut.rglob("state.pt"):
        path.unlink()
    weights[1].unlink()
    anew = command(*words, "--output-dir", cut, "--resume")
    assert anew.code == 0, anew.err
    assert "from the beginning" in anew.out
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_trained_weights_are_not_warmed(tiny_run: Path, command: Command) -> None:
    done = command("train", "--checkpoint", tiny_run / "weights" / "best", "--warm-start", "pixels")
    assert done.code == 2
    assert "is for random weights" in done.err
