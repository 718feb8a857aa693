"""What a run will take, before anything of it is made: memory, disk, time."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import resource
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate.utils import set_seed
from hydra.utils import instantiate
from sam3.model.data_misc import BatchedDatapoint
from sam3.model.sam3_image import Sam3Image

from app.compression import distillation
from app.config.schema import Config
from app.console import duration
from app.datasets.build import Splits
from app.datasets.queries import collate
from app.errors import UserError
from app.files import nearest_existing
from app.inference.predictor import Predictor
from app.model.build import build_model, count_parameters
from app.model.device import choose_device, choose_precision, free_memory
from app.planning.memory import step_bytes
from app.training import checkpoints, features, method, run
from app.training.loop import EpochSampler, Loop, build_accelerator
from app.training.session import score

log = logging.getLogger("app")
Configure = Callable[[Sequence[str]], Config]

GB = 1e9
# What an allocator holds beyond the tensors in use: glibc as much again, of blocks below 32 MB.
CPU_SLACK = 300_000_000
CUDA_SLACK = 0.1
CUDA_CONTEXT = 600_000_000
PROBED = 3  # updates, after a first one that is not timed
# What makes a run smaller, that which costs the least of quality and time first.
CHANGES = (
    "training.precision=bf16",
    "model.activation_checkpointing=true",
    "dataset.max_prompts=4",
    "method=lora",
    "method=lora-minimal",
    "loss=boxes",
)
PROPOSED = 3
HEAVIEST_KEPT = 2  # the run's own, and that of the size that was tried last


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by what they hold.

    Attributes:
        process: Python, libraries and labels; on a GPU, CUDA's context.
        weights: the model's, and its teacher's where it has one.
        optimizer: AdamW's moments, and the average where there is one.
        step: activations and gradients, and what the allocator holds beyond them.
    """

    process: int
    weights: int
    optimizer: int
    step: int

    @property
    def total(self) -> int:
        return self.process + self.weights + self.optimizer + self.step


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes.

    Attributes:
        kept: in the output folder at the end: checkpoints and weights.
        while_saving: more, as what is new is whole before the oldest goes.
        features: of frozen encoders, in data/; 0 where none are kept.
    """

    kept: int
    while_saving: int
    features: int


@dataclass(frozen=True)
class Plan:
    """What a run takes, and what there is.

    Attributes:
        starts_trained: whether it starts from weights.
        parameters, trained: counts.
        updates: of an epoch.
        memory: of each process.
        free_memory: bytes for each process, what this one holds included.
        free_disk: bytes.
    """

    config: Config
    starts_trained: bool
    parameters: int
    trained: int
    updates: int
    memory: Memory
    free_memory: int
    disk: Disk
    free_disk: int

    @property
    def spare_memory(self) -> int:
        """Bytes that are left over; below 0, that are lacking."""
        return self.free_memory - self.memory.total

    @property
    def lacking_disk(self) -> int:
        """Bytes; none where it fits."""
        return max(0, self.disk.kept + self.disk.while_saving - self.free_disk)

    @property
    def fits(self) -> bool:
        return self.spare_memory >= 0 and not self.lacking_disk


def make_plan(config: Config, splits: Splits, *, trained: bool) -> Plan:
    """Count what the run takes.

    Args:
        trained: whether it starts from weights; they are not read.
    """
    device = choose_device(config.training.device)
    precision = choose_precision(config.training.precision, device, config.model)
    model = method.on_meta(config, trained=trained)
    share = len(_sampler(config, splits))
    steps = math.ceil(share / config.training.batch_size)
    return Plan(
        config,
        starts_trained=trained,
        parameters=count_parameters(model)["total"],
        trained=count_parameters(model, trainable=True)["total"],
        updates=math.ceil(steps / config.training.grad_accum),
        disk=predict_disk(config, splits, model, precision),
        free_disk=shutil.disk_usage(nearest_existing(Path(config.output_dir))).free,
        memory=predict_memory(config, splits, model, device, precision),
        free_memory=free_memory(device, config.training.num_gpus),
    )


def show(plan: Plan, splits: Splits) -> None:
    """Print a plan."""
    epochs, memory, disk = plan.config.training.epochs, plan.memory, plan.disk
    parts = (memory.process, memory.weights, memory.optimizer, memory.step)
    for name, line in (
        (
            "images",
            f"{len(splits.train.images)} to train on, {len(splits.valid.images)} to validate, of "
            f"{len(splits.train.class_names)} classes",
        ),
        ("updates", f"{plan.updates * epochs}: {plan.updates} in each of {epochs} epochs"),
        ("parameters", f"{plan.parameters / 1e6:.2f} M, {plan.trained / 1e6:.2f} M trained"),
        (
            "memory",
            "{:.2f} GB: process {:.2f}, weights {:.2f}, optimiser {:.2f}, step {:.2f}".format(
                *(size / GB for size in (memory.total, *parts))
            )
            + f"; {plan.free_memory / GB:.2f} GB are free",
        ),
        (
            "disk",
            f"{disk.kept / GB:.2f} GB, {(disk.kept + disk.while_saving) / GB:.2f} GB while it "
            f"saves; {plan.free_disk / GB:.2f} GB are free",
        ),
        ("features", f"{disk.features / GB:.2f} GB in {run.FEATURES}" if disk.features else ""),
    ):
        if line:
            log.info("%-11s %s", name, line)


def require_fit(plan: Plan, splits: Splits, configure: Configure) -> None:
    """Refuse a run that does not fit.

    Args:
        configure: further overrides -> the plan's configuration with them.

    Raises:
        UserError: what is lacking, and the changes that would make it fit, the mildest first.
    """
    if plan.fits:
        return
    problems = []
    if plan.lacking_disk:
        problems.append(
            f"--output-dir {plan.config.output_dir}: {plan.lacking_disk / GB:.2f} GB more are "
            "needed on its disk"
        )
    if plan.spare_memory < 0:
        problems.append(f"memory: {-plan.spare_memory / GB:.2f} GB more are needed")
    problems[-1] += "; what would do:"
    ways = list(itertools.islice(_ways_to_fit(plan, splits, configure), PROPOSED))
    raise UserError(
        [*problems, *(ways or ["  no single change; a smaller model or another machine"])]
    )


def _ways_to_fit(plan: Plan, splits: Splits, configure: Configure) -> Iterator[str]:
    """Lines, each with a change that is enough."""
    training = plan.config.training
    most = 0 if plan.lacking_disk else training.batch_size - 1
    size = largest_batch(plan.config, splits, trained=plan.starts_trained, most=most)
    if size:
        accumulated = math.ceil(training.batch_size * training.grad_accum / size)
        yield f"  --batch-size {size} --grad-accum {accumulated}"
    for change in CHANGES:
        try:
            config = configure([change])
        except UserError:  # it does not go with what was asked for
            continue
        adapts_random = config.method.lora is not None and not plan.starts_trained
        if config == plan.config or adapts_random:
            continue
        smaller = make_plan(config, splits, trained=plan.starts_trained)
        if smaller.fits:
            disk = smaller.disk.kept + smaller.disk.while_saving
            yield f"  {change} ({smaller.memory.total / GB:.2f} GB, {disk / GB:.2f} GB of disk)"


def largest_batch(config: Config, splits: Splits, *, trained: bool, most: int | None = None) -> int:
    """The largest `training.batch_size` that fits, up to `most` and to the images; 0: none does."""

    def at(size: int) -> Plan:
        training = config.training.model_copy(update={"batch_size": size})
        sized = config.model_copy(update={"training": training})
        return make_plan(sized, splits, trained=trained)

    low, high = 0, len(_sampler(config, splits)) if most is None else most
    size = 1
    while low < high:
        size = min(max(size, low + 1), high)
        plan = at(size)
        low, high = (size, high) if plan.spare_memory >= 0 else (low, size - 1)
        size += math.floor(plan.spare_memory / (plan.memory.step / size))
    return low


def predict_memory(
    config: Config,
    splits: Splits,
    model: Sam3Image,
    device: torch.device,
    precision: torch.dtype,
) -> Memory:
    """Peak of one process in training.

    Args:
        model: as `method.on_meta` makes it.
    """
    gpu = device.type == "cuda"
    weights = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
    if (teacher := distillation.teacher_on_meta(config, model, precision)) is not None:
        weights += distillation.own_bytes(teacher, model)
    step = step_bytes(config, model, _heaviest_batch(config, splits), precision)
    return Memory(
        process=CUDA_CONTEXT if gpu else _process_bytes(),
        weights=weights,
        optimizer=checkpoints.optimizer_bytes(config, model),
        step=step + (round(CUDA_SLACK * step) if gpu else min(step, CPU_SLACK)),
    )


def predict_disk(config: Config, splits: Splits, model: Sam3Image, precision: torch.dtype) -> Disk:
    """What a run writes; pictures and tables, some MB, apart."""
    kept, while_saving = checkpoints.run_bytes(config, model)
    return Disk(kept, while_saving, run.kept_bytes(config, splits, model, precision))


@dataclass(frozen=True)
class Times:
    """Seconds.

    Attributes:
        update: of an update.
        cached: of one whose features are kept already; None where none are kept.
        image: of an image in a validation.
        peak: bytes, most that this process held.
    """

    update: float
    cached: float | None
    image: float
    peak: int

    def total(self, plan: Plan, splits: Splits) -> float:
        """Of the whole run: updates, validations before, between and after them."""
        epochs, every = plan.config.training.epochs, plan.config.evaluation.every
        first = min(epochs, plan.config.dataset.views or features.VIEWS)
        if self.cached is None:
            seconds = epochs * plan.updates * self.update
        else:
            seconds = plan.updates * (first * self.update + (epochs - first) * self.cached)
        validations = 2 + math.ceil(epochs / every)
        return seconds + validations * len(splits.valid.images) * self.image


def measure(config: Config, splits: Splits, *, trained: bool) -> Times:
    """Train a few updates and validate two images, from random weights; nothing is left behind."""
    device = choose_device(config.training.device)
    precision = choose_precision(config.training.precision, device, config.model)
    accelerator = build_accelerator(device)
    set_seed(config.seed)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    method.prepare(model, config.method, trained=trained)
    kept = run.kept_encoders(config, model)
    data = run.query_dataset(config, splits.train)
    with tempfile.TemporaryDirectory() as folder:
        features.keep(model, kept, Path(folder), precision)
        lesson = run.make_lesson(config, model, splits, device, precision, Path(folder))
        loop = Loop(config, model, data, accelerator, lr_scale=1.0, lesson=lesson)
        update = _seconds_per_update(loop)
        cached = _seconds_per_update(loop) if kept else None
        few = splits.valid.subset([image.id for image in splits.valid.images[:2]])
        begun = time.monotonic()
        score(Predictor(model, config.model, precision), few, config, "validating")
        image = (time.monotonic() - begun) / len(few.images)
    if device.type == "cuda":
        peak = CUDA_CONTEXT + torch.cuda.max_memory_reserved()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Times(update, cached, image, peak)


def _seconds_per_update(loop: Loop) -> float:
    """The median of the first epoch's, the very first apart."""
    begun, seconds = time.monotonic(), []
    for _ in itertools.islice(loop.run_epoch(0), PROBED + 1):
        seconds.append(time.monotonic() - begun)
        begun = time.monotonic()
    return statistics.median(seconds[1:] or seconds)


