"""Augmentation: image, boxes and masks in step, the same for a seed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from sam3.train.data.sam3_image_dataset import Datapoint, Object
from sam3.train.data.sam3_image_dataset import Image as DatapointImage
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from app.config.compose import load_config
from app.datasets.augment import ADJUST, HUE, Augment, Recolor, changes_of, to_numbers
from app.datasets.build import load_splits
from app.datasets.queries import QueryDataset, ToSquare, collate

PLAIN = {
    "flip": 0.0,
    "flip_vertical": 0.0,
    "scale": (1.0, 1.0),
    "rotate": 0.0,
    "min_visible": 0.0,
}


def _datapoint(width: int, height: int, box: tuple[int, int, int, int], mask: bool) -> Datapoint:
    """A black image with one green block, xyxy in pixels, that is labelled."""
    x0, y0, x1, y1 = box
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[y0:y1, x0:x1, 1] = 255
    segment = torch.from_numpy((pixels[..., 1] > 0).astype(np.uint8)) if mask else None
    thing = Object(
        bbox=torch.tensor(box, dtype=torch.float32),
        area=float((x1 - x0) * (y1 - y0)),
        object_id=0,
        segment=segment,
        is_crowd=False,
    )
    image = DatapointImage(data=PILImage.fromarray(pixels), objects=[thing], size=(height, width))
    return Datapoint(find_queries=[], images=[image])


def _green(datapoint: Datapoint) -> np.ndarray:
    """Where the block lies in the image: what its labels must say."""
    return np.asarray(datapoint.images[0].data)[..., 1] > 190


@st.composite
def _blocks(draw):
    width, height = draw(st.integers(24, 80)), draw(st.integers(24, 80))
    x0, y0 = draw(st.integers(0, width - 9)), draw(st.integers(0, height - 9))
    x1, y1 = draw(st.integers(x0 + 8, width)), draw(st.integers(y0 + 8, height))
    return width, height, (x0, y0, x1, y1)


@settings(max_examples=150, deadline=None)
@given(
    _blocks(),
    st.floats(0.5, 1.0),
    st.floats(1.0, 2.0),
    st.sampled_from([0.0, 5.0, 45.0]),
    st.integers(0, 10_000),
)
def test_the_mask_and_the_box_stay_on_the_object(block, low, high, rotate, seed) -> None:
    """The image itself is the oracle: its green pixels are the mask, their hull is the box."""
    random.seed(seed)
    augment = Augment(
        **{**PLAIN, "flip": 0.5, "flip_vertical": 0.5, "scale": (low, high), "rotate": rotate}
    )
    after = augment(_datapoint(*block, mask=True)).images[0]
    green = np.asarray(after.data)[..., 1]
    thing = after.objects[0]
    mask = thing.segment.numpy().astype(bool)
    assert (mask.shape[1], mask.shape[0]) == after.data.size
    assert after.size == mask.shape
    if not rotate:
        assert np.array_equal(mask, green == 255)
    else:  # nearest and linear sampling differ by half a pixel at most
        assert not (mask & (green < 64)).any()
        assert not (~mask & (green == 255)).any()
    rows, columns = np.nonzero(mask)
    if len(rows):
        hull = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert thing.bbox.tolist() == hull
        assert thing.area > 0
    else:
        assert thing.area == 0


@settings(max_examples=80, deadline=None)
@given(_blocks(), st.integers(0, 10_000))
def test_a_box_without_a_mask_moves_as_the_mask_does(block, seed) -> None:
    augment = Augment(**{**PLAIN, "flip": 0.5, "scale": (0.5, 2.0)})
    boxes = []
    for mask in (True, False):
        random.seed(seed)
        thing = augment(_datapoint(*block, mask=mask)).images[0].objects[0]
        boxes.append(thing.bbox.tolist() if thing.area else None)
    assert boxes[0] == boxes[1]


def test_a_turned_box_holds_the_turned_object() -> None:
    random.seed(1)
    augment = Augment(**{**PLAIN, "rotate": 40.0})
    datapoint = augment(_datapoint(60, 60, (20, 25, 40, 35), mask=False))
    rows, columns = np.nonzero(_green(datapoint))
    x0, y0, x1, y1 = datapoint.images[0].objects[0].bbox.tolist()
    assert x0 <= columns.min() + 1
    assert y0 <= rows.min() + 1
    assert x1 >= columns.max()
    assert y1 >= rows.max()


def test_an_object_out_of_view_is_dropped() -> None:
    """Cropped to a quarter: where less than half of the object is left it has no area."""
    augment = Augment(**{**PLAIN, "scale": (2.0, 2.0), "min_visible": 0.5})
    kept = dropped = 0
    for seed in range(60):
        random.seed(seed)
        datapoint = augment(_datapoint(40, 40, (0, 0, 10, 10), mask=True))
        thing = datapoint.images[0].objects[0]
        share = float(thing.segment.sum()) / 100
        assert (thing.area > 0) is (share >= 0.5)
        kept, dropped = kept + (share >= 0.5), dropped + (share < 0.5)
    assert kept
    assert dropped


def test_nothing_is_touched_without_a_change() -> None:
    before = _datapoint(31, 20, (3, 4, 12, 15), mask=True)
    pixels, segment = before.images[0].data, before.images[0].objects[0].segment
    after = Augment(**PLAIN)(before)
    assert after.images[0].data is pixels
    assert after.images[0].objects[0].segment is segment


def test_colour_changes_pixels_and_nothing_else() -> None:
    """As torchvision's own jitter does to the bit, where the bytes have become numbers."""
    plain, datapoint = (ToSquare(30)(_datapoint(30, 30, (5, 5, 20, 20), mask=True)) for _ in "ab")
    torch.manual_seed(0)
    recolored = Recolor(0.5)(datapoint).images[0]
    assert torch.equal(recolored.objects[0].bbox, plain.images[0].objects[0].bbox)
    assert torch.equal(recolored.objects[0].segment, plain.images[0].objects[0].segment)
    pixels = plain.images[0].data
    assert torch.equal(recolored.data, pixels)
    before, after = to_numbers(torch.stack([pixels] * 2), [(), changes_of(recolored)])
    assert after.shape == pixels.shape
    assert -1 <= after.min() <= after.max() <= 1
    assert (after - before).abs().mean() > 0.04
    torch.manual_seed(0)
    jitter = v2.ColorJitter(0.5, 0.5, 0.5, 0.1)
    expected = jitter(v2.functional.to_dtype(pixels, torch.float32, scale=True))
    assert torch.equal(after, v2.functional.normalize(expected, [0.5] * 3, [0.5] * 3))
    assert Recolor(0.0)(plain).images[0].data is pixels
    assert not changes_of(plain.images[0])


