"""The plan of a run: its memory, disk and time, before anything of it is made."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate.utils import set_seed
from hydra.utils import instantiate
from sam3.model.data_misc import BatchedDatapoint
from sam3.model.sam3_image import Sam3Image

from app.compression import distillation
from app.compression.teaching import teach
from app.config.schema import Config, ModelConfig
from app.console import counted, duration
from app.datasets.build import Splits
from app.datasets.queries import collate
from app.errors import UserError
from app.evaluation.evaluate import score_dataset
from app.files import nearest_existing
from app.inference.predictor import Predictor
from app.model.build import build_model, count_parameters
from app.model.device import PRECISIONS, choose_device, choose_precision, free_memory, peak_memory
from app.model.halves import hold_frozen
from app.planning.memory import StepBytes
from app.training import checkpoints, features, method
from app.training.batches import Batches, EpochSampler, query_dataset
from app.training.losses import LabelLosses, Losses
from app.training.prepare import Prepared
from app.training.step import Step, build_accelerator

log = logging.getLogger("app")

GB = 1e9
# What an allocator holds beyond the tensors in use: glibc as much again, of blocks below 32 MB;
# torch's for CUDA a share of all of them (tests/gpu/test_memory.py).
CPU_SLACK = 300_000_000
CUDA_SLACK = 0.2
CUDA_CONTEXT = 600_000_000
PROBED = 3  # updates, after a first one that is not timed
# What makes a run smaller, that which costs the least of quality and time first.
CHANGES = (
    "training.precision=",  # the half that the device multiplies in
    "model.activation_checkpointing=true",
    "dataset.max_prompts=4",
    "method=lora",
    "method=lora-minimal",
    "loss=boxes",
)
PROPOSED = 3
HEAVIEST_CACHED = 2  # the run's own, and that of the size that was tried last


@dataclass(frozen=True)
class Memory:
    """Hold the bytes of one process at its peak, by their use.

    Attributes:
        process: Python, libraries and labels; on a GPU, CUDA's context.
        weights: the model's, and its teacher's where it has one.
        optimizer: AdamW's moments, and the EMA where there is one.
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
    """Hold the bytes that a run writes.

    Attributes:
        left: in the output folder at the end: checkpoints and weights.
        while_saving: more, as what is new is whole before the oldest goes.
        features: of the feature cache, in data/; 0 without one.
    """

    left: int
    while_saving: int
    features: int


@dataclass(frozen=True)
class Plan:
    """Hold what a run takes, and what there is.

    Attributes:
        parameters, trained: counts.
        updates: of an epoch.
        memory: of each process.
        free_memory: bytes for each process, what this one holds included.
        free_disk: bytes.
    """

    config: Config
    parameters: int
    trained: int
    updates: int
    memory: Memory
    free_memory: int
    disk: Disk
    free_disk: int

    @property
    def spare_memory(self) -> int:
        """Return the bytes that are left over; below 0, that are lacking."""
        return self.free_memory - self.memory.total

    @property
    def lacking_disk(self) -> int:
        """Return the bytes that are lacking; 0 where the run fits."""
        return max(0, self.disk.left + self.disk.while_saving - self.free_disk)

    @property
    def fits(self) -> bool:
        return self.spare_memory >= 0 and not self.lacking_disk


def show(plan: Plan, splits: Splits) -> None:
    """Print a plan."""
    epochs, memory, disk = plan.config.training.epochs, plan.memory, plan.disk
    parts = (memory.process, memory.weights, memory.optimizer, memory.step)
    for name, line in (
        (
            "images",
            f"{len(splits.train.images)} to train on, {len(splits.valid.images)} to validate, of "
            f"{counted(len(splits.train.class_names), 'class')}",
        ),
        (
            "updates",
            f"{plan.updates * epochs}: {plan.updates} in {'each of ' if epochs > 1 else ''}"
            f"{counted(epochs, 'epoch')}",
        ),
        ("parameters", f"{plan.parameters / 1e6:.2f} M, {plan.trained / 1e6:.2f} M trained"),
        ("recomputed", recomputed_in_words(plan.config.model)),
        (
            "memory",
            "{:.2f} GB: process {:.2f}, weights {:.2f}, optimizer {:.2f}, step {:.2f}".format(
                *(size / GB for size in (memory.total, *parts))
            )
            + f"; {plan.free_memory / GB:.2f} GB are free",
        ),
        (
            "disk",
            f"{disk.left / GB:.2f} GB, {(disk.left + disk.while_saving) / GB:.2f} GB while it "
            f"saves; {plan.free_disk / GB:.2f} GB are free",
        ),
        ("features", f"{disk.features / GB:.2f} GB in {features.FOLDER}" if disk.features else ""),
    ):
        if line:
            log.info("%-11s %s", name, line)


