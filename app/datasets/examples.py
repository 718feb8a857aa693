"""Example boxes that join the words of a training prompt, or stand for them.

They lie in the prompt's own image, or in another one of the batch that has its class: what they
show is then found in an image that they were not drawn in.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sam3.model.data_misc import FindStage
from sam3.train.data.sam3_image_dataset import Datapoint, FindQueryLoaded

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in shares of the image
MOST = 3  # boxes of what a prompt means, and likewise of what it does not mean
ELSEWHERE = 0.5  # share of the examples that another image has, where one can
WORDLESS = 0.5  # share of the prompts with examples that lose their words
NEGATIVE = 0.3  # share of them that are shown what is not meant as well
# As upstream jitters (RandomizeInputBbox), in shares of a box's side and of the image.
JITTER, MOST_JITTER = 0.1, 0.05
GROUND_TRIES = 10  # boxes that are drawn to find one of empty ground


@dataclass
class ExampleStage(FindStage):
    """Upstream's stage, whose prompts may have their boxes in another image.

    Attributes:
        example_ids: (P,) int64, the image of each prompt's boxes; `img_ids` is where it is asked.
    """

    example_ids: Any = None


def give_examples(batch: Sequence[Datapoint], share: float, visual: str) -> list[int]:
    """Give a share of a batch's prompts example boxes; return the image of each prompt's boxes.

    Each datapoint's `draw`, a number, decides on its prompts. A prompt for what no image of the
    batch shows keeps its words.

    Args:
        batch: with boxes as cxcywh in shares of the image, which the examples get too.
        share: 0..1 of the prompts.
        visual: what is said in place of words.
    """
    sources = []
    for place, datapoint in enumerate(batch):
        chance = random.Random(datapoint.draw)
        for query in datapoint.find_queries:
            sources.append(place)
            if chance.random() >= share:
                continue
            others = [other for other in range(len(batch)) if other != place]
            chance.shuffle(others)
            order = [*others, place] if chance.random() < ELSEWHERE else [place]
            for source in order:
                if boxes := _boxes_of(batch[source], query):
                    _give(query, batch[source], boxes, chance)
                    if chance.random() < WORDLESS:
                        query.query_text = visual
                    sources[-1] = source
                    break
    return sources


def with_examples(stage: FindStage, sources: Sequence[int]) -> FindStage:
    """Return a stage that says in which image each prompt's boxes lie, where it is another one."""
    ids = torch.tensor(sources)
    if torch.equal(ids, stage.img_ids):
        return stage
    return ExampleStage(**vars(stage), example_ids=ids)


def _boxes_of(datapoint: Datapoint, query: FindQueryLoaded) -> list[Box]:
    """Return the boxes of the query's class in an image."""
    return [_corners(datapoint, index) for index in _objects_of(datapoint, query)]


def _objects_of(datapoint: Datapoint, query: FindQueryLoaded) -> list[int]:
    """Return the objects of the query's class that an image is asked for."""
    category = query.inference_metadata.original_category_id
    return [
        index
        for other in datapoint.find_queries
        if other.inference_metadata.original_category_id == category
        for index in other.object_ids_output
    ]


def _give(
    query: FindQueryLoaded, source: Datapoint, boxes: list[Box], chance: random.Random
) -> None:
    """Join boxes of what is meant to a query, and perhaps of what is not."""
    shown = chance.sample(boxes, min(chance.randint(1, MOST), len(boxes)))
    hidden: list[Box] = []
    if chance.random() < NEGATIVE:
        pool = [*_others(source, query), *_ground(boxes, chance)]
        hidden = chance.sample(pool, min(chance.randint(1, MOST), len(pool)))
    jittered = torch.tensor([_jitter(box, chance) for box in (*shown, *hidden)])
    low, high = jittered[:, :2], jittered[:, 2:]
    query.input_bbox = torch.cat([(low + high) / 2, high - low], dim=1)  # (N, 4) cxcywh, 0..1
    query.input_bbox_label = torch.arange(len(jittered)) < len(shown)  # (N,) bool


def _others(datapoint: Datapoint, query: FindQueryLoaded) -> list[Box]:
    """Return the boxes of other classes' objects that an image is asked for."""
    meant = set(_objects_of(datapoint, query))
    asked = {index for other in datapoint.find_queries for index in other.object_ids_output}
    own = {_corners(datapoint, index) for index in meant}  # an object may have several classes
    return [
        box for index in sorted(asked - meant) if (box := _corners(datapoint, index)) not in own
    ]


def _ground(boxes: Sequence[Box], chance: random.Random) -> Iterator[Box]:
    """Yield a box of the size of one of these that touches none; nothing where there is no room."""
    x0, y0, x1, y1 = chance.choice(boxes)
    width, height = x1 - x0, y1 - y0
    for _ in range(GROUND_TRIES):
        left, top = chance.uniform(0, 1 - width), chance.uniform(0, 1 - height)
        right, bottom = left + width, top + height
        if all(left >= b[2] or right <= b[0] or top >= b[3] or bottom <= b[1] for b in boxes):
            yield left, top, right, bottom
            return


def _corners(datapoint: Datapoint, index: int) -> Box:
    x, y, width, height = datapoint.images[0].objects[index].bbox.flatten().tolist()
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _jitter(box: Box, chance: random.Random) -> Box:
    """Move a box's sides a little, as people draw them; what would leave nothing stays."""
    sizes = (box[2] - box[0], box[3] - box[1]) * 2
    moved = [
        min(max(side + max(min(chance.gauss(0, JITTER) * size, MOST_JITTER), -MOST_JITTER), 0), 1)
        for side, size in zip(box, sizes, strict=True)
    ]
    x0, y0, x1, y1 = moved
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else box
