"""Pictures of what is trained on: the objects where they are, what is not there in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.datasets.overlay import color_of
from app.training.batches import EpochSampler, query_dataset
from app.training.preview import draw, draw_first
from tests.helpers import TINY, Command


@pytest.fixture
def data(shapes: Path):
    config = load_config([*TINY, "transforms=none", "dataset.negatives=2"])
    return query_dataset(config, load_splits(shapes).train)


def test_objects_are_painted_where_their_masks_are(data) -> None:
    item = data[(0, 1)]
    without = data[(0, 1)]
    without.find_queries = [q for q in without.find_queries if not q.object_ids_output]
    before, after = (np.asarray(draw(i), dtype=int)[-512:] for i in (without, item))
    changed = np.abs(after - before).max(axis=-1) > 0
    answers = [(n, a) for n, q in enumerate(item.find_queries) for a in q.object_ids_output]
    assert answers
    for number, answer in answers:
        thing = item.images[0].objects[answer]
        mask = np.kron(thing.segment.numpy(), np.ones((8, 8))).astype(bool)  # 64 px to 512
        assert changed[mask].mean() > 0.95
        edge = mask & ~ndimage.binary_erosion(mask)
        assert (after[edge] == color_of(number)).all(axis=1).mean() > 0.8
    assert changed.mean() < 0.9


def test_they_are_the_first_that_are_trained_on(tiny_run: Path, data, tmp_path: Path) -> None:
    assert len(list((tiny_run / "plots").glob("train_*.png"))) == 1  # evaluation.pictures
    files = draw_first(data, [(0, 2), (0, 1), (0, 0)], tmp_path, 2)
    assert [file.name for file in files] == ["train_001.png", "train_002.png"]


def test_they_are_there_before_the_first_step(
    nan_weights: Path, shapes: Path, tmp_path: Path, command: Command
) -> None:
    """Also of a run that ends in it: of the first batches, as they are trained on."""
    done = command(
        *("train", "--dataset-dir", shapes, "--checkpoint", nan_weights, *TINY),
        *("--output-dir", tmp_path / "out", "--augmentation", "strong", "evaluation.pictures=3"),
    )
    assert done.code == 1
    (saved,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert saved.name == "update-00000000"
    config = load_config([], tmp_path / "out" / "config_resolved.yaml")
    data = query_dataset(config, load_splits(shapes).train)
    order = list(EpochSampler(len(data), config.seed, rank=0, processes=1))
    files = sorted((tmp_path / "out" / "plots").glob("train_*.png"))
    assert len(files) == 3
    for key, file in zip(order[:3], files, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(draw(data[key])))


def test_an_image_that_cannot_be_decoded_is_left_to_training(data, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    images = list(data.dataset.images)
    images[1] = replace(images[1], path=broken)
    data.dataset = replace(data.dataset, images=tuple(images))
    assert len(draw_first(data, [(0, 0), (0, 1), (0, 2)], tmp_path, 3)) == 1
