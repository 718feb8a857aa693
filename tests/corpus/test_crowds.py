"""Crowds: `iscrowd: 1`, which CVAT writes for every brush mask (FAULTS 1; cvat-ai/cvat#8046)."""

from __future__ import annotations

from pathlib import Path

from app.datasets.queries import PromptChoice, QueryDataset
from tests.corpus.making import coco, put, read, refusal, scenes


def crowded(folder: Path, crowd: tuple[str, ...], valid_crowd: tuple[str, ...] = ()) -> Path:
    for split, start, count, marked in (("train", 0, 6, crowd), ("valid", 50, 3, valid_crowd)):
        made = scenes(folder, count, split, start=start)
        put(folder / split / "_annotations.coco.json", coco(made, marked))
    return folder


def prompts(folder: Path, **decided: str) -> set[tuple[str, bool]]:
    """Every prompt that training asks, and whether it has an answer."""
    asked = QueryDataset(
        read(folder, **decided).train, [], seed=0, choice=PromptChoice(negatives=2)
    )
    queries = [query for index in range(len(asked)) for query in asked[index].find_queries]
    return {(query.query_text, bool(query.object_ids_output)) for query in queries}


def test_a_class_of_crowds_is_never_asked_as_absent(tmp_path):
    folder = crowded(tmp_path, ("rectangle",))
    found = read(folder)
    assert "6 of 18 objects are crowds" in found.said
    assert "'rectangle': crowds alone, so it is not trained at all" in found.said
    assert prompts(folder) == {("circle", True)}


def test_crowds_are_objects_where_the_user_says_so(tmp_path):
    folder = crowded(tmp_path, ("rectangle",))
    assert "crowds" not in read(folder, crowd="instances").said
    assert prompts(folder, crowd="instances") == {("circle", True), ("rectangle", True)}


def test_crowds_alone_are_refused_and_the_advice_works(tmp_path):
    folder = crowded(tmp_path, ("circle", "rectangle"))
    assert "--crowd instances" in refusal(folder)
    assert len(read(folder, crowd="instances").train.annotations) == 12


def test_a_validation_set_of_crowds_is_refused(tmp_path):
    said = refusal(crowded(tmp_path, (), ("circle", "rectangle")))
    assert "valid: 'annotations' is 'only crowds'" in said


def test_an_image_with_crowds_of_all_its_classes_is_not_trained_on(tmp_path):
    made = scenes(tmp_path, 8)
    document = coco(made)
    for annotation in document["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == 1)
    put(tmp_path / "annotations.json", document)
    assert prompts(tmp_path) == {("circle", True), ("rectangle", True)}
