"""What classes are called, and what else the model is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.datasets.build import load_splits
from app.datasets.coco import Category
from app.datasets.prompts import NOUNS, name_classes, nouns_beside, read_prompts
from app.errors import UserError

CLASSES = [Category(1, "fuse-cutout"), Category(2, "car"), Category(3, "2024")]


def _file(tmp_path: Path, text: str) -> Path:
    (tmp_path / "prompts.yaml").write_text(text)
    return tmp_path / "prompts.yaml"


def test_prompts_and_synonyms(tmp_path: Path) -> None:
    text = '{"fuse-cutout": " fuse  cutout", "car": ["car", "automobile", "car"], 2024: "a year"}'
    assert read_prompts(_file(tmp_path, text), CLASSES) == {
        "fuse-cutout": ("fuse cutout",),
        "car": ("car", "automobile"),
        "2024": ("a year",),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cat: tiger", "no class 'cat'. Did you mean 'car'"),
        ("car: 3", "'car': must be a prompt"),
        ("car: []", "'car': must be a prompt"),
        ("car: ['...']", "'car': must be a prompt"),
        ("car: Fuse-Cutout", "'fuse-cutout' is asked for 'fuse-cutout' and 'car'"),
        ("- car", "must be a mapping"),
        ("car: [", "broken YAML"),
        ("!!python/object/apply:os.system ['true']", "broken YAML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_prompts(_file(tmp_path, text), CLASSES)
    assert said in str(caught.value)


def test_all_problems_of_a_file_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_prompts(_file(tmp_path, "cat: a\ndog: b\ncar: 3"), CLASSES)
    assert len(caught.value.problems) == 3
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "none.yaml", CLASSES)


def test_classes_take_their_names(shapes: Path) -> None:
    dataset = load_splits(shapes).train
    named = name_classes(dataset, {"circle": ("disc", "round thing")})
    assert named.categories[0] == Category(dataset.categories[0].id, "disc", ("round thing",))
    assert named.categories[1:] == dataset.categories[1:]
    assert named.annotations == dataset.annotations


def test_nouns_leave_out_what_a_class_names() -> None:
    assert len(set(NOUNS)) == len(NOUNS) > 100
    beside = nouns_beside(["Crystal-Balls", "zebra crossing"])
    assert {"crystal ball", "zebra"} <= set(NOUNS) - set(beside)
    assert "walrus" in beside
