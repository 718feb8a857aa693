"""`data check` and `data build`, as their users run them."""

from __future__ import annotations

import copy
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.datasets.build import decode, load_splits, survey
from app.datasets.coco import read
from app.datasets.faults import KINDS
from tests.datasets.conftest import noise, sound_document
from tests.datasets.killed_builds import contents
from tests.helpers import REPOSITORY, run_module

PAGE = "dataset_report.html"


def load(folder: Path) -> Any:
    return json.loads((folder / "_annotations.coco.json").read_text())


def store(folder: Path, document: Any) -> None:
    (folder / "_annotations.coco.json").write_text(json.dumps(document))


def exif_image(path: Path, orientation: int) -> None:
    """Stored on its side: upright it is 30 wide, 40 high, and white in its upper left corner."""
    upright = np.zeros((40, 30, 3), dtype=np.uint8)
    upright[:20, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    Image.fromarray(upright).transpose(turned).save(path, quality=95, exif=exif)


@pytest.fixture
def split_set(save, tmp_path):
    """Twelve images in three splits; every second one without objects."""
    for split in ("train", "valid", "test"):
        document = sound_document()
        document["images"] = [
            {"id": i, "file_name": f"{split}{i}.png", "width": 40, "height": 30}
            for i in range(1, 5)
        ]
        save(document, f"set/{split}")
    return tmp_path / "set"


def test_potholes_check_clean_and_build(command, potholes, tmp_path):
    done = command("data", "check", potholes, "--output-dir", tmp_path / "report")
    assert done.code == 0, done.err
    assert f"{potholes}: sound" in done.out
    train = load_splits(potholes).train
    counts = f"{len(train.images)} images, {len(train.annotations)} objects"
    assert f"train: {counts}: pothole {len(train.annotations)}" in done.out.splitlines()
    page = (tmp_path / "report" / PAGE).read_text()
    assert page.count("data:image/jpeg;base64,") == 16
    assert "None were found." in page
    out = tmp_path / "out"
    assert command("data", "build", "--dataset-dir", potholes, "--output-dir", out).code == 0
    before, after = load_splits(potholes), load_splits(out)
    for split in ("train", "valid", "test"):
        old, new = getattr(before, split), getattr(after, split)
        assert new.annotations == old.annotations
        for one, other in zip(old.images, new.images, strict=True):
            assert one.path.read_bytes() == other.path.read_bytes()
        info = load(out / split)["info"]
        assert info["content_hash"] == new.content_hash()
        assert (info["mended"], info["dropped"]) == ({}, {})
    again = command("data", "check", out, "--output-dir", tmp_path / "again")
    assert f"{out}: sound" in again.out


def test_twenty_planted_faults_are_exactly_those_reported(command, potholes, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(potholes, folder, copy_function=shutil.copyfile)
    planted = plant(folder)
    assert len(planted) == 20
    found = decode(survey(folder), folder, lambda _: None).faults
    assert sorted((fault.kind, fault.place) for fault in found) == sorted(planted)
    before = contents(folder)
    done = command("data", "check", folder, "--output-dir", tmp_path / "out")
    assert done.code == 2
    page = (tmp_path / "out" / PAGE).read_text()
    for kind, place in planted:
        assert place in done.out
        assert place in page
        assert kind in done.out
    assert "Traceback" not in done.err
    built = command("data", "build", "--dataset-dir", folder, "--output-dir", tmp_path / "built")
    assert built.code == 2
    assert not (tmp_path / "built").exists()
    assert contents(folder) == before


def plant(folder: Path) -> list[tuple[str, str]]:
    """Spoil a copy of the potholes; returns the kind and place of each fault."""
    train, images = folder / "train", folder / "train" / "images"
    document = load(train)
    entries, annotations = document["images"], document["annotations"]
    chosen = annotations[:10]
    busy = {annotation["image_id"] for annotation in chosen}
    spare = [i for i, entry in enumerate(entries) if entry["id"] not in busy][:9]
    files = [images / entries[i]["file_name"] for i in spare]

    chosen[0]["segmentation"][0][3] = float("nan")
    chosen[1]["segmentation"][0].append(5.0)
    chosen[2].update(segmentation=[])
    del chosen[2]["bbox"]
    chosen[3]["segmentation"] = {"size": [640, 640], "counts": [100, 50]}
    chosen[4]["segmentation"] = [[1.2, 1.2, 1.3, 1.2, 1.3, 1.3]]
    del chosen[5]["iscrowd"]
    chosen[6]["bbox"][2] = 0
    x, y, w, h = chosen[7]["bbox"]
    chosen[7]["bbox"] = [x, y, x + w, y + h]
    chosen[8]["image_id"] = 9999
    chosen[9]["category_id"] = 77
    entries[spare[0]]["width"] = 0
    entries[spare[1]]["height"] = 641
    files[2].unlink()
    entries.append({**entries[spare[3]]})
    files[4].write_bytes(files[4].read_bytes()[:-3000])
    files[5].write_text("<!DOCTYPE html><html><body>404</body></html>")
    files[6].write_bytes(b"")
    Image.open(files[7]).convert("CMYK").save(files[7], "JPEG")
    shutil.copyfile(next((folder / "valid" / "images").iterdir()), files[8])
    document["categories"].append({"id": 1, "name": "Pothole "})
    store(train, document)

    def named(index: int) -> str:
        return f"images[{spare[index]}].file_name"

    return [
        ("polygon", "annotations[0].segmentation"),
        ("polygon", "annotations[1].segmentation"),
        ("no geometry", "annotations[2].bbox"),
        ("RLE", "annotations[3].segmentation"),
        ("zero area", "annotations[4].segmentation"),
        ("no iscrowd", "annotations[5].iscrowd"),
        ("bbox empty", "annotations[6].bbox"),
        ("box convention", "annotations[7].bbox"),
        ("image reference", "annotations[8].image_id"),
        ("category reference", "annotations[9].category_id"),
        ("image size", f"images[{spare[0]}].width"),
        ("other size", named(1)),
        ("image missing", named(2)),
        ("image id", f"images[{len(entries) - 1}].id"),
        ("image damaged", f"train/images/{files[4].name}"),
        ("no image", named(5)),
        ("image empty", named(6)),
        ("CMYK", named(7)),
        ("in two splits", f"train/images/{files[8].name}"),
        ("alike names", "categories[1].name"),
    ]


def test_mended_faults_are_counted_and_gone_from_the_build(command, split_set, tmp_path):
    train = split_set / "train"
    document = load(train)
    for key in ("area", "iscrowd", "bbox", "id"):
        del document["annotations"][0][key]
    document["images"][0].update(file_name="turned.jpg", width=30, height=40)
    exif_image(train / "turned.jpg", 6)
    square = {"bbox": [2, 2, 6, 16], "image_id": 1, "category_id": 3, "id": 9}
    document["annotations"] = [document["annotations"][0], square]
    document["annotations"][0]["image_id"] = 2
    noise("cmyk").convert("CMYK").save(train / "train2.png.jpg")
    document["images"][1]["file_name"] = "train2.png.jpg"
    noise("palette").convert("P").save(train / "train3.png")
    noise("alpha").convert("RGBA").save(train / "train4.png")
    store(train, document)
    done = command("data", "build", "--dataset-dir", split_set, "--output-dir", tmp_path / "out")
    assert done.code == 0, done.err
    mended = load(tmp_path / "out" / "train")["info"]["mended"]
    expected = {"EXIF": 1, "CMYK": 1, "palette": 1, "alpha": 1, "annotation id": 1, "no bbox": 3}
    assert expected.items() <= mended.items()
    assert "mended:" in done.out
    built = read(
        tmp_path / "out" / "train" / "_annotations.coco.json", [tmp_path / "out" / "train"]
    )
    pixels = {image.id: np.array(Image.open(image.path)) for image in built.images}
    assert all(array.shape[2:] == (3,) for array in pixels.values())
    x, y, w, h = (int(side) for side in built.annotations[1].bbox_xywh)
    assert pixels[1].shape == (40, 30, 3)
    assert pixels[1][y : y + h, x : x + w].min() > 200  # the box is on the white corner still
    assert pixels[1][25:, 15:].max() < 50
    check = command("data", "check", tmp_path / "out", "--output-dir", tmp_path / "report")
    assert check.code == 0
    assert ": sound" in check.out


def test_what_is_dropped_is_capped_and_counted(command, split_set, tmp_path):
    document = load(split_set / "train")
    for index in range(100):
        box = [1 + index / 10, 0, 5, 6]
        document["annotations"].append(
            {**document["annotations"][2], "id": 10 + index, "bbox": box}
        )
    document["annotations"][5] = {**document["annotations"][5], "bbox": [0, 0, 0, 5]}
    document["annotations"][6] = {**document["annotations"][6], "image_id": 77}
    store(split_set / "train", document)
    words = ("data", "build", "--dataset-dir", split_set, "--output-dir", tmp_path / "out")
    refused = command(*words)
    assert refused.code == 2
    assert "2 of 109 annotations would be left out (1.83 %)" in refused.err
    assert not (tmp_path / "out").exists()
    assert command(*words, "--max-drop", 0.02).code == 0
    written = load(tmp_path / "out" / "train")
    assert written["info"]["dropped"] == {"bbox empty": 1, "image reference": 1}
    assert len(written["annotations"]) == 101
    assert len(load_splits(split_set, max_drop=0.02).train.annotations) == 101


def test_a_build_is_replaced_only_when_asked_and_nothing_else_ever(command, split_set, tmp_path):
    words = ("data", "build", "--dataset-dir", split_set, "--output-dir")
    assert command(*words, tmp_path / "out").code == 0
    before = contents(tmp_path / "out")
    again = command(*words, tmp_path / "out")
    assert again.code == 2
    assert "--overwrite" in again.err
    assert command(*words, tmp_path / "out", "--overwrite").code == 0
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    for target in (tmp_path / "mine", split_set, split_set / "train", split_set / "new"):
        refused = command(*words, target, "--overwrite")
        assert refused.code == 2, target
    inside = command("data", "check", split_set, "--output-dir", split_set / "report")
    assert "lies in the dataset" in inside.err
    assert not (split_set / "report").exists()


def test_a_build_of_one_folder_has_three_splits_whatever_the_order(command, save, tmp_path):
    document = sound_document()
    document["images"] = [
        {"id": i, "file_name": f"{i}.png", "width": 40, "height": 30} for i in range(1, 21)
    ]
    template = document["annotations"][2]
    document["annotations"] = [{**template, "id": i, "image_id": i} for i in range(1, 21)]
    words = ("data", "build", "seed=3", "--dataset-dir")
    assert command(*words, save(document), "--output-dir", tmp_path / "one").code == 0
    names = [[i["file_name"] for i in load(tmp_path / "one" / s)["images"]] for s in SPLITS]
    assert [len(split) for split in names] == [14, 3, 3]
    document["images"].reverse()
    assert command(*words, save(document), "--output-dir", tmp_path / "two").code == 0
    again = [[i["file_name"] for i in load(tmp_path / "two" / s)["images"]] for s in SPLITS]
    assert [sorted(split) for split in names] == [sorted(split) for split in again]


SPLITS = ("train", "valid", "test")


def test_shapes_are_built_where_no_source_is_named(command, tmp_path, monkeypatch):
    monkeypatch.setattr("app.datasets.sources.DATA", tmp_path / "data")
    less = ("dataset.shapes.train=2", "dataset.shapes.valid=1", "dataset.shapes.width=64")
    done = command("data", "build", "--output-dir", tmp_path / "out", *less)
    assert done.code == 0, done.err
    assert len(load_splits(tmp_path / "out").train.images) == 2


def test_a_key_that_no_build_reads_is_refused(command, split_set, tmp_path):
    words = ("data", "build", "--dataset-dir", split_set, "--output-dir", tmp_path / "out")
    assert "training.epochs=3" in command(*words, "training.epochs=3").err
    assert "dataset.valid_fraction" in command(*words, "dataset.valid_fractio=0.2").err
    assert not (tmp_path / "out").exists()


def test_one_class_without_negatives_and_many_classes_are_warned_of(command, save, tmp_path):
    document = sound_document()
    document["annotations"] = [{**a, "category_id": 3} for a in document["annotations"]]
    document["categories"] = document["categories"][:1]
    done = command("data", "check", save(document), "--output-dir", tmp_path / "out")
    assert done.code == 0
    assert "would answer any prompt" in done.out
    assert "dataset.near_misses" in done.out
    document["categories"] += [{"id": i, "name": f"class {i}"} for i in range(10, 510)]
    done = command("data", "check", save(document, "many"), "--output-dir", tmp_path / "out")
    assert done.code == 0
    assert "dataset.max_prompts=20 towards 501" in done.out


class Nesting(HTMLParser):
    """Fails at a tag that closes another than the last that was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_counts_and_is_whole_in_itself(command, split_set, tmp_path):
    document = load(split_set / "train")
    del document["annotations"][0]["iscrowd"]
    store(split_set / "train", document)
    assert command("data", "check", split_set, "--output-dir", tmp_path / "out").code == 0
    page = (tmp_path / "out" / PAGE).read_text()
    nesting = Nesting()
    nesting.feed(page)
    assert nesting.open == []
    assert not re.search(r'(src|href)="(?!data:)', page)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in page.split("<tr>")]
    assert ["train", "4", "2", "3", "2", "1"] in rows  # images, without objects, objects, …
    classes = {re.sub("<.*", "", row[0]): row[1:] for row in rows if len(row) == 5}
    assert classes["dog"] == ["2", "2", "2", "6"]
    assert classes["cat"] == ["1", "1", "1", "3"]
    assert "40 × 30</text>" in page
    assert "annotations[0].iscrowd is missing" in page


def test_the_page_escapes_what_the_dataset_says(command, save, tmp_path):
    document = sound_document()
    document["categories"][0]["name"] = "<script>alert(1)</script>"
    document["images"][0]["file_name"] = "<img src=x onerror=alert(1)>.png"
    folder = save(document, "<b>set")
    assert command("data", "check", folder, "--output-dir", tmp_path / "out").code == 0
    page = (tmp_path / "out" / PAGE).read_text()
    assert "<script" not in page
    assert "<img src" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page


def test_what_is_no_dataset_is_said(command, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        done = command("data", "check", folder, "--output-dir", tmp_path / "out")
        assert done.code == 2
        assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_build_killed_at_any_file_operation_leaves_the_old_dataset(save, tmp_path, memory_folder):
    for name in ("old", "new"):
        document = copy.deepcopy(sound_document())
        for image in document["images"]:
            image["file_name"] = f"{name}_{image['file_name']}"
        save(document, f"work/{name}")
    work = shutil.copytree(tmp_path / "work", memory_folder / "work")
    done = run_module("tests.datasets.killed_builds", work)
    counts = json.loads(done.stdout)
    assert counts["kills"] > 40  # each file is opened, written, and its folder made
    assert counts["after the swap"] > 3


def test_every_kind_of_the_table_is_reported_somewhere():
    code = "\n".join(path.read_text() for path in (REPOSITORY / "app" / "datasets").rglob("*.py"))
    table = (REPOSITORY / "app" / "datasets" / "faults.py").read_text()
    assert [kind for kind in KINDS if f'"{kind}"' not in code.replace(table, "")] == []
