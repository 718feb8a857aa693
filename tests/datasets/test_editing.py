"""Labels of a folder, edited an image at a time: what is on disk, and what cannot be lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from app.datasets import editing
from app.datasets.build import survey
from app.datasets.editing import LabelFile, Shape, StaleError
from app.errors import UserError
from tests.helpers import REPOSITORY

POTHOLES = REPOSITORY / "examples" / "potholes" / "valid"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images without labels, one of them in a folder of its own."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name, size in {"a.png": (40, 30), "b.jpg": (50, 20), "sub/c.png": (30, 30)}.items():
        Image.new("RGB", size, "gray").save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def box(name: str = "cat", xywh: tuple[float, ...] = (2, 3, 10, 8), **other: object) -> Shape:
    return Shape(
        **{"id": None, "name": name, "box_xywh": xywh, "mask": None, "score": None} | other
    )


def disc(width: int, height: int) -> dict[str, object]:
    """A mask as a page counts it: run lengths down the columns."""
    rows, columns = np.ogrid[:height, :width]
    flat = ((columns - width / 2) ** 2 + (rows - height / 2) ** 2 < 50).ravel(order="F")
    bounds = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *bounds.tolist(), flat.size])
    return {"size": [height, width], "counts": counts.tolist()}


def saved(folder: Path) -> dict[str, list[dict]]:
    return json.loads((folder / "_annotations.coco.json").read_text())


def test_images_are_listed_and_nothing_is_written_by_a_look(photos: Path) -> None:
    labels = LabelFile(photos)
    assert labels.names() == ["a.png", "b.jpg", "sub/c.png"]
    assert (labels.counts(), labels.classes) == ({}, [])
    seen = labels.read("sub/c.png")
    assert (seen.width, seen.height, seen.finished, seen.objects) == (30, 30, False, ())
    assert not labels.file.exists()
    for name in (
        "none.png",
        "../photos/a.png",
        "notes.txt",
        "/etc/passwd",
        "a.png\0",
        "sub/../a.png/",
    ):
        with pytest.raises(KeyError):
            labels.read(name)
    with pytest.raises(UserError, match="no such folder"):
        LabelFile(photos / "none")


def test_what_is_written_is_a_dataset(photos: Path) -> None:
    labels = LabelFile(photos)
    mask = disc(40, 30)
    one = labels.write("a.png", labels.read("a.png").version, [box(mask=mask), box("dog")], True)
    assert [(name, each.id) for name, each in one.objects] == [("cat", 1), ("dog", 2)]
    decoded = coco_mask.decode(one.objects[0][1].segmentation)
    assert decoded.sum() == sum(mask["counts"][1::2])
    labels.write("sub/c.png", labels.read("sub/c.png").version, [], True)
    labels.write("b.jpg", labels.read("b.jpg").version, [box(" CAT ")], False)
    train = survey(photos).splits["train"]
    assert [image.path.name for image in train.images] == ["a.png", "c.png"]
    assert train.class_names == ["cat", "dog"]
    assert train.annotations[0].bbox_xywh == tuple(coco_mask.toBbox(one.objects[0][1].segmentation))
    faults = {fault.kind for fault in survey(photos).faults}
    assert "unfinished" in faults
    assert [each["category_id"] for each in saved(photos)["annotations"]] == [1, 2, 1]
    assert labels.counts() == {
        "a.png": (True, 2, 0),
        "b.jpg": (False, 1, 0),
        "sub/c.png": (True, 0, 0),
    }
    # Another process reads the same.
    assert LabelFile(photos).read("a.png") == labels.read("a.png")
    # What was begun and taken back leaves no trace.
    labels.write("b.jpg", labels.read("b.jpg").version, [], False)
    assert "b.jpg" not in labels.counts()


def test_proposals_are_marked_until_they_are_accepted(photos: Path) -> None:
    labels = LabelFile(photos)
    now = labels.write("a.png", labels.read("a.png").version, [box(score=0.4)], False)
    entry = saved(photos)["annotations"][0]
    assert (entry["source"], entry["score"]) == ("proposal", 0.4)
    with pytest.raises(UserError, match=r"objects\.0: is a proposal; accept or reject it"):
        labels.write("a.png", now.version, [box(id=1, score=0.4)], True)
    now = labels.write("a.png", now.version, [box(id=1)], True)
    entry = saved(photos)["annotations"][0]
    assert "source" not in entry
    assert "score" not in entry
    assert survey(photos).splits["train"].annotations[0].score is None


def test_a_stale_edit_changes_nothing(photos: Path) -> None:
    one, other = LabelFile(photos), LabelFile(photos)
    first = one.read("a.png")
    now = other.write("a.png", first.version, [box()], False)
    before = one.file.read_bytes()
    with pytest.raises(StaleError) as stale:
        one.write("a.png", first.version, [box("dog")], True)
    assert stale.value.labels == now
    assert one.file.read_bytes() == before
    one.write("b.jpg", one.read("b.jpg").version, [box("dog")], False)  # others are not touched
    assert other.read("a.png") == now


def test_what_an_edit_does_not_change_stays_as_it_was(tmp_path: Path) -> None:
    """An export of Roboflow: its ids count from 0, its polygons and other keys are kept."""
    folder = tmp_path / "valid"
    shutil.copytree(POTHOLES, folder)
    before = saved(folder)
    before["annotations"][0]["attributes"] = {"depth": "deep"}
    (folder / "_annotations.coco.json").write_text(json.dumps(before))
    labels = LabelFile(folder)
    name = labels.names()[0]
    now = labels.read(name)
    shapes = [
        Shape(each.id, called, each.bbox_xywh, each.segmentation, each.score)
        for called, each in now.objects
    ]
    again = labels.write(name, now.version, [*shapes, box("crack")], True)
    after = saved(folder)
    changed = {each["id"]: each for each in after["annotations"]}
    assert len(changed) == len(before["annotations"]) + 1
    for number, each in enumerate(before["annotations"]):
        old = each["id"] if before["annotations"][0]["id"] else number + 1
        assert changed[old] | {"id": each["id"]} == each
    assert after["info"] == before["info"]
    assert after["licenses"] == before["licenses"]
    assert again.objects[-1][0] == "crack"
    assert after["categories"][:-1] == before["categories"]
    labels.write(name, again.version, [*shapes[1:], box("crack", id=again.objects[-1][1].id)], True)
    assert len(saved(folder)["annotations"]) == len(before["annotations"])


def test_every_fault_is_told_and_nothing_is_written(photos: Path) -> None:
    labels = LabelFile(photos)
    version = labels.read("a.png").version
    empty = {"size": [30, 40], "counts": [1200]}
    with pytest.raises(UserError) as caught:
        labels.write(
            "a.png",
            version,
            [
                box(" "),
                box(id=7),
                box(xywh=(50, 2, 5, 5)),
                box(xywh=(0, 0, 0, 5)),
                box(mask={"size": [40, 30], "counts": [1200]}),
                box(mask=empty),
                box(name="\ud800"),
            ],
            True,
        )
    for number, problem in enumerate(caught.value.problems):
        assert problem.startswith(f"objects.{number}: "), problem
    assert len(caught.value.problems) == 7
    assert not labels.file.exists()
    labels.file.write_text('{"images": [{"id": 1}], "annotations": [], "categories": []}')
    with pytest.raises(UserError, match="data fix"):
        LabelFile(photos)


def test_threads_and_processes_lose_no_edit(photos: Path) -> None:
    """Each adds its objects, and tries again on what is there where another was before it."""
    script = """
