"""What tests ask of a process that sees the null GPU: functions of JSON to JSON (server.py)."""

from __future__ import annotations

import collections
import ctypes
import gc
import sys
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from PIL import Image

from app.__main__ import main
from app.compression.importance import Measure
from app.config.compose import load_config, load_model_config
from app.config.schema import Config
from app.datasets.build import Splits, load_splits
from app.inference.finder import Query
from app.inference.predictor import Predictor
from app.model.build import build_model
from app.model.device import choose_precision, free_memory
from app.model.halves import hold_all
from app.planning.plan import CUDA_CONTEXT, Planner
from app.training import features, method
from app.training.batches import Batches, query_dataset, to_device
from app.training.losses import LabelLosses
from app.training.prepare import Prepared, Request
from app.training.random_state import random_state, restore_random_state
from app.training.step import Step, build_accelerator

CUDA = torch.device("cuda")
WARMING = 2  # updates and predictions that come before one that is looked at
COUNTS = (  # of null/runtime.c, in its order
    *("launches", "products", "fills", "from_pageable", "from_pinned", "to_host", "on_device"),
    "waits",
)


def command(*words: str) -> None:
    """Run `python -m app WORDS`."""
    sys.argv = ["app", *words]
    main()


def update(dataset: str, size: str, *overrides: str) -> dict[str, Any]:
    """Return what the host does in an update of the run's heaviest batch, as `_operations` does."""
    config, splits = _run(dataset, size, overrides)
    step = _step(config, splits)
    batches = Batches(config, query_dataset(config, splits.train), step.accelerator)
    loaded = (batch for [batch] in batches.epoch(0))
    heaviest = max(loaded, key=lambda batch: int(batch.find_targets[0].num_boxes.sum()))
    return _operations(lambda: step([heaviest], 0))


def update_from_cached_features(dataset: str, *overrides: str) -> dict[str, int]:
    """Return what the host does in an update of nano's head, with the trunk's features on disk."""
    config, splits = _run(dataset, "nano", ["method=head", "dataset.views=1", *overrides])
    step = _step(config, splits)
    stores = features.cache_encoders(step.module, ["vision"], Path("features"), torch.float32)
    data = query_dataset(config, splits.train)
    batches = Batches(config, data, step.accelerator, stores)
    for batch in batches.epoch(0):
        step(batch, 0)
    last = list(batches.epoch(0))[-1]
    before = _counts()
    step(last, 0)
    return _since(before)


def memory(runs: Sequence[tuple[str, str, list[str]]]) -> list[dict[str, float]]:
    """Return, of each run, the bytes that it plans and those that it takes in its updates.

    Args:
        runs: dataset, size and overrides of each.
    """
    found = []
    for dataset, size, overrides in runs:
        config, splits = _run(dataset, size, overrides)
        planner = _planner(config, splits)
        planned = planner.plan().memory.total
        step, batch = _step(config, splits), planner.heaviest_batch(config)
        _release()  # what was frozen came there in float32, which a run's does not
        for _ in range(WARMING):
            step([batch], 0)
        taken = torch.cuda.max_memory_reserved() + CUDA_CONTEXT
        found.append({"planned": planned, "taken": taken})
        del step
        _release()
    return found


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def prediction(size: str, prompts: int) -> dict[str, Any]:
    """Return what the host does to find prompts in an image of 1080p, as `_operations` does."""
    config = load_model_config(size)
    model, precision = build_model(config, device=CUDA), choose_precision("auto", CUDA, config)
    hold_all(model, precision)
    predictor = Predictor(model, config, precision)
    random = np.random.default_rng(0)
    words = tuple(f"thing {number}" for number in range(prompts))
    query = Query(words, (), (), threshold=-1, max_detections=2)  # scores are 0 here: two masks

    def predict() -> None:
        pixels = random.integers(0, 255, (1080, 1920, 3), dtype=np.uint8)  # no features of before
        (found,) = predictor._find([Image.fromarray(pixels)], query)
        assert len(found) == 2

    return _operations(predict)


