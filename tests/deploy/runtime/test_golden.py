"""What counts as a miss: figures moved by more than is allowed, and no less."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from app.deploy.runtime.golden import INPUTS, SAMPLES, golden_misses, sample
from app.deploy.runtime.manifest import Manifest, Tolerance, read_manifest
from app.errors import UserError
from tests.deploy.tiny import write_folder

LIMITS = Tolerance(cosine=0.99, scores=0.02, boxes=0.01, mask_iou=0.95)
PROMPTS, QUERIES, SIDE = 2, 30, 24


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = write_folder(tmp_path_factory.mktemp("golden") / "tiny")
    return replace(read_manifest(folder), tolerances={"fp16": LIMITS})


def _outputs() -> dict[str, np.ndarray]:
    """Queries from the highest score to the lowest, and more masks than are sampled."""
    random = np.random.default_rng(3)
    scores = np.sort(random.random((PROMPTS, QUERIES)), axis=1)[:, ::-1]
    return {
        "fpn0": random.standard_normal((1, 8, 40, 40)),
        "scores": scores.copy(),
        "presence": scores[:, 0].copy(),
        "boxes": random.random((PROMPTS, QUERIES, 4)),
        "masks": random.standard_normal((PROMPTS, QUERIES, SIDE, SIDE)) * 5,
    }


def _misses(manifest: Manifest, changed: dict[str, np.ndarray], top: int | None = None) -> list:
    golden = {name: sample(value) for name, value in _outputs().items()}
    golden |= {name: np.zeros(3) for name in INPUTS}
    return golden_misses(replace(manifest, top=top), "fp16", golden, changed)


def test_samples_are_evenly_spaced_from_the_first_to_the_last() -> None:
    assert sample(np.arange(5.0)).tolist() == [0, 1, 2, 3, 4]
    kept = sample(np.arange(100_000).reshape(10, -1))
    assert kept.shape == (SAMPLES,)
    assert (kept[0], kept[-1]) == (0, 99_999)
    assert set(np.diff(kept)) == {24, 25}


def test_the_same_answers_miss_nothing(manifest: Manifest) -> None:
    assert _misses(manifest, _outputs()) == []


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_a_tolerance_is_kept_to(manifest: Manifest, share: float) -> None:
    """Each output moved a little less than is allowed, and a little more."""
    said = []
    for name, shift in (("scores", 0.02), ("presence", 0.02), ("boxes", 0.01)):
        found = _outputs()
        found[name].flat[0] += share * shift
        said += _misses(manifest, found)
    found = _outputs()
    noise = np.random.default_rng(1).standard_normal(found["fpn0"].shape)
    found["fpn0"] += noise * share * np.tan(np.arccos(LIMITS.cosine))
    said += _misses(manifest, found)
    found = _outputs()
    turned = np.random.default_rng(2).random(found["masks"].shape) < share * 0.05
    found["masks"][turned] *= -1
    said += _misses(manifest, found)
    names = [miss.split(":")[0] for miss in said]
    assert names == ([] if share < 1 else ["scores", "presence", "boxes", "fpn0", "masks"])


def test_what_says_nothing_is_not_compared(manifest: Manifest) -> None:
    found = _outputs()
    low = found["scores"] < 0.05
    assert low.any()
    found["boxes"][low] += 0.5
    found["masks"][low] *= -1
    assert _misses(manifest, found) == []


def test_neighbours_may_change_places_where_rows_are_sorted(manifest: Manifest) -> None:
    found = _outputs()
    close = int(np.argmin(found["scores"][0, :-1] - found["scores"][0, 1:]))
    assert found["scores"][0, close] > 0.1
    pair = [close, close + 1]
    found["boxes"][0, pair] = found["boxes"][0, pair[::-1]]
    found["masks"][0, pair] = found["masks"][0, pair[::-1]]
    assert _misses(manifest, found, top=QUERIES) == []
    assert any(miss.startswith("boxes: differ by") for miss in _misses(manifest, found))


def test_the_last_of_the_best_may_be_another(manifest: Manifest) -> None:
    """What was just among the best may be just out of them, once rounded."""
    kept = {name: value[:, :20] if value.ndim > 1 else value for name, value in _outputs().items()}
    kept["fpn0"] = _outputs()["fpn0"]
    golden = {name: sample(value) for name, value in kept.items()}
    assert kept["scores"][1, 19] > 0.1
    kept["boxes"] = kept["boxes"].copy()
    kept["boxes"][1, 19] += 0.3
    every = golden_misses(replace(manifest, top=None), "fp16", golden, kept)
    assert any(miss.startswith("boxes: differ by 0.3") for miss in every)
    assert golden_misses(replace(manifest, top=20), "fp16", golden, kept) == []


def test_what_is_missing_or_no_number_is_named(manifest: Manifest) -> None:
    found = _outputs()
    del found["masks"]
    found["scores"][0, 3] = np.nan
    found["boxes"] = found["boxes"][:, :4]
    assert _misses(manifest, found) == [
        "scores: holds NaN or infinity",
        "boxes: has another size: (2, 4, 4)",
        "masks: is missing",
    ]


def test_a_precision_without_a_tolerance(manifest: Manifest) -> None:
    with pytest.raises(UserError, match="no tolerance of int8"):
        golden_misses(manifest, "int8", {}, {})
