"""Dataset → what the model trains on: an image, its prompts, the objects that answer each."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sam3.model.box_ops import box_xyxy_to_cxcywh
from sam3.model.data_misc import BatchedDatapoint
from sam3.train.data.collator import collate_fn_api
from sam3.train.data.sam3_image_dataset import (
    Datapoint,
    FindQueryLoaded,
    InferenceMetadata,
    Object,
)
from sam3.train.data.sam3_image_dataset import Image as DatapointImage
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms.v2.functional import resize

from app.datasets.augment import changes_of, to_numbers
from app.datasets.coco import Annotation, Dataset
from app.datasets.examples import give_examples, with_examples
from app.datasets.images import open_image
from app.datasets.square import to_square

Transform = Callable[..., Datapoint]
NO_CLASS = -1  # category id of a prompt that asks for something else


@dataclass(frozen=True)
class PromptChoice:
    """The choice of prompts that an image is asked in a step.

    Attributes:
        most: prompts an image: bounds the memory, whatever the number of classes.
        negatives: of them kept for what the image lacks: an absent class, as often as others are
            shown it, so that no word by itself tells whether it is there; or a foreign word.
        foreign: 0..1, share of the negatives that are foreign words; all where no class is absent.
        near_misses: foreign words for what looks like a class and is none; every second one drawn.
        nouns: foreign words for things that no image shows.
        examples: 0..1, share of the prompts that are given example boxes (`examples`).
        visual: what is said in place of words where examples stand alone.
    """

    most: int = 20
    negatives: int = 0
    foreign: float = 0.5
    near_misses: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()
    examples: float = 0.0
    visual: str = ""


class QueryDataset(TorchDataset):
    """A dataset with one item an image: upstream's `Datapoint`, with a query for each prompt.

    Every class is a prompt; those that the image lacks are its negatives. A class of which the
    image has a crowd is no prompt: a crowd is no answer, and shows that the class is not absent.
    Beyond `choice.most`, present classes come first, and which of them is drawn anew each time. The
    same seed, epoch and index give the same item, whatever the number of workers.

    Args:
        dataset: a checked dataset.
        transforms: upstream's transforms, applied in order.
        choice: of prompts.
        seed: of augmentation and of the choice of prompts.
        views: augmented views of each image, which come again after so many epochs; None: another
            in each epoch.
    """

    def __init__(
        self,
        dataset: Dataset,
        transforms: Sequence[Transform],
        *,
        seed: int,
        choice: PromptChoice | None = None,
        views: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.transforms = transforms
        self.choice = choice or PromptChoice()
        self.seed, self.views = seed, views
        self._classes = {category.id: category for category in dataset.categories}
        pairs = {(a.image_id, a.category_id) for a in dataset.annotations}
        self._images_with = Counter(category_id for _, category_id in pairs)

    def __len__(self) -> int:
        return len(self.dataset.images)

    def __getitem__(self, key: tuple[int, int] | int) -> Datapoint:
        """Return item `(epoch, index)`, or `index` of epoch 0.

        Raises:
            UserError: its image cannot be decoded; never another image in its place, as upstream
                does (sam3_image_dataset.py:518).
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        python_state, torch_state = random.getstate(), torch.get_rng_state()
        _seed(f"{self.seed}/{epoch}/{index}")
        try:
            datapoint = self._datapoint(index)
            if self.views is not None:
                # By the image, whatever others there are: folds share the views' features.
                image = self.dataset.images[index]
                _seed(f"{self.seed}/view {epoch % self.views}/{image.id}")
            for transform in self.transforms:
                datapoint = transform(datapoint, epoch=epoch)
            if self.choice.examples:
                _seed(f"{self.seed}/examples {epoch}/{index}")
                datapoint.choice, datapoint.draw = self.choice, random.getrandbits(63)
        finally:
            random.setstate(python_state)
            torch.set_rng_state(torch_state)
        return datapoint

    def _datapoint(self, index: int) -> Datapoint:
        image = self.dataset.images[index]
        annotations = self.dataset.annotations_by_image.get(image.id, [])
        queries = []
        for category_id, prompt in self._prompts(annotations):
            outputs = [i for i, a in enumerate(annotations) if a.category_id == category_id]
            queries.append(
                FindQueryLoaded(
                    query_text=prompt,
                    image_id=0,
                    object_ids_output=outputs,
                    is_exhaustive=True,
                    is_pixel_exhaustive=True,
                    inference_metadata=InferenceMetadata(
                        coco_image_id=image.id,
                        original_image_id=image.id,
                        original_category_id=category_id,
                        original_size=(image.height, image.width),
                        object_id=-1,
                        frame_index=-1,
                    ),
                )
            )
        objects = [_object(i, a, image.width, image.height) for i, a in enumerate(annotations)]
        pixels = DatapointImage(
            data=open_image(image.path, image.levels),
            objects=objects,
            size=(image.height, image.width),
        )
        return Datapoint(find_queries=queries, images=[pixels])

    def _prompts(self, annotations: Sequence[Annotation]) -> list[tuple[int, str]]:
        """Return the category id (NO_CLASS for none) and words of each prompt."""
        classes = self._classes
        crowded = {annotation.category_id for annotation in annotations if annotation.iscrowd}
        present = sorted({annotation.category_id for annotation in annotations} - crowded)
        absent = [id for id in classes if id not in present and id not in crowded]
        random.shuffle(absent)
        lacking = self._lacking(absent)
        room = max(self.choice.most - len(lacking), 1)
        if len(present) > room:
            present = sorted(random.sample(present, room))
        asked = [(id, random.choice((classes[id].name, *classes[id].synonyms))) for id in present]
        asked += lacking[: self.choice.most - len(asked)]
        rest = [(id, classes[id].name) for id in absent if (id, classes[id].name) not in asked]
        return asked + rest[: self.choice.most - len(asked)]

    def _lacking(self, absent: Sequence[int]) -> list[tuple[int, str]]:
        """Draw up to `choice.negatives` prompts for what the image lacks, each once."""
        drawn: list[tuple[int, str]] = []
        for _ in range(self.choice.negatives):
            classes = [id for id in absent if (id, self._classes[id].name) not in drawn]
            pools = [[w for w in pool if (NO_CLASS, w) not in drawn] for pool in self._foreign()]
            words = random.choice([pool for pool in pools if pool] or [[]])
            if words and (not classes or random.random() < self.choice.foreign):
                drawn.append((NO_CLASS, random.choice(words)))
            elif classes:
                id = random.choices(classes, [self._images_with[id] + 1 for id in classes])[0]
                drawn.append((id, self._classes[id].name))
        return drawn

    def _foreign(self) -> list[Sequence[str]]:
        return [self.choice.near_misses, self.choice.nouns] if self.choice.foreign else []