def copies_of_a_batch(dataset: str, *overrides: str) -> dict[str, int]:
    """Return the copies by which a batch of the run's own loader reaches the GPU."""
    config, splits = _run(dataset, "nano", overrides)
    data = query_dataset(config, splits.train)
    [batch], *_ = Batches(config, data, build_accelerator(CUDA)).epoch(0)
    before = _counts()
    to_device(batch, CUDA)
    return _since(before)


def state_of_the_gpu(dataset: str, *overrides: str) -> dict[str, Any]:
    """Return what leaves the GPU's generator as it was, and the bytes free that held ones cost."""
    config, splits = _run(dataset, "nano", overrides)
    model = build_model(config.model, device=CUDA, matcher=instantiate(config.loss.matcher))
    before = torch.cuda.get_rng_state()
    query_dataset(config, splits.train)[(0, 0)]
    drawn = torch.equal(before, torch.cuda.get_rng_state())
    Measure(config, model, splits.valid, torch.float32).mean_loss(model)
    measured = torch.equal(before, torch.cuda.get_rng_state())
    every = [before] * (torch.cuda.device_count() + 1)  # as once kept, on a machine with one more
    torch.cuda.manual_seed(5)
    restore_random_state(random_state() | {"cuda": every})
    restored = torch.equal(before, torch.cuda.get_rng_state())
    free = free_memory(CUDA)
    held = torch.empty(1 << 28, dtype=torch.uint8, device=CUDA)
    cost = free - free_memory(CUDA)
    del held
    return {"drawn": drawn, "measured": measured, "restored": restored, "cost": cost}


def _run(dataset: str, size: str, overrides: Sequence[str]) -> tuple[Config, Splits]:
    of_model = [text for text in overrides if text.startswith("model.")]
    others = [text for text in overrides if text not in of_model]
    alone = ["training.num_workers=0", "training.cache_features=false"]
    return load_config([*others, *alone], None, load_model_config(size, of_model)), load_splits(
        Path(dataset)
    )


def _planner(config: Config, splits: Splits) -> Planner:
    return Planner(Prepared(Request(()), config, splits, Path("pretrained"), ()))


def _step(config: Config, splits: Splits) -> Step:
    """Return the update of a run from pretrained weights, which here are any."""
    accelerator = build_accelerator(CUDA)
    # Not built on the GPU, from which upstream would read the rates of stochastic depth back.
    model = method.on_meta(config, pretrained=True).to_empty(device=CUDA)
    model.matcher = instantiate(config.loss.matcher)
    features.cache_prompts(model, features.frozen_encoders(model))
    precision = choose_precision(config.training.precision, CUDA, config.model)
    losses = LabelLosses(instantiate(config.loss.criterion, _convert_="all"), precision)
    batches = Batches(config, query_dataset(config, splits.train), accelerator)
    step = Step(config, model, losses, accelerator, batches, lr_scale=0.1)
    step.set_training()
    return step


def _operations(work: Callable[[], object]) -> dict[str, Any]:
    """Return what the host does in a later call: "launches" of any kind, "waits", "places".

    The last tells where torch says that the host waits, line by line; torch does not see all.
    """
    for _ in range(WARMING):
        work()
    before = _counts()
    work()
    done = _since(before)
    packages = sysconfig.get_paths()["purelib"] + "/"
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    places = collections.Counter(
        f"{each.filename.removeprefix(packages)}:{each.lineno}"
        for each in found
        if "synchroniz" in str(each.message)
    )
    launches = done["launches"] + done["products"] + done["fills"]
    return {"launches": launches, "waits": done["waits"], "places": dict(places.most_common())}


def _counts() -> dict[str, int]:
    """Return what this process has done on the null GPU."""
    library = ctypes.CDLL(None)
    library.nullgpu_counts.restype = ctypes.POINTER(ctypes.c_long * len(COUNTS))
    return dict(zip(COUNTS, library.nullgpu_counts().contents, strict=True))


def _since(before: dict[str, int]) -> dict[str, int]:
    return {name: count - before[name] for name, count in _counts().items()}
