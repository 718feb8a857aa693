"""What stands in an output folder, and how images are called, can hurt no other file."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from app.errors import UserError
from app.inference.journal import FILE, Journal
from app.inference.outputs import PER_IMAGE
from tests.inference.doors import SETTINGS, predict

JOURNALLED = pytest.mark.parametrize("overwrite", [False, True])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20)).save(folder / name)
    return folder


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A file of somebody else's."""
    file = tmp_path / "theirs" / "thesis.txt"
    file.parent.mkdir()
    file.write_text("years of work")
    return file


@JOURNALLED
@pytest.mark.parametrize("kind", ["link", "second name", "other file", "pipe", "folder"])
def test_what_stands_in_the_journals_place_is_left_as_it_is(
    images: Path, theirs: Path, tmp_path: Path, kind: str, overwrite: bool
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if kind == "link":
        (out / FILE).symlink_to(theirs)
    elif kind == "second name":
        theirs.write_text('{"checkpoint": "none", "prompts": []}\n')
        (out / FILE).hardlink_to(theirs)
    elif kind == "other file":
        (out / FILE).write_text('{"image": "of another program"}\n')
    elif kind == "pipe":
        os.mkfifo(out / FILE)
    else:
        (out / FILE).mkdir()
    before = {path: path.read_bytes() for path in (theirs, out / FILE) if path.is_file()}
    with pytest.raises((UserError, OSError), match=re.escape(str(out / FILE))):
        predict(images, out, overwrite=overwrite)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in out.iterdir()) == [FILE]


@JOURNALLED
@pytest.mark.parametrize("name", ["labels", "cutouts", "labels/a.txt", "cutouts/a", "data.yaml"])
def test_no_link_in_the_output_folder_is_followed(
    images: Path, theirs: Path, tmp_path: Path, name: str, overwrite: bool
) -> None:
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(theirs if link.suffix else theirs.parent)
    with pytest.raises(UserError, match=rf"{name}: is a link"):
        predict(images, tmp_path / "out", "yolo", "cutouts", overwrite=overwrite)
    assert [path.read_text() for path in theirs.parent.iterdir()] == ["years of work"]


def test_the_output_folder_itself_may_be_a_link(images: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert predict(images, tmp_path / "out") == []
    assert (tmp_path / "disk" / "a.png").is_file()


def test_replaced_cutouts_are_cutouts(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(images, out, "cutouts")
    predict(images, out, "cutouts", overwrite=True)
    (out / "cutouts" / "a" / "mine.txt").write_text("notes")
    with pytest.raises(UserError, match=r"cutouts/a holds mine\.txt, which is no cutout"):
        predict(images, out, "cutouts", overwrite=True)
    assert (out / "cutouts" / "a" / "mine.txt").read_text() == "notes"


@pytest.mark.parametrize("name", ["..png", "...png", "....png", f"{'x' * 240}.png"])
def test_an_images_name_leads_nowhere_else(images: Path, tmp_path: Path, name: str) -> None:
    Image.new("RGB", (30, 20)).save(images / name, format="PNG")
    # a folder's hidden files are passed over, and a list names them
    (images / "list.txt").write_text(f"a.png\nb.png\n{name}\n")
    out, kinds = tmp_path / "out", [*PER_IMAGE, "coco", "csv"]
    assert predict(images / "list.txt", out, *kinds) == []
    assert len(list((out / "cutouts").iterdir())) == 3
    assert all(folder.is_dir() and any(folder.iterdir()) for folder in (out / "cutouts").iterdir())
    files = {path.relative_to(out).parts[0] for path in out.rglob("*") if path.is_file()}
    assert files >= {"labels", "cutouts", "geojson", "instances", "predictions.csv"}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_a_pipe_is_no_image(images: Path, tmp_path: Path) -> None:
    os.mkfifo(images / "c.png")
    (images / "list.txt").write_text("a.png\nb.png\nc.png\n")
    with pytest.raises(UserError, match=r"c\.png: no such file"):
        predict(images / "list.txt", tmp_path / "out")
    assert predict(images, tmp_path / "out") == []  # of a folder it is passed over


def test_names_in_a_csv_are_no_formulas_and_need_not_be_utf8(images: Path, tmp_path: Path) -> None:
    for name in ("=cmd|x.png", os.fsdecode(b"\xff.png")):
        Image.new("RGB", (30, 20)).save(images / name)
    assert predict(images, tmp_path / "out", "csv") == []
    with (tmp_path / "out" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["prompt"] for row in rows} == {"'=1+1"}
    assert {row["file_name"] for row in rows} == {"a.png", "b.png", "'=cmd|x.png", "\\udcff.png"}
    assert {row["x"] for row in rows} == {"0.0"}


@pytest.mark.parametrize(
    "change",
    [
        {"found": [{"category_id": 9, "bbox": [0, 0, 1, 1], "score": 1.0}]},
        {"found": [{"category_id": 1, "bbox": ["="], "score": 1.0}]},
        {"found": [{"category_id": 1, "bbox": [0, 0, 1, 1], "score": 1, "segmentation": [1]}]},
        {"found": 3},
        {"found": None},
        {"width": "x"},
    ],
)
def test_an_entry_that_is_none_is_done_again(images: Path, tmp_path: Path, change: dict) -> None:
    out = tmp_path / "out"
    predict(images, out)
    right = (out / "predictions.json").read_text()
    lines = (out / FILE).read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | change)
    (out / FILE).write_text("\n".join(lines) + "\n")
    assert predict(images, out) == []
    assert (out / "predictions.json").read_text() == right


@pytest.mark.parametrize(
    "line", ["[" * 100_000, f'{{"n": {"9" * 6000}}}', "3", '{"files": 3}', "\xff"]
)
def test_a_journal_is_read_as_far_as_it_is_one(images: Path, tmp_path: Path, line: str) -> None:
    out = tmp_path / "out"
    predict(images, out)
    with (out / FILE).open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    assert predict(images, out) == []
    assert len((out / FILE).read_text().splitlines()) == 4


def test_what_another_run_wrote_since_the_first_look_is_not_replaced(
    images: Path, tmp_path: Path
) -> None:
    """The other run has ended by the time that this one has loaded its weights."""
    other, out = tmp_path / "other", tmp_path / "out"
    other.mkdir()
    Image.new("RGB", (30, 20), "red").save(other / "a.png")
    written: list[bytes] = []

    def meanwhile() -> None:
        predict(other, out)
        written.append((out / "a.png").read_bytes())

    with pytest.raises(UserError, match="holds results of"):
        predict(images, out, meanwhile=meanwhile)
    assert [(out / "a.png").read_bytes()] == written


def test_a_journal_that_a_kill_cut_at_its_beginning_is_begun_anew(
    images: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE).write_text('{"check')
    assert predict(images, tmp_path / "out") == []
    with Journal(tmp_path / "out", SETTINGS.identity(), overwrite=False) as journal:
        assert len(journal) == 2
