"""Parts → one file: complete, each image once, read by pycocotools and by the dataset builder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from app.errors import UserError
from app.launch.shards import Shard
from app.scale.collect import inner_path
from app.scale.parts import Parts, Row, failed_row, find, folder_of, rows_of
from app.scale.sources import shard_of
from tests.helpers import Command

NAMES = [f"{number}.jpg" for number in range(30)]
COUNT = 3


def row(name: str, objects: int, masks: bool = True) -> Row:
    pixels = np.zeros((20, 30), dtype=np.uint8, order="F")
    pixels[2:6, 3:9] = 1
    counts = coco_mask.encode(pixels)["counts"].decode()
    return {
        **{"name": name, "width": 30, "height": 20, "best_score": 0.9, "problem": None},
        "label": [f"thing {index}" for index in range(objects)],
        "score": [0.5 + index / 10 for index in range(objects)],
        "bbox": [[3.0, 2.0, 6.0, 4.0]] * objects,
        "rle": [counts] * objects if masks else None,
    }


@pytest.fixture(params=["parquet", "jsonl"])
def done(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Three shards, in two parts each; two images could not be read."""
    for number in range(COUNT):
        parts = Parts(folder_of(tmp_path, Shard(number, COUNT)), request.param, {"a": 1})
        names = [name for name in NAMES if shard_of(name, COUNT) == number]
        for some in (names[:4], names[4:]):
            parts.add([row(name, int(name[:-4]) % 3) for name in some if name not in ("3.jpg",)])
        if shard_of("3.jpg", COUNT) == number:
            parts.add([failed_row("3.jpg", "cut short")])
        parts.finish()
    return tmp_path


def test_one_coco_of_all(command: Command, done: Path) -> None:
    made = command("collect", done)
    assert made.code == 3  # an image could not be read
    assert "bad: 3.jpg: cut short" in made.out
    assert (done / "bad_images.txt").read_text() == "3.jpg\tcut short\n"
    coco = COCO(str(done / "coco.json"))
    assert sorted(i["file_name"] for i in coco.dataset["images"]) == sorted({*NAMES} - {"3.jpg"})
    objects = sum(int(name[:-4]) % 3 for name in NAMES if name != "3.jpg")
    assert len(coco.dataset["annotations"]) == objects
    for annotation in coco.dataset["annotations"]:
        image = coco.imgs[annotation["image_id"]]
        assert coco.annToMask(annotation).shape == (20, 30)
        assert annotation["area"] == 24
        label = coco.cats[annotation["category_id"]]["name"]
        assert int(label[-1]) < int(image["file_name"][:-4]) % 3
        assert annotation["score"] == pytest.approx(0.5 + int(label[-1]) / 10)


def test_one_parquet_of_all(command: Command, done: Path) -> None:
    assert command("collect", done, "--to", "parquet").code == 3
    table = pyarrow.parquet.read_table(done / "all.parquet")
    assert sorted(table.column("name").to_pylist()) == sorted(NAMES)
    assert command("collect", done, "--to", "parquet").code == 2  # not unasked
    assert command("collect", done, "--to", "parquet", "--overwrite").code == 3


def test_what_is_not_complete(command: Command, done: Path) -> None:
    first = done / "shard-00000-of-00003"
    (first / "done.json").unlink()
    (done / "shard-00001-of-00003").rename(done / "away")
    made = command("collect", done)
    assert made.code == 2
    assert "2 shards of 3 are not done: 0, 1" in made.err
    assert not (done / "coco.json").exists()


@pytest.mark.parametrize("fault", ["twice", "cut", "lacks", "mark"])
def test_what_is_not_each_image_once(command: Command, done: Path, fault: str) -> None:
    folder = done / "shard-00002-of-00003"
    part = find(folder)[0]
    if fault == "twice":
        (folder / f"part-00009{part.suffix}").write_bytes(part.read_bytes())
    elif fault == "cut":
        part.write_bytes(part.read_bytes()[:-30])
    elif fault == "lacks":
        part.unlink()
    else:
        (folder / "done.json").write_text('{"images": "many"}')
    made = command("collect", done)
    assert made.code == 2
    said = {"twice": "is there twice", "cut": "is damaged", "lacks": "its mark says"}
    assert said.get(fault, "is no mark of a shard") in made.err
    assert not (done / "coco.json").exists()


def test_shards_of_two_counts_and_of_none(command: Command, tmp_path: Path, done: Path) -> None:
    (done / "shard-00000-of-00009").mkdir()
    assert "shards of 3 and 9" in command("collect", done).err
    (tmp_path / "empty").mkdir()
    assert "holds no shards" in command("collect", tmp_path / "empty").err


def test_parts_of_other_settings_are_refused(tmp_path: Path) -> None:
    Parts(tmp_path / "shard", "parquet", {"threshold": 0.5, "prompts": ("a",)})
    Parts(tmp_path / "shard", "parquet", {"threshold": 0.5, "prompts": ["a"]})
    with pytest.raises(UserError, match=r"other settings \(threshold\)"):
        Parts(tmp_path / "shard", "parquet", {"threshold": 0.4, "prompts": ["a"]})


def test_a_box_model_has_no_masks(tmp_path: Path) -> None:
    parts = Parts(tmp_path, "parquet", {})
    parts.add([row("a.jpg", 2, masks=False)])
    (one,) = rows_of(find(tmp_path)[0])
    expected: Any = row("a.jpg", 2, masks=False)
    assert one["rle"] is None
    assert one["score"] == pytest.approx(expected["score"])
    assert json.dumps(one["bbox"]) == json.dumps(expected["bbox"])


@pytest.mark.parametrize("fault", [False, True])
def test_a_dataset_of_proposals_with_its_images(
    command: Command, done: Path, tmp_path: Path, fault: bool
) -> None:
    for name in NAMES:
        if not (fault and name == "5.jpg"):
            (tmp_path / "images").mkdir(exist_ok=True)
            Image.new("RGB", (30, 20)).save(tmp_path / "images" / name)
    made = command("collect", done, "--to", "dataset", "--images", tmp_path / "images")
    if fault:
        assert made.code == 2
        assert "lacks 1 image: 5.jpg" in made.err
        assert not (done / "dataset").exists()
        return
    assert made.code == 3
    checked = command("data", "check", done / "dataset")
    assert "29 images" in checked.out, checked.err
    assert "proposals" in checked.out
    assert command("collect", done, "--to", "dataset").code == 2
    assert command("collect", done, "--images", tmp_path / "images").code == 2


def test_a_name_that_leads_out_stays_within() -> None:
    assert inner_path("../../etc/x.png", ()) == "etc/x.png"
    assert inner_path("https://host/a b.png", ()) == "https-/host/a b.png"
    assert inner_path(r"C:\\..\\x.png", ()) == "C-/x.png"
    assert inner_path("x.png", {"x.png"}) != "x.png"
