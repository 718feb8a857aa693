"""The batches of a training run: which images, in which order, on which process."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from sam3.model.data_misc import BatchedDatapoint
from sam3.model.utils.misc import copy_data_to_device
from sam3.train.data.sam3_image_dataset import Datapoint
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from app import signals
from app.config.schema import Config
from app.console import counted
from app.datasets.augment import Changes, changes_of, to_numbers
from app.datasets.coco import Dataset
from app.datasets.prompts import nouns_beside
from app.datasets.queries import PromptChoice, QueryDataset, collate_bytes
from app.errors import UserError
from app.model.device import cores
from app.model.vocabulary import VISUAL_PROMPT, in_vocabulary
from app.training.collective import raise_on_all_ranks
from app.training.store import Found, Store, find, image_bytes, note_found
from app.training.teacher import teacher_size

log = logging.getLogger("app")
CUDA_WORKERS = 4  # processes that load images beside a GPU; a CPU's cores are busy with the model
PREFETCHED = 2  # batches a worker, as the loader has it by default
SHARED_MEMORY = Path("/dev/shm")  # through which workers hand over their batches


def query_dataset(config: Config, dataset: Dataset) -> QueryDataset:
    """Return the images of a split with the prompts that training asks of each."""
    settings = config.dataset
    names = [name for c in dataset.categories for name in (c.name, *c.synonyms)]
    choice = PromptChoice(
        most=settings.max_prompts,
        negatives=settings.negatives,
        foreign=settings.foreign,
        near_misses=tuple(settings.near_misses),
        nouns=tuple(in_vocabulary(config.model.vocabulary, nouns_beside(names))),
        examples=settings.examples,
        visual=VISUAL_PROMPT,
    )
    transforms = [instantiate(node) for node in config.transforms.train]
    return QueryDataset(dataset, transforms, seed=config.seed, choice=choice, views=settings.views)


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) of this process's share of an epoch, in the order that the seed gives.

    The order is padded from its start so that every process has the same number of items. The first
    `first` items are left out because a resumed epoch has had them.
    """

    def __init__(self, length: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.length, self.seed, self.rank, self.processes = length, seed, rank, processes
        self.epoch = 0
        self.first = 0

    def __len__(self) -> int:
        return math.ceil(self.length / self.processes)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        padded = itertools.islice(itertools.cycle(order), len(self) * self.processes)
        start = self.rank + self.first * self.processes
        return ((self.epoch, i) for i in itertools.islice(padded, start, None, self.processes))


class Batches:
    """The training images in batches, epoch after epoch; every process of a run has its share.

    Args:
        data: the training images.

    Attributes:
        updates_per_epoch: updates of the weights; each takes `training.grad_accum` batches.
        paths: image id -> its file.
    """

    def __init__(
        self,
        config: Config,
        data: QueryDataset,
        accelerator: Accelerator,
        stores: Sequence[Store] = (),
    ) -> None:
        self.config, self.device = config.training, accelerator.device
        self.sampler = EpochSampler(
            len(data), config.seed, accelerator.process_index, accelerator.num_processes
        )
        kept = features_bytes(config, stores)
        workers = _workers_with_room(self._workers(), config, data.dataset, kept)
        self.loader: DataLoader[Any] = DataLoader(
            _Items(data, stores),
            batch_size=self.config.batch_size,
            sampler=self.sampler,
            num_workers=workers,
            prefetch_factor=PREFETCHED if workers else None,
            collate_fn=_collate,
            worker_init_fn=signals.leave_to_parent,
            # A separate generator: the loader must not advance the global one, or dropout would
            # differ after a resume.
            generator=torch.Generator(),
            pin_memory=self.device.type == "cuda",
        )
        self.updates_per_epoch = math.ceil(len(self.loader) / self.config.grad_accum)
        self.paths: dict[int, Path] = {image.id: image.path for image in data.dataset.images}

    def _workers(self) -> int:
        """Return the number of workers that was given, or that suits the device."""
        if self.config.num_workers != "auto":
            return self.config.num_workers
        if self.device.type == "cpu":
            return 0
        return min(CUDA_WORKERS, max(1, cores() // self.config.num_gpus))

    def epoch(self, epoch: int, first_update: int = 0) -> Iterator[list[BatchedDatapoint]]:
        """Yield the batches of each update; all images once.

        Args:
            first_update: updates of the epoch that are done already.

        Raises:
            UserError: images that cannot be decoded, each by its path; on all ranks at once.
        """
        self.sampler.epoch = epoch
        self.sampler.first = first_update * self.config.batch_size * self.config.grad_accum
        with signals.blocked_signals():
            batches = iter(self.loader)
        try:
            while group := list(itertools.islice(batches, self.config.grad_accum)):
                with raise_on_all_ranks(self.device):
                    if errors := [batch for batch in group if isinstance(batch, UserError)]:
                        raise errors[0]
                yield group
        finally:
            del batches  # ends the workers: an error's traceback would keep them, and exit waits


class _Items(TorchDataset):
    """Return an image, and what the stores have of it: its batch then needs no encoder.

    A UserError is returned, too: one raised in a worker would arrive with a traceback.
    """

    def __init__(self, data: QueryDataset, stores: Sequence[Store]) -> None:
        self.data, self.stores = data, stores

    def __getitem__(self, key: tuple[int, int]) -> tuple[Datapoint, Found | None] | UserError:
        try:
            datapoint = self.data[key]
        except UserError as error:
            return error
        image = datapoint.images[0]
        return datapoint, find(image.data, changes_of(image), self.stores) if self.stores else None


def _collate(
    items: list[tuple[Datapoint, Found | None] | UserError],
) -> BatchedDatapoint | UserError:
    errors = [item for item in items if isinstance(item, UserError)]
    if errors:
        return UserError([problem for error in errors for problem in error.problems])
    pairs = [item for item in items if not isinstance(item, UserError)]
    datapoints, found = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    batch = collate_bytes(datapoints)
    parts = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    target, shown = batch.find_targets[0], None
    segments = target.semantic_segments  # (P, R, R) bool; (0,) where no transform makes any
    if segments.ndim == 3:
        shown = segments.flatten(1).any(dim=1).nonzero()[:, 0]
        target.semantic_segments = segments[shown]
    changes = [changes_of(datapoint.images[0]) for datapoint in datapoints]
    return _Batch(**parts, changes=changes, shown=shown, found=found)


@dataclasses.dataclass
class _Batch(BatchedDatapoint):
    """A batch on its way to the device: pixels as bytes, and no semantic target without a pixel.

    The loader asks what is no tensor or collection of tensors for a method `pin_memory`, so that
    the GPU copies the batch while it computes.

    Attributes:
        changes: of the colors of each image.
        shown: (K,) int64, the prompts of the K semantic targets.
        found: features of each image; None where none are cached.
    """

    changes: list[Changes] = dataclasses.field(default_factory=list)
    shown: Any = None
    found: list[Found | None] = dataclasses.field(default_factory=list)

    def pin_memory(self) -> _Batch:
        """Return the batch in memory that is never swapped out."""
        pinned: _Batch = _pin(self)
        return pinned


def to_device(batch: BatchedDatapoint, device: torch.device) -> BatchedDatapoint:
    """Return a batch on the device where it is computed, made whole there: as `collate` makes it.

    Bytes are a quarter of what the numbers would be, and many prompts are of nothing in the image.
    """
    batch = copy_data_to_device(batch, device, non_blocking=True)
    if not isinstance(batch, _Batch):
        return batch
    batch.img_batch = to_numbers(batch.img_batch, batch.changes)  # (B, 3, R, R), -1..1
    note_found(batch.img_batch, batch.found)
    if batch.shown is not None:
        target = batch.find_targets[0]
        shown = target.semantic_segments  # (K, R, R) bool
        every = shown.new_zeros(len(target.num_boxes), *shown.shape[1:])  # (P, R, R)
        target.semantic_segments = every.index_copy_(0, batch.shown, shown)
    return batch


def _pin(part: Any) -> Any:
    if isinstance(part, torch.Tensor):
        return part.pin_memory()
    if isinstance(part, list):
        return [_pin(each) for each in part]
    if isinstance(part, dict):
        return {name: _pin(each) for name, each in part.items()}
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = dataclasses.fields(part)
        return type(part)(**{field.name: _pin(getattr(part, field.name)) for field in fields})
    return part


def features_bytes(config: Config, stores: Sequence[Store]) -> int:
    """Return the bytes that an image's features take on their way, at most."""
    sizes = (config.model, teacher_size(config)) if stores else ()
    return sum(image_bytes(size, stores[0].dtype) for size in sizes if size is not None)


def _workers_with_room(workers: int, config: Config, dataset: Dataset, kept: int = 0) -> int:
    """Return how many workers find room in shared memory; fewer are said, as they are slower.

    A worker that fills it is killed by a bus error. Containers often have 64 MB of it.

    Args:
        kept: bytes of an image's cached features.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return workers
    counts = Counter(annotation.image_id for annotation in dataset.annotations)
    objects = max(counts.values(), default=0)
    prompts = min(config.dataset.max_prompts, len(dataset.categories), objects)  # with an object
    maps = len("RGB") + prompts + objects  # a byte a pixel each
    image = config.model.resolution**2 * maps + kept
    share = shutil.disk_usage(SHARED_MEMORY).free // config.training.num_gpus
    room = share // (config.training.batch_size * image) // (PREFETCHED + 1)
    if room < workers:
        log.info(
            "note: %s has room for %s, not %d: images are loaded more slowly. Give it more, such "
            "as docker run --shm-size=8g",
            *(SHARED_MEMORY, counted(room, "worker"), workers),
        )
    return min(workers, room)
