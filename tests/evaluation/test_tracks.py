"""HOTA, IDF1 and MOTA of drawn films, where they can be counted by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.datasets.synthetic.films import make_films
from app.errors import UserError
from app.evaluation.tracks import read_films, score_tracks

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films") / "set"
    make_films(folder, films=3, frames=20, fps=5.0, width=96, height=72)
    return folder / "_annotations.coco.json"


def scored(films: Path, tmp_path: Path, change: Change) -> dict[str, float]:
    document = json.loads(films.read_text())
    change(document)
    (tmp_path / "found.json").write_text(json.dumps(document))
    return score_tracks(read_films(films), read_films(tmp_path / "found.json"))


def test_the_truth_is_perfect(films: Path, tmp_path: Path) -> None:
    figures = scored(films, tmp_path, lambda document: None)
    for name in ("HOTA", "DetA", "AssA", "IDF1", "MOTA"):
        assert figures[name] == pytest.approx(1)
    assert figures["switches"] == 0


def one_class(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Leave one thing of the first film, which is seen in all of its frames of the list."""
    first = [a for a in document["annotations"] if a["video_id"] == 1]
    track = max(
        {a["track_id"] for a in first}, key=lambda t: sum(a["track_id"] == t for a in first)
    )
    document["annotations"] = [a for a in first if a["track_id"] == track]
    return document["annotations"]


def test_a_switched_identity_costs_what_it_should(films: Path, tmp_path: Path) -> None:
    """Half of a thing's frames under another id: one switch; IDF1 and AssA are those of a half."""
    truth = json.loads(films.read_text())
    one_class(truth)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    document = copy.deepcopy(truth)
    count = len(document["annotations"])
    half = count // 2
    for each in document["annotations"][half:]:
        each["track_id"] += 1
    (tmp_path / "found.json").write_text(json.dumps(document))
    figures = score_tracks(read_films(tmp_path / "truth.json"), read_films(tmp_path / "found.json"))
    assert figures["switches"] == 1
    assert figures["MOTA"] == pytest.approx(1 - 1 / count)
    assert figures["IDF1"] == pytest.approx(max(half, count - half) / count)
    # AssA: of each frame, the part of the thing's frames that have its id.
    assert figures["AssA"] == pytest.approx((half**2 + (count - half) ** 2) / count**2)
    assert figures["DetA"] == pytest.approx(1)
    assert figures["HOTA"] == pytest.approx(figures["AssA"] ** 0.5)


def test_what_is_missed_and_what_is_not_there_cost_detections(films: Path, tmp_path: Path) -> None:
    truth = json.loads(films.read_text())
    one_class(truth)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    missed = copy.deepcopy(truth)
    del missed["annotations"][::2]
    (tmp_path / "missed.json").write_text(json.dumps(missed))
    figures = score_tracks(
        read_films(tmp_path / "truth.json"), read_films(tmp_path / "missed.json")
    )
    count, left = len(truth["annotations"]), len(missed["annotations"])
    assert figures["DetA"] == pytest.approx(left / count)
    assert figures["MOTA"] == pytest.approx(left / count)
    assert figures["IDF1"] == pytest.approx(2 * left / (count + left))
    figures = score_tracks(
        read_films(tmp_path / "missed.json"), read_films(tmp_path / "truth.json")
    )
    assert figures["MOTA"] == pytest.approx(1 - (count - left) / left)


def test_classes_are_told_apart_by_their_names(films: Path, tmp_path: Path) -> None:
    """Other ids of the same names change nothing; another name finds nothing."""

    def renumber(document: dict[str, Any]) -> None:
        for each in document["categories"]:
            each["id"] += 10
        for each in document["annotations"]:
            each["category_id"] += 10

    assert scored(films, tmp_path, renumber)["HOTA"] == pytest.approx(1)

    def rename(document: dict[str, Any]) -> None:
        for each in document["categories"]:
            each["name"] = f"other {each['name']}"

    assert scored(films, tmp_path, rename)["HOTA"] == 0


def test_boxes_alone_are_scored_by_boxes(films: Path, tmp_path: Path) -> None:
    def boxes(document: dict[str, Any]) -> None:
        for each in document["annotations"]:
            each["segmentation"] = []

    assert scored(films, tmp_path, boxes)["HOTA"] == pytest.approx(1)


def test_what_is_no_film_is_told_whole(films: Path, tmp_path: Path) -> None:
    document = json.loads(films.read_text())
    file = tmp_path / "broken.json"
    file.write_text(json.dumps({**document, "videos": None}))
    with pytest.raises(UserError, match="is no COCO-VID"):
        read_films(file)
    document["images"][0]["frame_id"] = 900
    document["images"][1]["video_id"] = 77
    document["annotations"][-1]["track_id"] = "x"
    document["annotations"][-2]["category_id"] = 99
    document["annotations"][-3]["segmentation"]["counts"] = "zz"
    file.write_text(json.dumps(document))
    with pytest.raises(UserError) as caught:
        read_films(file)
    told = "\n".join(caught.value.problems)
    for words in ("images[0].frame_id is 900", "images[1]: has no video_id", "track_id is 'x'"):
        assert words in told
    assert len(caught.value.problems) >= 5
    make_films(tmp_path / "other", films=2, frames=5, width=64, height=64)
    with pytest.raises(UserError, match="are not the same"):
        score_tracks(read_films(films), read_films(tmp_path / "other" / "_annotations.coco.json"))
