"""Concepts: boxes of other images, encoded once, asked for by a name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.config.compose import load_config
from app.datasets.build import load_splits
from app.datasets.images import open_image
from app.datasets.synthetic.shapes import make_shapes
from app.deploy.runtime.runtime import Runtime
from app.errors import UserError
from app.inference import Predictor, concepts, encoding
from app.inference.concepts import Concept
from app.model.build import build_model
from app.model.bundled import NANO
from tests.deploy.tiny import PROMPTS, TOKENS, features, write_folder
from tests.helpers import MICRO, Command, once

CONFIG = load_config(MICRO).model


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(2)
    return Predictor(build_model(CONFIG), CONFIG)


@pytest.fixture
def scene() -> Image.Image:
    return Image.effect_noise((90, 60), 80).convert("RGB")


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of shapes with their boxes."""
    drawn = {"train": 3, "valid": 1, "width": 96, "height": 64, "seed": 4}
    return once(tmp_path_factory, "examples", lambda out: make_shapes(out, fog=0, **drawn))


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    made = [
        Concept(name, random.normal(size=(count, 16)).astype(np.float32), count, "abc")
        for name, count in (("widget", 3), ("Schraube, rostig", 1))
    ]
    concepts.write(tmp_path / "a.concept", made)
    found = concepts.read(tmp_path / "a.concept")
    assert [(c.name, c.boxes, c.weights) for c in found] == [
        ("widget", 3, "abc"), ("Schraube, rostig", 1, "abc")
    ]  # fmt: skip
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(made, found, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["a.concept"]


def _saved(file: Path, info: object, **arrays: np.ndarray) -> Path:
    with file.open("wb") as opened:
        np.savez(opened, info=np.array(json.dumps(info)), **arrays)
    return file


def test_what_is_no_concept_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.concept"
    concepts.write(whole, [Concept("a", np.ones((2, 4), np.float32), 1)])
    entry = {"name": "a", "boxes": 1, "weights": ""}
    ones = np.ones((2, 4), np.float32)
    (tmp_path / "cut.concept").write_bytes(whole.read_bytes()[:200])
    (tmp_path / "text.concept").write_text("no zip")
    _saved(tmp_path / "none.concept", [])
    _saved(tmp_path / "lacks.concept", [entry])
    _saved(tmp_path / "list.concept", [entry], **{"0": np.ones(4, np.float32)})
    _saved(tmp_path / "type.concept", [entry], **{"0": np.ones((2, 4))})
    _saved(tmp_path / "nan.concept", [entry], **{"0": ones * np.nan})
    _saved(tmp_path / "name.concept", [{**entry, "name": " "}], **{"0": ones})
    with (tmp_path / "pickle.concept").open("wb") as opened:
        np.savez(opened, info=np.array([{"a": 1}], dtype=object))
    for file in sorted(tmp_path.iterdir()):
        if file != whole:
            with pytest.raises(UserError, match="is no file that python -m app concept"):
                concepts.read(file)
    with pytest.raises(UserError, match="no such file"):
        concepts.read(tmp_path / "absent.concept")


def test_a_concept_of_words_alone_is_those_words(predictor: Predictor, scene) -> None:
    """The words' own tokens, under another name, find what the words find."""
    words = predictor.concept("widget", [], words="red circle")
    assert words.boxes == 0
    expected = predictor.predict(scene, ["red circle", "dog"], threshold=0.0)
    predictor.learn([words])
    found = predictor.predict(scene, ["widget", "dog"], threshold=0.0)
    assert np.allclose(found.scores, expected.scores, atol=1e-6)
    assert np.allclose(found.boxes_xyxy, expected.boxes_xyxy, atol=1e-3)
    predictor.learn([])
    by_name = predictor.predict(scene, ["widget", "dog"], threshold=0.0)
    assert not np.allclose(by_name.scores, expected.scores, atol=1e-5)


def test_boxes_change_what_is_found(predictor: Predictor, scene) -> None:
    other = scene.rotate(180)
    one = predictor.concept("a", [(other, [(10, 10, 30, 20)])])
    two = predictor.concept("a", [(other, [(10, 10, 30, 20)]), (scene, [(40, 5, 20, 20)] * 2)])
    words = len(one.tokens) - 1
    assert two.tokens.shape == (words + 3, CONFIG.d_model)
    assert np.allclose(one.tokens, two.tokens[: words + 1], atol=1e-6)
    scores = []
    for concept in (one, two):
        predictor.learn([concept])
        scores.append(predictor.predict(scene, ["a"], threshold=0.0).scores)
    predictor.learn([])
    assert not np.allclose(scores[0], scores[1], atol=1e-6)


def test_many_tokens_stand_beside_words(predictor: Predictor, scene) -> None:
    """More tokens than a prompt of words may have leave the words' answers as they are."""
    boxes = [(x, 5, 10, 10) for x in range(0, 80, 2)]
    long = predictor.concept("many", [(scene, boxes)])
    assert len(long.tokens) > CONFIG.text.context_length
    alone = predictor.predict(scene, ["dog"], threshold=0.0)
    predictor.learn([long])
    both = predictor.predict(scene, ["many", "dog"], threshold=0.0, max_detections=1000)
    predictor.learn([])
    assert np.allclose(both.scores[both.prompt_ids == 1], alone.scores, atol=1e-6)


def test_concepts_of_another_model_are_refused(predictor: Predictor, caplog) -> None:
    wide = Concept("a", np.ones((2, 32), np.float32), 1)
    with pytest.raises(UserError, match="is of a model with 32 channels, and this one has 16"):
        predictor.learn([wide])
    identified = Predictor(predictor.model, CONFIG, identity="one")
    identified.learn([Concept("a", np.ones((2, 16), np.float32), 1, "other")])
    assert "'a': encoded by other weights than these" in caplog.text


def test_an_exported_folder_finds_concepts_without_torch(tmp_path: Path) -> None:
    """The tiny graphs score a prompt by its features, which are known."""
    folder = write_folder(tmp_path / "out")
    runtime = Runtime.load(folder, backend="onnxruntime")
    image = Image.new("RGB", (20, 10), (255, 0, 0))
    expected = runtime.predict(image, ["red", "blue"], threshold=0.0)
    runtime.learn([Concept("widget", features()[PROMPTS.index("red")], 1)])
    found = runtime.predict(image, ["widget", "blue"], threshold=0.0)
    assert np.array_equal(found.scores, expected.scores)
    assert found.prompts == ("widget", "blue")
    with pytest.raises(UserError, match=f"has {TOKENS + 1} tokens, and this export reads {TOKENS}"):
        runtime.learn([Concept("long", np.ones((TOKENS + 1, 3), np.float32), 3)])
    with pytest.raises(UserError, match="is of a model with 4 channels"):
        runtime.learn([Concept("wide", np.ones((1, 4), np.float32), 1)])


def test_the_commands(command: Command, examples: Path, tmp_path: Path) -> None:
    """`concept` writes what `infer --concept` finds by, and `infer --examples` the same at once."""
    file, scene = tmp_path / "shapes.concept", examples / "valid" / "images"
    done = command("concept", examples, "--checkpoint", NANO, "--output", file)
    assert done.code == 0, done.err
    names = [concept.name for concept in concepts.read(file)]
    assert names == [
        c.name
        for c in load_splits(examples).train.categories
        if any(a.category_id == c.id for a in load_splits(examples).train.annotations)
    ]
    again = command("concept", examples, "--checkpoint", NANO, "--output", file)
    assert again.code == 2
    assert "is there already" in again.err
    results = []
    for name, words in (("file", ("--concept", file)), ("folder", ("--examples", examples))):
        out = tmp_path / name
        given = ("--input", scene, "--threshold", 0.001, "--output-dir", out, "--save", "coco")
        done = command("infer", "--checkpoint", NANO, *words, *given)
        assert done.code == 0, done.err
        assert f"prompts: {', '.join(names)} (by their examples)" in done.out
        results.append(json.loads((out / "predictions.json").read_text()))
    assert results[0] == results[1]
    assert results[0]
    twice = command("infer", "--checkpoint", NANO, "--concept", file, "--examples", examples,
                    "--input", scene, "--output-dir", tmp_path / "twice")  # fmt: skip
    assert twice.code == 2
    assert f"concept '{names[0]}': is in several" in twice.err
    other = command("infer", "--checkpoint", NANO, "--concept", tmp_path / "absent.concept",
                    "--input", scene, "--output-dir", tmp_path / "absent")  # fmt: skip
    assert other.code == 2
    assert "no such file" in other.err


def test_examples_are_encoded_as_by_hand(examples: Path) -> None:
    predictor, dataset = Predictor.load(NANO, device="cpu"), encoding.read_examples(examples)
    found = encoding.encode(predictor, dataset)
    for concept in found:
        (category,) = [c for c in dataset.categories if c.name == concept.name]
        shots = []
        for image in dataset.images:
            boxes = [
                a.bbox_xywh
                for a in dataset.annotations
                if (a.image_id, a.category_id) == (image.id, category.id)
            ]
            if boxes:
                shots.append((open_image(image.path), boxes))
        expected = predictor.concept(concept.name, shots)
        assert concept.boxes == sum(len(boxes) for _, boxes in shots)
        assert np.array_equal(concept.tokens, expected.tokens)