def show_times(times: Times, plan: Plan, splits: Splits) -> None:
    """Print what was measured, beside what was foretold."""
    cached = "" if times.cached is None else f", {times.cached:.2f} s from kept features"
    log.info(
        "%-11s %s: %.2f s an update%s, %.2f s an image validated",
        *("time", duration(times.total(plan, splits)), times.update, cached, times.image),
    )
    log.info("%-11s %.2f GB in %d updates", "measured", times.peak / GB, PROBED + 1)


def _sampler(config: Config, splits: Splits) -> EpochSampler:
    processes = config.training.num_gpus * config.cluster.nodes
    return EpochSampler(len(splits.train.images), config.seed, 0, processes)


def _heaviest_batch(config: Config, splits: Splits) -> BatchedDatapoint:
    """The batch of the first epoch with the most objects, its pixels apart: they are any.

    The last ones are kept, as plans with other settings are made of the same.
    """
    keys, size = list(_sampler(config, splits)), config.training.batch_size
    objects = Counter(annotation.image_id for annotation in splits.train.annotations)
    images = splits.train.images
    batches = [keys[first : first + size] for first in range(0, len(keys), size)]
    heaviest = max(
        batches, key=lambda batch: (len(batch), sum(objects[images[i].id] for _, i in batch))
    )
    made_of = (id(splits.train), heaviest, config.seed, config.dataset, config.transforms)
    key = repr((*made_of, config.model.resolution, config.model.vocabulary))
    if key not in _heaviest:
        data = run.query_dataset(config, splits.train)
        if len(_heaviest) == HEAVIEST_KEPT:
            del _heaviest[next(iter(_heaviest))]
        batch = collate([data[item] for item in heaviest])
        batch.img_batch = torch.empty_like(batch.img_batch)  # takes no memory until it is written
        _heaviest[key] = batch
    return _heaviest[key]


_heaviest: dict[str, BatchedDatapoint] = {}  # by all that one is made of


@functools.cache
def _process_bytes() -> int:
    """What this process held before anything was planned."""
    return psutil.Process().memory_info().rss
