from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from app.config.compose import load_config
from app.datasets.read_splits import read_splits
from app.errors import UserError


def test_classes_are_named_by_the_prompts_file(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("circle: [disc, round thing]\n")
    splits = read_splits(
        load_config([f"dataset.dir={shapes}", f"dataset.prompts={tmp_path / 'p.yaml'}"])
    )
    for split in (splits.train, splits.valid):
        assert "disc" in split.class_names
        assert "circle" not in split.class_names


@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_an_image_that_cannot_be_decoded(shapes: Path, tmp_path: Path, choice: str, caplog) -> None:
    """Skipped where asked; else left in, for the run to stop at."""
    folder = tmp_path / "set"
    shutil.copytree(shapes, folder)
    image = sorted((folder / "train").rglob("*.png"))[1]
    Image.open(image).save(tmp_path / "whole.jpg", quality=95)
    image.write_bytes((tmp_path / "whole.jpg").read_bytes()[:-600])  # its header says nothing of it
    whole = read_splits(load_config([f"dataset.dir={shapes}"])).train
    config = load_config([f"dataset.dir={folder}", f"dataset.bad_images={choice}"])
    left = read_splits(config).train
    skipped = {each.path.name for each in whole.images} - {each.path.name for each in left.images}
    assert skipped == ({image.name} if choice == "skip" else set())
    assert (image.name in caplog.text) is (choice == "skip")


def test_more_classes_than_prompts_of_a_step_are_noted(shapes: Path) -> None:
    few, enough = (
        read_splits(load_config([f"dataset.dir={shapes}", f"dataset.max_prompts={most}"]))
        for most in (1, 8)
    )
    assert len(few.notes) == len(enough.notes) + 1


def test_the_group_is_read_from_the_configuration(shapes: Path) -> None:
    """The set has its own validation split, so that its training folder alone is read."""
    with pytest.raises(UserError, match=r"dataset\.group=zebra: .* do not match"):
        read_splits(load_config([f"dataset.dir={shapes / 'train'}", "dataset.group=zebra"]))
    with pytest.raises(UserError, match=r"'\(' is no regular expression"):
        load_config(["dataset.group=("])


def test_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        read_splits(load_config([f"dataset.dir={tmp_path / 'nowhere'}"]))
