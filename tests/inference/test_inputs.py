from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.errors import UserError
from app.inference.inputs import find_images, output_names, parse_box, read_prompts


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "in put"
    folder.mkdir()
    for name in ("b.jpg", "a.png", "ä.JPG", "notes.md"):
        (folder / name).touch()
    return folder


def test_inputs(images: Path) -> None:
    assert [p.name for p in find_images(str(images))] == ["a.png", "b.jpg", "ä.JPG"]
    assert [p.name for p in find_images(str(images / "*.jpg"))] == ["b.jpg"]
    assert [p.name for p in find_images(str(images / "a.png"))] == ["a.png"]
    assert len(find_images(str(images.parent / "**" / "*"))) == 3


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "no such file, folder or glob"),
        ("nowhere/*.png", "no such file, folder or glob"),
        ("https://example.org/a.png", "addresses are not fetched"),
        (".", "no images in this folder"),
    ],
)
def test_no_images(tmp_path: Path, monkeypatch, source: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        find_images(source)


def test_boxes() -> None:
    assert parse_box("1,2.5,3,4") == (1, 2.5, 3, 4)
    with pytest.raises(UserError, match="four numbers"):
        parse_box("a,b,c,d")


def test_a_list_names_images_from_here_or_from_beside_it(images: Path, monkeypatch) -> None:
    monkeypatch.chdir(images.parent)
    file = images / "list.txt"
    file.write_text(f"in put/b.jpg\n\na.png\n{images}/ä.JPG\nin put/b.jpg\n", encoding="utf-8")
    assert [p.name for p in find_images(str(file))] == ["b.jpg", "a.png", "ä.JPG"]
    file.write_text("gone.png\nb.jpg\nlost.png\n")
    with pytest.raises(UserError) as error:
        find_images(str(file))
    assert error.value.problems == [
        f"--input {file}: {name}: no such file" for name in ("gone.png", "lost.png")
    ]
    file.write_text("\n")
    with pytest.raises(UserError, match="an empty list"):
        find_images(str(file))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "red car\n\n dog \n"),
        ("p.yaml", "- red car\n- dog\n"),
        ("p.yaml", "0: red car\nhound: [dog, hound]\n"),
        ("p.json", '["red car", "dog"]'),
    ],
)
def test_prompts_of_a_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == ["red car", "dog"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a", "broken YAML"),
        ("7", "must be a list"),
        ("[[a], 3]", "must be a list"),
        ("a: []", "must be a list of prompts, or class: prompt"),
        ("a: 2024-13-45x\nb: {}", "must be a list"),
        ("[" * 5000, "more than 64 deep"),
        (f"- {'9' * 6000}", "a number of 6000 characters"),
        ("é", "UTF-8"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.yaml").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=said):
        read_prompts(tmp_path / "p.yaml")


def test_a_glob_enters_each_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links in a circle would be followed 2^40 ways."""
    for name in ("a.png", "one/b.png", "one/two [x]/c.png", ".hidden/d.png", "one/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = ["a.png", "one/b.png", "one/two [x]/c.png"]
    for pattern in ("**/*.png", "**", "**/**/*.png"):
        found = find_images(f"{tmp_path}/{pattern}")
        assert [str(path.relative_to(tmp_path)) for path in found] == expected
    assert find_images(f"{tmp_path}/o**/*.png") == [tmp_path / "one" / "b.png"]
    monkeypatch.chdir(tmp_path)
    assert list(map(str, find_images("**/*.png"))) == expected
    for name in ("loop", "again", "one/up"):
        (tmp_path / name).symlink_to(tmp_path)
    assert len(find_images(f"{tmp_path}/**/*.png")) == 3


def test_prompts_are_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.txt")
    with pytest.raises(UserError, match=r"--prompts .*p\.txt: cannot be read \(is no regular"):
        read_prompts(tmp_path / "p.txt")


def test_names_of_outputs_stay_when_images_are_added() -> None:
    paths = [Path(p) for p in ("one/a.png", "one/b.png", "one/b.jpg", "two/c.png", "one/c.png")]
    names = output_names(paths)
    assert names[:3] == ["a", "b.png", "b.jpg"]
    assert len(set(names)) == 5
    assert all(name.startswith("c.png.") for name in names[3:])
    assert output_names([Path("zero/c.png"), *paths])[1:] == names
