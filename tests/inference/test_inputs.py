from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.errors import UserError
from app.inference.inputs import (
    check_length,
    find_images,
    output_names,
    parse_box,
    read_prompts,
    relative_names,
)
from app.inference.journal import FILE as JOURNAL


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
    file.write_text("# of Monday\n\nb.jpg\n#b.jpg\n")
    assert [p.name for p in find_images(str(file))] == ["b.jpg"]
    (images / "#b.jpg").touch()
    assert [p.name for p in find_images(str(file))] == ["b.jpg", "#b.jpg"]
    file.write_text("\n# nothing\n")
    with pytest.raises(UserError, match="an empty list"):
        find_images(str(file))


def test_what_a_folder_holds_beside_images_is_passed_over_and_said(images, caplog) -> None:
    for name in ("._b.jpg", ".DS_Store", "film.MP4", "list.csv", "no-ending"):
        (images / name).touch()
    (images / "cam1").mkdir()
    (images / "lost.png").symlink_to("nowhere")
    os.mkfifo(images / "pipe.png")
    with caplog.at_level("INFO", "app"):
        found = find_images(str(images))
    assert [path.name for path in found] == ["a.png", "b.jpg", "ä.JPG"]
    (said,) = caplog.messages
    for part in (
        f"--input {images}: passed over: ",
        "2 hidden (.DS_Store, …)",
        "1 .csv (list.csv)",
        "1 .md (notes.md)",
        "1 without an ending (no-ending)",
        "2 no file or a broken link (lost.png, …)",
        "1 folder (cam1)",
        f"; --input '{images}/**/*' takes what folders hold as well",
        f"{images}/film.MP4: is a film, which ./infer.sh --input '{images}/film.MP4' follows",
    ):
        assert part in said


def test_nothing_is_said_of_a_folder_of_images_alone(images, caplog) -> None:
    (images / "notes.md").unlink()
    with caplog.at_level("INFO", "app"):
        assert len(find_images(str(images))) == 3
    assert not caplog.messages


@pytest.mark.parametrize("source", ["film.mp4", "*.mov", ".", "list.txt"])
def test_films_are_no_images(tmp_path: Path, monkeypatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("film.mp4", "film.mov"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("film.mp4\n")
    with pytest.raises(UserError) as error:
        find_images(source)
    assert "is a film, which ./infer.sh" in str(error.value)
    assert "ffmpeg -i 'film.mo" in str(error.value) or "ffmpeg -i 'film.mp4'" in str(error.value)


def test_pictures_of_an_earlier_prediction_are_no_input(images: Path, caplog) -> None:
    """In the folder itself, and in one below that a glob reaches."""
    found = images / "found"
    for folder, name in ((images, "b.png"), (found, "instances/a.png")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        (folder / JOURNAL).write_text(f'{{"checkpoint": "x"}}\n{{"files": ["{name}"]}}\n')
    with caplog.at_level("INFO", "app"):
        assert [p.name for p in find_images(str(images))] == ["a.png", "b.jpg", "ä.JPG"]
        assert len(find_images(str(images / "**" / "*"))) == 3
    assert "1 of an earlier prediction (b.png)" in caplog.messages[0]
    assert "2 of an earlier prediction (b.png, …)" in caplog.messages[1]
    # Whoever names such a folder means it.
    assert len(find_images(str(found / "instances"))) == 1


def test_names_are_relative_to_what_input_names(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("in/cam1/0.jpg", "in/cam2/0.jpg", "else/0.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    Path("in/list.txt").write_text("cam2/0.jpg\nin/cam1/0.jpg\n")
    Path("in/wide.txt").write_text("cam2/0.jpg\n../else/0.jpg\n")
    cases = {
        "in/**/*.jpg": ["cam1/0.jpg", "cam2/0.jpg"],
        f"{tmp_path}/in/*/*": ["cam1/0.jpg", "cam2/0.jpg"],
        "in/../in/*/0.jpg": ["cam1/0.jpg", "cam2/0.jpg"],
        "**/cam?/*": ["in/cam1/0.jpg", "in/cam2/0.jpg"],
        "in/cam1": ["0.jpg"],
        "in/cam1/0.jpg": ["0.jpg"],
        "in/list.txt": ["cam2/0.jpg", "cam1/0.jpg"],
        "in/wide.txt": ["in/cam2/0.jpg", "else/0.jpg"],
    }
    for source, names in cases.items():
        assert relative_names(source, find_images(source)) == names, source


def test_prompts_that_are_not_read_to_their_end() -> None:
    """A token a letter, of which a model reads 6 beside those of start and end."""
    tokens = lambda prompt: [ord(letter) for letter in prompt]  # noqa: E731
    assert check_length(["dog", "kitten"], tokens, 8) == ""
    note = check_length(["kittens", "dog"], tokens, 8)
    assert note == ("'kittens': has 7 tokens, of which this model reads the first 6; shorten it")
    for pair in (["kittens", "kittenish"], ["kitten", "kittens"]):
        with pytest.raises(UserError, match=r"'kitten.*' and 'kitten.*': are one prompt"):
            check_length(pair, tokens, 8)


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
    images = ["one/a.png", "one/b.png", "one/b.jpg", "two/c.png", "one/c.png", "..png"]
    names = output_names(images)
    assert names == ["one/a", "one/b.png", "one/b.jpg", "two/c", "one/c", "..png"]
    assert output_names(["zero/c.png", *images])[1:] == names
