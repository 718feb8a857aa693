"""Example boxes in training: of what is meant, of what is not, here or in another image."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from sam3.model.box_ops import box_cxcywh_to_xyxy, box_iou
from sam3.train.data.sam3_image_dataset import Datapoint

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.datasets.examples import JITTER, MOST, MOST_JITTER, ExampleStage, give_examples
from app.datasets.queries import PromptChoice, QueryDataset, collate
from app.datasets.synthetic.shapes import make_shapes
from app.model.vocabulary import VISUAL_PROMPT
from tests.helpers import once


def _items(folder: Path, share: float) -> QueryDataset:
    nodes = load_config(["model.resolution=64", "transforms=none"]).transforms.train
    transforms = [instantiate(node) for node in nodes]
    return QueryDataset(
        load_splits(folder).train,
        transforms,
        seed=0,
        choice=PromptChoice(examples=share, visual=VISUAL_PROMPT),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = {"train": 24, "valid": 1, "width": 96, "height": 64, "min_shapes": 3, "max_shapes": 6}
    return once(tmp_path_factory, "many-shapes", lambda out: make_shapes(out, fog=0, **drawn))


@pytest.fixture
def batch(folder: Path) -> list[Datapoint]:
    items = _items(folder, 1.0)
    return [items[0, index] for index in range(len(items))]


def _objects(datapoint: Datapoint, category: int) -> torch.Tensor:
    """The boxes (N, 4) xyxy of a class that an image is asked for."""
    boxes = [
        datapoint.images[0].objects[index].bbox.flatten()
        for query in datapoint.find_queries
        if query.inference_metadata.original_category_id == category
        for index in query.object_ids_output
    ]
    return box_cxcywh_to_xyxy(torch.stack(boxes)) if boxes else torch.zeros(0, 4)


def test_examples_show_what_is_meant_and_what_is_not(batch: list[Datapoint]) -> None:
    before = copy.deepcopy(batch)
    sources = give_examples(batch, 1.0, VISUAL_PROMPT)
    queries = [(place, q) for place, each in enumerate(batch) for q in each.find_queries]
    words = [q.query_text for each in before for q in each.find_queries]
    elsewhere = wordless = negative = given = 0
    for (place, query), source, text in zip(queries, sources, words, strict=True):
        if query.input_bbox is None:
            assert source == place
            assert query.query_text == text
            continue
        given += 1
        elsewhere += source != place
        wordless += query.query_text == VISUAL_PROMPT
        assert query.query_text in (text, VISUAL_PROMPT)
        label = query.input_bbox_label
        assert 1 <= int(label.sum()) <= MOST
        assert int((~label).sum()) <= MOST
        negative += bool((~label).any())
        boxes = box_cxcywh_to_xyxy(query.input_bbox)
        assert ((boxes >= 0) & (boxes <= 1)).all()
        meant = _objects(before[source], query.inference_metadata.original_category_id)
        overlaps = box_iou(boxes, meant)[0].amax(dim=1)
        assert (overlaps[label] > 0.4).all()
        assert (overlaps[~label] < 0.9).all()
    assert given > 30
    assert 0.2 < elsewhere / given < 0.8
    assert 0.3 < wordless / given < 0.7
    assert 0.1 < negative / given < 0.5


def test_an_absent_class_is_shown_by_another_image(batch: list[Datapoint]) -> None:
    """What it shows is then not to be found: examples do not always have an answer."""
    sources = give_examples(batch, 1.0, VISUAL_PROMPT)
    queries = [(place, q) for place, each in enumerate(batch) for q in each.find_queries]
    absent = [
        query
        for (place, query), source in zip(queries, sources, strict=True)
        if not query.object_ids_output and source != place
    ]
    assert absent
    assert all(query.input_bbox is not None for query in absent)


def test_boxes_are_jittered_as_much_as_upstream_does(batch: list[Datapoint]) -> None:
    before = copy.deepcopy(batch)
    sources = give_examples(batch, 1.0, VISUAL_PROMPT)
    queries = [q for each in batch for q in each.find_queries]
    shares = []
    for query, source in zip(queries, sources, strict=True):
        if query.input_bbox is not None:
            shown = box_cxcywh_to_xyxy(query.input_bbox[query.input_bbox_label])
            meant = _objects(before[source], query.inference_metadata.original_category_id)
            nearest = meant[box_iou(shown, meant)[0].argmax(dim=1)]
            moved = (shown - nearest).abs()
            assert (moved <= MOST_JITTER + 1e-6).all()
            sides = (nearest[:, 2:] - nearest[:, :2]).repeat(1, 2)
            inside = (nearest > 0.01) & (nearest < 0.99) & (moved < MOST_JITTER - 1e-3)
            shares.append((moved / sides)[inside])
    joined = torch.cat(shares)
    # The mean of a normal distribution's absolute values; the largest are cut off.
    assert 0.6 * JITTER < joined.mean() < 0.85 * JITTER


def test_the_same_seed_gives_the_same_examples(folder: Path) -> None:
    one, other = (collate([_items(folder, 0.7)[2, i] for i in range(6)]) for _ in range(2))
    first, second = one.find_inputs[0], other.find_inputs[0]
    assert torch.equal(first.input_boxes, second.input_boxes)
    assert one.find_text_batch == other.find_text_batch
    assert isinstance(first, ExampleStage)
    assert first.input_boxes.shape[1:] == (len(first.img_ids), 4)
    elsewhere = first.example_ids != first.img_ids
    assert elsewhere.any()
    assert (~first.input_boxes_mask[elsewhere]).any(dim=1).all()  # none is elsewhere for nothing


def test_without_a_share_nothing_changes(folder: Path) -> None:
    stage = collate([_items(folder, 0.0)[0, index] for index in range(6)]).find_inputs[0]
    assert not isinstance(stage, ExampleStage)
    assert stage.input_boxes.shape[0] == 0
