"""Batches: every image once, shared among ranks, resumed within an epoch."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.datasets.queries import collate
from app.errors import UserError
from app.training import batches
from app.training.batches import (
    CUDA_WORKERS,
    Batches,
    EpochSampler,
    query_dataset,
    to_device,
)
from tests.helpers import TINY, log_lines
from tests.training.updates import tiny_updates


def test_an_epoch_takes_every_image_once(shapes: Path) -> None:
    for accumulate, expected in ((1, 4), (3, 2), (9, 1)):
        updates, _ = tiny_updates(
            shapes, "training.batch_size=1", f"training.grad_accum={accumulate}"
        )
        assert updates.batches.updates_per_epoch == expected
        steps = list(updates.epoch(0))
        assert len(steps) == expected
        assert sum(step.images for step in steps) == 4


def test_an_error_leaves_no_loading_process(shapes: Path, monkeypatch) -> None:
    """Whoever holds the error holds its frames: the exit would wait for the processes for ever."""
    updates, data = tiny_updates(shapes, "training.num_workers=2")
    others = set(multiprocessing.active_children())  # that another test's garbage holds

    def bad(*_: object) -> None:
        raise UserError("bad image")

    monkeypatch.setattr(type(data), "__getitem__", bad)
    with pytest.raises(UserError, match="bad image") as caught:
        list(updates.epoch(0))
    assert caught.value.__traceback__ is not None
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_a_gpus_workers_are_no_more_than_the_cores(shapes: Path, monkeypatch) -> None:
    updates, data = tiny_updates(shapes)
    accelerator = SimpleNamespace(
        device=torch.device("cuda"), process_index=0, num_processes=1
    )  # all that batches ask of it
    for given, number in ((1, 1), (2, 2), (64, CUDA_WORKERS)):
        monkeypatch.setattr(batches, "cores", lambda given=given: given)
        loader = Batches(updates.step.config, data, accelerator).loader
        assert loader.num_workers == number


@pytest.mark.parametrize(("megabytes", "number"), [(20, 0), (80, 2), (8000, 4)])
def test_workers_find_room_in_shared_memory(
    shapes: Path, monkeypatch, megabytes: int, number: int
) -> None:
    """At 1008 px an image with three classes and five objects takes 11 MB of it."""
    config = load_config(["model.resolution=1008", "training.batch_size=1"])
    dataset = load_splits(shapes).train
    free = SimpleNamespace(free=megabytes * 10**6)
    monkeypatch.setattr(batches.shutil, "disk_usage", lambda _: free)
    lines = log_lines(monkeypatch)
    assert batches._workers_with_room(4, config, dataset) == number
    assert ["/dev/shm has room for" in line for line in lines] == [True] * (number < 4)
    assert batches._workers_with_room(0, config, dataset) == 0


@pytest.mark.parametrize("transforms", ["none", "strong"])
def test_bytes_become_the_batch_on_the_device(shapes: Path, transforms: str) -> None:
    """To the bit; and what is empty does not travel."""
    config = load_config([*TINY, f"transforms={transforms}", "dataset.negatives=2"])
    data = query_dataset(config, load_splits(shapes).train)
    whole = collate([data[(0, index)] for index in range(4)])
    items = batches._Items(data, ())
    sent = batches._collate([items[(0, index)] for index in range(4)])
    assert sent.img_batch.dtype == torch.uint8
    semantic = whole.find_targets[0].semantic_segments
    shown = semantic.flatten(1).any(dim=1)
    assert 0 < shown.sum() < len(shown)
    assert len(sent.find_targets[0].semantic_segments) == shown.sum()
    for _ in range(2):  # what was sent stays as it is
        made = to_device(sent, torch.device("cpu"))
        assert torch.equal(made.img_batch, whole.img_batch)
        assert torch.equal(made.find_targets[0].semantic_segments, semantic)
        assert torch.equal(made.find_targets[0].segments, whole.find_targets[0].segments)
    assert to_device(whole, torch.device("cpu")).img_batch is whole.img_batch


def test_the_sampler_goes_on_from_a_position() -> None:
    for rank in range(3):
        sampler = EpochSampler(10, seed=1, rank=rank, processes=3)
        whole = list(sampler)
        sampler.first = 2
        assert list(sampler) == whole[2:]


def test_the_sampler_shares_out_every_image() -> None:
    for length, processes in ((10, 1), (10, 3), (2, 4)):
        shares = []
        for rank in range(processes):
            sampler = EpochSampler(length, seed=1, rank=rank, processes=processes)
            sampler.epoch = 5
            assert len(list(sampler)) == len(sampler)
            shares.append(list(sampler))
        assert {i for share in shares for _, i in share} == set(range(length))
        assert {epoch for share in shares for epoch, _ in share} == {5}
    first, second = EpochSampler(50, 1, 0, 1), EpochSampler(50, 1, 0, 1)
    assert list(first) == list(second)
    second.epoch = 1
    assert [i for _, i in first] != [i for _, i in second]
