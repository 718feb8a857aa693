"""Batches one after the other: the next is opened and the last is written beside a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.inference.batch import Job, predict_batches
from app.inference.detections import Detections
from tests.helpers import until
from tests.inference.doors import SETTINGS, Same


class Watching(Same):
    """Finds what `Same` does, and counts the images that were opened.

    Args:
        meanwhile: called in each prediction, with the number of those before.
    """

    def __init__(self, meanwhile: Any) -> None:
        self.meanwhile, self.opened, self.predicted = meanwhile, 0, 0

    @property
    def levels(self) -> None:  # asked for as each image is opened
        self.opened += 1

    def predict_batch(
        self, images: Sequence[Image.Image], prompts: Sequence[str], **_: Any
    ) -> list[Detections]:
        self.meanwhile(self.predicted)
        self.predicted += 1
        return super().predict_batch(images, prompts)


@pytest.fixture
def batches(tmp_path: Path) -> list[list[Job]]:
    """Of one image each."""
    jobs = []
    for name in "abcde":
        Image.effect_noise((30, 20), 90).save(tmp_path / f"{name}.png")
        jobs.append([Job(tmp_path / f"{name}.png", f"{name}.png", name)])
    return jobs


def test_one_is_opened_and_one_is_written_beside_a_prediction(batches, tmp_path) -> None:
    def meanwhile(index: int) -> None:
        ahead = min(index + 2, len(batches))
        until(lambda: finder.opened == ahead, "the next image is opened")
        if index:
            until((tmp_path / "out" / f"{'abcde'[index - 1]}.png").exists, "the last is written")
        assert finder.opened == ahead  # and no more

    finder = Watching(meanwhile)
    outcomes = list(predict_batches(finder, SETTINGS, tmp_path / "out", batches))
    assert [entry["name"] for each in outcomes for entry in each.entries] == list("abcde")
    assert finder.predicted == 5
    assert list(predict_batches(finder, SETTINGS, tmp_path / "out", [])) == []


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_was_done_before_an_end_is_told(batches, tmp_path, end) -> None:
    def meanwhile(index: int) -> None:
        if index == 2:
            raise end

    told = []
    with pytest.raises(end):
        for outcome in predict_batches(Watching(meanwhile), SETTINGS, tmp_path / "out", batches):
            told.append(outcome.entries[0]["name"])
    assert told == ["a", "b"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]


def test_who_wants_no_more_ends_it(batches, tmp_path) -> None:
    finder = Watching(lambda _: None)
    outcomes = predict_batches(finder, SETTINGS, tmp_path / "out", batches)
    assert next(outcomes).entries[0]["name"] == "a"
    outcomes.close()
    assert finder.predicted == 2


def test_a_file_that_cannot_be_written_ends_all(batches, tmp_path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match="out"):
        list(predict_batches(Watching(lambda _: None), SETTINGS, tmp_path / "out", batches))


def test_an_image_that_cannot_be_read_fails_alone(batches, tmp_path) -> None:
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    (tmp_path / "e.png").unlink()
    finder = Watching(lambda _: None)
    outcomes = list(predict_batches(finder, SETTINGS, tmp_path / "out", batches))
    assert [len(each.entries) for each in outcomes] == [1, 0, 1, 1, 0]
    assert "b.png" in outcomes[1].failed[0]
    assert "e.png" in outcomes[4].failed[0]
    assert finder.predicted == 3