def test_images_are_recolored_together_as_each_by_itself() -> None:
    """Some with their hue first or last, one without any change; more than are turned at once."""
    torch.manual_seed(3)
    recolor, datapoint = Recolor(0.5), _datapoint(9, 9, (1, 1, 5, 5), mask=False)
    changes = [changes_of(recolor(datapoint).images[0]) for _ in range(7)]
    changes[2] = ()
    assert len({[name for name, _ in each].index(HUE) for each in changes if each}) > 2
    pixels = torch.randint(256, (7, 3, 30, 30), dtype=torch.uint8)
    expected = v2.functional.to_dtype(pixels, torch.float32, scale=True)
    for image, each in zip(expected, changes, strict=True):
        for name, factor in each:
            image.copy_(ADJUST[name](image, factor))
    assert torch.equal(to_numbers(pixels, changes), expected.sub(0.5).div(0.5))


@pytest.mark.parametrize("name", ["none", "light", "strong"])
def test_the_same_under_a_seed_whatever_the_number_of_workers(shapes: Path, name: str) -> None:
    config = load_config(["model.resolution=64", f"transforms={name}"])
    transforms = [instantiate(node) for node in config.transforms.train]
    items = QueryDataset(load_splits(shapes).train, transforms, seed=0)
    keys = [(epoch, index) for epoch in range(3) for index in range(len(items))]
    batches = {
        workers: list(DataLoader(items, sampler=keys, num_workers=workers, collate_fn=collate))
        for workers in (0, 2)
    }
    for alone, shared in zip(*batches.values(), strict=True):
        assert torch.equal(alone.img_batch, shared.img_batch)
        assert torch.equal(alone.find_targets[0].boxes, shared.find_targets[0].boxes)
        assert torch.equal(alone.find_targets[0].segments, shared.find_targets[0].segments)
    first = [batch.img_batch for batch in batches[0][:: len(items)]]
    assert torch.equal(first[0], first[1]) is (name == "none")


def test_an_object_that_is_dropped_answers_no_prompt(shapes: Path) -> None:
    """Strong crops leave prompts without objects; what is left is inside the image."""
    config = load_config(["model.resolution=64", "transforms=strong"])
    transforms = [instantiate(node) for node in config.transforms.train]
    dataset = load_splits(shapes).train
    items = QueryDataset(dataset, transforms, seed=0)
    seen = 0
    for epoch in range(12):
        for index, image in enumerate(dataset.images):
            datapoint = items[(epoch, index)]
            things = datapoint.images[0].objects
            answers = [i for q in datapoint.find_queries for i in q.object_ids_output]
            assert sorted(answers) == list(range(len(things)))
            seen += len(things) < len(dataset.annotations_by_image[image.id])
            for thing in things:
                x, y, w, h = thing.bbox.flatten().tolist()
                assert w > 0
                assert h > 0
                assert x - w / 2 + 1e-6 >= 0
                assert x + w / 2 <= 1 + 1e-6
                assert y - h / 2 + 1e-6 >= 0
                assert y + h / 2 <= 1 + 1e-6
    assert seen
