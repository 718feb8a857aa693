"""A validation shared by two processes is one process's to the bit, and ends in both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import gather_object

from app.datasets.build import load_splits
from app.datasets.coco import Dataset
from app.datasets.images import open_image
from app.datasets.synthetic.shapes import make_shapes
from app.errors import UserError
from app.evaluation.validate import ALONE, Ranks, Validation, validate
from app.inference import Predictor
from app.inference.outputs import coco_results
from app.signals import Stopped
from app.training.step import build_accelerator
from tests.helpers import PATIENCE, REPOSITORY

IMAGES = 7  # two ranks with batches of two: the last round has one image, and none for rank 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(folder, train=1, valid=IMAGES, fog=0, width=96, height=64, seed=3)
    return folder


@pytest.fixture(scope="module")
def predictor(tiny_run: Path) -> Predictor:
    return Predictor.load(tiny_run / "weights" / "best", device="cpu")


def _validate(predictor: Predictor, dataset: Dataset, **options: Any) -> Validation:
    return validate(predictor, dataset, max_detections=20, nouns=["harp", "yak"], **options)


def _as_json(validation: Validation) -> str:
    content = [validation.figures, validation.results, validation.off_prompts.firings]
    return json.dumps(content, default=vars)


def test_images_are_answered_in_batches(predictor, data) -> None:
    """The same detections, but for rounding, in the same order; progress counts images."""
    dataset = load_splits(data).valid
    done: list[tuple[int, int]] = []
    alone = _validate(predictor, dataset)
    batched = _validate(
        predictor, dataset, batch_size=3, on_images=lambda *counts: done.append(counts)
    )
    assert done == [(3, 7), (6, 7), (7, 7)]
    assert [r["image_id"] for r in batched.results] == [r["image_id"] for r in alone.results]
    scores = [[r["score"] for r in each.results] for each in (alone, batched)]
    assert np.allclose(*scores, atol=1e-5)


def test_an_image_alone_is_answered_as_predict_answers(predictor, data) -> None:
    dataset = load_splits(data).valid
    ids = [category.id for category in dataset.categories]
    expected = []
    for image in dataset.images:
        detections = predictor.predict(
            open_image(image.path), dataset.class_names, threshold=0.0, max_detections=20
        )
        expected += coco_results(detections, image.id, ids)
    assert _validate(predictor, dataset).results == expected


@pytest.mark.parametrize("batch_size", [1, 2])
def test_ranks_cut_the_images_without_overlap(predictor, data, batch_size: int) -> None:
    """Each rank's share, gathered by hand round by round, is what one process answers."""
    dataset = load_splits(data).valid
    alone = _validate(predictor, dataset, batch_size=batch_size)
    rounds: list[list[Any]] = []
    with_two = Ranks(1, 2, lambda own: rounds.append(own) or own)
    _validate(predictor, dataset, batch_size=batch_size, ranks=with_two)
    others = iter(rounds)
    both = Ranks(0, 2, lambda own: own + next(others))
    assert _as_json(_validate(predictor, dataset, batch_size=batch_size, ranks=both)) == _as_json(
        alone
    )


def test_an_error_ends_the_validation(predictor, data) -> None:
    dataset = _with_a_missing_image(load_splits(data).valid, 2)
    with pytest.raises(UserError, match="absent"):
        _validate(predictor, dataset)


def _with_a_missing_image(dataset: Dataset, index: int) -> Dataset:
    images = list(dataset.images)
    images[index] = replace(images[index], path=Path("absent.png"))
    return replace(dataset, images=tuple(images))


@pytest.mark.system
def test_two_processes_are_as_one(predictor, data, tiny_run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "app.launch.torchrun", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.evaluation.test_validate"]
    command += [str(data), str(tiny_run / "weights" / "best"), str(tmp_path)]
    ended = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=PATIENCE,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    elsewhere = "another process of this run cannot go on"
    for batch_size in ("1", "2"):
        first, second = (rank[batch_size] for rank in ranks)
        assert first["shared"] == first["alone"]
        assert first["alone"][1]  # there are results
        assert second["shared"] == [first["alone"][0], [], []]  # the figures
        assert elsewhere in first["missing"]
        assert "absent.png" in second["missing"]
        assert first["stopped"] == second["stopped"] == "Stopped"
        assert elsewhere in first["both"]
        assert "absent.png" in second["both"]
        assert first["after"] == second["after"] == "went on"


def _rank_main(data: Path, checkpoint: Path, folder: Path) -> None:
    """Write what validations come to in this rank, by the size of their batches."""
    accelerator = build_accelerator(torch.device("cpu"))
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, gather_object)
    assert ranks.world_size == 2
    predictor = Predictor.load(checkpoint, device="cpu")
    dataset = load_splits(data).valid
    content = {size: _outcomes(predictor, dataset, size, ranks) for size in (1, 2)}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(content), encoding="utf-8")
    accelerator.end_training()


def _outcomes(
    predictor: Predictor, dataset: Dataset, batch_size: int, ranks: Ranks
) -> dict[str, Any]:
    def end(dataset: Dataset, stopping_rank: int | None = None) -> str:
        def on_images(_done: int, _total: int) -> None:
            if ranks.rank == stopping_rank:
                raise Stopped

        try:
            _validate(predictor, dataset, batch_size=batch_size, ranks=ranks, on_images=on_images)
        except UserError as error:
            return str(error)
        except Stopped:
            return "Stopped"
        return "went on"

    broken = _with_a_missing_image(dataset, batch_size)  # in the first batch of rank 1
    shared, alone = (
        _as_json(_validate(predictor, dataset, batch_size=batch_size, ranks=each))
        for each in (ranks, ALONE)
    )
    return {
        "shared": json.loads(shared),
        "alone": json.loads(alone),
        "missing": end(broken),
        "stopped": end(dataset, stopping_rank=1),
        "both": end(broken, stopping_rank=0),
        "after": end(dataset),  # the ranks are in step still
    }


if __name__ == "__main__":
    _rank_main(*map(Path, sys.argv[1:4]))