import sys
from pathlib import Path
from app.datasets.editing import LabelFile, Shape, StaleError
labels = LabelFile(Path(sys.argv[1]))
for number in range(10):
    while True:
        now = labels.read("a.png")
        kept = [Shape(e.id, n, e.bbox_xywh, None, None) for n, e in now.objects]
        new = Shape(None, sys.argv[2], (number, 1, 5, 5), None, None)
        try:
            labels.write("a.png", now.version, [*kept, new], False)
            break
        except StaleError:
            pass
"""
    words = [sys.executable, "-c", script, str(photos)]
    processes = [subprocess.Popen([*words, name], cwd=REPOSITORY) for name in ("cat", "dog")]
    assert [process.wait(120) for process in processes] == [0, 0]
    objects = LabelFile(photos).read("a.png").objects
    assert sorted((name, each.bbox_xywh[0]) for name, each in objects) == [
        (name, float(number)) for name in ("cat", "dog") for number in range(10)
    ]


def test_a_kill_leaves_what_was_answered(photos: Path) -> None:
    """Each write is told by its number; killed at any moment, that many objects are there."""
    script = """
import sys
from pathlib import Path
from app.datasets.editing import LabelFile, Shape
labels = LabelFile(Path(sys.argv[1]))
for number in range(len(labels.read("a.png").objects), 100000):
    now = labels.read("a.png")
    kept = [Shape(e.id, n, e.bbox_xywh, None, None) for n, e in now.objects]
    new = Shape(None, f"class {number % 7}", (number % 30, 1, 5, 5), None, None)
    labels.write("a.png", now.version, [*kept, new], False)
    print(number + 1, flush=True)
"""
    last = 0
    for seed in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(photos)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, "it writes"
        time.sleep(random.Random(seed).uniform(0.01, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        told = int((first + process.stdout.read()).split("\n")[-2].split()[-1])
        process.wait()
        there = len(LabelFile(photos).read("a.png").objects)
        assert there in (told, told + 1)  # the last may be there before it is told
        assert there > last
        last = there


def test_readers_and_writers_share_threads(photos: Path) -> None:
    labels, problems = LabelFile(photos), list[Exception]()

    def work(name: str) -> None:
        try:
            for _ in range(15):
                now = labels.read(name)
                shapes = [Shape(e.id, n, e.bbox_xywh, None, None) for n, e in now.objects]
                labels.write(name, now.version, [*shapes, box()], False)
                labels.counts()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in ("a.png", "b.jpg", "sub/c.png")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert {name: count for name, (_, count, _) in labels.counts().items()} == dict.fromkeys(
        labels.names(), 15
    )
    ids = [each["id"] for each in saved(photos)["annotations"]]
    assert len(set(ids)) == 45


def test_an_own_write_is_not_read_again(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file would be checked anew at every stroke."""
    labels = LabelFile(photos)
    labels.write("a.png", labels.read("a.png").version, [box()], False)

    def never(*_: object) -> None:
        raise AssertionError("it is read")

    monkeypatch.setattr(editing, "read_json", never)
    now = labels.read("a.png")
    labels.write("a.png", now.version, [box(id=1, xywh=(0, 0, 4, 4))], False)
    assert labels.read("a.png").objects[0][1].bbox_xywh == (0, 0, 4, 4)
