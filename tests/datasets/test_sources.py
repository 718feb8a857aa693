from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from app.config.compose import load_config
from app.config.schema import DatasetConfig
from app.datasets import roboflow, sources
from app.datasets.archive import unzip
from app.datasets.build import Splits, load_splits
from app.datasets.sources import fetch
from app.errors import UserError
from tests.datasets.exports import IMAGES, coco_export, packed, yolo_export
from tests.helpers import TINY, Command


def config(**settings: object) -> DatasetConfig:
    return load_config([f"dataset.{key}={value}" for key, value in settings.items()]).dataset


def save(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read_zip(path: Path, content: bytes) -> Splits:
    folder = fetch(config(dir=save(path, content)), 0, path.parent / "data")
    return load_splits(folder)


@pytest.mark.parametrize(
    ("export", "masks", "note"),
    [
        (coco_export(masks=True), [True, True], ()),
        (coco_export(masks=False), [False, False], ()),
        (yolo_export(), [True, False], ("no COCO JSON: read as YOLO",)),
    ],
    ids=["coco-segmentation", "coco", "yolov8"],
)
def test_an_export_of_roboflow(tmp_path, export, masks, note):
    splits = read_zip(tmp_path / "Potholes.v3i.zip", export)
    assert splits.notes[: len(note)] == note
    assert splits.test is None
    names = [sorted(i.path.name for i in split.images) for split in (splits.train, splits.valid)]
    assert names == [sorted(IMAGES["train"]), IMAGES["valid"]]
    for split in (splits.train, splits.valid):
        assert split.class_names == ["pothole"]  # not the placeholder, category 0
        for annotation in split.annotations:
            assert annotation.bbox_xywh == pytest.approx((10, 5, 10, 10), abs=0.01)
    by_name = {i.path.name: splits.train.annotations_by_image[i.id] for i in splits.train.images}
    assert [a.segmentation is not None for n in sorted(by_name) for a in by_name[n]] == masks


def test_a_zip_is_unpacked_once_and_anew_for_other_contents(tmp_path, monkeypatch):
    folders: list[Path] = []

    def counted(archive: Path, folder: Path) -> None:
        folders.append(folder)
        unzip(archive, folder)

    monkeypatch.setattr(sources, "unzip", counted)
    path, export = tmp_path / "my set (1).zip", coco_export(masks=True)
    assert read_zip(path, export) == read_zip(path, export)
    read_zip(path, coco_export(masks=False))
    assert len(folders) == 2
    assert all(folder.name.startswith("zip-my-set-1-") for folder in folders)
    assert folders[0] != folders[1]


@pytest.mark.parametrize(
    ("names", "inner"),
    [
        (["set/a.txt", "set/b.txt"], "set"),
        (["set/deep/a.txt", "set/deep/b/c.txt"], "set/deep"),
        (["set/a.txt", "__MACOSX/set/._a.txt", ".DS_Store"], "set"),
        (["train/a.txt"], "."),
        (["set/a.txt", "README.txt"], "."),
        (["a.txt"], "."),
    ],
)
def test_the_folder_that_holds_the_dataset(tmp_path, names, inner):
    archive = save(tmp_path / "a.zip", packed(dict.fromkeys(names, "x")))
    folder = fetch(config(dir=archive), 0, tmp_path / "data")
    (top,) = (tmp_path / "data").glob("zip-*")
    assert folder == top / inner


def test_a_refused_zip_and_a_file_that_is_none(tmp_path):
    for name, content in (("a.zip", packed({"../evil": "x"})), ("a.json", b"{}")):
        with pytest.raises(UserError, match=name):
            fetch(config(dir=save(tmp_path / name, content)), 0, tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".lock"]
    assert not list(tmp_path.rglob("evil"))


def test_a_folder_is_itself_and_nothing_is_written(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert fetch(config(dir=path), 0, tmp_path / "data") == path
    assert not list(tmp_path.iterdir())


def test_roboflow_is_asked_for_the_version(tmp_path, monkeypatch):
    monkeypatch.setattr(roboflow, "fetch", lambda *given: Path(*map(str, given)))
    assert fetch(config(roboflow="a/b/3"), 0, tmp_path) == Path("a/b/3", tmp_path)


def test_processes_that_start_together_unpack_once(tmp_path, monkeypatch):
    """Threads here: flock is of the open file, so that it parts them as it parts processes."""
    folders: list[Path] = []

    def slow(archive: Path, folder: Path) -> None:
        folders.append(folder)
        time.sleep(0.2)
        unzip(archive, folder)

    monkeypatch.setattr(sources, "unzip", slow)
    dataset = config(dir=save(tmp_path / "a.zip", coco_export(masks=True)))
    words = (dataset, 0, tmp_path / "data")
    threads = [threading.Thread(target=fetch, args=words) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 1


def test_a_zip_is_trained_on(tmp_path, monkeypatch, command: Command):
    monkeypatch.setattr(sources.fetch, "__defaults__", (tmp_path / "data",))
    archive = save(tmp_path / "export.zip", coco_export(masks=True))
    words = ["--dataset-dir", archive, "--format", "coco", "--model", "nano", "--epochs", 1]
    result = command("train", *words, "--output-dir", tmp_path / "out", *TINY)
    assert result.code == 0, result.err
    assert "read as COCO, as dataset.format says" in result.out
    assert (tmp_path / "out" / "weights" / "best" / "model.safetensors").is_file()
