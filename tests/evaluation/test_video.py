"""evaluate --video: the tracker's figures and the detector's, of COCO-VID and MOTChallenge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from app.datasets.synthetic.films import make_films
from app.errors import UserError
from app.evaluation.tracks import Films, read_films, score_tracks
from app.evaluation.video import score_video
from app.model.bundled import bundled_nano

TRUTH = "_annotations.coco.json"


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films") / "set"
    make_films(folder, films=2, frames=8, fps=10.0, width=160, height=120, seed=1)
    return folder


def test_weights_follow_the_films_of_a_truth(command, films: Path, tmp_path: Path) -> None:
    words = ("evaluate", "--video", films, "--checkpoint", bundled_nano())
    done = command(*words, "--output-dir", tmp_path)
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "metrics.json").read_text())
    line = f"HOTA {figures['HOTA']:.3f}, DetA"
    assert line in done.out
    assert f"box AP {figures['bbox/AP']:.3f}, mask AP {figures['segm/AP']:.3f}" in done.out
    truth = read_films(films / TRUTH)
    found = [read_films(tmp_path / name / "tracks.json") for name in ("0001", "0002")]
    joined = Films({n: each.films[1] for n, each in enumerate(found, start=1)}, found[0].classes)
    expected = score_tracks(truth, joined)
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert 0.2 < figures["HOTA"] <= 1
    assert "holds metrics.json already" in command(*words, "--output-dir", tmp_path).err


def test_tracks_from_elsewhere(command, films: Path, tmp_path: Path) -> None:
    words = ("evaluate", "--video", films / TRUTH, "--predictions", films / TRUTH)
    done = command(*words, "--output-dir", tmp_path)
    assert done.code == 0, done.err
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert (figures["HOTA"], figures["switches"]) == (pytest.approx(1), 0)
    assert "bbox/AP" not in figures


def as_mot(films: Path, folder: Path) -> Path:
    """Write circles' boxes as sequences of MOTChallenge, as if all were pedestrians."""
    document = json.loads((films / TRUTH).read_text())
    images = {each["id"]: each for each in document["images"]}
    for video in document["videos"]:
        sequence = folder / video["name"]
        (sequence / "gt").mkdir(parents=True)
        (sequence / "img1").symlink_to(films / video["name"])
        (sequence / "seqinfo.ini").write_text("[Sequence]\nframeRate=10\n")
        rows = []
        for each in document["annotations"]:
            if each["video_id"] == video["id"]:
                box = coco_mask.toBbox(each["segmentation"])
                frame = images[each["image_id"]]["frame_id"] + 1
                rows.append([frame, each["track_id"], *box, 1, 1, 1.0])
        rows.append([1, 999, 1, 1, 5, 5, 0, 1, 1.0])  # marked as not to be scored
        rows.append([1, 998, 1, 1, 5, 5, 1, 3, 1.0])  # a car
        lines = [",".join(f"{value:g}" for value in row) for row in rows]
        (sequence / "gt" / "gt.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_motchallenge(films: Path, tmp_path: Path) -> None:
    mot = as_mot(films, tmp_path / "mot")
    own = json.loads((films / TRUTH).read_text())
    own["categories"] = [{"id": 1, "name": "pedestrian"}]
    for each in own["annotations"]:
        each["category_id"] = 1
    (tmp_path / "tracks.json").write_text(json.dumps(own))
    figures = score_video(mot, tmp_path / "out", tracks=tmp_path / "tracks.json")
    assert figures["HOTA"] == pytest.approx(1)
    written = json.loads((tmp_path / "out" / "truth.json").read_text())
    assert len(written["annotations"]) == len(own["annotations"])
    assert [video["fps"] for video in written["videos"]] == [10.0, 10.0]
    boxes = np.array([each["bbox"] for each in written["annotations"]])
    assert (boxes[:, 2:] > 0).all()
    lines = (mot / "0001" / "gt" / "gt.txt").read_text().splitlines()
    lines[0], lines[2] = "99,1,1,1,5,5", "1,x,1,1,5,5"
    (mot / "0001" / "gt" / "gt.txt").write_text("\n".join(lines))
    (mot / "0002" / "img1").unlink()
    with pytest.raises(UserError) as caught:
        score_video(mot, tmp_path / "broken", tracks=tmp_path / "tracks.json")
    told = "\n".join(caught.value.problems)
    for words in ("gt.txt: line 1: must be frame (1 to 8)", "line 3", "0002: has no images"):
        assert words in told


def test_what_does_not_go_together(command, films: Path, tmp_path: Path) -> None:
    for words, told in (
        (("--video", films), "give either --checkpoint or --predictions"),
        (("--video", tmp_path / "x", "--predictions", films / TRUTH), "no such file or folder"),
        (("--video", tmp_path, "--predictions", films / TRUTH), "holds neither"),
        (("--prompt", "person"), "--prompt: is for --video"),
        (
            ("--video", films, "--checkpoint", bundled_nano(), "--dataset-dir", films),
            "dataset.dir",
        ),
    ):
        done = command("evaluate", *words, "--output-dir", tmp_path / "out")
        assert done.code == 2
        assert told in done.err
    document = json.loads((films / TRUTH).read_text())
    document["images"][3]["file_name"] = "../../secret.png"
    (tmp_path / "truth.json").write_text(json.dumps(document))
    done = command(
        *("evaluate", "--video", tmp_path / "truth.json", "--checkpoint", bundled_nano()),
        *("--output-dir", tmp_path / "out"),
    )
    assert done.code == 2
    assert "../../secret.png" in done.err
