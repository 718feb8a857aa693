"""HuggingFace's imagefolder (huggingface.co/docs/datasets, image_dataset): metadata.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.corpus.making import (
    CLASSES,
    Thing,
    put,
    read,
    refusal,
    scenes,
    sorted_things,
    things_of,
)

CARD = """---
license: mit
dataset_info:
  features:
  - name: image
    dtype: image
  - name: objects
    sequence:
    - name: bbox
      sequence: float32
      length: 4
    - name: categories
      dtype:
        class_label:
          names:
            '0': circle
            '1': rectangle
---
# Shapes
"""


def line(name: str, things: list[Thing], number: bool = False, key: str = "categories") -> str:
    boxes = [[x, y, side, side] for _, x, y, side in things]
    labels = [CLASSES.index(kind) if number else kind for kind, *_ in things]
    return json.dumps({"file_name": name, "objects": {"bbox": boxes, key: labels}}) + "\n"


def lines(made: dict[str, list[Thing]], **more: object) -> str:
    return "".join(line(name, things, **more) for name, things in made.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["categories", "category", "label", "category_id"])
def test_names_of_classes_as_text(tmp_path, key):
    made = scenes(tmp_path, sub=".")
    put(tmp_path / "metadata.jsonl", lines(made, key=key))
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things(made)
    assert not found.kinds


def test_numbers_of_classes_are_named_by_the_card(tmp_path):
    made = scenes(tmp_path, sub=".")
    put(tmp_path / "metadata.jsonl", lines(made, number=True))
    assert read(tmp_path).train.class_names == ["0", "1"]
    put(tmp_path / "README.md", CARD)
    assert things_of(read(tmp_path).train) == sorted_things(made)
    for broken in ("---\na: [\n---\n", "---", "# Shapes", "---\n- &a [*a]\n---\n", "---\n1\n---\n"):
        put(tmp_path / "README.md", broken)
        assert read(tmp_path).train.class_names == ["0", "1"]


def test_a_list_of_objects_and_an_image_without_any(tmp_path):
    made = scenes(tmp_path, sub=".")
    text = ""
    for name, things in made.items():
        objects = [{"bbox": [x, y, s, s], "category": kind} for kind, x, y, s in things]
        text += json.dumps({"file_name": name, "objects": objects, "text": "x"}) + "\n"
    scenes(tmp_path, 7, ".")
    text += json.dumps({"file_name": "img_6.png"}) + "\n\n"
    put(tmp_path / "metadata.jsonl", text)
    found = read(tmp_path)
    assert things_of(found.train) == sorted_things({**made, "img_6.png": []})
    assert found.kinds == {"unlabelled": 1}


@pytest.mark.parametrize("own", [True, False])
def test_splits(tmp_path, own):
    """A file in each split's folder, or one above that names the folders."""
    made, text = {}, ""
    for split, start in (("train", 0), ("validation", 20), ("test", 40)):
        made[split] = scenes(tmp_path, 3, split, start=start)
        if own:
            put(tmp_path / split / "metadata.jsonl", lines(made[split]))
        text += lines({f"{split}/{name}": things for name, things in made[split].items()})
    if not own:
        put(tmp_path / "metadata.jsonl", text)
    found = read(tmp_path)
    for split, its in (("train", "train"), ("valid", "validation"), ("test", "test")):
        assert things_of(found.splits[split]) == sorted_things(made[its])


def test_boxes_that_are_corners_are_told(tmp_path):
    made = scenes(tmp_path, sub=".")
    text = ""
    for name, things in made.items():
        boxes = [[x, y, x + s, y + s] for _, x, y, s in things]
        objects = {"bbox": boxes, "categories": [kind for kind, *_ in things]}
        text += json.dumps({"file_name": name, "objects": objects}) + "\n"
    put(tmp_path / "metadata.jsonl", text)
    assert "--boxes xyxy" in refusal(tmp_path)
    assert things_of(read(tmp_path, boxes="xyxy").train) == sorted_things(made)


def test_bad_lines_are_named(tmp_path: Path):
    made = scenes(tmp_path, sub=".")
    entries = [
        '{"file_name": "img_0.png", "obj',
        "7",
        json.dumps({"objects": {}}),
        json.dumps({"file_name": "../../etc/passwd", "objects": {"bbox": []}}),
        json.dumps({"file_name": "img_0.png", "objects": {"bbox": [[1, 2, 3]], "label": ["a"]}}),
        json.dumps({"file_name": "img_1.png", "objects": {"bbox": [[1, 2, 3, 4]], "label": []}}),
        json.dumps({"file_name": "img_2.png", "objects": {"bbox": 7, "label": ["x"]}}),
        json.dumps(
            {"file_name": "img_3.png", "objects": [7, {"bbox": [1, 2, 0, 4], "label": "x"}]}
        ),
    ]
    put(
        tmp_path / "metadata.jsonl",
        "\n".join(entries) + "\n" + line("img_4.png", made["img_4.png"]),
    )
    said = refusal(tmp_path)
    for part in (
        *("line 1 is '{\"file_name", "line 2 is", "line 3 is missing", "line 4 is '../../etc"),
        *("line 5: objects[0] is [1, 2, 3]", "line 6: objects[0] is missing", "line 7: objects[0]"),
        *("line 8: objects[0]", "line 8: objects[1]"),
    ):
        assert part in said, part
    assert things_of(read(tmp_path, max_drop=0.9).train)["img_4.png"] == sorted(made["img_4.png"])
