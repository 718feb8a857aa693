"""Names of images as other systems write them: one rule for each of them (FAULTS 8)."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from app.datasets.names import Named, Names, readings
from tests.corpus.making import coco, put, read, refusal, scene, scenes

# HumanSignal/label-studio#6608, #7294; label-studio-converter#139; Roboflow's package; Windows
WRITTEN = {
    "backslashes": lambda name: f"images\\{name}",
    "another folder": lambda name: f"exported/from/there/{name}",
    "a dot before": lambda name: f"./images/{name}",
    "Windows' drive": lambda name: f"C:\\Users\\me\\data\\{name}",
    "a drive with slashes": lambda name: f"D:/data/{name}",
    "an absolute path": lambda name: f"/home/me/data/{name}",
    "a way up": lambda name: f"../../upload/1/{name}",
    "an upload of Label Studio": lambda name: f"/data/upload/1/{name}",
    "its local storage": lambda name: f"/data/local-files/?d=shop/{name}",
    "an address": lambda name: f"https://example.org/a/b/{name}?width=640",
    "a bucket": lambda name: f"s3://bucket/folder/{name}",
    "percent signs": lambda name: f"my%20images/{name.replace('_', '%5F')}",
    "upper case": lambda name: name.upper(),
    "no ending": lambda name: Path(name).stem,
    "no ending, in a folder": lambda name: f"images\\{Path(name).stem}",
    "blanks around": lambda name: f"  {name} ",
}


@pytest.mark.parametrize("how", WRITTEN)
def test_the_one_file_that_can_be_meant_is_found_and_that_is_said(tmp_path, how):
    made = scenes(tmp_path)
    document = coco({WRITTEN[how](name): things for name, things in made.items()})
    put(tmp_path / "annotations.json", document)
    found = read(tmp_path)
    assert [image.path.name for image in found.train.images] == list(made)
    assert found.kinds.get("other name", 0) == (0 if how == "a dot before" else 6)


@pytest.mark.parametrize(("written", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_unicode_forms_are_one(tmp_path, written, stored):
    """macOS stores names decomposed, Windows and Linux as they were typed."""
    made = scenes(tmp_path)
    for name in made:
        old = tmp_path / "images" / name
        old.rename(old.with_name(unicodedata.normalize(stored, f"é_{name}")))
    names = {unicodedata.normalize(written, f"é_{name}"): made[name] for name in made}
    put(tmp_path / "annotations.json", coco(names))
    assert len(read(tmp_path).train.images) == 6


def test_where_two_files_could_be_meant_none_is_taken(tmp_path):
    made = scenes(tmp_path, sub="images/a")
    scenes(tmp_path, sub="images/b", start=20)
    put(tmp_path / "annotations.json", coco({f"x/{name}": t for name, t in made.items()}))
    said = refusal(tmp_path)
    assert "may be images/a/img_0.png, images/b/img_0.png" in said
    put(tmp_path / "annotations.json", coco({f"C:\\a\\{name}": t for name, t in made.items()}))
    paths = [image.path.parent.name for image in read(tmp_path).train.images]
    assert paths == ["a"] * 6  # the folder that is written says which


def test_a_name_in_one_split_never_means_a_file_of_another(tmp_path):
    for split, start in (("train", 0), ("valid", 20)):
        document = coco(scenes(tmp_path, 3, split, start=start))
        put(tmp_path / split / "_annotations.coco.json", document)
    put(tmp_path / "valid" / "only_here.png", scene(99)[0])
    document = coco({"only_here.png": scene(99)[1]})
    put(tmp_path / "train/_annotations.coco.json", document)
    assert "no such file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "..\\secret.png"])
def test_nothing_outside_the_folder_is_opened(tmp_path, name):
    put(tmp_path / "secret.png", scene(1)[0])
    made = scenes(tmp_path / "set", 3)
    things = next(iter(made.values()))
    absolute = str(tmp_path / "secret.png") if name.startswith("/") else name
    put(tmp_path / "set/annotations.json", coco({**made, absolute: things}))
    assert "no such file" in refusal(tmp_path / "set")


def test_a_link_out_of_the_folder_is_left_out_and_said(tmp_path):
    put(tmp_path / "secret.png", scene(1)[0])
    made = scenes(tmp_path / "set", 3)
    (tmp_path / "set/images/img_9.png").symlink_to(tmp_path / "secret.png")
    put(tmp_path / "set/annotations.json", coco({**made, "img_9.png": []}))
    assert "a link that leads out of the dataset" in refusal(tmp_path / "set")
    assert len(read(tmp_path / "set", max_drop=0.25).train.images) == 3


def test_a_name_as_written_wins_whatever_else_is_like_it(tmp_path):
    put(tmp_path / "a%20b.png", scene(1)[0])
    put(tmp_path / "a b.png", scene(2)[0])
    put(tmp_path / "x\\y.png", scene(3)[0])
    put(tmp_path / "y.png", scene(4)[0])
    names = Names([tmp_path])
    assert names.find("a%20b.png") == Named(tmp_path / "a%20b.png")
    assert names.find("x\\y.png") == Named(tmp_path / "x\\y.png")


@pytest.mark.parametrize("name", ["", " ", ".", "..", "/", "\\", "C:\\", "a\0b", "x" * 9000, "%"])
def test_names_of_nothing_find_nothing(tmp_path, name):
    put(tmp_path / "a.png", scene(1)[0])
    assert isinstance(Names([tmp_path]).find(name), str)
    assert all(parts for parts in readings(name))