def _seed(words: str) -> None:
    random.seed(words)
    # Not torch.manual_seed, which seeds the GPU as well: dropout would come again with the views.
    torch.default_generator.manual_seed(random.getrandbits(63))


def _object(index: int, annotation: Annotation, width: int, height: int) -> Object:
    x, y, w, h = annotation.bbox_xywh
    corners = torch.tensor([max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)])
    return Object(
        bbox=corners.float(),  # (4,) xyxy, pixels, as upstream's transforms expect
        area=float((corners[2] - corners[0]) * (corners[3] - corners[1])),
        object_id=index,
        segment=annotation.segmentation,
        is_crowd=annotation.iscrowd,
    )


class SemanticTargets:
    """Give each query the union of its objects' masks, for the semantic head.

    Upstream's own union fails where no prompt of a batch has an object (loss_fns.py:50). A query
    with an object without a mask gets an empty target, which the loss leaves out.
    """

    def __call__(self, datapoint: Datapoint, **_: Any) -> Datapoint:
        image = datapoint.images[0]
        for query in datapoint.find_queries:
            segments = [image.objects[i].segment for i in query.object_ids_output]
            target = torch.zeros(image.size, dtype=torch.uint8)  # (H, W), 0 or 1
            if all(segment is not None for segment in segments):
                for segment in segments:
                    target |= segment
            query.semantic_target = target
        return datapoint


class ToSquare:
    """Stretch image, boxes and masks to the model's square, as prediction stretches images.

    Args:
        resolution: pixels.
    """

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution

    def __call__(self, datapoint: Datapoint, **_: Any) -> Datapoint:
        image, side = datapoint.images[0], self.resolution
        width, height = image.data.size
        image.data = to_square(image.data, side)  # (3, side, side) uint8
        image.size = (side, side)
        scale = torch.tensor([side / width, side / height] * 2)
        for thing in image.objects:
            thing.bbox = thing.bbox.reshape(1, 4) * scale
            thing.area *= side * side / (width * height)
            if thing.segment is not None:
                thing.segment = resize(thing.segment[None], [side, side], antialias=True)[0]
        return datapoint


class ShareBoxes:
    """Give boxes as cxcywh in shares of the image.

    Upstream's NormalizeAPI does so too, and takes pixels as numbers alone: here they stay bytes on
    the way to the model's device.
    """

    def __call__(self, datapoint: Datapoint, **_: Any) -> Datapoint:
        image = datapoint.images[0]
        height, width = image.data.shape[-2:]
        for thing in image.objects:
            sides = torch.tensor([width, height, width, height], dtype=torch.float32)
            thing.bbox = box_xyxy_to_cxcywh(thing.bbox) / sides
        return datapoint


def resize_sizes(resolution: int, smallest: float) -> list[int]:
    """Return sizes in pixels from `smallest` x resolution to resolution, 32 apart from the top.

    For `configs/upstream/`: upstream's own transforms take a list.
    """
    return list(range(resolution, round(resolution * smallest) - 1, -32))[::-1]


def collate(batch: list[Datapoint]) -> BatchedDatapoint:
    """Make upstream's batch: img_batch (B, 3, R, R) float32 in -1..1, one stage of all prompts."""
    batched = collate_bytes(batch)
    changes = [changes_of(datapoint.images[0]) for datapoint in batch]
    batched.img_batch = to_numbers(batched.img_batch, changes)
    return batched


def collate_bytes(batch: list[Datapoint]) -> BatchedDatapoint:
    """Make upstream's batch with img_batch (B, 3, R, R) uint8, not recolored."""
    choice = getattr(batch[0], "choice", None)  # of prompts with examples
    sources = give_examples(batch, choice.examples, choice.visual) if choice else []
    batched = collate_fn_api(batch, dict_key="all", with_seg_masks=True)["all"]
    if choice:
        batched.find_inputs[0] = with_examples(batched.find_inputs[0], sources)
    target = batched.find_targets[0]
    if target.segments is not None and target.segments.ndim != 3:  # no object in the batch
        target.segments = torch.zeros(0, *batched.img_batch.shape[-2:], dtype=torch.bool)
    return batched
