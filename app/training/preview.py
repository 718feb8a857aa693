"""Pictures of the first training images as the model gets them: augmented, with their prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from sam3.train.data.sam3_image_dataset import Datapoint
from torchvision.transforms.v2.functional import to_pil_image

from app.datasets.augment import changes_of, to_numbers
from app.datasets.overlay import color_of, draw_objects, titled
from app.datasets.queries import QueryDataset
from app.errors import UserError
from app.files import atomic_path

NAMED = 3  # prompts without an answer
SIDE = 512  # pixels, least, of a picture: labels stay readable on a small model's input


def draw_first(
    data: QueryDataset, order: Iterable[tuple[int, int]], folder: Path, count: int
) -> list[Path]:
    """Write `train_001.png`, … of the first `count` items in the order of training.

    An image that cannot be decoded ends it: training will say so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, key in enumerate(itertools.islice(order, count), 1):
        try:
            picture = draw(data[key])
        except UserError:
            break
        files.append(folder / f"train_{number:03d}.png")
        with atomic_path(files[-1]) as temporary:
            picture.save(temporary)
    return files


def draw(item: Datapoint) -> Image.Image:
    """Draw the prompts of one image with the objects that answer them; name those without one.

    Args:
        item: after the transforms: pixels (3, R, R) uint8, boxes (1, 4) cxcywh in 0..1.
    """
    given = item.images[0]
    side = given.data.shape[-1]
    side *= -(-SIDE // side)  # whole times as large
    [pixels] = to_numbers(given.data[None], [changes_of(given)])
    image = to_pil_image(pixels / 2 + 0.5).resize((side, side), Image.Resampling.NEAREST)
    boxes, masks, labels, colors = [], [], [], []
    for index, query in enumerate(item.find_queries):
        for answer in query.object_ids_output:
            thing = given.objects[answer]
            x, y, w, h = (thing.bbox.flatten() * side).tolist()
            boxes.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
            masks.append(None if thing.segment is None else _rle(thing.segment.numpy(), side))
            labels.append(query.query_text)
            colors.append(color_of(index))
    drawn = draw_objects(image, np.array(boxes).reshape(-1, 4), masks, labels, colors)
    absent = [query.query_text for query in item.find_queries if not query.object_ids_output]
    more = len(absent) - NAMED
    named = ", ".join(absent[:NAMED]) + (f" and {more} more" if more > 0 else "")
    return titled(drawn, f"not there: {named}" if absent else "all of it is there")


def _rle(mask: np.ndarray, side: int) -> dict:
    large = Image.fromarray(mask.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    encoded: dict = coco_mask.encode(np.asfortranarray(np.asarray(large)))
    return encoded