def recomputed_in_words(model: ModelConfig) -> str:
    """Return what a step computes anew in its backward pass."""
    choice = model.activation_checkpointing
    if isinstance(choice, list):
        return " and ".join(choice) or "nothing"
    return {True: "everything", False: "nothing", "auto": "by the memory of where it runs"}[choice]


class Planner:
    """Count what a run takes, and what runs with other settings of the same data would.

    Args:
        prepared: the run; its weights are not read.
        most_memory: bytes that a process can have, where that is known to be less than is free.
    """

    def __init__(self, prepared: Prepared, most_memory: int | None = None) -> None:
        self.prepared, self.splits = prepared, prepared.splits
        self.most_memory = math.inf if most_memory is None else most_memory
        self.pretrained = prepared.pretrained_path is not None
        _process_bytes()
        # By size, method, and the half in which frozen matrices are held, where they are.
        self._models: dict[tuple[str, str, torch.dtype | None], Sam3Image] = {}
        if prepared.meta_model is not None:
            self._models[(*_model_key(prepared.config), None)] = prepared.meta_model
        self._step_bytes = StepBytes()
        self._heaviest: dict[str, BatchedDatapoint] = {}  # by all that a batch is made of

    def plan(self, config: Config | None = None) -> Plan:
        """Return the plan of the run, or of one with another configuration."""
        config = config or self.prepared.config
        device = choose_device(config.training.device)
        precision = choose_precision(config.training.precision, device, config.model)
        on_gpu_in_half = device.type == "cuda" and precision != torch.float32
        model = self._model(config, precision if on_gpu_in_half else None)
        batches = math.ceil(len(self._sampler(config)) / config.training.batch_size)
        free = free_memory(device, config.training.num_gpus)
        if device.type == "cuda":
            free += CUDA_CONTEXT  # of this process, which the driver counts as used
        return Plan(
            config,
            parameters=count_parameters(model)["total"],
            trained=count_parameters(model, trainable=True)["total"],
            updates=math.ceil(batches / config.training.grad_accum),
            disk=predict_disk(config, self.splits, model, precision),
            free_disk=shutil.disk_usage(nearest_existing(Path(config.output_dir))).free,
            memory=self.predict_memory(config, model, device, precision),
            free_memory=round(min(free, self.most_memory)),
        )

    def require_fit(self, plan: Plan) -> None:
        """Refuse a run that does not fit.

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
        raise UserError([*problems, *self.ways_to_fit(plan)])

    def ways_to_fit(self, plan: Plan) -> list[str]:
        """Return lines, each with a change by which the run would fit, the mildest first."""
        ways = list(itertools.islice(self._ways_to_fit(plan), PROPOSED))
        return ways or ["  no single change; a smaller model or another machine"]

    def _ways_to_fit(self, plan: Plan) -> Iterator[str]:
        """Yield lines, each with a change that is enough."""
        training = plan.config.training
        most = 0 if plan.lacking_disk else training.batch_size - 1
        size = self.largest_batch(plan.config, most=most)
        if size:
            accumulated = math.ceil(training.batch_size * training.grad_accum / size)
            yield f"  --batch-size {size} --grad-accum {accumulated}"
        for change in CHANGES:
            if change.endswith("="):
                change += _half_of(choose_device(training.device), plan.config.model)
            try:
                config = self.prepared.configure([change])
            except UserError:  # it does not go with what was asked for
                continue
            adapts_random = config.method.lora is not None and not self.pretrained
            if config == plan.config or adapts_random:
                continue
            smaller = self.plan(config)
            if smaller.fits:
                disk = smaller.disk.left + smaller.disk.while_saving
                flag = change.replace("method=", "--method ")
                yield f"  {flag} ({smaller.memory.total / GB:.2f} GB, {disk / GB:.2f} GB of disk)"

    def largest_batch(self, config: Config | None = None, *, most: int | None = None) -> int:
        """Return the largest `training.batch_size` that fits; 0 where not even one image does.

        Args:
            most: upper bound; the number of training images of a process where it is None.
        """
        config = config or self.prepared.config
        low, high = 0, len(self._sampler(config)) if most is None else most
        size = 1
        while low < high:
            size = min(max(size, low + 1), high)
            training = config.training.model_copy(update={"batch_size": size})
            plan = self.plan(config.model_copy(update={"training": training}))
            low, high = (size, high) if plan.spare_memory >= 0 else (low, size - 1)
            size += math.floor(plan.spare_memory / (plan.memory.step / size))
        return low

    def predict_memory(
        self, config: Config, model: Sam3Image, device: torch.device, precision: torch.dtype
    ) -> Memory:
        """Return the peak of one process in training.

        Args:
            model: on the meta device.
        """
        on_gpu = device.type == "cuda"
        weights = sum(
            tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers())
        )
        if (teacher := distillation.teacher_on_meta(config, model, precision)) is not None:
            weights += distillation.own_bytes(teacher, model)
        optimizer = checkpoints.optimizer_bytes(config, model)
        step = self._step_bytes(config, model, self.heaviest_batch(config), precision, device)
        on_cuda = round(CUDA_SLACK * (weights + optimizer + step))
        return Memory(
            process=CUDA_CONTEXT if on_gpu else _process_bytes(),
            weights=weights,
            optimizer=optimizer,
            step=step + (on_cuda if on_gpu else min(step, CPU_SLACK)),
        )

    def heaviest_batch(self, config: Config) -> BatchedDatapoint:
        """Return the batch of the first epoch with the most objects; its pixels are any.

        The last ones are cached, because plans with other settings are made of the same.
        """
        keys, size = list(self._sampler(config)), config.training.batch_size
        train = self.splits.train
        objects = Counter(annotation.image_id for annotation in train.annotations)
        batches = [keys[first : first + size] for first in range(0, len(keys), size)]
        heaviest = max(
            batches,
            key=lambda batch: (len(batch), sum(objects[train.images[i].id] for _, i in batch)),
        )
        made_of = (heaviest, config.seed, config.dataset, config.transforms)
        key = repr((*made_of, config.model.resolution, config.model.vocabulary))
        if key not in self._heaviest:
            data = query_dataset(config, train)
            if len(self._heaviest) == HEAVIEST_CACHED:
                del self._heaviest[next(iter(self._heaviest))]
            batch = collate([data[item] for item in heaviest])
            batch.img_batch = torch.empty_like(batch.img_batch)  # no memory until it is written
            self._heaviest[key] = batch
        return self._heaviest[key]

    def _model(self, config: Config, half: torch.dtype | None) -> Sam3Image:
        """Return the model of a run as its steps have it, on the meta device."""
        key = (*_model_key(config), half)
        if key not in self._models:
            model = method.on_meta(config, pretrained=self.pretrained)
            if half is not None:
                hold_frozen(model, half)
            self._models[key] = model
        return self._models[key]

    def _sampler(self, config: Config) -> EpochSampler:
        processes = config.training.num_gpus * config.cluster.nodes
        return EpochSampler(len(self.splits.train.images), config.seed, 0, processes)


def _half_of(device: torch.device, model: ModelConfig) -> str:
    """Return the name of the half precision to propose: on a CPU bfloat16, whose range is wide."""
    dtype = torch.bfloat16 if device.type == "cpu" else choose_precision("auto", device, model)
    return next(name for name, each in PRECISIONS.items() if each == dtype)


@functools.cache
def _process_bytes() -> int:
    """Return what this process held before anything was planned."""
    return psutil.Process().memory_info().rss


def _model_key(config: Config) -> tuple[str, str]:
    return config.model.model_dump_json(), config.method.model_dump_json()


def predict_disk(config: Config, splits: Splits, model: Sam3Image, precision: torch.dtype) -> Disk:
    """Return the bytes that a run writes; pictures and tables, some MB, apart."""
    left, while_saving = checkpoints.run_bytes(config, model)
    return Disk(left, while_saving, features.cache_bytes(config, splits, model, precision))


@dataclass(frozen=True)
class Times:
    """Hold measured seconds.

    Attributes:
        update: of an update.
        cached: of an update whose features are cached; None without a feature cache.
        image: of an image in a validation.
        peak: bytes, most that this process held.
    """

    update: float
    cached: float | None
    image: float
    peak: int

    def total(self, plan: Plan, splits: Splits) -> float:
        """Return the seconds of the whole run: updates, validations before, between and after."""
        epochs, every = plan.config.training.epochs, plan.config.evaluation.every
        first = min(epochs, plan.config.dataset.views or features.VIEWS)
        if self.cached is None:
            seconds = epochs * plan.updates * self.update
        else:
            seconds = plan.updates * (first * self.update + (epochs - first) * self.cached)
        validations = 2 + math.ceil(epochs / every)
        return seconds + validations * len(splits.valid.images) * self.image


def measure(prepared: Prepared) -> Times:
    """Train a few updates and validate two images, from random weights; leave nothing behind."""
    config, splits = prepared.config, prepared.splits
    device = choose_device(config.training.device)
    precision = choose_precision(config.training.precision, device, config.model)
    accelerator = build_accelerator(device)
    set_seed(config.seed)
    model = build_model(config.model, matcher=instantiate(config.loss.matcher))
    method.prepare(model, config.method, pretrained=prepared.pretrained_path is not None)
    encoders = features.cached_encoders(config, model)
    with tempfile.TemporaryDirectory() as folder:
        stores = features.cache_encoders(model, encoders, Path(folder), precision)
        features.cache_prompts(model, features.frozen_encoders(model))
        labels = LabelLosses(instantiate(config.loss.criterion, _convert_="all"), precision)
        losses: Losses = labels
        if config.distill.teacher is not None:
            losses = teach(config, model, splits, labels, Path(folder))
        data = query_dataset(config, splits.train)
        batches = Batches(config, data, accelerator, [*stores, *losses.stores])
        step = Step(config, model, losses, accelerator, batches, lr_scale=1.0)
        update = _seconds_per_update(step, batches)
        cached = _seconds_per_update(step, batches) if encoders else None
        few = splits.valid.subset([image.id for image in splits.valid.images[:2]])
        begun = time.monotonic()
        score_dataset(Predictor(model, config.model, precision), few, config, "validating")
        image = (time.monotonic() - begun) / len(few.images)
    peak = peak_memory(device) + (CUDA_CONTEXT if device.type == "cuda" else 0)
    return Times(update, cached, image, peak)


def _seconds_per_update(step: Step, batches: Batches) -> float:
    """Return the median of the first updates of an epoch, the very first apart."""
    step.set_training()
    begun, seconds = time.monotonic(), []
    for group in itertools.islice(batches.epoch(0), PROBED + 1):
        step(group, 0)
        seconds.append(time.monotonic() - begun)
        begun = time.monotonic()
    return statistics.median(seconds[1:] or seconds)


def show_times(times: Times, plan: Plan, splits: Splits) -> None:
    """Print what was measured, beside what was foretold."""
    cached = "" if times.cached is None else f", {times.cached:.2f} s from cached features"
    log.info(
        "%-11s %s: %.2f s an update%s, %.2f s an image validated",
        *("time", duration(times.total(plan, splits)), times.update, cached, times.image),
    )
    log.info("%-11s %.2f GB in %d updates", "measured", times.peak / GB, PROBED + 1)
